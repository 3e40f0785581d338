"""accelerate with FSDP2: every process holds a part of all weights, frozen experts and grafts alike.

    torchrun --nproc-per-node 2 examples/fsdp2.py

FSDP joins a layer's weights for its forward and its backward, so the fused path sees whole tensors. Each process takes
its own half of a batch; the losses are those of one process that takes it whole.
"""

import tiny_moe
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from torch import Tensor, nn

import flex_kernels

STEPS = 4


def grafted_model() -> nn.Module:
    model = tiny_moe.model()
    model.requires_grad_(False)
    torch.manual_seed(1)
    for graft in flex_kernels.attach_graft(model, width=16, logit_bias=0.0).values():
        graft.reset_parameters()
    return model


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)


def alone() -> list[float]:
    """The losses of one process."""
    model, losses = grafted_model(), []
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        ids = tiny_moe.sequences(8, seed=step)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def accelerator() -> Accelerator:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["OlmoeDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    made = Accelerator(cpu=not torch.cuda.is_available(), fsdp_plugin=plugin)
    if made.device.type == "cpu":  # accelerate 1.15 chooses FSDP on accelerators only; here it is told to
        made.state.distributed_type, made.state.fsdp_plugin = DistributedType.FSDP, plugin
    return made


def main() -> None:
    ours = accelerator()
    model = grafted_model()
    model, optimizer = ours.prepare(model, optimizer_of(model))
    half = slice(ours.process_index, None, ours.num_processes)
    losses = []
    for step in range(STEPS):
        ids = tiny_moe.sequences(8, seed=step)[half]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        ours.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(ours.reduce(loss.detach(), "mean").item())
    parts = {type(parameter).__name__ for parameter in model.parameters()}
    if ours.is_main_process:
        flex_kernels.explain(model)
        print(f"parameters are {parts}, {ours.num_processes} processes: {[f'{x:.5f}' for x in losses]}")
        whole = alone()
        print(f"one process: {[f'{x:.5f}' for x in whole]}")
        torch.testing.assert_close(Tensor(losses), Tensor(whole), rtol=1e-5, atol=1e-5)
        assert parts == {"DTensor"}
    ours.wait_for_everyone()  # a group that one process leaves early can abort in gloo
    ours.end_training()


if __name__ == "__main__":
    main()
