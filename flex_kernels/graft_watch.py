"""What goes wrong silently with a graft on a transformers model, said once: it is frozen, not started, not saved.

peft and the Trainer know nothing of grafts: peft freezes all it finds, an adapter's file holds the adapter alone, and
`from_pretrained` drops what its class does not have. Nothing here patches them. A hook that `attach_graft` hangs on the
experts looks at the first forward in training mode, one on the graft at every `state_dict` that is asked for by a
function that saves.
"""

import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from flex_kernels.layer import Graft, LoraGraft

SAVERS = {"save_pretrained", "save_model"}  # of transformers, peft, and of the Trainer where it gathers a sharded model
ZERO_3 = "DeepSpeed ZeRO-3 keeps {} in parts that only a module's own forward puts together, and a graft is computed "
ZERO_3 += "by its experts' forward; ZeRO-2, DDP and FSDP2 work"


class GraftWatch:
    """What the grafts of one model have in common: who they are and what was said about them already."""

    def __init__(self) -> None:
        self.grafts: dict[str, Graft] = {}
        self.looked = self.told_training = self.told_saving = False

    def before_forward(self, graft: Graft) -> None:
        """At the first forward with gradients: warns of what will not train. A graft frozen later is seen as well."""
        if self.told_training or not torch.is_grad_enabled() or (self.looked and trains(graft)):
            return
        self.looked = True
        states = {name: graft_state(graft) for name, graft in self.grafts.items()}
        wrong = {name: state for name, state in states.items() if state != "trained"}
        if wrong:
            self.told_training = True
            name, state = next(iter(wrong.items()))
            warnings.warn(
                f"{len(wrong)} of {len(states)} grafts will not train; that of {name or 'the experts'} is {state}. "
                "flex_kernels.train_grafts(model) unfreezes grafts; one that is not started needs reset_parameters() "
                "or a copy of pretrained weights.",
                UserWarning,
                stacklevel=2,
            )


def trains(graft: Graft) -> bool:
    """Whether any parameter that is the graft's own to train asks for a gradient."""
    return any(parameter.requires_grad for parameter in own_parameters(graft))


def own_parameters(graft: Graft) -> list[nn.Parameter]:
    """What of a graft is to train: all of it, or the factors and the gate beside a frozen copy."""
    return [p for name, p in graft.named_parameters() if graft.parameter_roles.get(name) == "personal"]


def graft_state(graft: Graft) -> str:
    """ "trained", "frozen", "not started", or "not started and frozen".

    Not started: so much of it is zero that its weights get no gradient, ever. Of tensors that are sharded or not there
    (meta) this is not asked.
    """
    troubles = ["not started"] * _is_dead(graft) + ["frozen"] * (not trains(graft))
    return " and ".join(troubles) or "trained"


@torch.no_grad()
def _is_dead(graft: Graft) -> bool:
    """Each gradient of `D (act(G x) * (U x))` has the other two matrices as factors: with two of them zero all are."""
    lora = isinstance(graft, LoraGraft) and not graft.merged
    tensors = [graft.gate_up_proj, graft.down_proj, *((graft.gate_up_lora_b, graft.down_lora_b) if lora else ())]
    if any(is_sharded(tensor) or is_partitioned(tensor) or tensor.is_meta for tensor in tensors):
        return False
    parts = [(*tensors[0].chunk(2), tensors[1])]
    if lora:  # a low-rank part whose B is zero is zero
        parts.append((*tensors[2].chunk(2), tensors[3]))
    return sum(not any(bool(part.any()) for part in matrix) for matrix in zip(*parts, strict=True)) > 1


def is_sharded(tensor: Tensor) -> bool:
    return getattr(tensor, "device_mesh", None) is not None


def is_partitioned(tensor: Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 has it: then it has an id there, and its shape is [0] outside a forward."""
    return hasattr(tensor, "ds_id") or hasattr(tensor, "ds_shape")


def refuse_partitioned(name: str, module: nn.Module) -> None:
    """
    Raises:
        ValueError: DeepSpeed ZeRO-3 has partitioned a parameter of this module.
    """
    if any(is_partitioned(parameter) for parameter in module.parameters()):
        raise ValueError(ZERO_3.format(f"the weights of {name or type(module).__name__}"))


def before_state_dict(graft: Graft, *_: Any) -> None:
    """Warns, once, where a function that saves asks for the state of a model whose grafts nobody has saved."""
    watch: GraftWatch = graft.watch
    if watch.told_saving or not _is_saved():
        return
    watch.told_saving = True
    warnings.warn(
        "this model carries grafts: a peft adapter's files do not hold them, and from_pretrained drops them. "
        "flex_kernels.save_grafts(model, folder) and load_grafts(model, folder) keep them, in a Trainer "
        "callbacks=[flex_kernels.graft_callback()].",
        UserWarning,
        stacklevel=2,
    )


def know_saving(grafts: dict[str, Graft]) -> None:
    """Somebody saves these grafts; no warning is needed."""
    for graft in grafts.values():
        if (watch := getattr(graft, "watch", None)) is not None:
            watch.told_saving = True


def _is_saved() -> bool:
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name not in SAVERS:
        frame = frame.f_back
    return frame is not None
