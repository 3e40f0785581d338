"""The experts implementation "flex" on transformers models: equal to eager on every layout, with and without graft."""

import copy

import pytest
import torch
import torch.nn.functional as F
from layouts import LAYOUTS, experts_of
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import flex_kernels
from flex_kernels import plan, transformers_plug

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
QWEN = {"num_experts": 6, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16}
MODELS = {
    "qwen2_moe": (Qwen2MoeForCausalLM, Qwen2MoeConfig, QWEN),
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 5}),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig, {"num_experts": 6}),
    "gpt_oss": (GptOssForCausalLM, GptOssConfig, {"num_local_experts": 4, "head_dim": 8}),
}


@pytest.fixture(autouse=True)
def registered() -> None:
    flex_kernels.register()


def tiny(name: str, **more) -> nn.Module:
    model_class, config_class, own = MODELS[name]
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES, **own, **more)).eval()
    for parameter in model.parameters():  # some families start at zero, biases for one
        if parameter.dim() > 1 or float(parameter.detach().abs().sum()) == 0:
            nn.init.normal_(parameter, std=0.15)
    return model


def run(model: nn.Module, implementation: str, **options) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradient of every parameter."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    ids = torch.randint(0, 64, (2, 11), generator=torch.Generator().manual_seed(1))
    out = model(input_ids=ids, labels=ids, **options)
    out.loss.backward()
    return out.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(ours: tuple, theirs: tuple, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def randomise(grafts: dict[str, flex_kernels.Graft]) -> None:
    for graft in grafts.values():
        for parameter in graft.parameters():
            nn.init.normal_(parameter, std=0.2)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_equals_eager_forward_and_every_gradient(name: str, backend: str) -> None:
    model = tiny(name)
    assert_close(run(model, "flex"), run(model, "eager"))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_graft_starts_without_effect_and_detaches_without_trace(name: str) -> None:
    model = tiny(name)
    keys, before = list(model.state_dict()), run(model, "flex")
    grafts = flex_kernels.attach_graft(model)
    after = run(model, "flex")
    torch.testing.assert_close(after[0], before[0])
    experts = list(flex_kernels.moe_layers(model))
    assert list(grafts) == experts == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    added = {f"{e}.graft.{p}" for e in experts for p in ("gate_up_proj", "down_proj", "logit_weight", "logit_bias")}
    assert set(model.state_dict()) - set(keys) == added
    states = flex_kernels.detach_graft(model)
    assert {f"{name}.graft.{key}" for name, state in states.items() for key in state} == added
    assert list(model.state_dict()) == keys
    assert flex_kernels.detach_graft(model) == {}
    assert_close(run(model, "eager"), before)


@pytest.mark.parametrize("combine", ["additive", "convex"])
@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss"])
def test_a_graft_adds_what_the_formula_says(name: str, combine: str, backend: str) -> None:
    model = tiny(name)
    experts = next(iter(flex_kernels.moe_layers(model).values()))
    model.set_experts_implementation("eager")
    x = torch.randn(13, 32)
    indices, weights = torch.randint(0, 4, (13, 2)), torch.rand(13, 2)
    routed = experts(x, indices, weights)
    graft = next(iter(flex_kernels.attach_graft(model, width=10, combine=combine, logit_bias=-1.0).values()))
    randomise({"": graft})
    opening = torch.sigmoid(x @ graft.logit_weight + graft.logit_bias)[:, None]
    gate, up = F.linear(x, graft.gate_up_proj).chunk(2, dim=-1)
    own = F.linear(F.silu(gate) * up, graft.down_proj)
    want = routed * (1 - opening if combine == "convex" else 1) + opening * own
    d_out = torch.randn_like(want)
    want_grads = torch.autograd.grad(want, list(graft.parameters()), d_out)
    out = experts(x, indices, weights)
    assert_close(out, want)
    assert_close(torch.autograd.grad(out, list(graft.parameters()), d_out), want_grads)
    torch.testing.assert_close(graft.last_opening, opening.mean().detach())


def test_grafts_on_some_layers_only() -> None:
    model = tiny("qwen2_moe")
    assert list(flex_kernels.attach_graft(model, width=3, layers=[1])) == ["model.layers.1.mlp.experts"]
    assert model.model.layers[1].mlp.experts.graft.gate_up_proj.shape == (6, 32)
    with pytest.raises(ValueError, match="already carries a graft"):
        flex_kernels.attach_graft(model)
    with pytest.raises(ValueError, match=r"layers has \[2\], expected positions from 0 to 1"):
        flex_kernels.attach_graft(tiny("qwen2_moe"), layers=[2])


def test_grafts_of_a_width_for_each_layer() -> None:
    grafts = flex_kernels.attach_graft(tiny("qwen2_moe"), width=[3, 5])
    assert [graft.width for graft in grafts.values()] == [3, 5]
    grafts = flex_kernels.attach_graft(tiny("qwen2_moe"), width=(7,), layers=[1], rank=2)
    assert {name: graft.width for name, graft in grafts.items()} == {"model.layers.1.mlp.experts": 7}
    model = tiny("qwen2_moe")
    with pytest.raises(ValueError, match="width has 3 entries, expected one for each of 2 layers"):
        flex_kernels.attach_graft(model, width=[1, 2, 3])
    assert not any(".graft." in name for name in model.state_dict())


def test_attach_switches_to_flex_and_a_graft_is_never_ignored() -> None:
    model = tiny("qwen2_moe")
    model.set_experts_implementation("eager")
    flex_kernels.attach_graft(model)
    assert model.config._experts_implementation == "flex"
    with pytest.raises(RuntimeError, match="the model runs on 'eager', expected 'flex'"):
        run(model, "eager")
    flex_kernels.detach_graft(model)
    run(model, "eager")


def test_a_model_without_experts_is_refused() -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "num_experts_per_tok"}
    with pytest.raises(ValueError, match="LlamaForCausalLM has no MoE layers"):
        flex_kernels.attach_graft(LlamaForCausalLM(LlamaConfig(**sizes)))


@pytest.mark.parametrize("grafted", [False, True], ids=["bare", "grafted"])
@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_every_layout_is_right_and_says_which_path_it_takes(name: str, grafted: bool) -> None:
    experts, reason = experts_of(name)
    assert transformers_plug.why_not_fused(experts) == reason
    if grafted:
        flex_kernels.attach_graft(experts, combine="convex", logit_bias=0.0)
        assert (experts.graft.hidden_size, experts.graft.width) == (12, 8)
        randomise({"": experts.graft})
    x, indices, weights = torch.randn(9, 12), torch.rand(9, 4).argsort(1)[:, :2], torch.rand(9, 2)
    d_out, results = torch.randn(9, 12), []
    for implementation in ("flex", "eager"):
        inputs = [x.clone().requires_grad_(), indices, weights.clone().requires_grad_()]
        experts.zero_grad()
        if implementation == "flex":
            out = experts(*inputs)
        else:
            out = type(experts).forward.__wrapped__(experts, *inputs)
            if grafted:
                opening = torch.sigmoid(experts.graft.logits(inputs[0]))[:, None]
                out = out * (1 - opening) + opening * experts.graft(inputs[0])
        out.backward(d_out)
        results.append([out, inputs[0].grad, inputs[2].grad, *(p.grad for p in experts.parameters())])
    assert_close(*results)


def test_components_of_an_odd_layout_cannot_be_taken() -> None:
    experts, _ = experts_of("plain")
    taken = flex_kernels.expert_weights(experts)
    assert taken.gate_up_proj is experts.gate_up_proj
    assert taken.activation == "silu"
    with pytest.raises(ValueError, match="the experts of Experts cannot be taken apart: the experts have biases"):
        flex_kernels.expert_weights(experts_of("biased")[0])


@pytest.mark.parametrize("name", ["plain", "biased"])
def test_expert_parallel_slots_are_skipped(name: str) -> None:
    experts, _ = experts_of(name)
    experts._is_expert_parallel = True
    indices = torch.tensor([[0, 4], [4, 4], [3, 1]])
    inputs = (torch.randn(3, 12), indices, torch.rand(3, 2).masked_fill(indices == 4, 0))
    assert_close(experts(*inputs), ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, *inputs))
    with pytest.raises(ValueError, match="split over ranks"):
        flex_kernels.attach_graft(experts)
    experts._is_expert_parallel = False
    flex_kernels.attach_graft(experts)[""].reset_parameters()
    experts._is_expert_parallel = True
    with pytest.raises(ValueError, match="would count its graft several times"):
        experts(*inputs)


def test_explain_names_path_and_reason(capsys: pytest.CaptureFixture[str], backend: str) -> None:
    model = tiny("qwen2_moe")
    model.set_experts_implementation("flex")
    flex_kernels.attach_graft(model, layers=[0])
    paths = flex_kernels.explain(model)
    name = plan.backend_name(plan.cpu_backend("experts", torch.float32, torch.float32))  # the model is on the CPU
    assert [path.path for path in paths] == ["fused", "fused"]
    assert paths[0].why == f"{name} on cpu, float32, weights dense, plain, with a graft: not started"
    assert (
        capsys.readouterr().out.splitlines()[1]
        == f"model.layers.1.mlp.experts: fused ({name} on cpu, float32, weights dense, plain)"
    )
    odd = tiny("gpt_oss")
    odd.set_experts_implementation("flex")
    assert {(path.path, path.why) for path in flex_kernels.explain(odd)} == {("general", "the experts have biases")}
    odd.set_experts_implementation("eager")
    assert {path.path for path in flex_kernels.explain(odd)} == {"not flex"}
    assert flex_kernels.explain(nn.Linear(2, 2)) == []


def test_registering_twice_changes_nothing() -> None:
    flex_kernels.register()
    assert ALL_EXPERTS_FUNCTIONS["flex"] is transformers_plug.flex_experts_forward


def test_gradient_checkpointing() -> None:
    model = tiny("qwen2_moe")
    randomise(flex_kernels.attach_graft(model))
    model.train()
    want = run(model, "flex", use_cache=False)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # its name since 5.23
    assert_close(run(model, "flex", use_cache=False), want)


def test_a_bf16_model_trains_a_graft_in_fp32() -> None:
    model = tiny("qwen2_moe").to(torch.bfloat16)
    model.requires_grad_(False)
    randomise(flex_kernels.attach_graft(model, dtype=torch.float32))
    logits, grads = run(model, "flex")
    assert logits.dtype == torch.bfloat16
    assert len(grads) == 8
    assert {grad.dtype for grad in grads.values()} == {torch.float32}
    assert all(bool(grad.isfinite().all()) and float(grad.abs().sum()) > 0 for grad in grads.values())


def test_autocast_as_eager_has_it() -> None:
    model = tiny("qwen2_moe")
    exact = run(model, "eager")[0]
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = run(model, "flex"), run(model, "eager")
    assert ours[0].dtype == theirs[0].dtype
    error, allowed = (ours[0] - exact).norm(), (theirs[0] - exact).norm()
    assert error <= 2 * allowed
    assert {grad.dtype for grad in ours[1].values()} == {torch.float32}


def test_generates_what_eager_generates() -> None:
    model = tiny("qwen2_moe")
    ids = torch.randint(5, 64, (2, 4))
    texts = []
    for implementation in ("eager", "flex"):
        model.set_experts_implementation(implementation)
        texts.append(model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0))
    assert torch.equal(*texts)


def test_the_experts_module_compiles_whole_with_a_graft() -> None:
    torch._dynamo.reset()
    experts, _ = experts_of("plain")
    randomise(flex_kernels.attach_graft(experts))
    compiled = torch.compile(experts, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_tokens in (7, 12):
        inputs = (torch.randn(num_tokens, 12), torch.randint(0, 4, (num_tokens, 2)), torch.rand(num_tokens, 2))
        assert_close(compiled(*inputs), experts(*inputs))


def test_a_copied_model_has_a_graft_of_its_own() -> None:
    model = tiny("qwen2_moe")
    randomise(flex_kernels.attach_graft(model))
    want = run(model, "flex")
    copied = copy.deepcopy(model)
    assert_close(run(copied, "flex"), want)
    flex_kernels.detach_graft(copied)
    run(copied, "eager")
    assert_close(run(model, "flex"), want)
