"""A shared expert by the fused operation, beside the dense module that a model has for it.

    python -m benchmarks.shared_expert

Qwen1.5-MoE's layer: its shared expert is as wide as four experts, and behind a gate that is no softmax. `apart` is the
fused layer and a dense SwiGLU in PyTorch; `prepared` is the fused layer and what `prepare_shared_experts` puts in the
place of that module, a call of its own; `joined` is one call with four experts more, which every token takes with the
gate as their routing weight. The weights are the same, the results are compared first. Ways are measured in turns and
the least counts; a gain is over `apart`, and "saved" is what autograd keeps for the backward, weights not counted.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import results
from benchmarks.layers import CHECKED_TOKENS, TOLERANCE, saved_bytes
from benchmarks.tables import table
from benchmarks.turns import least_seconds
from flex_kernels.ops.experts import grafted_experts
from flex_kernels.shared_experts import SharedExpert

HIDDEN, EXPERTS, TOP_K, WIDTH, SHARED = 2048, 60, 4, 1408, 4  # the shared expert: so many experts wide
TOKENS, DTYPES = (1, 16, 256, 2048), (torch.float32, torch.bfloat16)
WAYS = ("apart", "prepared", "joined")


class Layer:
    """One layer's weights and inputs, and the ways to compute it; nothing but the inputs asks for gradients."""

    def __init__(self, dtype: torch.dtype, hidden: int = HIDDEN, experts: int = EXPERTS, width: int = WIDTH) -> None:
        torch.manual_seed(0)
        self.gate_up = torch.empty(experts + SHARED, 2 * width, hidden, dtype=dtype).normal_(std=hidden**-0.5)
        self.down = torch.empty(experts + SHARED, hidden, width, dtype=dtype).normal_(std=width**-0.5)
        self.experts = experts
        shared_gate_up = self.gate_up[experts:].unflatten(1, (2, width)).transpose(0, 1).reshape(-1, hidden)
        self.shared_gate_up = shared_gate_up.contiguous()
        self.shared_down = self.down[experts:].transpose(0, 1).reshape(hidden, -1).contiguous()
        self.shared = SharedExpert(self.shared_gate_up[None], self.shared_down[None], "silu", ())

    def draw_inputs(self, num_tokens: int) -> None:
        weights, self.indices = torch.softmax(torch.randn(num_tokens, self.experts), dim=-1).topk(TOP_K)
        hidden_states = torch.randn(num_tokens, self.gate_up.shape[2]).to(self.gate_up.dtype)
        self.leaves = [hidden_states, weights, torch.rand(num_tokens, 1)]
        self.d_out = torch.randn_like(hidden_states)
        shared = torch.arange(self.experts, self.experts + SHARED).expand(num_tokens, SHARED)
        self.joined_indices = torch.cat([self.indices, shared], dim=1)

    def apart(self, hidden_states: Tensor, weights: Tensor, opening: Tensor) -> Tensor:
        gate, up = (F.linear(hidden_states, weight) for weight in self.shared_gate_up.chunk(2))
        return self.beside(hidden_states, weights, opening, F.linear(F.silu(gate) * up, self.shared_down))

    def prepared(self, hidden_states: Tensor, weights: Tensor, opening: Tensor) -> Tensor:
        return self.beside(hidden_states, weights, opening, self.shared(hidden_states))

    def beside(self, hidden_states: Tensor, weights: Tensor, opening: Tensor, shared: Tensor) -> Tensor:
        weights_of = self.gate_up[: self.experts], self.down[: self.experts]
        routed = grafted_experts(hidden_states, self.indices, weights, *weights_of)
        return routed + opening.to(shared.dtype) * shared

    def joined(self, hidden_states: Tensor, weights: Tensor, opening: Tensor) -> Tensor:
        all_weights = torch.cat([weights, opening.expand(-1, SHARED)], dim=1)
        return grafted_experts(hidden_states, self.joined_indices, all_weights, self.gate_up, self.down)

    def forward(self, way: Callable[..., Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                return way(*self.leaves)

        return run

    def training(self, way: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        leaves = [leaf.clone().requires_grad_() for leaf in self.leaves]

        def run() -> tuple[Tensor, ...]:
            out = way(*leaves)
            return (out.detach(), *torch.autograd.grad(out, leaves, self.d_out))

        return run

    def check(self) -> None:
        self.draw_inputs(CHECKED_TOKENS)
        limit = TOLERANCE[self.d_out.dtype]
        wanted = self.training(self.apart)()
        for way in WAYS[1:]:
            for mine, theirs in zip(self.training(getattr(self, way))(), wanted, strict=True):
                error = float((mine.double() - theirs.double()).norm() / theirs.double().norm())
                assert error < limit, f"{way} differs from apart by {error:.3g}, limit {limit:.3g}"

    def saved_bytes(self, way: Callable[..., Tensor]) -> int:
        leaves = [leaf.clone().requires_grad_() for leaf in self.leaves]
        return saved_bytes(lambda: way(*leaves), (self.gate_up, self.down, self.shared_gate_up, self.shared_down))


def rows(layer: Layer, tokens: Sequence[int], rounds: int) -> Iterator[list[str]]:
    """A row for each number of tokens: of each way milliseconds and gain, forward and training, then its saved MB."""
    layer.check()
    for num_tokens in tokens:
        layer.draw_inputs(num_tokens)
        row = [str(num_tokens), str(layer.d_out.dtype).removeprefix("torch.")]
        for kind in (layer.forward, layer.training):
            best = least_seconds({name: kind(getattr(layer, name)) for name in WAYS}, rounds)
            row += [f"{1e3 * best['apart']:.2f}"]
            row += [f"{1e3 * best[way]:.2f} ({best['apart'] / best[way]:.2f}x)" for way in WAYS[1:]]
        yield row + [f"{layer.saved_bytes(getattr(layer, way)) / 1e6:.1f}" for way in WAYS]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(results.machine())
    head = ["tokens", "dtype", *(f"{kind}: {way} ms" for kind in ("forward", "training") for way in WAYS)]
    found = [row for dtype in DTYPES for row in rows(Layer(dtype), given.tokens, given.rounds)]
    print("\n".join(table([*head, *(f"saved: {way} MB" for way in WAYS)], found)))
