"""`prepare_experts` on real models, inside what people do with them, and experts that a parametrisation dequantises."""

import copy
import gc
import subprocess
import sys
import weakref
from pathlib import Path

import peft
import pytest
import torch
from layouts import experts_of
from memory import HAS_PEAK
from prepared import TOKENS, tiny, with_kept_values
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import Qwen2MoeForCausalLM, Trainer, TrainingArguments

import flex_kernels
from flex_kernels import FrozenWeight
from flex_kernels.backends import pytorch
from flex_kernels.weights import QUANTIZED, keep_stored


@pytest.mark.parametrize("format", QUANTIZED)
def test_replaces_the_experts_and_nothing_else(format: str) -> None:
    model = tiny()
    want, others = with_kept_values(model, format), {n: p for n, p in model.named_parameters() if "experts." not in n}
    assert flex_kernels.prepare_experts(model, format) == dict.fromkeys(flex_kernels.moe_layers(model), "dense")
    torch.testing.assert_close(model(TOKENS).logits, want(TOKENS).logits, rtol=1e-4, atol=1e-5)
    assert all(p is others[n] for n, p in model.named_parameters() if n in others)
    experts = model.model.layers[0].mlp.experts
    assert not experts.gate_up_proj.requires_grad
    assert experts.gate_up_proj.shape == (6, 48, 32)
    assert experts.gate_up_proj.numel() == want.model.layers[0].mlp.experts.gate_up_proj.numel()
    assert flex_kernels.prepare_experts(model, format) == dict.fromkeys(flex_kernels.moe_layers(model), format)
    flex_kernels.prepare_experts(model, None)
    assert type(experts.gate_up_proj) is nn.Parameter
    assert torch.equal(experts.down_proj, want.model.layers[0].mlp.experts.down_proj)


@pytest.mark.parametrize("format", QUANTIZED)
def test_state_dict_and_saved_files_are_plain(format: str, tmp_path: Path) -> None:
    model = tiny().to(torch.bfloat16)
    want = with_kept_values(model, format).state_dict()
    flex_kernels.prepare_experts(model, format)
    state = model.state_dict()
    assert list(state) == list(want)
    for name, tensor in state.items():
        assert type(tensor) is Tensor, name
        assert torch.equal(tensor, want[name]), name
    with keep_stored():
        assert sum(isinstance(x, FrozenWeight) for x in model.state_dict().values()) == 4
    model.save_pretrained(tmp_path)
    again = Qwen2MoeForCausalLM.from_pretrained(tmp_path, experts_implementation="flex")
    assert all(torch.equal(tensor, want[name]) for name, tensor in again.state_dict().items())
    other = tiny().to(torch.bfloat16)
    flex_kernels.prepare_experts(other, format)
    other.load_state_dict(state)
    for name, tensor in other.state_dict().items():  # int8's scale is rounded with the largest weight of its row
        torch.testing.assert_close(tensor, want[name], rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("format", QUANTIZED)
def test_moves_and_copies(format: str) -> None:
    model = tiny()
    flex_kernels.prepare_experts(model, format)
    with torch.no_grad():
        want = model(TOKENS).logits
        assert torch.equal(copy.deepcopy(model)(TOKENS).logits, want)
        model.to(torch.bfloat16)
        assert model.model.layers[1].mlp.experts.down_proj.dtype == torch.bfloat16
        assert torch.isfinite(model(TOKENS).logits).all()
        assert model.to("meta").model.layers[0].mlp.experts.down_proj.is_meta


@pytest.mark.filterwarnings("ignore::FutureWarning")  # names that transformers 5.23 deprecates, and 5.17 needs
@pytest.mark.parametrize("format", QUANTIZED)
def test_peft_trainer_checkpointing_and_generate(format: str, tmp_path: Path) -> None:
    model = tiny()
    flex_kernels.prepare_experts(model, format)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    grafts = flex_kernels.attach_graft(adapted.base_model.model, dtype=torch.float32)
    for graft in grafts.values():
        graft.reset_parameters()
    experts = adapted.base_model.model.model.layers[0].mlp.experts
    before = experts.gate_up_proj.codes.clone(), grafts["model.layers.0.mlp.experts"].down_proj.detach().clone()
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    arguments = TrainingArguments(
        tmp_path, max_steps=2, report_to=[], use_cpu=True, gradient_checkpointing=True, disable_tqdm=True
    )
    Trainer(adapted, arguments, train_dataset=rows, callbacks=[flex_kernels.graft_callback()]).train()
    assert torch.equal(experts.gate_up_proj.codes, before[0])
    assert not torch.equal(grafts["model.layers.0.mlp.experts"].down_proj, before[1])
    out = adapted.eval().generate(input_ids=TOKENS[:1, :4], max_new_tokens=3, do_sample=False)
    assert out.shape[1] <= 7
    files = {path.name for path in tmp_path.rglob("*.safetensors")}
    assert files == {"adapter_model.safetensors", "grafts.safetensors"}


def test_the_whole_model_compiles() -> None:
    model = tiny()
    flex_kernels.prepare_experts(model, "nf4")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(TOKENS, use_cache=False).logits, model(TOKENS).logits)


@pytest.mark.parametrize("format", QUANTIZED)
def test_explain_says_the_format_and_who_computes(
    format: str, capsys: pytest.CaptureFixture[str], backend: str
) -> None:
    model = tiny()
    flex_kernels.prepare_experts(model, format)
    paths = flex_kernels.explain(model)
    assert all(f"weights {format}, plain" in path.why for path in paths)
    experts = model.model.layers[0].mlp.experts
    chosen = flex_kernels.plan.cpu_backend("experts", torch.float32, experts.gate_up_proj.codes.dtype)
    assert paths[0].why.startswith(flex_kernels.plan.backend_name(chosen))


@pytest.mark.parametrize("format", QUANTIZED)
def test_a_layer_without_transformers(format: str) -> None:
    layer = flex_kernels.GraftedMoE(32, 24, 4, 2, graft_width=8).freeze_pretrained()
    x = torch.randn(5, 32)
    flex_kernels.prepare_experts(layer, format)
    layer(x).sum().backward()
    assert layer.graft.down_proj.grad is not None
    fresh = flex_kernels.GraftedMoE(32, 24, 4, 2, graft_width=8)
    fresh.load_state_dict(layer.state_dict())
    torch.testing.assert_close(fresh(x), layer(x), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_prepared_is_refused_and_unchanged() -> None:
    model = tiny()
    experts = model.model.layers[1].mlp.experts
    with torch.no_grad():
        experts.down_proj[3, 2, 1] = float("nan")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.experts.down_proj has 1 NaN or infinite values"):
        flex_kernels.prepare_experts(model, "nf4")
    assert type(model.model.layers[0].mlp.experts.gate_up_proj) is nn.Parameter
    with pytest.raises(ValueError, match="format is 'fp4', expected one of int8, nf4"):
        flex_kernels.prepare_experts(model, "fp4")
    with pytest.raises(ValueError, match="Linear has no MoE layers"):
        flex_kernels.prepare_experts(nn.Linear(2, 2), "nf4")
    with torch.no_grad():
        experts.down_proj[3, 2, 1] = 0
    flex_kernels.prepare_experts(model, "int8")
    with pytest.raises(ValueError, match="are kept in int8, expected dense ones to be kept in nf4"):
        flex_kernels.prepare_experts(model, "nf4")


@pytest.mark.parametrize("layout", ["biased", "transposed", "interleaved", "own gate", "no gate"])
def test_layouts_that_the_fused_path_does_not_take_are_refused(layout: str) -> None:
    experts, reason = experts_of(layout)
    with pytest.raises(ValueError, match=f"cannot be kept in nf4: {reason}"):
        flex_kernels.prepare_experts(experts, "nf4")


def test_experts_that_train_are_refused_by_name() -> None:
    model = tiny()
    flex_kernels.prepare_experts(model, "nf4")
    model.requires_grad_(True)
    with pytest.raises(ValueError, match="gate_up_proj is kept in nf4 and requires grad, expected it frozen"):
        model(TOKENS)


class Dequantizing(nn.Module):
    """Of the kind that bitsandbytes registers; counts, and remembers what it made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref] = []

    @torch.no_grad()
    def forward(self, codes: Tensor) -> Tensor:
        made = codes.float() / 16
        self.made.append(weakref.ref(made))
        return made


def parametrized(model: nn.Module) -> list[Dequantizing]:
    found = []
    for experts in flex_kernels.moe_layers(model).values():
        for name in ("gate_up_proj", "down_proj"):
            codes = (getattr(experts, name).detach() * 16).round().to(torch.int8)
            setattr(experts, name, nn.Parameter(codes, requires_grad=False))
            found.append(Dequantizing())
            parametrize.register_parametrization(experts, name, found[-1], unsafe=True)
    return found


def alive(made: list[Dequantizing]) -> int:
    gc.collect()
    return sum(ref() is not None for each in made for ref in each.made)


def test_parametrised_experts_are_dequantised_again_and_not_kept(backend: str) -> None:
    dense = tiny()
    model = copy.deepcopy(dense)
    made = parametrized(model)
    with torch.no_grad():
        for a, b in zip(*(flex_kernels.moe_layers(m).values() for m in (dense, model)), strict=True):
            a.gate_up_proj.copy_(b.gate_up_proj)
            a.down_proj.copy_(b.down_proj)
    dense.requires_grad_(False)
    flex_kernels.explain(model)
    gradients = []
    for each in (dense, model):
        x = each.get_input_embeddings()(TOKENS).detach().requires_grad_()
        loss = each(inputs_embeds=x).logits.square().sum()
        if each is model:
            assert alive(made) == 0  # between forward and backward
            calls = [len(one.made) for one in made]
        loss.backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
    assert [len(one.made) - before for one, before in zip(made, calls, strict=True)] == [1] * 4
    assert alive(made) == 0
    with pytest.raises(ValueError, match="are computed at every access"):
        flex_kernels.prepare_experts(model, "nf4")


def test_bitsandbytes_experts_keep_working() -> None:
    replace = pytest.importorskip("bitsandbytes.nn.parametrize").replace_parameter_4bit
    model = tiny(hidden_size=64, moe_intermediate_size=64)
    experts = model.model.layers[0].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        replace(experts, name, quant_type="nf4")
    refs: list[weakref.ref] = []
    original = type(experts.parametrizations.gate_up_proj[0]).forward

    def remembered(self: nn.Module, codes: Tensor) -> Tensor:
        made = original(self, codes)
        refs.append(weakref.ref(made))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(experts.parametrizations.gate_up_proj[0]), "forward", remembered)
        x = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
        loss = model(inputs_embeds=x).logits.square().sum()
        gc.collect()
        assert refs
        assert not any(ref() is not None for ref in refs)
        loss.backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.any()


PREPARE = """
import re, torch, flex_kernels
from torch import nn
layers = nn.ModuleList(flex_kernels.GraftedMoE(256, 256, 16, 2) for _ in range(4))
flex_kernels.prepare_experts(flex_kernels.GraftedMoE(64, 64, 2, 2), "nf4")
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before = peak()
flex_kernels.prepare_experts(layers, "nf4")
held = sum(p.stored_bytes for p in layers.parameters() if isinstance(p, flex_kernels.FrozenWeight))
print(peak() - before, held, layers[0].gate_up_proj.numel() * 4)
"""


@pytest.mark.skipif(not HAS_PEAK, reason="needs the kernel's peak of memory")
def test_peak_memory_while_a_model_is_prepared() -> None:
    """Beside the model: one dense matrix's worth, not a second model; what becomes of a layer takes its place."""
    run = subprocess.run([sys.executable, "-c", PREPARE], capture_output=True, text=True, check=True)
    grown, held, matrix = map(int, run.stdout.split())
    assert held < 4 * 1.5 * matrix * 0.14
    assert grown < 1.5 * matrix


def test_pytorch_computes_what_no_kernel_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny().double()
    flex_kernels.prepare_experts(model, "int8")
    calls = []
    original = pytorch.experts_fwd
    monkeypatch.setattr(pytorch, "experts_fwd", lambda *args: calls.append(1) or original(*args))
    model(TOKENS)
    assert len(calls) == 2
