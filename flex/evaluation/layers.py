"""What the MoE layers make of a client's own prompts: how they route, what their grafts add, and what that costs.

With p_t the router's distribution over the experts at token t, n_e the (token, slot) pairs routed to expert e, y_t what
the experts module gives with its graft and F_t what it gives without:

    entropy       mean over tokens of -sum_e p_te ln p_te, in nats; at most ln E
    counts        n_e; the experts that are used are exp of the entropy of n_e / sum_e n_e, E if all are used alike
    added         mean over tokens of ||y_t - F_t|| / ||y_t||; a shared expert, which stands outside of y_t, is left out
    opening       mean over tokens of the sigmoid of the gate

Families differ in what their routers return and how they weigh it. Which distribution it is, the routing weights say:
the softmax of the scores, or their sigmoid, the square root of their softplus, or they themselves, divided by the sum
over the experts; the one that the weights of the chosen experts are proportional to. Where none is, those weights
alone, divided by their sum, stand for it ("kept").

All of it comes from hooks on a few forward passes over a bounded number of tokens; nothing is left on the model.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flex.data.examples import Batch, Encoder, Example
from flex.evaluation.score import Prepare, run_layers
from flex_kernels import Graft, reference

LOOK_TOKENS = 512  # of a client's prompts; with 60 experts and 4 a token each expert gets about 34
TINY = torch.finfo(torch.float32).tiny
TIMED_TOKENS, REPEATS = 128, 3  # of a timed forward, and how often each of the two is timed, by turns
WEIGHT_ERROR = 0.01  # mean, of a routing weight; scores rounded to bf16 come to a third of it
SOFTMAX, KEPT = "softmax", "kept"
PARTS: dict[str, Callable[[Tensor], Tensor]] = {  # each is divided by its sum over the experts
    SOFTMAX: lambda scores: scores if _is_distribution(scores) else torch.softmax(scores, -1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda scores: F.softplus(scores).sqrt(),
    "scores": lambda scores: scores.clamp_min(0),
}


@dataclass
class LayerLook:
    """Sums over the tokens of one layer. `most`: the largest entropy there can be; `added`, `opening`: None without a
    graft; `source`: what the router's distribution is, decided at the first batch."""

    source: str = ""
    num_tokens: int = 0
    top_k: int = 0
    most: float = 0.0
    entropies: float = 0.0
    counts: list[int] = field(default_factory=list)
    additions: float | None = None
    openings: float | None = None

    @property
    def entropy(self) -> float:
        return self.entropies / self.num_tokens

    @property
    def added(self) -> float | None:
        return None if self.additions is None else self.additions / self.num_tokens

    @property
    def opening(self) -> float | None:
        return None if self.openings is None else self.openings / self.num_tokens

    def add_routing(self, scores: Tensor | None, indices: Tensor, weights: Tensor, num_experts: int) -> None:
        """`scores` [T, E] as the router returns them, None where it returns none; `indices`, `weights` [T, K]."""
        weights = weights.float()
        if not self.source:
            self.source = source_of(scores, indices, weights)
        distribution = _distribution(self.source, scores, weights)
        num_choices = num_experts if scores is None else max(num_experts, scores.shape[1])
        self.num_tokens, self.top_k = self.num_tokens + len(indices), indices.shape[1]
        self.most = math.log(distribution.shape[1])
        self.entropies += float(torch.special.entr(distribution).sum())
        counts = torch.bincount(indices.flatten().long(), minlength=num_choices).tolist()
        self.counts = [a + b for a, b in zip(self.counts or [0] * len(counts), counts, strict=True)]

    def add_graft(self, graft: Graft, hidden_states: Tensor, output: Tensor) -> None:
        """`hidden_states` and the layer's `output`, which has the graft in it: [T, H]."""
        added, opening = addition(graft, hidden_states, output)
        shares = added.norm(dim=-1) / output.float().norm(dim=-1).clamp_min(TINY)
        self.additions = (self.additions or 0.0) + float(shares.double().sum())
        self.openings = (self.openings or 0.0) + float(opening.double().sum())


def addition(graft: Graft, hidden_states: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """(y - F [T, H], the gate's opening s [T]) in fp32. Additive: `s E_g(x)`; convex, where `y = (1 - s) F + s E_g(x)`:
    `s (E_g(x) - y) / (1 - s)`."""
    logits = reference.graft_logits(hidden_states, graft.logit_weight, graft.logit_bias).float()
    opening, own = torch.sigmoid(logits), graft(hidden_states).float()
    if graft.combine == "convex":
        return torch.exp(logits)[:, None] * (own - output.float()), opening  # s / (1 - s) = exp(logit)
    return opening[:, None] * own, opening


def source_of(scores: Tensor | None, indices: Tensor, weights: Tensor) -> str:
    """Which distribution over the experts the routing weights are taken from."""
    if scores is None:
        return KEPT
    expected = _comparable(weights.double())
    errors = {}
    for source in PARTS:
        chosen = _distribution(source, scores, weights).gather(1, indices.long())
        errors[source] = float((_comparable(chosen) - expected).abs().mean())
    best = min(errors, key=errors.__getitem__)
    return best if errors[best] <= WEIGHT_ERROR else KEPT


def _comparable(weights: Tensor) -> Tensor:
    """Without a factor that all share: of one expert a token, that of all tokens."""
    total = weights.sum(-1, keepdim=True) if weights.shape[1] > 1 else weights.mean()
    return weights / total.clamp_min(TINY)


def _distribution(source: str, scores: Tensor | None, weights: Tensor) -> Tensor:
    """[T, E], or [T, K] of the kept weights alone, fp64; every row sums to one."""
    parts = (weights.float() if source == KEPT or scores is None else PARTS[source](scores.float())).double()
    return parts / parts.sum(-1, keepdim=True).clamp_min(TINY)


def _is_distribution(scores: Tensor) -> bool:
    """Some routers return the softmax already."""
    return bool((scores >= 0).all()) and torch.allclose(scores.sum(-1), scores.new_ones(()), atol=WEIGHT_ERROR)


def prompts_of(examples: Sequence[Example], most_tokens: int) -> list[Example]:
    """Prompts without their answers, in an order of chance that is always the same, of `most_tokens` together; the last
    is cut."""
    found: list[Example] = []
    left = most_tokens
    for index in random.Random("layers").sample(range(len(examples)), len(examples)):
        ids = examples[index].input_ids[: examples[index].prompt_length][:left]
        if ids:
            found.append(Example(ids, len(ids), ""))
            left -= len(ids)
        if left <= 0:
            break
    return found


@torch.no_grad()
def look(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    encoder: Encoder,
    prompts: Sequence[Example],
    batch_size: int,
    prepare: Prepare | None = None,
    sources: Mapping[str, str] | None = None,
) -> dict[str, LayerLook]:
    """What each layer makes of the prompts; a layer that no token comes by is left out.

    Args:
        layers: the experts modules by their names in `model`.
        prepare: see `score`.
        sources: by layer, what its router's distribution is, where that is known.
    """
    found = {name: LayerLook((sources or {}).get(name, "")) for name in layers}
    device = next(model.parameters()).device
    model.eval()
    for start in range(0, len(prompts), batch_size):
        chosen = prompts[start : start + batch_size]
        if prepare:
            prepare([prompt.input_ids for prompt in chosen])
        batch = encoder.batch(chosen, device)
        with _hooked(model, layers, found, batch.attention_mask.bool().flatten()):
            run_layers(model, batch)
    return {name: own for name, own in found.items() if own.num_tokens}


@contextmanager
def _hooked(
    model: nn.Module, layers: Mapping[str, nn.Module], found: Mapping[str, LayerLook], rows: Tensor
) -> Iterator[None]:
    """Inside, every forward of a layer adds to its look. A router is whatever beside the experts returns scores, and
    the indices that the experts get."""
    given: dict[str, Sequence[Any]] = {}

    def keep(name: str, output: Any) -> None:
        if isinstance(output, tuple) and len(output) > 2 and isinstance(output[0], Tensor) and output[0].dim() == 2:
            given[name] = output

    def add(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        hidden_states, indices, weights = inputs
        own = rows if len(rows) == len(hidden_states) else slice(None)
        num_experts, came = layer.down_proj.shape[0], given.pop(name, ())
        routed = any(isinstance(t, Tensor) and torch.equal(t.to(indices.dtype), indices) for t in came[1:3])
        scores = came[0][own] if routed and came[0].shape[1] >= num_experts else None
        if not len(hidden_states[own]):
            return
        found[name].add_routing(scores, indices[own], weights[own], num_experts)
        if (graft := getattr(layer, "graft", None)) is not None:
            found[name].add_graft(graft, hidden_states[own], output[own])

    hooks = []
    for name, layer in layers.items():
        for beside in model.get_submodule(name.rpartition(".")[0]).children():
            if beside is not layer:
                hooks.append(beside.register_forward_hook(lambda _, inputs, output, n=name: keep(n, output)))
        hooks.append(layer.register_forward_hook(lambda m, inputs, output, n=name: add(n, m, inputs, output)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def graft_flops(graft: Graft) -> int:
    """Of one token: its three matrices and its gate, a multiplication and an addition each."""
    return 2 * (math.prod(graft.gate_up_proj.shape) + math.prod(graft.down_proj.shape) + graft.hidden_size)


def layer_flops(model: nn.Module, name: str, layer: nn.Module, top_k: int) -> int:
    """Of one token: the matrices of its `top_k` experts, and of what stands beside them under a name that begins with
    "shared". The router is not counted, nor what lies outside of the module that holds the experts."""
    experts = (3 if layer.has_gate else 2) * top_k * math.prod(layer.down_proj.shape[1:])
    beside = model.get_submodule(name.rpartition(".")[0]).named_children()
    shared = [
        parameter
        for child_name, child in beside
        if child_name.startswith("shared")
        for own_name, parameter in child.named_parameters()
        if parameter.dim() > 1 and "lora_" not in own_name
    ]
    return 2 * (experts + sum(math.prod(parameter.shape) for parameter in shared))


@torch.no_grad()
def forward_seconds(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batch: Batch,
    repeats: int = REPEATS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """The median time of a forward pass over a batch "with" the grafts and "without" them, timed by turns after one of
    each that does not count; empty where there are none."""
    grafts = {name: graft for name, layer in layers.items() if (graft := getattr(layer, "graft", None)) is not None}
    if not grafts:
        return {}
    device = batch.input_ids.device
    times: dict[str, list[float]] = {"with": [], "without": []}
    model.eval()
    try:
        for turn in range(repeats + 1):
            for which in sorted(times, reverse=turn % 2 == 1):
                for name, graft in grafts.items():
                    layers[name].graft = graft if which == "with" else None
                _finish(device)
                started = clock()
                run_layers(model, batch)
                _finish(device)
                times[which].append(clock() - started)
    finally:
        for name, graft in grafts.items():
            layers[name].graft = graft
    return {which: statistics.median(own[1:]) for which, own in times.items()}


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
