"""What `experts_fwd`, `preactivations_fwd` and `experts_bwd` of every backend read of a layer's call."""

from typing import NamedTuple

from torch import Tensor


class LayerInputs(NamedTuple):
    """Rows are (token, slot) pairs in plan order, sorted by expert; all three of the graft are there, or none."""

    hidden_states: Tensor  # [T, H]
    sorted_pairs: Tensor  # [T*K] int32, token * K + slot of every row
    expert_offsets: Tensor  # [E+1] int32, where each expert's rows begin
    routing_weights: Tensor  # [T, K] fp32
    gate_up_proj: Tensor  # [E, 2I, H]
    down_proj: Tensor  # [E, H, I]
    graft_gate_up_proj: Tensor | None  # [2I_g, H]
    graft_down_proj: Tensor | None  # [H, I_g]
    graft_logits: Tensor | None  # [T] fp32

    @property
    def has_graft(self) -> bool:
        return self.graft_gate_up_proj is not None

    @property
    def graft_width(self) -> int:
        """I_g; 0 without a graft."""
        return self.graft_down_proj.shape[1] if self.has_graft else 0

    def contiguous(self) -> "LayerInputs":
        """Autograd hands over transposed and stride-0 tensors."""
        return LayerInputs(*(None if tensor is None else tensor.contiguous() for tensor in self))
