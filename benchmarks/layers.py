"""The same frozen experts and the same graft, in flex and in what a user of transformers would write.

`flex` is transformers' experts module with its implementation set to "flex" and a `Graft` attached. A peer is the same
module set to another implementation, or somebody's own (`ADDED`), and beside it the graft as a plain SwiGLU
module with a sigmoid gate.
"""

import copy
import importlib
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2MoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

import flex_kernels
from benchmarks.shapes import Shape

# hidden_states [T, H], top_k_index [T, K] int64, top_k_weights [T, K] in the dtype of the layer -> [T, H]
Experts = Callable[[Tensor, Tensor, Tensor], Tensor]

TRANSFORMERS = ("grouped_mm", "eager")  # the peers of every table
PROVIDERS = ("flex", *TRANSFORMERS)
# Further peers, each a column of RESULTS.md: name -> what makes its experts of the frozen weights, gate_up_proj
# [E, 2I, H] and down_proj [E, H, I]. A class of yours goes here; `make bench PEER=module:Class` names one for a run.
ADDED: dict[str, Callable[[Tensor, Tensor], Experts]] = {}
# Relative to the whole tensor, between two ways to compute the same in one dtype.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
CHECKED_TOKENS = 64
CHECKED_TOKENS_OF_PEERS = 16  # batched_mm copies the weights of every token's experts


class GraftedByHand(nn.Module):
    """The layer as a user writes it around somebody else's experts."""

    def __init__(self, experts: Experts, graft: flex_kernels.Graft) -> None:
        super().__init__()
        self.experts = experts
        self.gate_up_proj = nn.Parameter(graft.gate_up_proj.detach().clone())
        self.down_proj = nn.Parameter(graft.down_proj.detach().clone())
        self.logit_weight = nn.Parameter(graft.logit_weight.detach().clone())
        self.logit_bias = nn.Parameter(graft.logit_bias.detach().clone())

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        gate, up = F.linear(hidden_states, self.gate_up_proj).chunk(2, dim=-1)
        graft_out = F.linear(F.silu(gate) * up, self.down_proj)
        opening = torch.sigmoid(hidden_states @ self.logit_weight + self.logit_bias)
        return self.experts(hidden_states, top_k_index, top_k_weights) + opening[:, None] * graft_out


def saved_bytes(forward: Callable[[], Tensor], weights: Iterable[Tensor]) -> int:
    """What autograd keeps of a forward for its backward, `weights` not counted; storages: a view counts once."""
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    storages: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(storage)  # alive, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storages.values())


def maker_of(name: str) -> Callable[[Tensor, Tensor], Experts] | None:
    """Who makes a peer's experts of the frozen weights; None for an implementation that transformers has.

    Raises:
        ValueError: there is no peer of this name: none of `ADDED`, of transformers, and no `module:callable`.
    """
    known = {"eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()} - {"flex"}
    if name in ADDED or name in known:
        return ADDED.get(name)
    module, _, attribute = name.partition(":")
    try:
        maker = getattr(importlib.import_module(module), attribute) if module and attribute else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"PEER={name}: {error}; expected module:callable, importable from here") from None
    if not callable(maker):
        listed = ", ".join(sorted({*known, *ADDED}))
        raise ValueError(f"PEER={name}: no such peer; expected module:callable or one of {listed}")
    return maker


def experts_of(name: str, config: Qwen2MoeConfig, gate_up_proj: Tensor, down_proj: Tensor) -> Experts:
    """The experts of flex or of a peer, on these weights, which stay frozen."""
    maker = None if name == "flex" else maker_of(name)
    if maker is not None:
        made = maker(gate_up_proj, down_proj)
        return made.requires_grad_(False) if isinstance(made, nn.Module) else made
    own_config = copy.deepcopy(config)
    own_config._experts_implementation = name
    with torch.device("meta"):
        experts = Qwen2MoeExperts(own_config)
    experts.gate_up_proj, experts.down_proj = gate_up_proj, down_proj
    return experts


class Layers:
    """All providers of one shape and dtype, on the same weights and inputs; `peers` by name (`maker_of`)."""

    def __init__(self, shape: Shape, dtype: torch.dtype, peers: Sequence[str] = (*TRANSFORMERS, *ADDED)) -> None:
        torch.manual_seed(0)
        flex_kernels.register()
        self.shape, self.dtype = shape, dtype
        H, E, width = shape.hidden_size, shape.num_experts, shape.intermediate_size
        config = Qwen2MoeConfig(
            hidden_size=H, num_experts=E, num_experts_per_tok=shape.top_k, moe_intermediate_size=width
        )
        gate_up_proj = nn.Parameter(torch.empty(E, 2 * width, H, dtype=dtype), requires_grad=False)
        down_proj = nn.Parameter(torch.empty(E, H, width, dtype=dtype), requires_grad=False)
        for expert in range(E):  # one at a time: the generator works in fp32
            gate_up_proj[expert] = torch.randn(2 * width, H) * H**-0.5
            down_proj[expert] = torch.randn(H, width) * width**-0.5

        self.graft = flex_kernels.Graft(H, width, dtype=dtype)
        with torch.no_grad():
            self.graft.gate_up_proj.copy_(gate_up_proj[0])
            self.graft.down_proj.copy_(down_proj[0])
            self.graft.logit_weight.copy_(torch.randn(H) * H**-0.5)

        self.modules: dict[str, nn.Module] = {}
        self._weights = (gate_up_proj, down_proj)
        for provider in ("flex", *peers):
            experts = experts_of(provider, config, gate_up_proj, down_proj)
            if provider == "flex":
                experts.graft = self.graft
                self.modules[provider] = experts
            else:
                self.modules[provider] = GraftedByHand(experts, self.graft)
        self._eager = GraftedByHand(experts_of("eager", config, gate_up_proj, down_proj), self.graft)

        self._draw_inputs(shape.num_tokens)

    def forward(self, provider: str, num_tokens: int | None = None) -> Callable[[], Tensor]:
        module, inputs = self.modules[provider], self._inputs(num_tokens)

        def run() -> Tensor:
            with torch.no_grad():
                return module(*inputs)

        return run

    def training(self, provider: str, num_tokens: int | None = None) -> Callable[[], list[Tensor]]:
        """Forward and backward: gradients of the input, the routing weights and the graft with its gate."""
        return self._training(self.modules[provider], num_tokens)

    def _training(self, module: nn.Module, num_tokens: int | None) -> Callable[[], list[Tensor]]:
        hidden_states, index, weights = self._inputs(num_tokens)
        leaves = [hidden_states.detach().requires_grad_(), weights.detach().requires_grad_()]
        leaves += [parameter for name, parameter in self._trained(module)]
        d_out = self.d_out[:num_tokens]

        def run() -> list[Tensor]:
            out = module(leaves[0], index, leaves[1])
            return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]

        return run

    def check(self) -> None:
        """No number is published for a kernel that is wrong: each is held against transformers' eager.

        On tokens of its own: of a single one, a gradient may be all rounding.
        """
        checked = copy.copy(self)
        for provider in self.modules:
            checked._draw_inputs(CHECKED_TOKENS if provider in PROVIDERS else CHECKED_TOKENS_OF_PEERS)
            self._compare(provider, checked.training(provider)(), checked._training(self._eager, None)())

    def _compare(self, provider: str, results: list[Tensor], theirs: list[Tensor]) -> None:
        for index, (a, b) in enumerate(zip(results, theirs, strict=True)):
            scale = b.double().norm()
            if (
                b.numel() == 1
            ):  # the gate's bias sums what its weight's gradient sums with inputs of size 1: it may cancel
                scale = max(scale, theirs[-1].double().norm() * self.shape.hidden_size**-0.5)
            error = (a.double() - b.double()).norm() / scale
            limit = TOLERANCE[self.dtype] * (1 + 4 * a.numel() ** -0.5)
            assert error < limit, (
                f"{provider} at {self.shape.name}, result {index}: relative error {error:.3g}, limit {limit:.3g}"
            )

    def saved_bytes(self, provider: str) -> int:
        """As the function of this name, of this provider's layer."""
        module, (hidden_states, index, weights) = self.modules[provider], self._inputs(None)
        leaves = hidden_states.detach().requires_grad_(), weights.detach().requires_grad_()
        return saved_bytes(lambda: module(leaves[0], index, leaves[1]), (*module.parameters(), *self._weights))

    def _draw_inputs(self, num_tokens: int) -> None:
        shape = self.shape
        self.hidden_states = torch.randn(num_tokens, shape.hidden_size).to(self.dtype)
        weights, self.top_k_index = torch.softmax(torch.randn(num_tokens, shape.num_experts), dim=-1).topk(shape.top_k)
        self.top_k_weights = weights.to(self.dtype)
        self.d_out = torch.randn(num_tokens, shape.hidden_size).to(self.dtype)

    def _inputs(self, num_tokens: int | None) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden_states[:num_tokens], self.top_k_index[:num_tokens], self.top_k_weights[:num_tokens]

    @staticmethod
    def _trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """The graft's own, in the order of their names without the path."""
        trained = [(name.rpartition(".")[2], p) for name, p in module.named_parameters() if p.requires_grad]
        return sorted(trained, key=lambda pair: pair[0])
