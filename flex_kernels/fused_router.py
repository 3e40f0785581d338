"""A transformers model's own router computed by `grafted_route`, together with the gate of its layer's graft.

    flex_kernels.attach_graft(model, fuse_router=True)

The router module keeps its class and its parameters; its forward is replaced on the instance, and returns what that
class returns: the router's logits, the scores, the expert indices. Only routers of a known formula are taken, by the
name of their class. The graft's logits, which come out of the same pass, wait at the graft until its experts ask for
those of the very same hidden states.
"""

from types import MethodType
from typing import Any, NamedTuple

from torch import Tensor, nn

from flex_kernels.ops.grafted_route import grafted_route_with_logits


class Formula(NamedTuple):
    """Softmax in fp32 and top-k, and what the families do differently after them."""

    renormalize: bool | None  # None: as the module's `norm_topk_prob` says
    cast_scores: bool  # to the dtype of the router's logits, else they stay fp32


AS_CONFIGURED, ALWAYS = Formula(None, True), Formula(True, True)
# Classes by name, so that nothing needs importing; a class of the same name elsewhere is still the same formula.
FORMULAS = {
    "FlexOlmoTopKRouter": AS_CONFIGURED,
    "MellumTopKRouter": AS_CONFIGURED,
    "MiniMaxTopKRouter": Formula(True, False),
    "MixtralTopKRouter": Formula(True, False),
    "OlmoeTopKRouter": AS_CONFIGURED,
    "Qwen2MoeTopKRouter": AS_CONFIGURED,
    "Qwen3MoeTopKRouter": AS_CONFIGURED,
    "Qwen3NextTopKRouter": AS_CONFIGURED,
    "Qwen3OmniMoeTalkerTextTopKRouter": AS_CONFIGURED,
    "Qwen3OmniMoeThinkerTextTopKRouter": AS_CONFIGURED,
    "Qwen3OmniMoeTextTopKRouter": ALWAYS,
    "Qwen3VLMoeTextTopKRouter": ALWAYS,
    "Qwen3_5MoeTopKRouter": ALWAYS,
}


def router_of(model: nn.Module, experts_name: str) -> nn.Module:
    """The router that stands beside an experts module.

    Raises:
        ValueError: there is none, or one whose formula is not softmax and top-k as `grafted_route` has them.
    """
    parent = model.get_submodule(experts_name.rpartition(".")[0])
    routers = [child for child in parent.children() if type(child).__name__ in FORMULAS]
    if len(routers) == 1:
        return routers[0]
    found = ", ".join(type(child).__name__ for child in parent.children())
    raise ValueError(f"beside {experts_name} are {found}; expected one softmax-top-k router of {', '.join(FORMULAS)}")


def refuse_router_logits(model: nn.Module, _: Any, options: dict[str, Any]) -> None:
    """A hook before the model's forward: the logits of a fused router have no gradient, so no loss may be made of them.

    Raises:
        ValueError: `output_router_logits` is on, in the config or in this call.
    """
    config = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    wanted = options.get("output_router_logits")
    if wanted or (wanted is None and getattr(text_config, "output_router_logits", False)):
        raise ValueError("output_router_logits is on, expected it off with fuse_router: they would have no gradient")


def fuse(router: nn.Module, experts: nn.Module) -> None:
    # A tuple, so that the experts do not become the router's submodule; a bound method, so that a copy of the model
    # gets one of its own router.
    router._fused_experts = (experts,)
    router.forward = MethodType(_fused_forward, router)


def unfuse(model: nn.Module) -> None:
    """Gives every router of the model its own forward back."""
    for router in model.modules():
        if "_fused_experts" in vars(router):
            del router.forward, router._fused_experts


def _fused_forward(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    formula, graft = FORMULAS[type(self).__name__], getattr(self._fused_experts[0], "graft", None)
    gate = (None, None) if graft is None else (graft.logit_weight, graft.logit_bias)
    renormalize = self.norm_topk_prob if formula.renormalize is None else formula.renormalize
    weights, indices, graft_logits, _, router_logits = grafted_route_with_logits(
        hidden_states.reshape(-1, hidden_states.shape[-1]), self.weight, *gate, self.top_k, renormalize
    )
    if graft is not None:
        graft.expect(hidden_states, graft_logits)
    return router_logits, weights.to(router_logits.dtype) if formula.cast_scores else weights, indices
