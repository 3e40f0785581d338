"""The Triton backend as one module: every stage under the name and with the signature that it has in `pytorch.py`."""

from flex_kernels.backends.triton.combine import combine_bwd, combine_fwd
from flex_kernels.backends.triton.experts_bwd import experts_bwd
from flex_kernels.backends.triton.experts_fwd import experts_fwd, preactivations_fwd
from flex_kernels.backends.triton.graft_logits import graft_logits_bwd, graft_logits_fwd
from flex_kernels.backends.triton.grafted_route import grafted_route_fwd
from flex_kernels.backends.triton.route import route_bwd, route_fwd
from flex_kernels.backends.triton.routing_plan import routing_plan
from flex_kernels.backends.triton.score import score_experts, score_neurons

__all__ = [
    "combine_bwd",
    "combine_fwd",
    "experts_bwd",
    "experts_fwd",
    "graft_logits_bwd",
    "graft_logits_fwd",
    "grafted_route_fwd",
    "preactivations_fwd",
    "route_bwd",
    "route_fwd",
    "routing_plan",
    "score_experts",
    "score_neurons",
]
