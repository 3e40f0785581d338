"""`flex::grafted_route`: the router, the graft's gate and the counts at once, and what trains of them."""

import os

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICE, DTYPES
from compare import assert_double_rule, default_dtype, double, exact
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

import flex_kernels
from flex_kernels import plan, reference
from flex_kernels.backends import native, pytorch
from flex_kernels.ops.grafted_route import grafted_route_with_logits

SHAPES = {  # tokens, hidden size, experts, top-k
    "plain": (37, 32, 6, 2),
    "one token": (1, 40, 4, 1),
    "two tokens, many experts": (2, 64, 61, 8),
    "odd H": (19, 33, 5, 3),
    "H = 1": (7, 1, 3, 2),
    "K = E": (9, 24, 5, 5),
    "E = 1": (8, 16, 1, 1),
    "more blocks than one": (83, 70, 17, 4),
    "more experts than a Triton block": (5, 12, 300, 6),
    "no tokens": (0, 8, 4, 2),
}
shapes = pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
renormalized = pytest.mark.parametrize("renormalize", [False, True], ids=["plain", "renormalized"])
Sizes = tuple[int, int, int, int]


def inputs_of(sizes: Sizes, dtype: torch.dtype = torch.float32, has_graft: bool = True) -> list[Tensor | None]:
    num_tokens, hidden_size, num_experts, _ = sizes
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    hidden_states = torch.randn(num_tokens, hidden_size).to(dtype)
    router_weight = (torch.randn(num_experts, hidden_size) * hidden_size**-0.5).to(dtype)
    gate = (torch.randn(hidden_size).to(wide) * hidden_size**-0.5, torch.randn(1).to(wide))
    inputs = [hidden_states, router_weight, *(gate if has_graft else (None, None))]
    return [x if x is None else x.to(DEVICE) for x in inputs]


def few_integers(sizes: Sizes, dtype: torch.dtype) -> list[Tensor]:
    """Small integers: every sum is exact in any order, every logit a bf16 number. Many ties, no rounding."""
    num_tokens, hidden_size, num_experts, _ = sizes
    shapes = ((num_tokens, hidden_size), (num_experts, hidden_size), (hidden_size,), (1,))
    drawn = [torch.randint(-1, 2, shape).to(DEVICE) for shape in shapes]
    return [drawn[0].to(dtype), drawn[1].to(dtype), drawn[2].float(), drawn[3].float()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_graft", [True, False], ids=["graft", "no graft"])
@renormalized
@shapes
def test_forward(sizes: Sizes, renormalize: bool, has_graft: bool, dtype: torch.dtype, backend: str) -> None:
    inputs, (num_tokens, _, num_experts, top_k) = inputs_of(sizes, dtype, has_graft), sizes
    *ours, logits = grafted_route_with_logits(*inputs, top_k, renormalize)
    plain = reference.grafted_route(*inputs, top_k, renormalize)
    # The logits by the double rule; then the routes of those very logits, of which no rounding is left to differ.
    wanted_logits = F.linear(inputs[0], inputs[1])
    assert_double_rule([logits], [wanted_logits], [F.linear(inputs[0].double(), inputs[1].double())], dtype, ("l",))
    weights, indices = reference.route(logits, top_k, renormalize)
    assert torch.equal(ours[1], indices)
    torch.testing.assert_close(ours[0], weights, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours[3], torch.bincount(indices.flatten(), minlength=num_experts).int())
    assert [x.dtype for x in ours] == [x.dtype for x in plain]
    assert [x.shape for x in ours] == [x.shape for x in plain]
    if has_graft:
        states, weight, bias = inputs[0].double(), inputs[2].double(), inputs[3].double()
        # Beside the sum's terms: those of one token may cancel.
        terms = states.abs() @ weight.abs() + bias.abs()
        assert ((ours[2].double() - (states @ weight + bias)).abs() <= 8 * torch.finfo(torch.float32).eps * terms).all()
    assert int(ours[3].sum()) == num_tokens * top_k


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@renormalized
@pytest.mark.parametrize("sizes", [(40, 33, 7, 3), (3, 20, 60, 8), (1, 17, 5, 5)], ids=str)
def test_the_models_own_choice_and_ties(sizes: Sizes, renormalize: bool, dtype: torch.dtype, backend: str) -> None:
    """Where nothing is rounded, everything is the reference's, ties among it, and as many of them as there are."""
    inputs = few_integers(sizes, dtype)
    ours = flex_kernels.grafted_route(*inputs, sizes[3], renormalize)
    wanted = reference.grafted_route(*inputs, sizes[3], renormalize)
    assert (F.linear(inputs[0], inputs[1]).sort(dim=1).values.diff(dim=1) == 0).any(), "no ties to test"
    torch.testing.assert_close(ours[0], wanted[0], rtol=1e-6, atol=1e-6)
    for index in (1, 2, 3):
        assert torch.equal(ours[index], wanted[index])


def test_ties_go_to_the_lower_index(backend: str) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 1.0], [0.0] * 5], device=DEVICE)
    _, indices, _, counts = flex_kernels.grafted_route(logits, torch.eye(5, device=DEVICE), None, None, 3, False)
    assert indices.tolist() == [[1, 2, 3], [0, 1, 2]]
    assert counts.tolist() == [1, 2, 2, 1, 0]


def test_the_choice_is_made_of_rounded_logits(backend: str) -> None:
    """1 + 2^-10 is 1 in bf16: a tie there, which the lower index wins, although the later sum is larger in fp32."""
    hidden_states = torch.tensor([[1.0, 2.0**-10]], device=DEVICE).bfloat16()
    router_weight = torch.tensor([[1.0, 0.0], [1.0, 1.0]], device=DEVICE).bfloat16()
    assert flex_kernels.grafted_route(hidden_states, router_weight, None, None, 1, False)[1].tolist() == [[0]]
    wide = (hidden_states.float(), router_weight.float())
    assert flex_kernels.grafted_route(*wide, None, None, 1, False)[1].tolist() == [[1]]


def test_a_row_of_nan_stays_in_range(backend: str) -> None:
    hidden_states, router_weight, *gate = inputs_of((6, 16, 5, 2))
    hidden_states[2] = float("nan")
    _, indices, _, counts = flex_kernels.grafted_route(hidden_states, router_weight, *gate, 2, True)
    assert ((indices >= 0) & (indices < 5)).all()
    assert torch.equal(counts, torch.bincount(indices.flatten(), minlength=5).int())
    wanted = reference.grafted_route(hidden_states, router_weight, *gate, 2, True)[1]
    others = torch.arange(6, device=DEVICE) != 2
    assert torch.equal(indices[others], wanted[others])


def gradients(function, inputs: list, sizes: Sizes, renormalize: bool, d_out: list[Tensor]) -> list[Tensor | None]:
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    weights, _, logits, _ = function(*leaves, sizes[3], renormalize)
    outs = [(weights, d_out[0].to(weights.dtype)), (logits, d_out[1].to(logits.dtype))][: 2 if logits.numel() else 1]
    torch.autograd.backward([out for out, _ in outs], [d for _, d in outs])
    return [None if x is None else x.grad for x in leaves]


# Where the one weight is always 1, its gradient is nothing but rounding.
GRADIENT_CASES = [
    (sizes, renormalize)
    for name, sizes in SHAPES.items()
    for renormalize in (False, True)
    if name not in ("no tokens", "E = 1") and not (sizes[3] == 1 and renormalize)
]
GRADIENTS = ("d_hidden_states", "d_router_weight", "d_graft_logit_weight", "d_graft_logit_bias")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_graft", [True, False], ids=["graft", "no graft"])
@pytest.mark.parametrize(("sizes", "renormalize"), GRADIENT_CASES, ids=str)
def test_gradients(sizes: Sizes, renormalize: bool, has_graft: bool, dtype: torch.dtype, backend: str) -> None:
    num_tokens, _, _, top_k = sizes
    inputs = inputs_of(sizes, dtype, has_graft)
    d_out = [torch.randn(num_tokens, top_k, device=DEVICE), torch.randn(num_tokens, device=DEVICE)]
    ours = gradients(flex_kernels.grafted_route, inputs, sizes, renormalize, d_out)
    plain = gradients(reference.grafted_route, inputs, sizes, renormalize, d_out)
    with exact():
        truth = gradients(reference.grafted_route, double(inputs), sizes, renormalize, d_out)
    assert_double_rule(ours[:2], plain[:2], truth[:2], dtype, GRADIENTS[:2])
    assert_double_rule(ours[2:], plain[2:], truth[2:], torch.float32, GRADIENTS[2:])


def test_gradients_of_no_tokens(backend: str) -> None:
    leaves = [x.requires_grad_() for x in inputs_of(SHAPES["no tokens"])]
    weights, _, logits, _ = flex_kernels.grafted_route(*leaves, 2, True)
    (weights.sum() + logits.sum()).backward()
    for leaf in leaves:
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("needs", [(i, j, k, m) for i in (0, 1) for j in (0, 1) for k in (0, 1) for m in (0, 1)][1:])
@pytest.mark.parametrize("reads", ["both", "weights", "logits"])
def test_only_what_is_needed(needs: tuple[int, ...], reads: str, backend: str) -> None:
    """Every set of what trains, and of what of the results a loss reads."""

    def run(function) -> list[Tensor | None]:
        leaves = [x.clone().requires_grad_(bool(need)) for x, need in zip(inputs, needs, strict=True)]
        weights, _, logits, _ = function(*leaves, 2, True)
        loss = sum(
            x.square().sum() for x, name in ((weights, "weights"), (logits, "logits")) if reads in ("both", name)
        )
        if loss.requires_grad:
            loss.backward()
        return [x.grad for x in leaves]

    inputs = inputs_of((21, 48, 5, 2))
    for ours, wanted, need in zip(run(flex_kernels.grafted_route), run(reference.grafted_route), needs, strict=True):
        assert need or ours is None
        if wanted is None or ours is None:  # what the loss does not depend on: None, or zeros
            assert ours is None or not ours.any()
            assert wanted is None or not wanted.any()
        else:
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


def test_a_frozen_router_has_no_gradient_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    multiply = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: seen.append((tuple(a.shape), tuple(b.shape))) or multiply(a, b))
    hidden_states, router_weight, *_ = inputs_of((11, 16, 5, 2))
    flex_kernels.grafted_route(hidden_states.requires_grad_(), router_weight, None, None, 2, True)[0].sum().backward()
    assert seen == [((11, 5), (5, 16))]  # the hidden states' alone


def test_nothing_is_kept_where_nothing_trains() -> None:
    inputs = inputs_of((11, 16, 5, 2))
    assert grafted_route_with_logits(*inputs, 2, True, False)[4].shape == (0, 5)
    inputs[0].requires_grad_()
    assert grafted_route_with_logits(*inputs, 2, True, False)[4].shape == (11, 5)
    with torch.no_grad():
        assert grafted_route_with_logits(*inputs, 2, True, False)[4].shape == (0, 5)


@renormalized
@pytest.mark.parametrize("has_graft", [True, False], ids=["graft", "no graft"])
def test_gradcheck_in_fp64(renormalize: bool, has_graft: bool) -> None:
    inputs = [None if x is None else x.requires_grad_() for x in inputs_of((4, 6, 5, 2), torch.float64, has_graft)]
    assert torch.autograd.gradcheck(
        lambda *x: flex_kernels.grafted_route(*x, 2, renormalize)[0 : 3 if has_graft else 1 : 2], inputs
    )


def test_fp64_is_the_references(backend: str) -> None:
    inputs = inputs_of((13, 40, 6, 2), torch.float64)
    ours = flex_kernels.grafted_route(*inputs, 2, True)
    with exact():
        wanted = reference.grafted_route(*inputs, 2, True)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast(backend: str) -> None:
    """As `F.linear` under autocast: the product in bf16, softmax and gate in fp32."""
    inputs = inputs_of((12, 64, 6, 2))
    half = [inputs[0].bfloat16(), inputs[1].bfloat16(), *inputs[2:]]
    wanted = flex_kernels.grafted_route(*half, 2, True)
    leaf = inputs[0].clone().requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = flex_kernels.grafted_route(leaf, *inputs[1:], 2, True)
        (found[0].square().sum() + found[2].square().sum()).backward()
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)
    assert leaf.grad.dtype == torch.float32


@pytest.mark.parametrize("has_graft", [True, False], ids=["graft", "no graft"])
def test_opcheck(has_graft: bool, backend: str) -> None:
    hidden_states, router_weight, *gate = inputs_of((7, 33, 5, 2), has_graft=has_graft)
    gate = [None if x is None else x.requires_grad_() for x in gate]
    for states in (hidden_states, torch.randn(33, 7, device=DEVICE).T, hidden_states[:1].expand(7, 33)):
        for weight in (router_weight, torch.randn(33, 5, device=DEVICE).T):
            for trained in (True, False):
                args = (states.detach().requires_grad_(), weight.detach().requires_grad_(trained), *gate, 2, True, True)
                torch.library.opcheck(torch.ops.flex.grafted_route.default, args)
    weights, indices, logits, _, kept = grafted_route_with_logits(hidden_states, router_weight, *gate, 2, True)
    weight = None if gate[0] is None else gate[0].detach()
    expanded = (torch.ones(1, 1, device=DEVICE).expand(7, 2), torch.ones(1, device=DEVICE).expand(7))
    for d_weights, d_logits in ((weights, logits), (torch.randn(2, 7, device=DEVICE).T, expanded[1]), expanded):
        d_logits = d_logits if has_graft else None
        for needs in ((True, True, has_graft), (True, False, False), (False, True, False), (False, False, has_graft)):
            args = (d_weights, d_logits, hidden_states, router_weight, weight, kept, indices, True, *needs)
            args = [x.detach() if isinstance(x, Tensor) else x for x in args]
            operation = torch.ops.flex.grafted_route_bwd.default
            torch.library.opcheck(operation, args, test_utils=("test_schema", "test_faketensor"))


def test_compiles_whole_and_once() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flex_kernels.grafted_route, fullgraph=True, dynamic=True, backend=counter)
    for num_tokens in (9, 4, 30):
        inputs = [x.requires_grad_() for x in inputs_of((num_tokens, 24, 6, 2))]

        def loss(results: tuple[Tensor, ...]) -> Tensor:
            return results[0].square().sum() + results[2].square().sum()

        found = torch.autograd.grad(loss(compiled(*inputs, 2, True)), inputs)
        wanted = torch.autograd.grad(loss(flex_kernels.grafted_route(*inputs, 2, True)), inputs)
        for ours, theirs in zip(found, wanted, strict=True):
            assert torch.equal(ours, theirs)
    assert counter.frame_count == 1


@pytest.mark.skipif(native.module() is None, reason="the native module was not built")
@pytest.mark.parametrize("isa", [] if native.module() is None else native.module().available_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@shapes
def test_every_instruction_set(sizes: Sizes, dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEX_ISA", isa)
    inputs = [x.cpu() for x in few_integers(sizes, dtype)]
    ours = native.grafted_route_fwd(*inputs, sizes[3], True, True)
    wanted = pytorch.grafted_route_fwd(*inputs, sizes[3], True, True)
    torch.testing.assert_close(ours[0], wanted[0], rtol=1e-6, atol=1e-6)
    for index in (1, 2, 3, 4):
        assert torch.equal(ours[index], wanted[index])


@pytest.mark.skipif(native.module() is None, reason="the native module was not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_on_any_threads_and_in_any_company(dtype: torch.dtype) -> None:
    """Sizes at which several threads share the tokens, and (one token, many wide experts) the experts."""
    threads = torch.get_num_threads()
    try:
        for sizes in ((150, 1040, 70, 6), (1, 4096, 300, 8)):
            inputs, results = [x.cpu() for x in inputs_of(sizes, dtype)], []
            for count in (1, 2, 7):
                torch.set_num_threads(count)
                results.append(native.grafted_route_fwd(*inputs, sizes[3], True, True))
                for a, b in zip(results[0], results[-1], strict=True):
                    assert torch.equal(a, b)
            alone = native.grafted_route_fwd(inputs[0][-1:], *inputs[1:], sizes[3], True, True)
            for index in (0, 1, 2, 4):
                assert torch.equal(alone[index][0], results[0][index][-1])
    finally:
        torch.set_num_threads(threads)


def others_of(inputs: list[Tensor]) -> dict[str, list]:
    """Calls that csrc must not take as they are: what each changes, and the arguments."""
    hidden_states, router_weight, weight, bias = inputs
    owed = torch.complex(torch.zeros_like(hidden_states), -hidden_states).conj().imag
    left: list[Tensor] = []
    torch.func.grad(lambda x: left.append(x) or x.sum())(hidden_states)
    changes = {
        "transposed": {0: hidden_states.T.contiguous().T},
        "expanded": {0: hidden_states[:1].expand(5, -1)},
        "router transposed": {1: router_weight.T.contiguous().T},
        "gate with steps": {2: torch.stack([weight, weight], 1)[:, 0]},
        "a subclass": {0: hidden_states.as_subclass(Own)},
        "a minus that is owed": {0: owed},
        "left by a transform": {0: left[0]},
        "a gate in bf16": {2: weight.bfloat16(), 3: bias.bfloat16()},
        "fp64": {i: x.double() for i, x in enumerate(inputs)},
        "fp16": {i: x.half() for i, x in enumerate(inputs[:2])},
    }
    return {name: [change.get(i, x) for i, x in enumerate(inputs)] for name, change in changes.items()}


class Own(Tensor):
    pass


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch's own, of forward mode
@pytest.mark.skipif(native.module() is None, reason="the native module was not built")
def test_what_csrc_takes_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "INTERPRET", False)
    inputs = [x.cpu() for x in inputs_of((5, 24, 6, 2))]
    taken, plain_route = [], native.plain_grafted_route

    def spy(*arguments: object) -> object:
        taken.append(plain_route(*arguments))
        return taken[-1]

    monkeypatch.setattr(native, "plain_grafted_route", spy)
    for states, weight in ((inputs[0], inputs[1]), (inputs[0].bfloat16(), torch.nn.Parameter(inputs[1].bfloat16()))):
        for gate in (inputs[2:], [None, None]):
            with torch.no_grad():
                ours = flex_kernels.grafted_route(states, weight, *gate, 2, True)
                assert ours is taken[-1]
                wanted = native.grafted_route_fwd(states, weight, *gate, 2, True, True)
                kept = grafted_route_with_logits(states, weight, *gate, 2, True)
            assert kept is taken[-1]
            for found in (ours, kept):
                for a, b in zip(found, wanted, strict=False):
                    assert torch.equal(a, b)
                    assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
            assert (len(ours), len(kept)) == (4, 5)
    for name, arguments in others_of(inputs).items():
        taken.clear()
        ours = flex_kernels.grafted_route(*arguments, 2, True)
        assert all(found is None for found in taken), name
        wanted = reference.grafted_route(*(x.as_subclass(Tensor) for x in arguments), 2, True)
        assert torch.equal(ours[1], wanted[1]), name
        torch.testing.assert_close(ours[2], wanted[2].to(ours[2].dtype), rtol=1e-3, atol=1e-3)
    taken.clear()
    flex_kernels.grafted_route(inputs[0].clone().requires_grad_(), *inputs[1:], 2, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        flex_kernels.grafted_route(*inputs, 2, True)
    with forward_ad.dual_level():
        moving = forward_ad.make_dual(inputs[0], inputs[0])
        with pytest.raises(NotImplementedError, match="grafted_route has no forward-mode derivative"):
            flex_kernels.grafted_route(moving, *inputs[1:], 2, True)
    assert taken == []  # not even asked


@pytest.mark.skipif(native.module() is None, reason="the native module was not built")
def test_csrc_says_no_to_what_it_would_read_wrongly() -> None:
    inputs = [x.cpu() for x in inputs_of((5, 24, 6, 2))]
    wrong = {
        "a row of the router too short": {1: torch.zeros(6, 23)},
        "one dimension": {0: torch.zeros(24)},
        "three": {0: torch.zeros(5, 1, 24)},
        "the router's dtype": {1: inputs[1].bfloat16()},
        "integers": {0: torch.zeros(5, 24, dtype=torch.int64), 1: torch.zeros(6, 24, dtype=torch.int64)},
        "a short gate": {2: torch.zeros(23)},
        "no bias": {3: torch.zeros(0)},
        "a bias without a dimension": {3: torch.zeros(())},
        "half a gate": {3: None},
        "the other half": {2: None},
        "another device": {0: inputs[0].to("meta")},
        "sparse": {0: inputs[0].to_sparse()},
        "no tensor": {0: [[1.0] * 24]},
        "K = 0": {4: 0},
        "K > E": {4: 7},
        "K beyond 64 bits": {4: 2**70},
        "K is no integer": {4: 2.0},
        "K is a bool": {4: True},
        "renormalize is no bool": {5: 1},
    }
    for name, change in wrong.items():
        arguments = [change.get(i, x) for i, x in enumerate((*inputs, 2, True))]
        assert native.plain_grafted_route(*arguments, False) is None, name
    assert native.plain_grafted_route(*inputs, 2, True, False) is not None


def test_any_default_dtype(backend: str) -> None:
    inputs = [x.cpu() for x in inputs_of((5, 24, 6, 2))]
    wanted = flex_kernels.grafted_route(*inputs, 2, True)
    for dtype in (torch.bfloat16, torch.float64):
        with default_dtype(dtype):
            found = flex_kernels.grafted_route(*inputs, 2, True)
            kept = grafted_route_with_logits(*inputs, 2, True)
        for results in (found, kept):
            for a, b in zip(results, wanted, strict=False):
                assert torch.equal(a, b)


def test_no_hidden_size(backend: str) -> None:
    """Logits of nothing are zero, and the gate's are its bias."""
    inputs = [torch.zeros(3, 0), torch.zeros(4, 0), torch.zeros(0), torch.tensor([1.5])]
    ours = flex_kernels.grafted_route(*(x.to(DEVICE) for x in inputs), 2, True)
    for a, b in zip(ours, reference.grafted_route(*(x.to(DEVICE) for x in inputs), 2, True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(native.module() is None, reason="the native module was not built")
@pytest.mark.parametrize("error", [AttributeError("no table"), RuntimeError("DLPack 2"), ImportError("not built")])
def test_without_torchs_table_pytorch_computes(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(native.module(), "know_tensors", fail)
    with pytest.warns(RuntimeWarning, match=f"the native module is not there .{error}"):
        assert native.module.__wrapped__() is None


@pytest.mark.skipif(native.module() is None, reason="the native module was not built")
def test_another_class_offers_no_table() -> None:
    like = native._MADE_LIKE
    with pytest.raises(AttributeError, match="__dlpack_c_exchange_api__"):
        native.module().know_tensors(int, torch.nn.Parameter, *like)
    test_csrc_says_no_to_what_it_would_read_wrongly()  # it still knows torch's


def test_who_computes() -> None:
    for dtype, name in ((torch.float32, "native"), (torch.bfloat16, "native"), (torch.float64, "torch")):
        if os.environ.get("TRITON_INTERPRET") == "1":
            name = "torch" if dtype == torch.float64 else "triton"
        elif native.module() is None:
            name = "torch"
        assert plan.backend_name(plan.cpu_backend("grafted_route", dtype, dtype)) == name


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: torch.zeros(3)}, ValueError, r"hidden_states has shape \[3\], expected \[T, H\]"),
        ({1: torch.zeros(4, 7)}, ValueError, r"router_weight has shape \[4, 7\], expected \[E, 8\]"),
        ({2: torch.zeros(7)}, ValueError, r"graft_logit_weight has shape \[7\], expected \[8\]"),
        ({3: torch.zeros(())}, ValueError, r"graft_logit_bias has shape \[\], expected \[1\]"),
        ({3: None}, ValueError, "one of graft_logit_weight and graft_logit_bias is missing, expected both or none"),
        ({4: 5}, ValueError, "top_k is 5, expected 1 to 4"),
        ({4: 0}, ValueError, "top_k is 0, expected 1 to 4"),
        ({0: torch.zeros(3, 8, dtype=torch.int64)}, TypeError, "hidden_states is torch.int64, expected a floating"),
        ({1: torch.zeros(4, 8).half()}, TypeError, "router_weight is torch.float16, expected torch.float32"),
    ],
    ids=["states", "router", "gate", "bias", "half a gate", "K > E", "K = 0", "integers", "dtypes"],
)
def test_bad_input(change: dict, error: type[Exception], message: str) -> None:
    arguments = [torch.zeros(3, 8), torch.zeros(4, 8), torch.zeros(8), torch.zeros(1), 2, False]
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(error, match=message):
        flex_kernels.grafted_route(*arguments)
