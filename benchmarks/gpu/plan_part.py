"""The routing plan: Triton's, csrc's in CUDA, PyTorch's, and the plain `sort` + `bincount` that all must beat.

Shape names are the models'; ours is the one that `plan.py` chooses.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.record import OURS, Key
from benchmarks.gpu.session import Session
from benchmarks.shapes import Shape
from flex_kernels import plan, reference
from flex_kernels.backends import native, pytorch


def sort_and_bincount(expert_indices: Tensor, num_experts: int) -> tuple[Tensor, ...]:
    ids = expert_indices.flatten()
    return ids.sort(stable=True).indices, torch.bincount(ids, minlength=num_experts)


def measure(session: Session) -> None:
    session.each("plan", session.tokens, "plan", measure_plan)


def measure_plan(session: Session, model: Shape, tokens: int) -> None:
    place, top_k, num_experts = ("plan", model.name, tokens), model.top_k, model.num_experts
    indices = torch.rand(tokens, num_experts, device=session.device.kind).topk(top_k).indices
    truth = reference.routing_plan(indices, num_experts)
    on_cpu = session.device.kind == "cpu"
    chosen = (plan.cpu_backend if on_cpu else plan.cuda_backend)("routing_plan", torch.float32).routing_plan
    makers: dict[str, Callable] = {"torch": pytorch.routing_plan, OURS: chosen}
    if not on_cpu:
        makers = {"triton": plan.triton_backend().routing_plan, "cuda": native.routing_plan, **makers}

    def checked(make: Callable) -> Callable:
        for ours, wanted in zip(make(indices, num_experts), truth, strict=True):
            assert torch.equal(ours, wanted), "not the reference's plan"
        return lambda: make(indices, num_experts)

    runs = {
        name: session.attempt(Key(*place, "plan", name), lambda make=make: checked(make))
        for name, make in makers.items()
    }
    runs = {name: run for name, run in runs.items() if run is not None}
    runs = {"sort + bincount": lambda: sort_and_bincount(indices, num_experts), **runs}
    if OURS not in runs:
        raise AssertionError(f"{place}: the chosen routing plan is wrong, see the skipped lines")
    for name, values in session.measure(runs).items():
        session.record.add(Key(*place, "plan", name), **values, launches=session.device.launches(runs[name]))
