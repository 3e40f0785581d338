"""`prepare_shared_experts` on every family that has some, in every format, and inside what people do with a model."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from families import build, experts_classes, inputs_of, run
from prepared import TOKENS, tiny
from torch import Tensor, nn
from transformers import Qwen2MoeForCausalLM

import flex_kernels
from flex_kernels import FrozenWeight
from flex_kernels.shared_experts import PARTS, SharedExpert, shared_experts
from flex_kernels.weights import FORMATS, QUANTIZED, format_of, keep_stored

FAMILIES = experts_classes()
CLAMPED = ("deepseek_v4", "glm5_next")  # their module limits its pre-activations
FORMAT = {name: None if name == "dense" else name for name in FORMATS}


@pytest.fixture(autouse=True)
def registered() -> None:
    flex_kernels.register()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_the_same_and_speaks_of_its_own_names(family: str) -> None:
    model = build(family, FAMILIES[family])
    names = [name for name, _ in shared_experts(model)]
    if not names or family in CLAMPED:
        expected = "has no shared experts" if not names else "does not compute down_proj"
        with pytest.raises(ValueError, match=expected):
            flex_kernels.prepare_shared_experts(model)
        assert not any(isinstance(module, SharedExpert) for module in model.modules())
        return
    inputs, state = inputs_of(family), copy.deepcopy(model.state_dict())
    want, want_grads = run(model, "flex", inputs)
    assert flex_kernels.prepare_shared_experts(model) == names
    got, grads = run(model, "flex", inputs)
    assert float((got - want).norm()) <= 1e-5 * float(want.norm())
    largest = max(float(grad.norm()) for grad in want_grads.values())
    frozen = {f"{name}.{part}.weight" for name in names for part in PARTS}
    assert grads.keys() == want_grads.keys() - frozen
    for name, grad in grads.items():
        error = float((grad - want_grads[name]).norm())
        assert error <= 1e-4 * float(want_grads[name].norm()) + 1e-6 * largest, name
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def with_kept_values(model: nn.Module, format: str) -> nn.Module:
    """The model as it was, its shared experts of the values that a format keeps."""
    model = copy.deepcopy(model)
    for _, module in shared_experts(model):
        for part in PARTS:
            linear = getattr(module, part)
            kept = FrozenWeight.quantize(linear.weight[None], format).dequantize()[0]
            linear.weight = nn.Parameter(kept, requires_grad=False)
    return model


@pytest.mark.parametrize("format", QUANTIZED)
def test_formats_keep_their_values_and_files_stay_plain(format: str, tmp_path: Path) -> None:
    model = tiny()
    want = with_kept_values(model, format)
    names = flex_kernels.prepare_shared_experts(model, format)
    module = model.get_submodule(names[0])
    assert format_of(module.gate_up_proj) == format_of(module.down_proj) == format
    torch.testing.assert_close(model(TOKENS).logits, want(TOKENS).logits, rtol=1e-4, atol=1e-5)
    state = model.state_dict()
    assert list(state) == list(want.state_dict())
    for name, tensor in want.state_dict().items():
        assert type(state[name]) is Tensor
        assert torch.equal(state[name], tensor), name
    model.save_pretrained(tmp_path)
    again = Qwen2MoeForCausalLM.from_pretrained(tmp_path, experts_implementation="flex")
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    other = tiny()
    flex_kernels.prepare_shared_experts(other, format)
    other.load_state_dict(state)
    assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)
    assert flex_kernels.prepare_shared_experts(model, format) == names  # nothing more to do
    flex_kernels.prepare_shared_experts(model)
    assert type(module.down_proj) is nn.Parameter
    assert torch.equal(module.down_proj[0], want.get_submodule(names[0]).down_proj.weight)


def test_beside_prepared_experts_and_through_their_files(tmp_path: Path) -> None:
    model = tiny()
    flex_kernels.prepare_experts(model, "nf4")
    names = flex_kernels.prepare_shared_experts(model, "int8")
    with keep_stored():
        assert all(type(model.state_dict()[f"{name}.up_proj.weight"]) is Tensor for name in names)
    flex_kernels.save_prepared(model, tmp_path)
    again = flex_kernels.load_prepared(tmp_path, dtype=torch.float32)
    assert not any(isinstance(module, SharedExpert) for module in again.modules())
    torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(
        again.state_dict()[f"{names[0]}.up_proj.weight"], model.state_dict()[f"{names[0]}.up_proj.weight"]
    )


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft 0.21 asks transformers 5.23
@pytest.mark.parametrize("format", FORMATS)
def test_trains_as_the_plain_model_with_lora_and_checkpointing(format: str) -> None:
    model = tiny()
    want = with_kept_values(model, format) if format in QUANTIZED else copy.deepcopy(model)
    flex_kernels.prepare_shared_experts(model, FORMAT[format])
    grads = []
    for one in (model, want):
        torch.manual_seed(0)
        getattr(one, "activation_checkpointing_enable", one.gradient_checkpointing_enable)()  # its name since 5.23
        lora = peft.get_peft_model(one.train(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        lora(input_ids=TOKENS, labels=TOKENS).loss.backward()
        grads.append({name: p.grad for name, p in lora.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_compiles_with_the_model() -> None:
    torch._dynamo.reset()
    model = tiny()
    flex_kernels.prepare_shared_experts(model)
    want = model(TOKENS).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(TOKENS).logits, want, rtol=1e-4, atol=1e-5)


def test_keeps_fewer_bytes_for_the_backward() -> None:
    from benchmarks.layers import saved_bytes

    model = tiny(hidden_size=64, shared_expert_intermediate_size=128)
    name, plain = next(iter(shared_experts(model)))
    plain, inputs = copy.deepcopy(plain).requires_grad_(False), torch.randn(1, 50, 64, requires_grad=True)
    flex_kernels.prepare_shared_experts(model)
    fused = model.get_submodule(name)
    sizes = [saved_bytes(lambda m=m: m(inputs), tuple(m.parameters())) for m in (plain, fused)]
    assert sizes[1] < 0.8 * sizes[0]


def refused(model: nn.Module, match: str, format: str | None = None) -> None:
    before = [type(module) for _, module in shared_experts(model)]
    with pytest.raises(ValueError, match=match):
        flex_kernels.prepare_shared_experts(model, format)
    assert [type(module) for _, module in shared_experts(model)] == before


def test_what_is_refused() -> None:
    refused(tiny(), "unknown format 'int4'|int4", "int4")
    model = tiny()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["up_proj"]), model)
    refused(model, "its up_proj is a Linear")
    model = tiny()
    model.model.layers[1].mlp.shared_expert.register_forward_hook(lambda *_: None)
    refused(model, "layers.1.mlp.shared_expert cannot be kept in dense: it has hooks")
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].mlp.shared_expert.down_proj.weight[0, 0] = float("nan")
    refused(model, "layers.1.mlp.shared_expert.down_proj.weight has 1 NaN or infinite values", "nf4")
    model = tiny()
    model.model.layers[0].mlp.shared_expert.gate_proj.bias = nn.Parameter(torch.zeros(16))
    refused(model, "its gate_proj has a bias")
    model = tiny()
    model.model.layers[0].mlp.shared_expert.act_fn = nn.Tanh()
    refused(model, "its activation is unknown")
    model = tiny()
    flex_kernels.prepare_shared_experts(model, "nf4")
    refused(model, "it is in nf4, and a format of a format loses twice", "int8")
    refused(nn.Linear(2, 2), "Linear has no shared experts")
