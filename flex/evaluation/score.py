"""How good a model is on a set of examples: response loss, exact match, ROUGE-L and ROUGE-1.

Exact match is by teacher forcing: greedy decoding gives the reference exactly if and only if every argmax under the
reference's own prefix is right, end token included; one forward pass decides it. ROUGE is of real greedy decoding.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, TextStreamer

from flex.config import EvaluateSettings
from flex.data.examples import IGNORED, Batch, Encoder, Example
from flex.evaluation.words import rouge_scorer

# Called with the prompts of a batch before the model answers them, in their order; a method that looks at its input
# first hangs itself in here.
Prepare = Callable[[Sequence[Sequence[int]]], None]


def response_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(logits [N, V], targets [N], row [N]) of the N response tokens of a batch; `row` is the example's place in it."""
    targets = batch.labels[:, 1:]
    row, column = torch.where(targets != IGNORED)
    return token_logits(model, batch, row, column), targets[row, column], row


def token_logits(model: nn.Module, batch: Batch, row: Tensor, column: Tensor) -> Tensor:
    """[N, V]: the logits at N places of a batch. The model's head sees those places alone, so that the logits of all
    others, and their gradients, are never made; but for a model that is compiled as one."""
    compiled = hasattr(model.forward, "get_compiler_config")  # a hook that is new would compile it anew
    with contextlib.nullcontext() if compiled else _head_sees(model, row, column):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return logits[row, column] if logits.shape[:2] == batch.input_ids.shape else logits[0]


def run_layers(model: nn.Module, batch: Batch) -> None:
    """A forward for what hooks see of it: the head sees the first token alone."""
    first = torch.zeros(1, dtype=torch.long, device=batch.input_ids.device)
    token_logits(model, batch, first, first)


@contextlib.contextmanager
def _head_sees(model: nn.Module, row: Tensor, column: Tensor) -> Iterator[None]:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][row, column][None], *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


def by_length(examples: Sequence[Example], batch_size: int) -> list[list[int]]:
    """Indices in batches of like length: little padding."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


@torch.no_grad()
def score(
    model: nn.Module,
    encoder: Encoder,
    examples: Sequence[Example],
    settings: EvaluateSettings,
    prepare: Prepare | None = None,
) -> dict[str, Any]:
    """`num_examples`, `loss` (nats a response token), `exact_match`, by group as well; `rouge_l`, `rouge_1` or None."""
    device = next(model.parameters()).device
    model.eval()
    losses, tokens, exact = (torch.zeros(len(examples), dtype=torch.float64) for _ in range(3))
    for indices in by_length(examples, settings.batch_size):
        chosen = [examples[i] for i in indices]
        if prepare:
            prepare([e.input_ids[: e.prompt_length] for e in chosen])
        batch = encoder.batch(chosen, device, last_alone=True)
        row, column = torch.where(batch.labels[:, 1:] != IGNORED)
        targets = batch.labels[:, 1:][row, column]
        logits = token_logits(model, batch, row, column)
        loss = F.cross_entropy(logits.float(), targets, reduction="none").double().cpu()
        wrong = (logits.argmax(-1) != targets).double().cpu()
        at = torch.tensor(indices)[row.cpu()]
        losses.index_add_(0, at, loss)
        tokens.index_add_(0, at, torch.ones_like(loss))
        exact.index_add_(0, at, wrong)
    exact = (exact == 0) & torch.tensor([not e.truncated for e in examples])

    def summary(keep: Tensor) -> dict[str, Any]:
        return {
            "num_examples": int(keep.sum()),
            "loss": float(losses[keep].sum() / tokens[keep].sum().clamp(min=1)),
            "exact_match": float(exact[keep].double().mean()),
        }

    groups = sorted({e.group for e in examples} - {""})
    scores = summary(torch.ones(len(examples), dtype=torch.bool))
    scores["groups"] = {g: summary(torch.tensor([e.group == g for e in examples])) for g in groups}
    none = {"rouge_l": None, "rouge_1": None}
    scores |= rouge(model, encoder, examples, settings, prepare) if settings.rouge else none
    return scores


def rouge(
    model: nn.Module,
    encoder: Encoder,
    examples: Sequence[Example],
    settings: EvaluateSettings,
    prepare: Prepare | None = None,
) -> dict[str, float]:
    """`rouge_l` and `rouge_1`: mean F1 (stemmed) of greedy decoding, in [0, 1]."""
    kinds = {"rouge_l": "rougeL", "rouge_1": "rouge1"}
    scorer, totals = rouge_scorer(*kinds.values()), dict.fromkeys(kinds, 0.0)
    for indices in by_length(examples, settings.batch_size):
        chosen = [examples[i] for i in indices]
        prompts = [e.input_ids[: e.prompt_length] for e in chosen]
        texts = generate(model, encoder, prompts, settings.max_new_tokens, prepare)
        for example, text in zip(chosen, texts, strict=True):
            found = scorer.score(example.response, text)
            for key, kind in kinds.items():
                totals[key] += found[kind].fmeasure
    return {key: total / len(examples) for key, total in totals.items()}


@torch.no_grad()
def generate(
    model: nn.Module,
    encoder: Encoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    prepare: Prepare | None = None,
    streamer: TextStreamer | None = None,
) -> list[str]:
    """Greedy continuations of tokenised prompts as text, cut at the end tokens. Padded on the left.

    What the checkpoint's own generation_config.json asks for (penalties, beams, forced tokens) is left aside.
    `streamer`, one of transformers, gets the tokens of a single prompt as they come.
    """
    device = next(model.parameters()).device
    if prepare:
        prepare(prompts)
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), encoder.pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    model.eval()
    # The model's own would fill in whatever a configuration that is handed over leaves open.
    kept, model.generation_config = (
        model.generation_config,
        GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=encoder.end_ids(), pad_token_id=encoder.pad_id
        ),
    )
    try:
        output = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), streamer=streamer)
    finally:
        model.generation_config = kept
    texts = encoder.tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    return [text.strip() for text in texts]
