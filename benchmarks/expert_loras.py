"""LoRA on experts, one step of a layer: one expert at a time, beside the fused operation on merged weights.

    python -m benchmarks.expert_loras

Both compute the same (`tests/flex/test_rivals.py`). The merged weights need the gradient of every expert's matrices.
Processor time, one thread, the least of seven.
"""

import time

import torch

import flex_kernels
from flex.model.expert_loras import ExpertLoras

SHAPES = {"demo": (16, 128, 96, 640, 4), "Qwen1.5-MoE, a quarter as wide": (60, 512, 352, 512, 4)}
RANK, REPEATS = 4, 7


def measure(
    num_experts: int, hidden_size: int, intermediate_size: int, num_tokens: int, top_k: int
) -> dict[str, float]:
    """Milliseconds of forward and backward by either way."""
    torch.manual_seed(0)
    layer = torch.nn.Module()
    shapes = {"gate_up_proj": (2 * intermediate_size, hidden_size), "down_proj": (hidden_size, intermediate_size)}
    for name, shape in shapes.items():
        setattr(layer, name, torch.nn.Parameter(torch.randn(num_experts, *shape) * 0.05, requires_grad=False))
    weights = flex_kernels.ExpertWeights(layer.gate_up_proj, layer.down_proj, "silu")
    own = ExpertLoras(weights, RANK, 2.0).train()
    with torch.no_grad():
        for b in (own.gate_up_lora_b, own.down_lora_b):
            b.normal_(std=0.02)
    x = torch.randn(num_tokens, hidden_size, requires_grad=True)
    indices = torch.rand(num_tokens, num_experts).topk(top_k).indices
    routing = torch.rand(num_tokens, top_k)

    def alone() -> torch.Tensor:
        return own(layer, x, indices, routing)

    def merged() -> torch.Tensor:
        gate_up = layer.gate_up_proj + own.scale * own.gate_up_lora_b @ own.gate_up_lora_a
        down = layer.down_proj + own.scale * own.down_lora_b @ own.down_lora_a
        return flex_kernels.grafted_experts(x, indices, routing, gate_up, down, activation="silu")

    torch.testing.assert_close(alone(), merged(), rtol=1e-3, atol=1e-4)
    found = {}
    for name, forward in (("one expert at a time", alone), ("merged weights", merged)):
        times = []
        for _ in range(REPEATS):
            own.zero_grad()
            started = time.process_time()
            forward().square().sum().backward()
            times.append(1000 * (time.process_time() - started))
        found[name] = round(min(times), 1)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    for title, shape in SHAPES.items():
        print(title, measure(*shape), flush=True)
