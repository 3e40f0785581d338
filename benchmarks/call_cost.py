"""What a call costs beside its arithmetic: one token of a layer so small that nothing is left to compute.

    python -m benchmarks.call_cost

`straight` is what a user has; `registered` the same call through torch's dispatcher, as every call went before and as
compiled code still does; `csrc` the arithmetic alone, where it is a function of its own. One thread, microseconds, the
least of all rounds; the columns are measured in turns, so that what else the machine does meets all of them.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import flex_kernels
from benchmarks.tables import table
from benchmarks.turns import least_seconds
from flex_kernels.backends import native
from flex_kernels.backends.call import LayerCall
from flex_kernels.ops import operation

HIDDEN_SIZE, NUM_EXPERTS, TOP_K, WIDTH = 64, 8, 2, 64
ROUNDS = 3000
Call = Callable[[], object]


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """Inside, no call goes past the dispatcher."""
    kept = operation._something_is_on
    operation._something_is_on = lambda: True
    try:
        yield
    finally:
        operation._something_is_on = kept


def inputs_of(requires_grad: bool) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Of the layer, of its router, and what an optimizer would ask the gradients of."""
    torch.manual_seed(0)
    x, weights = torch.randn(1, HIDDEN_SIZE), torch.rand(1, TOP_K)
    gate_up, down = torch.randn(NUM_EXPERTS, 2 * WIDTH, HIDDEN_SIZE), torch.randn(NUM_EXPERTS, HIDDEN_SIZE, WIDTH)
    graft = [torch.randn(2 * WIDTH, HIDDEN_SIZE), torch.randn(HIDDEN_SIZE, WIDTH), torch.randn(1)]
    gate = [torch.randn(HIDDEN_SIZE), torch.zeros(1)]
    trained = [x, weights, *graft, *gate]
    for tensor in trained:
        tensor.requires_grad_(requires_grad)
    layer = [x, torch.tensor([[1, 3]]), weights, gate_up, down, *graft]
    return layer, [x, torch.randn(NUM_EXPERTS, HIDDEN_SIZE), *gate], trained


def calls(requires_grad: bool) -> dict[str, Call]:
    layer, route, trained = inputs_of(requires_grad)
    moe = flex_kernels.GraftedMoE(HIDDEN_SIZE, WIDTH, NUM_EXPERTS, TOP_K, graft_width=WIDTH).freeze_pretrained()
    forwards: dict[str, tuple[Call, list[Tensor]]] = {
        "grafted_experts": (lambda: flex_kernels.grafted_experts(*layer)[None], trained[:5]),
        "grafted_route": (lambda: flex_kernels.grafted_route(*route, TOP_K, True)[:3:2], [trained[0], *trained[5:]]),
        "graft_logits": (lambda: flex_kernels.graft_logits(layer[0], *route[2:])[None], [trained[0], *trained[5:]]),
        "GraftedMoE": (lambda: moe(layer[0])[None], [trained[0], *(p for p in moe.parameters() if p.requires_grad)]),
    }
    if not requires_grad:
        return {name: torch.no_grad()(forward) for name, (forward, _) in forwards.items()}

    def step(forward: Call, leaves: list[Tensor]) -> Call:
        d_out = [torch.ones_like(x) for x in forward()]
        return lambda: torch.autograd.grad(list(forward()), leaves, d_out)

    return {name: step(*entry) for name, entry in forwards.items()}


def arithmetic() -> Call:
    """csrc's forward of the layer of `grafted_experts`, from addresses to addresses."""
    x, indices, *layer = inputs_of(False)[0]
    sorted_pairs, _, expert_offsets = native.routing_plan(indices, NUM_EXPERTS)
    described, kept = native._described(LayerCall(x, sorted_pairs, expert_offsets, *layer))
    out, forward = torch.empty_like(x), native.module().experts_forward
    return lambda: (kept, forward(described, out.data_ptr(), 0, 0, 1))


def microseconds(runs: dict[str, Call], rounds: int) -> dict[str, float]:
    return {name: 1e6 * seconds for name, seconds in least_seconds(runs, rounds).items()}


def measure(rounds: int = ROUNDS) -> list[list[object]]:
    """A row for each operation and pass: its name, the pass, straight, registered, how many times as long."""
    rows = []
    for what, requires_grad in (("forward", False), ("forward and backward", True)):
        for name, call in calls(requires_grad).items():
            ways = {"straight": call, "registered": registered()(call)}
            found = microseconds(ways, rounds)
            rows.append([name, what, *(f"{found[way]:.1f}" for way in ways)])
            rows[-1].append(f"{found['registered'] / found['straight']:.2f}x")
    if native.module() is not None:
        csrc = microseconds({"csrc": arithmetic()}, rounds)["csrc"]
        rows.append(["csrc's part of it", "forward", f"{csrc:.1f}", "", ""])
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("\n".join(table(["call", "pass", "straight us", "registered us", "gain"], measure())))
