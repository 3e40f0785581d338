"""Calibrate, score, select, build: one client's grafts from its own training sequences.

One pass over the calibration sequences through the pretrained model (no LoRA, no graft). At each MoE layer the inputs
and the routed output `F` of a batch go straight into three sums per expert (`flex_kernels.score_experts`), so memory
does not grow with the number of sequences. The paper's rule then takes, layer by layer (arXiv 2506.00965),

    i* = argmin_i  sum_b || F(X_b) - E_i(X_b) ||_F
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import flex_kernels
from flex.data import Encoder, Example
from flex.errors import FlexError
from flex.model import Base, pretrained_only


@dataclass
class LayerSums:
    """What one pass leaves of a layer. `scores`: [B, E, 3] of `score_experts`, a row a batch; `target_energy`: [B],
    `||F_b||^2`; `routed_mass`: [E], the routing weight each expert received."""

    scores: list[Tensor]
    target_energy: list[Tensor]
    routed_mass: Tensor

    def residuals(self) -> Tensor:
        """[E]: `sum_b ||F_b - E_i(X_b)|| / sum_b ||F_b||`; at 1 the expert is no better than nothing at all."""
        return flex_kernels.relative_residuals(torch.cat(self.scores), torch.stack(self.target_energy))


@dataclass(frozen=True)
class Choice:
    """The graft of one layer: `chosen` expert (none for a fresh module), and the residual of every candidate."""

    layer: int
    module: str
    criterion: str
    candidates: list[float]
    chosen: int | None
    routed_mass: float
    seconds: float

    @property
    def residual(self) -> float | None:
        return None if self.chosen is None else self.candidates[self.chosen]

    def event(self) -> dict[str, Any]:
        return {"event": "graft", **self.__dict__, "residual": self.residual}


@torch.no_grad()
def calibrate(base: Base, encoder: Encoder, examples: Sequence[Example], batch_size: int) -> dict[str, LayerSums]:
    """One pass over `examples`: the sums of every MoE layer, padding left out.

    Raises:
        FlexError: the activations of a layer are not finite, or a layer's experts have a layout that cannot be grafted.
    """
    sums = {
        name: LayerSums([], [], torch.zeros(layer.num_experts, device=base.device))
        for name, layer in base.layers.items()
    }
    weights = {name: _expert_weights(name, layer) for name, layer in base.layers.items()}
    kept: list[Tensor] = []  # [B*L] bool of the batch in flight

    def observe(name: str, inputs: tuple[Tensor, ...], target: Tensor) -> None:
        hidden_states, expert_indices, routing_weights = inputs
        rows = kept[-1]
        hidden_states, target = hidden_states[rows], target[rows]
        if not torch.isfinite(target).all():
            raise FlexError(f"{name} gives NaN or infinite activations on the calibration data; nothing can be scored")
        offsets = torch.tensor([0, len(target)], dtype=torch.int32, device=target.device)
        gate_up_proj, down_proj, activation = weights[name]
        scores = flex_kernels.score_experts(
            hidden_states, target, gate_up_proj, down_proj, offsets, activation=activation
        )
        layer_sums = sums[name]
        layer_sums.scores.append(scores)
        layer_sums.target_energy.append((target.float() ** 2).sum())
        layer_sums.routed_mass.index_add_(0, expert_indices[rows].flatten(), routing_weights[rows].float().flatten())

    hooks = [
        layer.register_forward_hook(lambda layer, inputs, output, name=name: observe(name, inputs, output))
        for name, layer in base.layers.items()
    ]
    try:
        with pretrained_only(base) as model:
            for start in range(0, len(examples), batch_size):
                batch = encoder.batch(examples[start : start + batch_size], base.device)
                kept[:] = [batch.attention_mask.flatten().bool()]
                model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def _expert_weights(name: str, layer: nn.Module) -> flex_kernels.ExpertWeights:
    try:
        return flex_kernels.expert_weights(layer)
    except ValueError as error:
        raise FlexError(f"nothing can be grafted at {name}: {error}") from None


def choose(base: Base, sums: dict[str, LayerSums], criterion: str, seed: str) -> list[Choice]:
    """One choice per layer. `criterion`: reconstruction (the paper), random, or fresh (no expert at all)."""
    rng = random.Random(seed)
    choices = []
    for index, (name, layer_sums) in enumerate(sums.items()):
        started = time.perf_counter()
        residuals = layer_sums.residuals()
        drawn = rng.randrange(len(residuals))
        chosen = {"reconstruction": int(residuals.argmin()), "random": drawn, "fresh": None}[criterion]
        mass = layer_sums.routed_mass / layer_sums.routed_mass.sum()
        choices.append(
            Choice(
                layer=index,
                module=name,
                criterion=criterion,
                candidates=[round(float(r), 6) for r in residuals],
                chosen=chosen,
                routed_mass=0.0 if chosen is None else float(mass[chosen]),
                seconds=time.perf_counter() - started,
            )
        )
    return choices


@torch.no_grad()
def build(base: Base, choices: Sequence[Choice], logit_bias: float, seed: int) -> None:
    """Writes the chosen starts into the grafts that hang on the model.

    A fresh module has normal weights of the same spread as the layer's pretrained experts, so that it differs from a
    graft in what it knows and not in how loud it starts.
    """
    generator = torch.Generator().manual_seed(seed)
    for choice in choices:
        layer = base.layers[choice.module]
        weights, graft = _expert_weights(choice.module, layer), layer.graft
        for own, pretrained in (
            (graft.gate_up_proj, weights.gate_up_proj),
            (graft.down_proj, weights.down_proj),
        ):
            if choice.chosen is None:
                own.copy_(torch.randn(own.shape, generator=generator) * float(pretrained.float().std()))
            else:
                own.copy_(pretrained[choice.chosen])
        graft.logit_weight.zero_()
        graft.logit_bias.fill_(logit_bias)
