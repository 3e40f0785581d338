"""Kernels for Mixture-of-Experts layers whose experts are frozen and that carry one extra, trained, gated expert."""

from flex_kernels.graft_callback import graft_callback
from flex_kernels.graft_files import load_grafts, save_grafts, train_grafts
from flex_kernels.grafts import attach_graft, detach_graft
from flex_kernels.layer import Graft, GraftedMoE, LoraGraft
from flex_kernels.ops.experts import grafted_experts
from flex_kernels.ops.graft_logits import graft_logits
from flex_kernels.ops.grafted_route import grafted_route
from flex_kernels.ops.router import combine, route, routing_plan
from flex_kernels.ops.score import score_experts, score_neurons
from flex_kernels.prepare import prepare_experts
from flex_kernels.selection.neurons import (
    NeuronChoice,
    NeuronSums,
    gather_neurons,
    greedy_neurons,
    neuron_sums,
    prefilter,
)
from flex_kernels.selection.one_expert import (
    choose,
    random_choice,
    reconstruction,
    relative_residuals,
    routed_mass,
    scaled,
    target_energy,
    zero,
)
from flex_kernels.selection.refit import Refit, refit_down, unexplained
from flex_kernels.selection.subsets import ExpertGram, RenormalizedLosses, Subset, best_scaled_subset, expert_gram
from flex_kernels.selection.sums import merged
from flex_kernels.shared_experts import prepare_shared_experts
from flex_kernels.transformers_plug import ExpertWeights, LayerPath, expert_weights, explain, moe_layers, register
from flex_kernels.weight_files import load_prepared, save_prepared
from flex_kernels.weights import FrozenWeight

__all__ = [
    "ExpertGram",
    "ExpertWeights",
    "FrozenWeight",
    "Graft",
    "GraftedMoE",
    "LayerPath",
    "LoraGraft",
    "NeuronChoice",
    "NeuronSums",
    "Refit",
    "RenormalizedLosses",
    "Subset",
    "attach_graft",
    "best_scaled_subset",
    "choose",
    "combine",
    "detach_graft",
    "expert_gram",
    "expert_weights",
    "explain",
    "gather_neurons",
    "graft_callback",
    "graft_logits",
    "grafted_experts",
    "grafted_route",
    "greedy_neurons",
    "load_grafts",
    "load_prepared",
    "merged",
    "moe_layers",
    "neuron_sums",
    "prefilter",
    "prepare_experts",
    "prepare_shared_experts",
    "random_choice",
    "reconstruction",
    "refit_down",
    "register",
    "relative_residuals",
    "route",
    "routed_mass",
    "routing_plan",
    "save_grafts",
    "save_prepared",
    "scaled",
    "score_experts",
    "score_neurons",
    "target_energy",
    "train_grafts",
    "unexplained",
    "zero",
]
