"""Grafts beside a peft LoRA are saved in files of their own and come back, and with them every logit, bit for bit.

    python examples/save_graft.py

Here the grafts are there first. peft freezes all it finds when it wraps a model, `train_grafts` lets them train again;
with `SFTTrainer(peft_config=...)` it stands between the trainer's construction and `train()`.
"""

import tempfile

import peft
import tiny_moe
import torch

import flex_kernels


def main() -> dict[str, float]:
    model = tiny_moe.model().requires_grad_(False)
    for graft in flex_kernels.attach_graft(model, width=16, logit_bias=0.0).values():
        graft.reset_parameters()
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    flex_kernels.train_grafts(model)

    ids = tiny_moe.sequences(16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(10):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        flex_kernels.save_grafts(model, folder)  # grafts.safetensors, and grafts.json to read
        model.save_pretrained(folder)  # the adapter alone
        lora = peft.PeftModel.from_pretrained(tiny_moe.model(), folder).eval()
        want, without = model.eval()(input_ids=ids).logits, lora(input_ids=ids).logits
        flex_kernels.load_grafts(lora, folder)
        back = lora(input_ids=ids).logits
    result = {"without": float((without - want).abs().max()), "difference": float((back - want).abs().max())}
    print(f"the adapter alone is off by {result['without']:.3f}, with its grafts by {result['difference']}")
    return result


if __name__ == "__main__":
    main()
