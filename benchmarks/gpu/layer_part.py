"""The layer, forward and frozen backward with one trained graft, beside every peer, on the models' real sizes."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from benchmarks.gpu.device import Run, count_launches
from benchmarks.gpu.peers import LIGER, BalancedProducts, Liger, RawGroupedMM, bare_layer, plain_layer
from benchmarks.gpu.record import OURS, Key
from benchmarks.gpu.session import Session
from benchmarks.layers import CHECKED_TOKENS, PROVIDERS, TOLERANCE, GraftedByHand, Layers
from benchmarks.shapes import Shape

PASSES = ("fwd", "bwd", "fwd+bwd")
PROFILED = (OURS, "grouped_mm")  # whose kernels the record lists, with their times


class Passes:
    """One module's passes. `bwd` runs over the graph of one forward again and again."""

    def __init__(self, layers: Layers, module: nn.Module) -> None:
        self.module, self.index, self.d_out = module, layers.top_k_index, layers.d_out
        self.hidden_states = layers.hidden_states.detach().requires_grad_()
        self.weights = layers.top_k_weights.detach().requires_grad_()
        trained = [(name.rpartition(".")[2], p) for name, p in module.named_parameters() if p.requires_grad]
        self.leaves = [self.hidden_states, self.weights, *(p for _, p in sorted(trained, key=lambda pair: pair[0]))]

    def forward(self) -> Tensor:
        return self.module(self.hidden_states, self.index, self.weights)

    def forward_alone(self) -> list[Tensor]:
        return [self.forward().detach()]

    def backward(self, out: Tensor, retain_graph: bool = True) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, self.leaves, self.d_out, retain_graph=retain_graph)

    def both(self) -> list[Tensor]:
        out = self.forward()
        return [out.detach(), *self.backward(out, retain_graph=False)]

    def run(self, what: str) -> Run:
        if what == "fwd":
            return self.forward
        return partial(self.backward, self.forward()) if what == "bwd" else self.both


class BoundPasses(Passes):
    """The balanced products, and the graft as a user writes it beside them."""

    def __init__(self, layers: Layers) -> None:
        super().__init__(layers, GraftedByHand(nn.Identity(), layers.graft))
        self.module.experts.forward = lambda hidden_states, index, weights: 0.0
        self.products = BalancedProducts(layers)
        self.leaves = [leaf for leaf in self.leaves if leaf is not self.weights]

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.products(), super().forward()

    def backward(self, out: tuple[Tensor, Tensor], retain_graph: bool = True) -> tuple[Tensor, ...]:
        leaves, d_out = [self.products.rows, *self.leaves], [self.products.d_rows, self.d_out]
        return torch.autograd.grad(list(out), leaves, d_out, retain_graph=retain_graph)

    def both(self) -> list[Tensor]:
        return list(self.backward(self.forward(), retain_graph=False))


def useful_flops(shape: Shape, what: str, has_graft: bool = True) -> int:
    """Three matrices for each of a token's experts; the backward once more, and the graft's weight gradients."""
    once = 6 * shape.num_tokens * shape.hidden_size * shape.intermediate_size
    forward, weight_gradients = once * (shape.top_k + has_graft), once * has_graft
    return {"fwd": forward, "bwd": forward + weight_gradients, "fwd+bwd": 2 * forward + weight_gradients}[what]


def check(ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype, name: str) -> None:
    """Raises AssertionError where two providers do not compute the same. Relative to the norm of each result.

    The gradient of the gate's bias is one number, whose terms may cancel; it is measured by the entries of what comes
    after it, the gradient of the gate's weight: the same sum with the inputs for factors.
    """
    assert len(ours) == len(theirs), f"{name} gives {len(theirs)} results, want {len(ours)}"
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        limit = TOLERANCE[dtype] * (1 + 4 * a.numel() ** -0.5)
        scale = b.float().norm()
        if b.numel() == 1 and index + 1 < len(theirs):
            scale = torch.maximum(scale, theirs[index + 1].float().norm() / theirs[index + 1].numel() ** 0.5)
        error = float((a.float() - b.float()).norm() / scale)
        assert error < limit, f"{name}, result {index}: relative error {error:.3g}, limit {limit:.3g}"


def providers(session: Session, layers: Layers, place: tuple[str, str, int]) -> dict[str, Passes]:
    """Those that are there and compute the same as ours, which itself is held against `eager`."""
    eager = Passes(layers, layers.modules["eager"])
    found = {OURS: Passes(layers, layers.modules[OURS])}
    # Of a few tokens a gradient may be all rounding, and there none is measured.
    results = Passes.both if layers.shape.num_tokens >= CHECKED_TOKENS or session.tiny else Passes.forward_alone
    check(results(found[OURS]), truth := results(eager), layers.dtype, OURS)
    makers: dict[str, Callable[[], Passes]] = {
        name: partial(Passes, layers, layers.modules[name]) for name in PROVIDERS if name != OURS
    }
    makers["raw grouped_mm"] = lambda: Passes(layers, plain_layer(layers, RawGroupedMM))
    makers[LIGER] = lambda: Passes(layers, plain_layer(layers, Liger))

    def checked(name: str) -> Passes:
        passes = makers[name]()
        check(results(passes), truth, layers.dtype, name)
        return passes

    left_out = session.without if find_spec("liger_kernel") else {*session.without, LIGER}
    for name in [name for name in makers if name not in left_out]:
        passes = session.attempt(Key(*place, "fwd+bwd", name), partial(checked, name))
        if passes is not None:
            found[name] = passes
    found["flex bare"] = Passes(layers, bare_layer(layers))
    with session.on_device():
        found["bmm"] = BoundPasses(layers)
    return found


def measure(session: Session) -> None:
    key = Key("layers", "all", 0, "layer", LIGER)
    session.record.skipped.pop(key, None)
    if not find_spec("liger_kernel"):
        session.record.skip(key, "liger_kernel is not installed")
    session.each("layers", session.tokens, PASSES[-1], measure_layer)


def measure_layer(session: Session, model: Shape, tokens: int) -> None:
    """Everything about one layer, ours last in the file: it says that the place is done."""
    place = ("layers", model.name, tokens)
    layers = session.layers(model, tokens)
    found = providers(session, layers, place)
    saved = {name: layers.saved_bytes(name) for name in PROVIDERS if name in found}
    names = sorted(found, key=lambda name: name == OURS)
    for what in PASSES:
        # `bwd` keeps the graph of every provider that takes its turn.
        apart = what == "bwd" and crowded(saved, len(found), session.device.memory_bytes)
        for group in [[name] for name in names] if apart else [names]:
            measure_pass(session, place, what, {name: found[name].run(what) for name in group}, saved)


def crowded(saved: dict[str, int], num_providers: int, memory_bytes: int | None) -> bool:
    """Whether what all providers keep for the backward, those of unknown size at the others' mean, is more than half of
    the memory: then they are measured one after another, without taking turns."""
    together = sum(saved.values()) / len(saved) * num_providers
    return memory_bytes is not None and together > memory_bytes / 2


def measure_pass(
    session: Session, place: tuple[str, str, int], what: str, runs: dict[str, Run], saved: dict[str, int]
) -> None:
    _, model, tokens = place
    shape = replace(next(shape for shape in session.models if shape.name == model), num_tokens=tokens)
    for name, times in session.measure(runs).items():
        tflop_s = useful_flops(shape, what, name != "flex bare") / times["ms"] / 1e9
        # The same kernels for any number of tokens, and a profile takes its time.
        kernels = session.device.kernels(runs[name]) if tokens == session.tokens[0] else None
        session.record.add(
            Key(*place, what, name),
            **times,
            tflop_s=tflop_s,
            **session.record.percent(tflop_s),
            **({"saved_bytes": saved[name]} if name in saved else {}),
            peak_bytes=session.device.peak_bytes(runs[name]),
            launches=count_launches(kernels),
            **({"kernels": kernels} if name in PROFILED and kernels else {}),
        )
