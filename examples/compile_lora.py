"""Training a compiled model: LoRA on attention, a graft on every layer, `torch.compile` around both.

    python examples/compile_lora.py

LoRA and grafts come first, `torch.compile` last: what is put on afterwards is compiled anew. `flex train` does the same
with `train.compile = true`. The first step takes as long as the compiler does.
"""

import peft
import tiny_moe
import torch

import flex_kernels


def train(backend: str | None, steps: int) -> list[float]:
    flex_kernels.register()
    model = tiny_moe.model(num_hidden_layers=1)
    model.set_experts_implementation("flex")
    torch.manual_seed(1)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for graft in flex_kernels.attach_graft(model, width=8, logit_bias=0.0).values():
        graft.reset_parameters()
    runner = model if backend is None else torch.compile(model, backend=backend, dynamic=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, eps=1e-4)
    losses = []
    for step in range(steps):
        ids = tiny_moe.sequences(16, 12 + 4 * (step % 2), seed=step)  # two lengths, one compilation
        loss = runner(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(backend: str = "inductor", steps: int = 20) -> dict[str, list[float]]:
    results = {"eager": train(None, steps), "compiled": train(backend, steps)}
    for name, losses in results.items():
        print(f"{name}: loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    return results


if __name__ == "__main__":
    main()
