"""bf16 autocast over fp32 weights, and frozen experts in bf16 under trained parts in fp32, which need no autocast.

    python examples/autocast.py

Under autocast the experts' weights are cast anew in every forward, like everybody's. Experts that are kept in bf16 to
begin with cost half the memory and no cast; the graft stays in fp32, where a small step is not lost.
"""

import tiny_moe
import torch

import flex_kernels


def train(bf16_experts: bool, steps: int = 20) -> list[float]:
    model = tiny_moe.model()
    model.requires_grad_(False)
    torch.manual_seed(1)
    for graft in flex_kernels.attach_graft(model, width=16, logit_bias=0.0).values():
        graft.reset_parameters()
    if bf16_experts:
        for experts in flex_kernels.moe_layers(model).values():
            experts.gate_up_proj.data = experts.gate_up_proj.data.bfloat16()
            experts.down_proj.data = experts.down_proj.data.bfloat16()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.03)
    losses = []
    for step in range(steps):
        ids = tiny_moe.sequences(16, seed=step)
        with torch.autocast("cpu", torch.bfloat16, enabled=not bf16_experts):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert {parameter.grad.dtype for parameter in trained} == {torch.float32}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> dict[str, list[float]]:
    losses = {"autocast": train(bf16_experts=False), "bf16 experts": train(bf16_experts=True)}
    for name, values in losses.items():
        print(f"{name}: loss {values[0]:.3f} -> {values[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
