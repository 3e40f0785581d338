"""Which of four continuations is a text's own: knowledge of plain text, without questions that somebody wrote.

The text is cut into passages of `PROMPT` + `CONTINUATION` tokens, side by side. A question is the beginning of a
passage with four continuations, its own and those of three other passages, drawn from a fixed seed. All are equally
long, and the likeliest is taken; who guesses is right in 25 %. A general text that no client trains on makes it a
measure of what a model has kept (`docs/knowledge.md`).
"""

import random
from collections.abc import Sequence
from typing import Any

import torch

from flex.errors import require
from flex.evaluation.likelihood import logits_after, standard_error
from flex.evaluation.scored import Scored

PROMPT, CONTINUATION, CHOICES = 96, 16, 4


def score_cloze(scored: Scored, text: str) -> dict[str, Any]:
    """`num_examples`, `accuracy`; in `details` its standard error and the tokens of prompt and continuation.

    The prompt is shorter than `PROMPT` where `data.max_length` or the model's context leave no room for it.
    """
    ids = scored.encoder.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    prompt = min(PROMPT, min(scored.encoder.max_length, scored.positions) - CONTINUATION)
    require(prompt > 0, f"data.max_length leaves no room for a prompt; expected more than {CONTINUATION}")
    length = prompt + CONTINUATION
    passages = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    require(
        len(passages) >= CHOICES,
        f"evaluate.text has {len(passages)} passages of {length} tokens; expected at least {CHOICES}",
    )
    count = min(scored.settings.questions or len(passages), len(passages))
    numbers = [i * len(passages) // count for i in range(count)]  # evenly over the text
    choices, answers = _draw(passages, numbers, prompt)
    asked = [passages[i] for i in numbers]
    size, hits = max(1, scored.settings.batch_size // CHOICES), 0
    for start in range(0, len(asked), size):
        chosen = range(start, min(start + size, len(asked)))
        likelihood = likelihoods(scored, [asked[i][:prompt] for i in chosen], [choices[i] for i in chosen])
        hits += sum(best == answers[i] for i, best in zip(chosen, likelihood.argmax(1).tolist(), strict=True))
        scored.say("cloze", chosen.stop, len(asked))
    details = {"standard_error": standard_error(hits, len(asked)), "prompt": prompt, "continuation": CONTINUATION}
    return {"num_examples": len(asked), "accuracy": hits / len(asked), "details": details}


def _draw(
    passages: Sequence[list[int]], numbers: Sequence[int], prompt: int
) -> tuple[list[list[list[int]]], list[int]]:
    """Of each of these passages: four continuations in any order, and the place of the true one."""
    draw = random.Random(0)
    choices, answers = [], []
    for number in numbers:
        others = draw.sample([i for i in range(len(passages)) if i != number], CHOICES - 1)
        answers.append(draw.randrange(CHOICES))
        others.insert(answers[-1], number)
        choices.append([passages[i][prompt:] for i in others])
    return choices, answers


@torch.no_grad()
def likelihoods(scored: Scored, prompts: Sequence[list[int]], choices: Sequence[Sequence[list[int]]]) -> torch.Tensor:
    """[prompts, choices] fp32: the log-likelihood of each continuation, all of one length, after its own prompt."""
    rows = [[*p, *one[:-1]] for p, own in zip(prompts, choices, strict=True) for one in own]
    if scored.prepare:
        scored.prepare([p for p, own in zip(prompts, choices, strict=True) for _ in own])
    target = torch.tensor([one for own in choices for one in own])
    of_tokens = logits_after(scored, rows, target.shape[1]).float().log_softmax(-1)
    found = of_tokens.gather(-1, target.to(of_tokens.device)[..., None]).sum((1, 2))
    return found.cpu().unflatten(0, (len(prompts), -1))
