"""One call of the layer after its router, as `experts_fwd` and `experts_bwd` of every backend take it."""

from typing import NamedTuple

from torch import Tensor

from flex_kernels.weights import Experts


class Needs(NamedTuple):
    """Which inputs want a gradient; `graft` stands for both of its matrices."""

    hidden: bool = True
    routing_weights: bool = True
    graft: bool = True
    graft_logits: bool = True


class LayerCall(NamedTuple):
    """Rows are (token, slot) pairs sorted by expert (plan order). All three tensors of the graft are there, or none."""

    hidden_states: Tensor  # [T, H]
    sorted_pairs: Tensor  # [T*K] int32, token * K + slot of every row
    expert_offsets: Tensor  # [E+1] int32, where each expert's rows begin
    routing_weights: Tensor  # [T, K] fp32
    gate_up_proj: Experts  # [E, 2I, H]; as the other in any format of `weights.py`
    down_proj: Experts  # [E, H, I]
    graft_gate_up_proj: Tensor | None = None  # [2I_g, H]
    graft_down_proj: Tensor | None = None  # [H, I_g]
    graft_logits: Tensor | None = None  # [T] fp32
    combine: str = "additive"
    activation: str = "silu"
    needs: Needs = Needs()

    @property
    def tensors(self) -> tuple[Experts | None, ...]:
        return self[:9]

    @property
    def has_graft(self) -> bool:
        return self.graft_gate_up_proj is not None

    @property
    def graft_width(self) -> int:
        """I_g; 0 without a graft."""
        return self.graft_down_proj.shape[1] if self.has_graft else 0

    @property
    def convex(self) -> bool:
        """Whether the routed experts' sum is scaled by `1 - s`."""
        return self.graft_logits is not None and self.combine == "convex"

    @property
    def routed(self) -> bool:
        """Whether a gradient that is needed goes through the routed experts."""
        return self.needs.hidden or self.needs.routing_weights or (self.needs.graft_logits and self.convex)

    def contiguous(self) -> "LayerCall":
        """As launchers read it: autograd hands over transposed and stride-0 tensors. Nothing is needed of no graft."""
        tensors = (None if tensor is None else tensor.contiguous() for tensor in self.tensors)
        needs = self.needs if self.has_graft else self.needs._replace(graft=False, graft_logits=False)
        return LayerCall(*tensors, self.combine, self.activation, needs)
