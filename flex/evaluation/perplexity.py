"""Perplexity of plain text: exp of the mean negative log-likelihood a token, in windows side by side.

Every token but the first of the text is predicted once, from the tokens of its own window before it; a window begins
with the last token of the one before, so that no token goes without. Windows are as long as `data.max_length`.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from flex.config import EvaluateSettings
from flex.data.examples import Batch
from flex.errors import FlexError, require
from flex.evaluation.score import token_logits
from flex.evaluation.scored import Scored


def read(settings: EvaluateSettings) -> str:
    """The text of a file; FlexError where it is missing, empty, or no UTF-8."""
    path = Path(settings.text).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FlexError(f"evaluate.text = {settings.text!r} cannot be read: {error}; expected a text file") from None
    require(bool(text.strip()), f"evaluate.text = {settings.text!r} is empty; expected a text")
    return text


@torch.no_grad()
def score_perplexity(scored: Scored, text: str) -> dict[str, Any]:
    """`num_examples` (windows), `loss` (nats a token), `perplexity`."""
    ids = scored.encoder.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    require(len(ids) > 1, "evaluate.text is a single token; expected a text with something to predict")
    length = min(scored.encoder.max_length, scored.positions)
    windows = [ids[start : start + length] for start in range(0, len(ids) - 1, length - 1)]
    device = next(scored.model.parameters()).device
    total = torch.zeros((), dtype=torch.float64)
    scored.model.eval()
    for start in range(0, len(windows), scored.settings.batch_size):
        chosen = windows[start : start + scored.settings.batch_size]
        total += _loss(scored, chosen, device)
        scored.say("perplexity", start + len(chosen), len(windows))
    loss = float(total) / (len(ids) - 1)
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {"num_examples": len(windows), "loss": loss, "perplexity": perplexity, "details": {"tokens": len(ids) - 1}}


def _loss(scored: Scored, windows: Sequence[list[int]], device: torch.device) -> torch.Tensor:
    """The sum over all predicted tokens."""
    if scored.prepare:
        scored.prepare(windows)
    longest = max(map(len, windows))
    ids = torch.tensor([[*w, *[scored.encoder.pad_id] * (longest - len(w))] for w in windows], device=device)
    mask = torch.tensor([[1] * len(w) + [0] * (longest - len(w)) for w in windows], device=device)
    row, column = torch.where(mask[:, 1:] == 1)
    logits = token_logits(scored.model, Batch(ids, mask, ids), row, column)
    return F.cross_entropy(logits.float(), ids[:, 1:][row, column], reduction="sum").double().cpu()
