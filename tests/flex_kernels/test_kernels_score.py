"""The scoring kernels below the operations: both ways of reading, pieces of experts and tokens, tiny targets."""

import pytest
import torch
from cases import DEVICE
from torch import Tensor

from flex_kernels import plan, reference
from flex_kernels.backends.triton import experts_fwd, score

pytestmark = pytest.mark.skipif(
    not (plan.INTERPRET or torch.cuda.is_available()), reason="Triton needs a GPU or TRITON_INTERPRET=1"
)
SHAPES = {"several-tiles": (40, 96, 80, 3), "odd": (37, 33, 17, 5)}  # T, H, I, E


def scoring_inputs(shape: str, dtype: torch.dtype) -> list[Tensor]:
    num_tokens, hidden_size, width, num_experts = SHAPES[shape]
    tokens = (num_tokens, hidden_size)
    sizes = (tokens, tokens, (num_experts, 2 * width, hidden_size), (num_experts, hidden_size, width))
    return [(torch.randn(size) * (size[-1] ** -0.5 if len(size) == 3 else 1)).to(DEVICE, dtype) for size in sizes]


def error(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("descriptors", [True, False], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_double_rule(shape: str, dtype: torch.dtype, descriptors: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not descriptors:
        for module in (experts_fwd, score):
            monkeypatch.setattr(module, "use_tma", lambda *_: False)
    inputs = scoring_inputs(shape, dtype)
    offsets = torch.tensor([0, 5, 5, len(inputs[0])], dtype=torch.int32, device=DEVICE)
    exact = [x.double() for x in inputs]
    ours = [score.score_experts(*inputs, offsets, "gelu"), *score.score_neurons(*inputs, "gelu")]
    plain, truth = (
        [
            reference.score_experts(*values, offsets, activation="gelu"),
            *reference.score_neurons(*values, activation="gelu"),
        ]
        for values in (inputs, exact)
    )
    for a, b, t in zip(ours, plain, truth, strict=True):
        assert error(a, t) <= 2 * error(b, t) + 1e-6


def test_pieces_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = scoring_inputs("several-tiles", torch.float32)
    offsets = torch.tensor([0, 11, 40], dtype=torch.int32, device=DEVICE)
    whole = score.score_experts(*inputs, offsets, "silu")
    monkeypatch.setattr(score, "ACTIVATION_BYTES", 1)
    monkeypatch.setattr(score, "MIN_TOKENS_AT_ONCE", 16)
    assert torch.equal(whole, score.score_experts(*inputs, offsets, "silu"))


def test_a_tiny_fp32_target_survives_fp16_weights() -> None:
    inputs = scoring_inputs("odd", torch.float16)
    target = inputs[1].float() * 1e-9
    _, correlation = score.score_neurons(inputs[0], target, *inputs[2:], "silu")
    _, wanted = reference.score_neurons(inputs[0].float(), target, *(x.float() for x in inputs[2:]))
    torch.testing.assert_close(correlation * 1e9, wanted * 1e9, rtol=2e-2, atol=2e-2)


def test_no_tokens() -> None:
    inputs = scoring_inputs("odd", torch.float32)
    none = [inputs[0][:0], inputs[1][:0], *inputs[2:]]
    offsets = torch.tensor([0, 0, 0], dtype=torch.int32, device=DEVICE)
    assert torch.equal(score.score_experts(*none, offsets, "silu"), torch.zeros(2, 5, 3, device=DEVICE))
    for result in score.score_neurons(*none, "silu"):
        assert torch.equal(result, torch.zeros(5, 17, device=DEVICE))
