"""Scoring a layer's experts and neurons, beside the published way: one forward per expert, all outputs kept."""

from functools import partial

import torch
from torch import Tensor

import flex_kernels
from benchmarks.gpu.layer_part import check
from benchmarks.gpu.record import OURS, Key
from benchmarks.gpu.session import Session
from benchmarks.shapes import Shape
from flex_kernels import reference

NUM_BATCHES = 32
PUBLISHED = "one by one"


def one_by_one(
    hidden_states: Tensor, target: Tensor, gate_up_proj: Tensor, down_proj: Tensor, batches: Tensor
) -> Tensor:
    """`||F_b - E_i(X_b)||^2`, [B, E] fp32, through all outputs, [E, T, H]."""
    outputs = torch.stack(
        [reference.expert(hidden_states, *pair) for pair in zip(gate_up_proj, down_proj, strict=True)]
    )
    errors = torch.stack([(target - out).float().square().sum(-1) for out in outputs])
    return errors.new_zeros(len(errors), NUM_BATCHES).index_add_(1, batches, errors).T


def measure(session: Session) -> None:
    session.each("scoring", session.tokens[:1], "experts", measure_layer)


@torch.no_grad()
def measure_layer(session: Session, model: Shape, tokens: int) -> None:
    layers = session.layers(model, tokens)
    experts = layers.modules[OURS]
    arguments = (layers.hidden_states, layers.d_out, experts.gate_up_proj, experts.down_proj)
    offsets = torch.linspace(0, tokens, NUM_BATCHES + 1).long().to(session.device.kind)
    batches = torch.repeat_interleave(offsets.diff())
    runs = {
        PUBLISHED: partial(one_by_one, *arguments, batches),
        OURS: partial(flex_kernels.score_experts, *arguments, offsets),
    }
    check([runs[OURS]()[..., 0]], [runs[PUBLISHED]()], session.dtype, "score_experts")
    flops = 6 * tokens * model.num_experts * model.hidden_size * model.intermediate_size
    for what, several in (("neurons", {OURS: partial(flex_kernels.score_neurons, *arguments)}), ("experts", runs)):
        for name, values in session.measure(several).items():
            tflop_s = flops / values["ms"] / 1e9
            session.record.add(
                Key("scoring", model.name, tokens, what, name),
                **values,
                tflop_s=tflop_s,
                **session.record.percent(tflop_s),
                peak_bytes=session.device.peak_bytes(several[name]),
            )
