"""What a layer with frozen experts keeps between forward and backward: under half of transformers' grouped_mm.

Counted with autograd's saved-tensor hooks: every storage once, parameters left out, the layer's input counted where
it is kept. Per layer, with `R = T K` rows and `s` bytes a number:

    grouped_mm          s R (3I + H) + s R  + 24 R + 4 E          Z, act(gate), the experts' output; sort indices
    flex                s R 2I       + 4 R  +  4 R + 4 (E + 1)    Z; fp32 routing weights; the plan of the rows
    flex, recompute     s T H        + 4 R  +  4 R + 4 (E + 1)    X, from which the backward computes Z again
    a graft of width I_g  + s T (H + 2 I_g) + 4 T                 X (once), its Z (not with recompute), its logits;
                                                                  for 16-bit numbers the gate's fp32 copy, 4 H

Where `I > H`, as in Mixtral, the first is more than half, and only `recompute` is under it.
"""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

import flex_kernels


@dataclass(frozen=True)
class Shape:
    hidden_size: int
    num_experts: int
    top_k: int
    intermediate_size: int
    num_tokens: int = 8192

    def grouped_mm_bytes(self, size: int) -> int:
        rows, wide = self.num_tokens * self.top_k, 3 * self.intermediate_size + self.hidden_size
        return size * rows * (wide + 1) + 24 * rows + 4 * self.num_experts

    def flex_bytes(self, size: int, graft_width: int | None = None, recomputes: bool = False) -> int:
        rows = self.num_tokens * self.top_k
        input_bytes = size * self.num_tokens * self.hidden_size
        total = 8 * rows + 4 * (self.num_experts + 1)
        total += input_bytes if recomputes else size * rows * 2 * self.intermediate_size
        if graft_width is not None:
            total += 4 * self.num_tokens + (4 * self.hidden_size if size < 4 else 0)
            total += 0 if recomputes else input_bytes + size * self.num_tokens * 2 * graft_width
        return total


TABLE = {  # of the models that FLEx is measured on
    "Qwen1.5-MoE-A2.7B": Shape(2048, 60, 4, 1408),
    "DeepSeek-MoE-16B": Shape(2048, 64, 6, 1408),
    "OLMoE-1B-7B": Shape(2048, 64, 8, 1024),
    "Mixtral-8x7B": Shape(4096, 8, 2, 14336),
    "Qwen3-30B-A3B": Shape(2048, 128, 8, 768),
}
SMALL = [Shape(48, 8, 2, 32, 64), Shape(64, 6, 3, 64, 40), Shape(32, 4, 1, 80, 24)]  # narrow, I = H, wide
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def registered() -> None:
    flex_kernels.register()


def layer_of(shape: Shape, dtype: torch.dtype, device: str) -> OlmoeExperts:
    config = OlmoeConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
    )
    with torch.device(device):
        return OlmoeExperts(config).to(dtype).requires_grad_(False)


def saved_bytes(layer: OlmoeExperts, shape: Shape, implementation: str, plain: nn.Module | None = None) -> int:
    """What one forward saves; with `plain`, a graft that plain PyTorch computes beside the layer."""
    layer.config._experts_implementation = implementation
    dtype, device = layer.down_proj.dtype, layer.down_proj.device
    hidden_states = torch.ones(shape.num_tokens, shape.hidden_size, dtype=dtype, device=device, requires_grad=True)
    weights = torch.ones(shape.num_tokens, shape.top_k, dtype=dtype, device=device, requires_grad=True)
    indices = torch.arange(shape.num_tokens * shape.top_k, device=device).view(weights.shape) % shape.num_experts
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        out = layer(hidden_states, indices, weights)
        if plain is not None:
            out = out + torch.sigmoid(plain.logits(hidden_states))[:, None].to(dtype) * in_plain_torch(
                plain, hidden_states
            )
    parameters = {id(parameter) for parameter in (*layer.parameters(), *(plain.parameters() if plain else ()))}
    kept = [x for x in kept if id(x) not in parameters and id(x._base) not in parameters]
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in kept}.values())


def assert_theirs(measured: int, shape: Shape, size: int) -> None:
    """transformers 5.17 keeps a mask of one byte a row besides."""
    assert measured - shape.grouped_mm_bytes(size) in (0, shape.num_tokens * shape.top_k)


def in_plain_torch(graft: nn.Module, hidden_states: Tensor) -> Tensor:
    gate, up = F.linear(hidden_states, graft.gate_up_proj).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, graft.down_proj)


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_the_formulas_are_what_is_measured(shape: Shape, dtype: torch.dtype, recompute: bool) -> None:
    layer = layer_of(shape, dtype, "cpu")
    layer.recompute = recompute
    assert_theirs(saved_bytes(layer, shape, "grouped_mm"), shape, dtype.itemsize)
    assert saved_bytes(layer, shape, "flex") == shape.flex_bytes(dtype.itemsize, None, recompute)
    flex_kernels.attach_graft(layer, width=24)[""].reset_parameters()
    assert saved_bytes(layer, shape, "flex") == shape.flex_bytes(dtype.itemsize, 24, recompute)


@pytest.mark.parametrize("name", TABLE)
def test_under_half_of_grouped_mm_on_real_shapes(name: str) -> None:
    """Bare and with a graft, which beside grouped_mm runs as plain PyTorch; wide experts need `recompute` for it."""
    shape = TABLE[name]
    layer = layer_of(shape, torch.bfloat16, "meta")
    wide = layer.recompute = shape.intermediate_size > shape.hidden_size
    theirs, ours = (saved_bytes(layer, shape, implementation) for implementation in ("grouped_mm", "flex"))
    assert ours == shape.flex_bytes(2, None, wide)
    assert_theirs(theirs, shape, 2)
    assert ours < 0.5 * theirs
    graft = flex_kernels.attach_graft(layer)[""]
    ours = saved_bytes(layer, shape, "flex")
    assert ours == shape.flex_bytes(2, shape.intermediate_size, wide)
    flex_kernels.detach_graft(layer)
    assert ours < 0.5 * saved_bytes(layer, shape, "grouped_mm", plain=graft)


def test_nothing_is_kept_where_nothing_trains() -> None:
    shape = SMALL[0]
    layer = layer_of(shape, torch.float32, "cpu")
    with torch.no_grad():
        assert saved_bytes(layer, shape, "flex") == 0


@pytest.mark.parametrize("grafted", [False, True], ids=["bare", "grafted"])
def test_computing_again_changes_no_bit(grafted: bool, backend: str) -> None:
    num_tokens, experts = 40, [torch.randn(5, 24, 16), torch.randn(5, 16, 12)]
    indices = torch.rand(num_tokens, 5).argsort(1)[:, :2]
    results = []
    for recompute in (False, True):
        torch.manual_seed(1)
        floats = [torch.randn(num_tokens, 16), torch.rand(num_tokens, 2)]
        floats += [torch.randn(20, 16), torch.randn(16, 10), torch.randn(num_tokens)] if grafted else []
        floats = [x.requires_grad_() for x in floats]
        out = flex_kernels.grafted_experts(
            floats[0], indices, floats[1], *experts, *floats[2:], combine="convex", recompute=recompute
        )
        out.backward(torch.randn(out.shape))
        results.append([out, *(x.grad for x in floats)])
    assert all(torch.equal(kept, again) for kept, again in zip(*results, strict=True))


def test_trained_experts_can_compute_again_too(backend: str) -> None:
    indices = torch.rand(40, 5).argsort(1)[:, :2]
    results = []
    for recompute in (False, True):
        torch.manual_seed(1)
        tensors = [torch.randn(40, 16), torch.rand(40, 2), torch.randn(5, 24, 16), torch.randn(5, 16, 12)]
        tensors = [x.requires_grad_() for x in tensors]
        out = flex_kernels.grafted_experts(tensors[0], indices, *tensors[1:], recompute=recompute)
        out.backward(torch.randn(out.shape))
        results.append([out, *(x.grad for x in tensors)])
    torch.testing.assert_close(*results)
