"""Prepared models to files and back, straight from dense files, at which peak of memory, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import quantised
import torch
from memory import HAS_PEAK
from prepared import TOKENS, tiny, with_kept_values
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2MoeForCausalLM

import flex_kernels
from flex_kernels import FrozenWeight, weight_files
from flex_kernels.backends import native
from flex_kernels.weights import QUANTIZED


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dense")
    tiny().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("format", QUANTIZED)
def test_from_dense_files_to_files_and_back(format: str, dense: Path, tmp_path: Path) -> None:
    source = AutoModelForCausalLM.from_pretrained(dense, experts_implementation="flex").eval()
    want = with_kept_values(source, format)(TOKENS).logits
    model = flex_kernels.load_prepared(dense, format).eval()
    torch.testing.assert_close(model(TOKENS).logits, want, rtol=1e-5, atol=1e-5)
    assert not getattr(model, "is_quantized", False)
    assert "quantization_config" not in model.config.to_dict()
    flex_kernels.save_prepared(model, tmp_path, source="the tiny one")
    again, found = flex_kernels.load_prepared(tmp_path, output_loading_info=True)
    torch.testing.assert_close(again.eval()(TOKENS).logits, model(TOKENS).logits)  # other addresses, other sums
    assert not found["missing_keys"]
    for experts in flex_kernels.moe_layers(again).values():
        assert isinstance(experts.gate_up_proj, FrozenWeight)
        assert (experts.gate_up_proj.format, experts.gate_up_proj.requires_grad) == (format, False)
    assert all(type(tensor) is torch.Tensor for tensor in again.state_dict().values())
    half = flex_kernels.load_prepared(tmp_path, format, dtype=torch.bfloat16)
    assert half.model.layers[0].mlp.experts.down_proj.dtype == torch.bfloat16
    assert half.lm_head.weight.dtype == torch.bfloat16


def test_what_the_files_say(dense: Path, tmp_path: Path) -> None:
    flex_kernels.save_prepared(flex_kernels.load_prepared(dense, "nf4"), tmp_path, source="the tiny one")
    about = {"version": 1, "format": "nf4", "layout": "plain", "source": "the tiny one"}
    index = json.loads((tmp_path / weight_files.INDEX).read_text())
    assert index["metadata"]["flex_experts"] == about
    (file,) = tmp_path.glob("*.safetensors")
    with weight_files.safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["flex_experts"])
    name = "model.layers.1.mlp.experts.down_proj"
    assert header["experts"][name] == {"columns": 24, "dtype": "float32"}
    assert set(index["weight_map"]) >= {f"{name}.codes", f"{name}.scales", "lm_head.weight"}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in load_file(file).values())
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_several_files(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "SHARD_BYTES", 10_000)
    model = flex_kernels.load_prepared(dense, "int8").eval()
    flex_kernels.save_prepared(model, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = flex_kernels.load_prepared(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("isa", [] if native.module() is None else native.module().available_isas())
@pytest.mark.parametrize("format", QUANTIZED)
def test_a_folder_on_another_processor(
    format: str, isa: str, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes are the same on each, and so is what each computes with them; nothing is repacked."""
    flex_kernels.save_prepared(flex_kernels.load_prepared(dense, format), tmp_path / "here")
    model = flex_kernels.load_prepared(tmp_path / "here").eval()
    want = Qwen2MoeForCausalLM(model.config)
    want.load_state_dict(model.state_dict())
    monkeypatch.setenv("FLEX_ISA", isa)
    there = flex_kernels.load_prepared(tmp_path / "here").eval()
    torch.testing.assert_close(there(TOKENS).logits, want.eval()(TOKENS).logits, rtol=1e-4, atol=1e-5)
    flex_kernels.save_prepared(flex_kernels.load_prepared(dense, format), tmp_path / "there")
    kept, again = (load_file(tmp_path / each / "prepared-00001.safetensors") for each in ("here", "there"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in kept.items())


def rewritten(folder: Path, **about: object) -> None:
    index = json.loads((folder / weight_files.INDEX).read_text())
    index["metadata"]["flex_experts"] |= about
    (folder / weight_files.INDEX).write_text(json.dumps(index))


def without(folder: Path, name: str) -> None:
    (file,) = folder.glob("*.safetensors")
    with weight_files.safe_open(file, "pt") as opened:
        header = opened.metadata()
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, header)


def shortened(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    with weight_files.safe_open(file, "pt") as opened:
        header = opened.metadata()
    tensors = load_file(file)
    name = "model.layers.0.mlp.experts.down_proj.codes"
    save_file({**tensors, name: tensors[name][..., :-1].contiguous()}, file, header)


def infinite(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    with weight_files.safe_open(file, "pt") as opened:
        header = opened.metadata()
    tensors = load_file(file)
    tensors["model.layers.0.mlp.experts.down_proj.scales"][0, 0] = float("inf")
    save_file(tensors, file, header)


BAD = {
    r"has version 2 of prepared experts, expected 1": lambda f: rewritten(f, version=2),
    r"has layout 'avx512' of prepared experts, expected plain": lambda f: rewritten(f, layout="avx512"),
    r"has format 'fp4' of prepared experts, expected int8 or nf4": lambda f: rewritten(f, format="fp4"),
    r"has experts in nf4, expected int8": lambda f: rewritten(f, format="int8"),
    r"index.json cannot be read": lambda f: (f / weight_files.INDEX).write_text("{"),
    r"prepared-00001.safetensors cannot be read": lambda f: (f / "prepared-00001.safetensors").write_bytes(b"x" * 20),
    r"down_proj has no scales, expected both": lambda f: without(f, "model.layers.0.mlp.experts.down_proj.scales"),
    r"the codes are torch.uint8 \[6, 32, 31\], expected torch.uint8 \[6, 32, 32\] for nf4": shortened,
    r"down_proj: the scales has 1 NaN or infinite values": infinite,
}


@pytest.mark.parametrize("message", sorted(BAD))
def test_files_that_are_not_right_are_refused(message: str, dense: Path, tmp_path: Path) -> None:
    flex_kernels.save_prepared(flex_kernels.load_prepared(dense, "nf4"), tmp_path)
    BAD[message](tmp_path)
    with pytest.raises(ValueError, match=message):
        flex_kernels.load_prepared(tmp_path)


def test_what_does_not_go_together_is_refused(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has dense experts, expected a format for them"):
        flex_kernels.load_prepared(dense)
    with pytest.raises(ValueError, match="format is 'int4', expected one of int8, nf4"):
        flex_kernels.load_prepared(dense, "int4")
    with pytest.raises(ValueError, match="the model's experts are dense, expected all in one of int8, nf4"):
        flex_kernels.save_prepared(tiny(), tmp_path)
    model = flex_kernels.load_prepared(dense, "nf4")
    flex_kernels.save_prepared(model, tmp_path)
    with pytest.raises(ValueError, match="has its experts in nf4, expected int8"):
        flex_kernels.load_prepared(tmp_path, "int8")


@pytest.mark.parametrize("matrix", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_dense_files_with_values_that_are_not_finite_are_refused_by_name(
    value: float, matrix: str, tmp_path: Path
) -> None:
    model = tiny()
    with torch.no_grad():
        getattr(model.model.layers[1].mlp.experts, matrix)[2, 3, 4] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"model.layers.1.mlp.experts.{matrix} has 1 NaN or infinite values"):
        flex_kernels.load_prepared(tmp_path, "nf4")


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4", None])
def test_checkpoints_of_other_programs_are_refused_by_name(method: str | None, dense: Path, tmp_path: Path) -> None:
    config = json.loads((dense / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    with pytest.raises(ValueError, match=f"quantised by {method!r}, expected dense weights, the files of"):
        flex_kernels.load_prepared(tmp_path, "nf4")


def test_layouts_that_the_fused_path_does_not_take_are_refused(tmp_path: Path) -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 4}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64}
    GptOssForCausalLM(GptOssConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be kept in nf4: the experts have biases"):
        flex_kernels.load_prepared(tmp_path, "nf4")


LOAD = """
import re, sys, torch, flex_kernels
from transformers import AutoModelForCausalLM, Qwen2MoeForCausalLM
tiny, folder, format = sys.argv[1:]
flex_kernels.load_prepared(tiny, "nf4")
def peak():
    return int(re.search(r"RssAnon:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
import threading, time
highest, stop = [peak()], threading.Event()
def watch():
    while not stop.wait(0.002):
        highest[0] = max(highest[0], peak())
before, watcher = peak(), threading.Thread(target=watch)
watcher.start()
model = flex_kernels.load_prepared(folder, format, dtype=torch.float32)
stop.set(); watcher.join()
held = sum(p.stored_bytes if isinstance(p, flex_kernels.FrozenWeight) else p.nbytes for p in model.parameters())
experts = model.model.layers[0].mlp.experts
layer = (experts.gate_up_proj.numel() + experts.down_proj.numel()) * 4
print(highest[0] - before, held, layer)
"""


@pytest.mark.parametrize("source", ["float32", "bfloat16", "nf4-double", "llm-int8"])
@pytest.mark.skipif(not HAS_PEAK, reason="needs the kernel's account of memory")
def test_peak_memory_of_a_load_is_the_result_and_one_layer(source: str, dense: Path, tmp_path: Path) -> None:
    """A real process; its own memory, without what is mapped of the files and can be dropped at any time.

    bf16 files are loaded in fp32: then a layer's experts are in memory as they come from the files. Of a file that is
    quantised, no layer is dense at any time.
    """
    model = tiny(hidden_size=256, moe_intermediate_size=256, num_experts=24, num_hidden_layers=6)
    format, share = "nf4", 1.0
    if source in quantised.LAYOUTS:
        format, share = quantised.LAYOUTS[source][0], 0.75
        quantised.write(tmp_path, source, model)
    else:
        model.to(getattr(torch, source)).save_pretrained(tmp_path)
    command = [sys.executable, "-c", LOAD, str(dense), str(tmp_path), format]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, held, layer = map(int, run.stdout.split())
    print(f"beside the result: {(grown - held) / layer:.2f} layers")
    assert grown < held + share * layer
    assert held + layer < 6 * layer
