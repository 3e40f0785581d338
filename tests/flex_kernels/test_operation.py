"""Past the dispatcher or through it: the same bits, and through it wherever torch has something of its own to do."""

from collections.abc import Callable, Iterator

import pytest
import torch
from cases import DEVICE
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import flex_kernels
from flex_kernels import described
from flex_kernels.ops import experts, graft_logits, grafted_route, operation, router

T, H, WIDTH, E, K = 5, 16, 8, 4, 2
OPERATIONS = {
    "grafted_experts": experts._grafted_experts,
    "grafted_experts_bwd": experts._grafted_experts_bwd,
    "graft_logits": graft_logits._graft_logits,
    "graft_logits_bwd": graft_logits._graft_logits_bwd,
    "grafted_route": grafted_route._grafted_route,
    "grafted_route_bwd": grafted_route._grafted_route_bwd,
    "route": router._route,
    "route_bwd": router._route_bwd,
    "combine": router._combine,
    "combine_bwd": router._combine_bwd,
    "routing_plan": router._routing_plan,
}


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the operations that went through the dispatcher, in order."""
    seen: list[str] = []

    def spy(name: str, overload: Callable) -> Callable:
        return lambda *arguments: seen.append(name) or overload(*arguments)

    for name, entry in OPERATIONS.items():
        monkeypatch.setattr(entry, "_overload", spy(name, entry._overload))
    return seen


def layer(requires_grad: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE).requires_grad_(requires_grad)

    return {
        "hidden_states": random(T, H),
        "expert_indices": torch.rand(T, E, generator=generator).topk(K).indices.to(DEVICE),
        "routing_weights": random(T, K),
        "gate_up_proj": random(E, 2 * WIDTH, H).detach(),
        "down_proj": random(E, H, WIDTH).detach(),
        "graft_gate_up_proj": random(2 * WIDTH, H),
        "graft_down_proj": random(H, WIDTH),
        "graft_logits": random(T),
    }


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def everything(requires_grad: bool) -> list[Tensor]:
    """Results of every operation, and the gradients of all that trains."""
    torch.manual_seed(0)
    call = layer(requires_grad)
    route = [random(T, H), random(E, H), random(H), random(1)]
    joined = [random(T, K, H), random(T, K), random(T, H), random(T)]
    if requires_grad:
        [x.requires_grad_() for x in (*route, *joined)]
    results = [
        flex_kernels.grafted_experts(**call, combine="convex"),
        flex_kernels.grafted_experts(**{name: x for name, x in call.items() if "graft" not in name}, recompute=True),
        *flex_kernels.grafted_route(*route, K, True),
        *flex_kernels.route(route[0], K, False),
        flex_kernels.graft_logits(route[0], *route[2:]),
        flex_kernels.combine(*joined),
        *flex_kernels.routing_plan(call["expert_indices"], E),
    ]
    if not requires_grad:
        return results
    trained = [x for x in (*call.values(), *route, *joined) if x.requires_grad]
    loss = sum((x * x.detach().cos()).sum() for x in results if x.requires_grad)
    return [*results, *torch.autograd.grad(loss, trained)]


@pytest.mark.parametrize("requires_grad", [False, True], ids=["forward", "backward"])
def test_the_same_bits_either_way(
    requires_grad: bool, registered: list[str], monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    straight = everything(requires_grad)
    assert registered == []
    monkeypatch.setattr(operation, "_something_is_on", lambda: True)
    through = everything(requires_grad)
    backward = {name for name in OPERATIONS if name.endswith("_bwd")}
    assert set(registered) == (set(OPERATIONS) if requires_grad else set(OPERATIONS) - backward)
    for ours, theirs in zip(straight, through, strict=True):
        assert torch.equal(ours, theirs)
        assert (ours.dtype, ours.stride(), ours.requires_grad) == (theirs.dtype, theirs.stride(), theirs.requires_grad)


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: object = None) -> object:
        return func(*args, **(kwargs or {}))


class Function(TorchFunctionMode):
    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: object = None) -> object:
        return func(*args, **(kwargs or {}))


class Own(Tensor):
    pass


@pytest.mark.parametrize("mode", [Dispatch, Function, FakeTensorMode, torch.profiler.profile])
def test_a_mode_sees_the_registered_operation(mode: Callable, registered: list[str]) -> None:
    with mode() as entered:
        call = layer()
        flex_kernels.grafted_experts(**call)
        gate = (torch.ones(H, device=DEVICE), torch.ones(1, device=DEVICE))
        flex_kernels.graft_logits(call["hidden_states"], *gate)
        flex_kernels.grafted_route(call["hidden_states"], torch.ones(E, H, device=DEVICE), *gate, K, True)
    assert registered == ["grafted_experts", "graft_logits", "grafted_route"]
    if mode is torch.profiler.profile:
        assert {f"flex::{name}" for name in registered} <= {event.key for event in entered.key_averages()}


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("trace", ["vmap", "make_fx", "pre_dispatch", "functionalize", "jit"])
def test_a_transform_or_a_tracer_sees_it_too(trace: str, registered: list[str]) -> None:
    call = layer()
    router = (torch.ones(E, H, device=DEVICE), torch.ones(H, device=DEVICE), torch.ones(1, device=DEVICE))

    def run(x: Tensor) -> Tensor:
        logits = flex_kernels.grafted_route(x, *router, K, True)[2]
        return flex_kernels.grafted_experts(x, *list(call.values())[1:]) + logits[:, None]

    x = call["hidden_states"]
    run(x)
    assert registered == []
    if trace == "vmap":
        torch.vmap(run)(torch.stack([x, x]))
    elif trace == "functionalize":
        torch.func.functionalize(run)(x)
    elif trace == "jit":
        torch.jit.trace(run, x, check_trace=False)
    else:
        made = make_fx(run, pre_dispatch=trace == "pre_dispatch")(x)
        assert any(node.target is torch.ops.flex.grafted_experts.default for node in made.graph.nodes)
    assert registered[:2] == ["grafted_route", "grafted_experts"]


def targets(program: torch.export.ExportedProgram) -> set[object]:
    return {node.target for node in program.graph.nodes}


def test_compiled_and_exported_programs_hold_the_registered_operation() -> None:
    class Module(torch.nn.Module):
        def forward(self, *arguments: Tensor) -> Tensor:
            return flex_kernels.grafted_experts(*arguments)

    graphs: list[torch.fx.GraphModule] = []
    arguments = tuple(layer().values())
    Module()(*arguments)  # so that its description is known
    torch._dynamo.reset()
    compiled = torch.compile(Module(), fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    assert torch.equal(compiled(*arguments), Module()(*arguments))
    assert torch.ops.flex.grafted_experts.default in {node.target for node in graphs[0].graph.nodes}
    for strict in (True, False):
        program = torch.export.export(Module(), arguments, strict=strict)
        assert torch.ops.flex.grafted_experts.default in targets(program)


def test_other_tensors_than_torchs_own_go_through(registered: list[str]) -> None:
    """A subclass; a minus sign that torch owes (an imaginary part); what `torch.func.grad` has left behind."""
    call = layer()
    plain = flex_kernels.grafted_experts(**call)
    owed = torch.complex(torch.zeros_like(call["hidden_states"]), -call["hidden_states"]).conj().imag
    assert owed.is_neg()
    left: list[Tensor] = []
    torch.func.grad(lambda x: left.append(x) or x.sum())(call["hidden_states"])
    for x in (call["hidden_states"].as_subclass(Own), owed, left[0]):
        registered.clear()
        out = flex_kernels.grafted_experts(**{**call, "hidden_states": x})
        assert registered == ["grafted_experts"]
        assert torch.equal(out.as_subclass(Tensor), plain)


def test_inside_another_operation_nothing_is_recorded(registered: list[str]) -> None:
    call = layer(requires_grad=True)
    with torch._C._AutoDispatchBelowAutograd():
        assert not flex_kernels.grafted_experts(**call).requires_grad
    assert registered == ["grafted_experts"]
    assert flex_kernels.grafted_experts(**call).requires_grad


def test_a_second_derivative_is_refused_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in ("straight", "through the dispatcher"):
        call = layer(requires_grad=True)
        leaves = [call["hidden_states"], call["graft_down_proj"]]
        first = torch.autograd.grad(flex_kernels.grafted_experts(**call).square().sum(), leaves, create_graph=True)
        with pytest.raises(RuntimeError, match=r"Trying to backward through flex.grafted_experts_bwd"):
            torch.autograd.grad(first[0].sum(), leaves[0])
        monkeypatch.setattr(operation, "_something_is_on", lambda: True)


def test_what_was_right_once_is_asked_again_of_any_other_call() -> None:
    call = layer()
    flex_kernels.grafted_experts(**call)
    with pytest.raises(ValueError, match=r"down_proj has shape \[4, 15, 8\], expected \[E, 16, I\]"):
        flex_kernels.grafted_experts(**{**call, "down_proj": call["down_proj"][:, 1:]})
    with pytest.raises(TypeError, match=r"routing_weights is torch.int64, expected a floating point tensor"):
        flex_kernels.grafted_experts(**{**call, "routing_weights": call["expert_indices"]})
    with pytest.raises(ValueError, match="combine is 'sum', expected one of"):
        flex_kernels.grafted_experts(**call, combine="sum")
    with pytest.raises(ValueError, match=r"combine is \['sum'\], expected one of"):
        flex_kernels.grafted_experts(**call, combine=["sum"])
    meta = {name: x.to("meta") for name, x in call.items()}
    with pytest.raises(ValueError, match="routing_weights is on"):
        flex_kernels.grafted_experts(**{**meta, "routing_weights": call["routing_weights"]})
    turned = {name: x.T.contiguous().T if x.dim() == 2 else x for name, x in call.items()}  # strides are in no check
    assert torch.equal(flex_kernels.grafted_experts(**turned), flex_kernels.grafted_experts(**call))


def test_descriptions_do_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(described, "MOST", 3)
    found = described.Remembered()
    for tokens in range(10):
        found.put(described.describe((torch.empty(tokens, 2), None), "silu"))
    assert 1 <= len(found) <= 3
    assert described.describe((torch.empty(9, 2), None), "silu") in found
    assert described.describe((torch.empty(9, 2).as_subclass(Own),), "silu") is None
