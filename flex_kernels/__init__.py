"""Kernels for Mixture-of-Experts layers whose experts are frozen and that carry one extra, trained, gated expert."""

from flex_kernels.grafts import attach_graft, detach_graft
from flex_kernels.layer import Graft, GraftedMoE, LoraGraft
from flex_kernels.ops import grafted_experts
from flex_kernels.ops_router import combine, route, routing_plan
from flex_kernels.ops_score import score_experts, score_neurons
from flex_kernels.selection import (
    choose,
    random_choice,
    reconstruction,
    relative_residuals,
    routed_mass,
    scaled,
    target_energy,
    zero,
)
from flex_kernels.transformers_plug import (
    ExpertWeights,
    LayerPath,
    expert_weights,
    explain,
    moe_layers,
    register,
)

__all__ = [
    "ExpertWeights",
    "Graft",
    "GraftedMoE",
    "LayerPath",
    "LoraGraft",
    "attach_graft",
    "choose",
    "combine",
    "detach_graft",
    "expert_weights",
    "explain",
    "grafted_experts",
    "moe_layers",
    "random_choice",
    "reconstruction",
    "register",
    "relative_residuals",
    "route",
    "routed_mass",
    "routing_plan",
    "scaled",
    "score_experts",
    "score_neurons",
    "target_energy",
    "zero",
]
