"""`attach_graft(..., fuse_router=True)`: the model's own router, computed with the graft's gate."""

import copy
import sys

import pytest
import torch
from families import build, experts_classes, inputs_of, run
from torch import Tensor, nn

import flex_kernels
from flex_kernels import fused_router, layer, reference

FAMILIES = experts_classes()


def router_class(family: str) -> type | None:
    """The first of its family's module that can be fused and goes with these experts."""
    module = sys.modules[FAMILIES[family].__module__]
    beginning = FAMILIES[family].__name__.removesuffix("Experts")
    return vars(module).get(f"{beginning}TopKRouter") if f"{beginning}TopKRouter" in fused_router.FORMULAS else None


FUSED = [family for family in FAMILIES if router_class(family) is not None]


def model_of(family: str) -> nn.Module:
    flex_kernels.register()
    return build(family, FAMILIES[family])


def assert_same(ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Outputs and every gradient; where terms cancel, relative to the model's largest gradient."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5 * float(theirs[0].abs().max()))
    assert ours[1].keys() == theirs[1].keys()
    largest = max(float(grad.norm()) for grad in theirs[1].values())
    for name, grad in theirs[1].items():
        error, size = float((ours[1][name] - grad).norm()), float(grad.norm())
        assert error <= 1e-5 * size + 1e-6 * largest, f"{name}: {error} of {size}"


def randomise(grafts: dict[str, flex_kernels.Graft]) -> None:
    for graft in grafts.values():
        for parameter in graft.parameters():
            nn.init.normal_(parameter, std=0.2)


def routers_of(model: nn.Module) -> list[nn.Module]:
    return [fused_router.router_of(model, name) for name in flex_kernels.moe_layers(model)]


def test_the_known_families_are_there() -> None:
    assert {"mixtral", "olmoe", "qwen2_moe", "qwen3_moe"} <= set(FUSED)


@pytest.mark.parametrize("family", FUSED)
def test_every_family_equals_eager_with_every_gradient(family: str) -> None:
    """The graft adds nothing yet, so that router, choice and weights are the model's own, or the results are not."""
    model, inputs = model_of(family), inputs_of(family)
    want = run(model, "eager", inputs)
    keys = list(model.state_dict())
    flex_kernels.attach_graft(model, width=4, fuse_router=True)
    assert all("forward" in vars(router) for router in routers_of(model))
    out, grads = run(model, "flex", inputs)
    assert_same((out, {name: grad for name, grad in grads.items() if ".graft." not in name}), want)
    flex_kernels.detach_graft(model)
    assert list(model.state_dict()) == keys
    assert not any("forward" in vars(router) for router in routers_of(model))
    assert_same(run(model, "eager", inputs), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FUSED)
def test_a_router_returns_what_its_class_returns(family: str, dtype: torch.dtype) -> None:
    model = model_of(family).to(dtype)
    router = routers_of(model)[0]
    with torch.no_grad():  # integers, so that no sum is rounded; distinct logits, so that `topk` has no choice
        router.weight.zero_()
        router.weight[:, :6] = torch.eye(6)[: router.weight.shape[0]]
    states = torch.stack([torch.randperm(router.weight.shape[1]) for _ in range(9)]).to(dtype)
    want = router(states)
    flex_kernels.attach_graft(model, width=4, fuse_router=True)
    ours = router(states)
    assert [(x.dtype, x.shape) for x in ours] == [(x.dtype, x.shape) for x in want]
    assert torch.equal(ours[0], want[0])
    assert torch.equal(ours[2], want[2])
    torch.testing.assert_close(ours[1], want[1], rtol=1e-6 if want[1].dtype == torch.float32 else 8e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FUSED)
def test_the_choice_is_the_models(family: str, dtype: torch.dtype) -> None:
    """Another set only where the model's own k-th logit and the next one tie, or are one rounding step apart and a sum
    in another order was rounded to the other side. Both kinds are counted."""
    model = model_of(family).to(dtype)
    router, eps = routers_of(model)[0], torch.finfo(dtype).eps
    states = torch.randn(4000, router.weight.shape[1]).to(dtype)
    own_logits, _, own = router(states)
    flex_kernels.attach_graft(model, width=4, fuse_router=True)
    logits, _, ours = router(states)
    assert torch.equal(ours, reference.route(logits, router.top_k, False)[1])  # a tie: the lower index
    step, of_terms = eps * torch.maximum(logits.abs(), own_logits.abs()), 1e-5  # near zero their rounding is larger
    assert ((logits - own_logits).abs() <= step + of_terms).all()
    last, following = own_logits.sort(dim=1, descending=True).values[:, router.top_k - 1 : router.top_k + 1].unbind(1)
    other = (ours.sort(dim=1).values != own.sort(dim=1).values).any(1)
    tied, close = last == following, last - following <= eps * last.abs() + of_terms
    rounded = int((other & ~tied).sum())
    counts = f"{int(tied.sum())} of {len(states)} tie, {int((other & tied).sum())} of them and {rounded} others differ"
    print(f"{family}, {dtype}: {counts}")
    assert not (other & ~close).any(), counts
    assert tied.any() == (dtype == torch.bfloat16), counts
    assert rounded <= (len(states) // 100 if dtype == torch.bfloat16 else 0), counts


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "olmoe"])
@pytest.mark.parametrize("rank", [None, 3], ids=["full", "lora"])
def test_equals_the_graft_beside_its_own_router(family: str, rank: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = model_of(family), inputs_of(family)
    randomise(flex_kernels.attach_graft(model, rank=rank))
    want = run(model, "flex", inputs)
    states = flex_kernels.detach_graft(model)
    grafts = flex_kernels.attach_graft(model, rank=rank, fuse_router=True)
    for at, graft in grafts.items():
        graft.load_state_dict(states[at])

    def not_again(*_: Tensor) -> Tensor:
        raise AssertionError("the gate is computed a second time")

    monkeypatch.setattr(layer, "graft_logits", not_again)
    assert_same(run(model, "flex", inputs), want)
    assert all(graft.last_opening is not None for graft in grafts.values())


def test_other_hidden_states_get_their_own_gate() -> None:
    """What a router left at the graft is for the very tensor that it saw, and for one call."""
    graft = layer.Graft(6, 2)
    nn.init.normal_(graft.logit_weight)
    states, left = torch.randn(5, 6), torch.zeros(5)
    own = graft.logits(states)
    graft.expect(states, left)
    assert torch.equal(graft.logits(states.clone()), own)
    assert torch.equal(graft.logits(states), own)
    graft.expect(states, left)
    assert graft.logits(states) is left
    assert torch.equal(graft.logits(states), own)


def test_gradient_checkpointing() -> None:
    model, inputs = model_of("qwen2_moe"), inputs_of("qwen2_moe")
    randomise(flex_kernels.attach_graft(model, fuse_router=True))
    model.train()
    want = run(model, "flex", inputs)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # its name since 5.23
    assert_same(run(model, "flex", inputs), want)


def test_a_copied_model_has_a_router_of_its_own() -> None:
    model, inputs = model_of("qwen2_moe"), inputs_of("qwen2_moe")
    randomise(flex_kernels.attach_graft(model, fuse_router=True))
    want = run(model, "flex", inputs)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for router in routers_of(model):
            router.weight.zero_()
    assert_same(run(copied, "flex", inputs), want)
    assert float((run(model, "flex", inputs)[0] - want[0]).norm()) > 1e-3 * float(want[0].norm())


def test_the_block_compiles_whole() -> None:
    torch._dynamo.reset()
    model = model_of("qwen2_moe")
    randomise(flex_kernels.attach_graft(model, fuse_router=True))
    block = model.model.layers[-1].mlp
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_tokens in (7, 12):
        states = torch.randn(1, num_tokens, 32)
        torch.testing.assert_close(compiled(states), block(states), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "router"), [("deepseek_v3", "DeepseekV3TopkRouter"), ("gpt_oss", "GptOssTopKRouter")]
)
def test_another_router_is_refused_by_name(family: str, router: str) -> None:
    model = model_of(family)
    with pytest.raises(
        ValueError, match=f"are .*{router}.*; expected one softmax-top-k router of .*Qwen2MoeTopKRouter"
    ):
        flex_kernels.attach_graft(model, fuse_router=True)
    assert not any(hasattr(experts, "graft") for experts in flex_kernels.moe_layers(model).values())


def test_router_logits_are_refused() -> None:
    message = "output_router_logits is on, expected it off with fuse_router"
    model, inputs = model_of("qwen2_moe"), inputs_of("qwen2_moe")
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match=message):
        flex_kernels.attach_graft(model, fuse_router=True)
    model.config.output_router_logits = False
    flex_kernels.attach_graft(model, fuse_router=True)
    with pytest.raises(ValueError, match=message):
        model(**inputs, output_router_logits=True)
    model(**inputs)
    flex_kernels.detach_graft(model)
    assert model(**inputs, output_router_logits=True).router_logits is not None
