"""Gradient checkpointing: the same gradients, and less kept between forward and backward.

python examples/gradient_checkpointing.py
"""

import tiny_moe
import torch

import flex_kernels


def gradients(checkpointing: bool) -> tuple[dict[str, torch.Tensor], int]:
    """The gradient of every graft, and the bytes that autograd kept."""
    model = tiny_moe.model()
    model.requires_grad_(False)
    model.enable_input_require_grads()  # a checkpointed layer is skipped in the backward if nothing in it needs one
    torch.manual_seed(1)
    for graft in flex_kernels.attach_graft(model, width=16, logit_bias=0.0).values():
        torch.nn.init.normal_(graft.gate_up_proj, std=0.2)
        torch.nn.init.normal_(graft.down_proj, std=0.2)
    model.train()
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # its name since 5.23
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = tiny_moe.sequences(8)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    activations = sum(size for pointer, size in kept.items() if pointer not in weights)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, activations


def main() -> dict[str, float]:
    (plain, plain_bytes), (checkpointed, checkpointed_bytes) = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    difference = max(float((plain[name] - checkpointed[name]).abs().max()) for name in plain)
    print(
        f"{len(plain)} gradients differ by {difference:.1e}; kept {plain_bytes} B, checkpointed {checkpointed_bytes} B"
    )
    return {"difference": difference, "bytes": plain_bytes, "checkpointed_bytes": checkpointed_bytes}


if __name__ == "__main__":
    main()
