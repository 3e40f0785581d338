"""peft's LoRA beside flex: on attention (the experts stay frozen, the case flex is made for), and on the experts too.

    python examples/peft_lora.py

LoRA on experts (`target_parameters`) is peft's own: it adds `B A` of all experts to the weights in every forward, so
the experts count as trained and the layer computes their gradients. It works, but it is not where flex saves memory.
Grafts are attached after `get_peft_model`, which freezes all it finds; `flex_kernels.train_grafts(model)` trains those
that were there before. `save_graft.py` saves both.
"""

import peft
import tiny_moe
import torch

import flex_kernels

ATTENTION = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
EXPERTS = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


def train(targets: dict[str, list[str]], grafted: bool, steps: int = 20) -> list[float]:
    flex_kernels.register()
    model = tiny_moe.model()
    model.set_experts_implementation("flex")
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **targets))
    if grafted:
        for graft in flex_kernels.attach_graft(model, width=8, logit_bias=0.0).values():
            graft.reset_parameters()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    losses = []
    for step in range(steps):
        ids = tiny_moe.sequences(16, seed=step)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> dict[str, list[float]]:
    losses = {
        "attention": train(ATTENTION, grafted=False),
        "attention and grafts": train(ATTENTION, grafted=True),
        "experts": train(EXPERTS, grafted=False),
    }
    for name, values in losses.items():
        print(f"LoRA on {name}: loss {values[0]:.3f} -> {values[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
