"""The likelihood of given continuations, for tasks whose answer is the likeliest of a few; nothing is decoded."""

import math
from collections.abc import Sequence

import torch

from flex.data.examples import Batch
from flex.evaluation.score import token_logits
from flex.evaluation.scored import Scored


@torch.no_grad()
def choice_likelihood(scored: Scored, prompts: Sequence[list[int]], choices: Sequence[list[int]]) -> torch.Tensor:
    """[prompts, choices] fp32: the log-likelihood of each choice after each prompt.

    Choices of one token each take one pass, in which the logits after the prompt alone are made; longer ones take a
    pass for each choice.
    """
    if scored.prepare:
        scored.prepare(prompts)
    if all(len(choice) == 1 for choice in choices):
        logits = logits_after(scored, prompts, 1)[:, 0]
        return logits.float().log_softmax(-1)[:, [choice[0] for choice in choices]].cpu()
    columns = []
    for choice in choices:
        logits = logits_after(scored, [[*prompt, *choice[:-1]] for prompt in prompts], len(choice))
        of_tokens = logits.float().log_softmax(-1)[:, range(len(choice)), choice]
        columns.append(of_tokens.sum(1).cpu())
    return torch.stack(columns, 1)


def logits_after(scored: Scored, rows: Sequence[list[int]], last: int) -> torch.Tensor:
    """[B, last, V]: the logits at the last places of each row."""
    device = next(scored.model.parameters()).device
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), scored.encoder.pad_id)
    for row, own in enumerate(rows):
        ids[row, : len(own)] = torch.tensor(own)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    column = (lengths[:, None] - last + torch.arange(last)).flatten().to(device)
    row = torch.arange(len(rows)).repeat_interleave(last).to(device)
    scored.model.eval()
    batch = Batch(ids.to(device), mask.to(device), ids.to(device))
    return token_logits(scored.model, batch, row, column).unflatten(0, (len(rows), last))


def standard_error(hits: int, count: int) -> float:
    """Of a share of `count` answers."""
    share = hits / count
    return math.sqrt(share * (1 - share) / count)
