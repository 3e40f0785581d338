"""What holds a client's model to the base: a term beside its own loss, on general text that belongs to nobody.

    distill   KL(base || model), nats a token: mean over the labelled tokens of a step's anchors
    gate      mean opening of the grafts' gates, over the layers and the anchors' tokens; the gates alone get a gradient

The base stands in memory anyway; with everything taken off it is the teacher. Its answers are computed once and kept
for all turns at a site: of V logits the likeliest k as log-probabilities, and the probability of all others as one
bucket, 8k + 4 bytes a token. With k = 64 that is 516 bytes instead of 600,000 (V = 150,000, fp32); 256 anchors of 512
tokens take at most 68 MB.

KL over k + 1 buckets is never more than over V tokens: what the model does within the bucket of the others is free.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from flex.config import AnchorSettings
from flex.data.examples import Batch, ClientData, Encoder, Example, training_batches
from flex.errors import FlexError
from flex.evaluation.score import response_logits
from flex.model.adapters import Private, pretrained_only
from flex.model.base import Base
from flex_kernels import reference

MOST_PADDING = 1.25  # times the tokens of two passes: a second pass reads the weights again, which costs about as much
SMALLEST_REST = 1e-7  # 1 - (sum of the likeliest) is no more exact than this in fp32


class Answers:
    """The base's answers at the labelled tokens of every anchor.

    token_ids [N, k] int32, log_probabilities [N, k] fp32 and log_rest [N] fp32 of all N tokens, in the examples' order;
    those of example i are `starts[i]` to `starts[i + 1]`. Where k is the whole vocabulary, log_rest is -inf.
    """

    def __init__(self, parts: Sequence[tuple[Tensor, Tensor, Tensor]], counts: Sequence[int]):
        self.token_ids, self.log_probabilities, self.log_rest = (
            torch.cat(tensors) for tensors in zip(*parts, strict=True)
        )
        self.starts = torch.tensor([0, *counts]).cumsum(0).tolist()

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.token_ids, self.log_probabilities, self.log_rest))

    def of(self, indices: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """(token_ids int64, log_probabilities, log_rest) of these examples, one after another."""
        rows = torch.cat([torch.arange(self.starts[i], self.starts[i + 1]) for i in indices])
        return (
            self.token_ids[rows].to(device).long(),
            self.log_probabilities[rows].to(device),
            self.log_rest[rows].to(device),
        )


def buckets(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """[N, V] logits -> log-probabilities of `token_ids` [N, k], and of all other tokens together [N]; in fp32."""
    logits = logits.float()
    likeliest = logits.gather(-1, token_ids) - logits.logsumexp(-1, keepdim=True)
    if token_ids.shape[-1] == logits.shape[-1]:
        return likeliest, torch.full_like(likeliest[:, 0], -torch.inf)
    rest = -torch.expm1(likeliest.logsumexp(-1))
    return likeliest, rest.clamp(min=SMALLEST_REST).log()


def divergence(logits: Tensor, token_ids: Tensor, log_probabilities: Tensor, log_rest: Tensor) -> Tensor:
    """KL(kept answers || logits), nats a token: a scalar, the mean over the N rows."""
    likeliest, rest = buckets(logits, token_ids)
    total = (log_probabilities.exp() * (log_probabilities - likeliest)).sum(-1)
    if token_ids.shape[-1] < logits.shape[-1]:
        total = total + log_rest.exp() * (log_rest - rest)
    return total.mean()


class Anchor:
    """Anchors and what is asked of a model on them.

    Args:
        settings: with every value (`AnchorSettings.resolved`).
    """

    def __init__(self, base: Base, encoder: Encoder, examples: list[Example], settings: AnchorSettings):
        self.base, self.encoder, self.examples, self.settings = base, encoder, examples, settings
        self.distills, self.gates = settings.what in ("distill", "both"), settings.what in ("gate", "both")
        self._answers: Answers | None = None

    @cached_property
    def fingerprint(self) -> str:
        """A name for the anchors, in their order."""
        parts = [f"{e.input_ids}{e.prompt_length}{e.earlier or ''}" for e in self.examples]
        return hashlib.sha256("/".join(parts).encode()).hexdigest()[:16]

    def batches(self, steps: int, seed: int) -> Iterator[list[int]]:
        """For each of `steps` steps, which anchors it takes; a function of `seed` alone."""
        return training_batches(list(range(len(self.examples))), self.settings.batch_size, steps, f"anchors {seed}")

    @property
    def answers(self) -> Answers:
        """The base's, computed when they are first asked for: by the model as it was pretrained."""
        if self._answers is None:
            size, parts, counts = self.settings.batch_size, [], []
            with pretrained_only(self.base) as model, torch.no_grad():
                for start in range(0, len(self.examples), size):
                    batch = self.encoder.batch(self.examples[start : start + size], self.base.device)
                    logits, _, row = response_logits(model, batch)
                    if not torch.isfinite(logits).all():
                        raise FlexError(
                            "the base gives NaN or infinite logits on the anchors; nothing can be held to it"
                        )
                    token_ids = logits.topk(min(self.settings.top_k, logits.shape[-1])).indices
                    kept = (token_ids.int(), *buckets(logits, token_ids))
                    parts.append(tuple(tensor.cpu() for tensor in kept))
                    counts += row.bincount(minlength=len(batch.input_ids)).tolist()
            self._answers = Answers(parts, counts)
        return self._answers

    def beside(
        self, own: Batch, indices: Sequence[int], trained: Mapping[str, nn.Parameter], private: Private
    ) -> Beside:
        """The forward of a client's own examples and of these anchors: in one pass, which reads every weight once,
        unless their lengths differ so much that padding would cost more than a pass of its own.

        Raises:
            FlexError: the term is not finite.
        """
        anchors, count = self.encoder.batch([self.examples[i] for i in indices], self.base.device), len(own.input_ids)
        answers = self.answers.of(indices, self.base.device) if self.distills else ()
        trained_ids = {id(parameter) for parameter in trained.values()}
        gates = {
            name: graft
            for name, layer in self.base.layers.items()
            if self.gates
            and (graft := getattr(layer, "graft", None)) is not None
            and id(graft.logit_weight) in trained_ids
        }
        joined = _joined(own, anchors)
        first = self.encoder.side_by_side([own, anchors]) if joined else own
        with _inputs_of({name: self.base.layers[name] for name in gates}) as inputs:
            logits, targets, row = response_logits(self.base.model, first)
            opening = private.opening(self.base, count * first.input_ids.shape[1])
            tokens, rows = int((row < count).sum()), first.attention_mask.bool()
            if joined:
                held, rows = logits[tokens:], rows.clone()
                rows[:count] = False
            elif self.distills or gates:
                with torch.set_grad_enabled(self.distills):
                    held, _, _ = response_logits(self.base.model, anchors)
                rows = anchors.attention_mask.bool()
        term = torch.zeros((), device=self.base.device)
        if self.distills:
            term = term + divergence(held, *answers)
        if gates:
            openings = [
                torch.sigmoid(
                    reference.graft_logits(inputs[name][rows.flatten()], graft.logit_weight, graft.logit_bias)
                ).mean()
                for name, graft in gates.items()
            ]
            term = term + self.settings.gate_factor * torch.stack(openings).mean()
        if not torch.isfinite(term):
            raise FlexError(
                f"the anchor's term is {term.item()}; expected a finite number (a lower learning rate may help)"
            )
        return Beside(logits[:tokens], targets[:tokens], self.settings.weight * term, opening)


@dataclass(frozen=True)
class Beside:
    """`logits` [N, V] and `targets` [N] of a client's own response tokens, the anchor's weighted `term`, and the gates'
    `opening` [layers] on the client's own tokens, None without gates."""

    logits: Tensor
    targets: Tensor
    term: Tensor
    opening: Tensor | None


def _joined(own: Batch, anchors: Batch) -> bool:
    """Whether one padded batch of both has hardly more tokens than two."""
    shapes = own.input_ids.shape, anchors.input_ids.shape
    together = sum(rows for rows, _ in shapes) * max(length for _, length in shapes)
    return together <= MOST_PADDING * sum(rows * length for rows, length in shapes)


def data_fingerprint(client: ClientData, anchor: Anchor | None) -> str:
    """A name for all that decides what a client trains on: its own examples, and the anchors."""
    return f"{client.fingerprint()}{f'+{anchor.fingerprint}' if anchor else ''}"


@contextlib.contextmanager
def _inputs_of(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Inside, {name: hidden states [T, H] of the layer's last forward}, without their graph."""
    found: dict[str, Tensor] = {}

    def keep(name: str, given: tuple) -> None:
        found[name] = given[0].detach()

    hooks = [layer.register_forward_pre_hook(lambda _, given, n=name: keep(n, given)) for name, layer in layers.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
