"""Checkpoints of bitsandbytes, compressed-tensors and torchao: read to the bit, or refused in one sentence."""

import json
from pathlib import Path

import pytest
import quantised
import torch
from prepared import TOKENS, tiny
from quantised import LAYOUTS, SIZES
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

import flex_kernels
from flex_kernels.weight_files import DenseExpertsError


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_is_read_as_it_is(layout: str, tmp_path: Path) -> None:
    want = quantised.write(tmp_path, layout)
    format = LAYOUTS[layout][0]
    model, found = flex_kernels.load_prepared(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert "quantization_config" not in model.config.to_dict()
    ours = model.state_dict()
    for name, tensor in want.state_dict().items():
        expert = ".experts." in name
        # NF4's scales are bf16 here; 127 divides the scale there, and the product here
        rtol = 2**-8 if expert and format == "nf4" else 3e-7
        torch.testing.assert_close(ours[name], tensor, rtol=rtol, atol=0 if expert else 1e-8, msg=name)
    for experts in flex_kernels.moe_layers(model).values():
        assert (experts.gate_up_proj.format, experts.down_proj.format) == (format, format)
        assert not experts.gate_up_proj.requires_grad
    want.load_state_dict(ours)  # the same weights, so what differs is how they are multiplied
    torch.testing.assert_close(model.eval()(TOKENS).logits, want(TOKENS).logits, rtol=1e-4, atol=1e-5)
    flex_kernels.save_prepared(model, tmp_path / "kept")
    again = flex_kernels.load_prepared(tmp_path / "kept").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("layout", ["nf4", "nf4-double", "torchao"])
def test_experts_in_one_tensor(layout: str, tmp_path: Path) -> None:
    want = quantised.write(tmp_path, layout, fused=True).model.layers[1].mlp.experts
    experts = flex_kernels.load_prepared(tmp_path).model.layers[1].mlp.experts
    assert experts.down_proj.format == LAYOUTS[layout][0]
    for matrix in ("gate_up_proj", "down_proj"):
        torch.testing.assert_close(
            getattr(experts, matrix).float().dequantize(), getattr(want, matrix), rtol=2**-8, atol=0
        )


def test_what_scales_in_bf16_cost() -> None:
    """Of bitsandbytes' NF4, whose scales are fp32, in the mean square of normal weights; the figures of the docs."""
    weight = torch.randn(512, 1024)
    parts, meant = quantised.nf4("weight", weight)
    scales = parts["weight.absmax"]
    error = scales.bfloat16().float() / scales - 1
    rounded = meant.view(-1, 64) * (1 + error)[:, None]
    costs = {
        "at most": error.abs().max(),
        "scales in bf16": (rounded - meant.view(-1, 64)).norm() / meant.norm(),
        "weights in bf16": (meant.bfloat16().float() - meant).norm() / meant.norm(),
        "NF4": (meant - weight).norm() / weight.norm(),
    }
    print(", ".join(f"{name} {100 * cost:.2f} %" for name, cost in costs.items()))
    assert costs["at most"] < 2**-8
    assert max(costs["scales in bf16"], costs["weights in bf16"]) < 0.002 < 0.09 < costs["NF4"]


def test_a_family_that_names_its_experts_otherwise(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_local_experts": 4}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
    want = quantised.write(tmp_path, "nf4", MixtralForCausalLM(MixtralConfig(**sizes)))
    assert any(".experts.3.w2.weight.absmax" in name for name in load_file(tmp_path / "model.safetensors"))
    model = flex_kernels.load_prepared(tmp_path)
    for experts in flex_kernels.moe_layers(model).values():
        assert (experts.gate_up_proj.format, experts.down_proj.format) == ("nf4", "nf4")
    torch.testing.assert_close(model.state_dict(), want.state_dict(), rtol=2**-8, atol=1e-8)


def test_a_config_that_says_no_dtype(tmp_path: Path) -> None:
    quantised.write(tmp_path, "llm-int8", tiny(**SIZES).bfloat16())
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = flex_kernels.load_prepared(tmp_path)
    assert model.dtype == model.model.layers[0].mlp.experts.down_proj.dtype == torch.bfloat16
    assert model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("layout", ["nf4", "int-quantized", None])
def test_experts_of_another_shape_than_the_configuration_says(layout: str | None, tmp_path: Path) -> None:
    tiny(**SIZES).save_pretrained(tmp_path)
    if layout is not None:
        quantised.write(tmp_path, layout)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "moe_intermediate_size": 128}))
    with pytest.raises(ValueError, match=r"down_proj is \[6, 64, 64\] in the files, expected \[6, 64, 128\]"):
        flex_kernels.load_prepared(tmp_path, None if layout else "nf4")


def test_experts_that_are_dense_in_a_quantised_checkpoint(tmp_path: Path) -> None:
    """transformers 5 quantises linear layers, and its fused experts are none."""
    want = quantised.write(tmp_path, "nf4-double", experts=False)
    with pytest.raises(DenseExpertsError, match=r"down_proj is dense in the checkpoint, expected a format for it"):
        flex_kernels.load_prepared(tmp_path)
    model = flex_kernels.load_prepared(tmp_path, "int8", dtype=torch.float32)
    assert model.model.layers[0].mlp.experts.down_proj.format == "int8"
    flex_kernels.prepare_experts(want, "int8")
    torch.testing.assert_close(model.state_dict(), want.state_dict(), rtol=0, atol=1e-8)


def test_several_files_and_their_order(tmp_path: Path) -> None:
    quantised.write(tmp_path, "nf4-double")
    whole = flex_kernels.load_prepared(tmp_path).state_dict()
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    places = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}  # codes here, scales there
    for file in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == file}, tmp_path / file, {"format": "pt"})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    again = flex_kernels.load_prepared(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model-1.safetensors, expected it: model.safetensors.index.json"):
        flex_kernels.load_prepared(tmp_path)


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    quantised.write(tmp_path, "torchao")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has no model.safetensors, expected it: other files may be pickles"):
        flex_kernels.load_prepared(tmp_path)


def test_generation_settings_come_along(tmp_path: Path) -> None:
    quantised.write(tmp_path, "nf4")
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [3, 5], "do_sample": True, "top_k": 7})
    )
    model = flex_kernels.load_prepared(tmp_path)
    assert (model.generation_config.eos_token_id, model.generation_config.top_k) == ([3, 5], 7)
    flex_kernels.save_prepared(model, tmp_path / "kept")
    again = flex_kernels.load_prepared(tmp_path / "kept")
    assert again.generation_config.eos_token_id == [3, 5]


NAME = "model.layers.1.mlp.experts.2.down_proj.weight"


def changed(folder: Path, **tensors: torch.Tensor | None) -> None:
    """The file with other tensors beside `NAME` (itself: `weight`), or without them."""
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    held = load_file(file)
    for ending, tensor in tensors.items():
        name = NAME.removesuffix("weight") + ending.replace("__", ".")
        assert name in held, name
        if tensor is None:
            del held[name]
        else:
            held[name] = tensor
    save_file(held, file, header)


def told(folder: Path, **settings: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))


def weights(**settings: object) -> dict:
    return {"group_0": {"targets": ["Linear"], "weights": quantised.SCHEME | settings}}


def state(folder: Path, **settings: object) -> None:
    parts, _ = quantised.nf4_parts("weight", torch.randn(64, 64), double=False, **settings)
    own = NAME.removesuffix("weight") + "weight.quant_state.bitsandbytes__nf4"
    file = folder / "model.safetensors"
    save_file(load_file(file) | {own: parts["weight.quant_state.bitsandbytes__nf4"]}, file, {"format": "pt"})


def without_state(folder: Path) -> None:
    file = folder / "model.safetensors"
    held = load_file(file)
    del held[f"{NAME}.quant_state.bitsandbytes__nf4"]
    save_file(held, file, {"format": "pt"})


def retyped(folder: Path, kind: str | None) -> None:
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    header = {"format": "pt"} if kind is None else header | {NAME: json.dumps({"_type": kind})}
    save_file(load_file(file), file, header)


def dense_after_all(folder: Path) -> None:
    tiny(**SIZES).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": LAYOUTS["llm-int8"][2]}))


NAN = float("nan")
BAD = {  # a layout, what is done to it, and what is said
    "no absmax": ("nf4", lambda f: changed(f, weight__absmax=None), "has no absmax beside it"),
    "no outer absmax": (
        "nf4-double",
        lambda f: changed(f, weight__nested_absmax=None),
        "has no nested_absmax beside it",
    ),
    "short absmax": (
        "nf4",
        lambda f: changed(f, weight__absmax=torch.ones(63)),
        r"down_proj.weight.absmax is F32 \[63\], expected F32 \[64\]",
    ),
    "nan absmax": (
        "nf4",
        lambda f: changed(f, weight__absmax=torch.full((64,), NAN)),
        "down_proj.weight: its scales has 64 NaN or infinite values",
    ),
    "nan offset": ("nf4-double", lambda f: changed(f, weight__nested_absmax=torch.tensor([NAN])), "has 64 NaN or inf"),
    "short codes": (
        "nf4",
        lambda f: changed(f, weight=torch.zeros(100, 1, dtype=torch.uint8)),
        r"is U8 \[100, 1\], expected 2048 bytes for a weight of \[64, 64\]",
    ),
    "no codes": ("nf4", lambda f: changed(f, weight=None), f"stands without its codes, expected {NAME}"),
    "other values": (
        "nf4",
        lambda f: changed(f, weight__quant_map=torch.ones(16)),
        "other values than the 16",
    ),
    "fp4": ("nf4", lambda f: state(f, quant_type="fp4"), "is in 'fp4' of bitsandbytes, expected 'nf4'"),
    "unknown type": ("nf4", lambda f: state(f, quant_type="nf5"), "is in 'nf5' of bitsandbytes, expected 'nf4'"),
    "another block": ("nf4", lambda f: state(f, blocksize=128), "has a scale per 128 weights, expected one per 64"),
    "odd rows": ("nf4", lambda f: state(f, shape=[128, 32]), "has rows of 32, so that blocks of 64 go over their ends"),
    "no shape": ("nf4", lambda f: state(f, shape=None), r"quant_state.bitsandbytes__nf4 cannot be read: TypeError"),
    "no account": (
        "nf4",
        without_state,
        "down_proj.weight is U8, expected beside it what its codes mean",
    ),
    "no SCB": ("llm-int8", lambda f: changed(f, SCB=None), "is I8, expected beside it what"),
    "other layout": (
        "llm-int8",
        lambda f: changed(f, weight_format=torch.tensor(2, dtype=torch.uint8)),
        "is in layout 2 of LLM.int8, expected 0",
    ),
    "infinite SCB": (
        "llm-int8",
        lambda f: changed(f, SCB=torch.full((64,), float("inf"))),
        "its scales has 64 NaN or inf",
    ),
    "4 bits": (
        "pack-quantized",
        lambda f: told(f, config_groups=weights(num_bits=4, strategy="group", group_size=128)),
        r"group_0 of the checkpoint is 'pack-quantized' of compressed-tensors \(type int, num_bits 4",
    ),
    "asymmetric": ("int-quantized", lambda f: told(f, config_groups=weights(symmetric=False)), "symmetric False"),
    "float": (
        "int-quantized",
        lambda f: told(f, format="float-quantized"),
        "is 'float-quantized' of",
    ),
    "rotated": (
        "int-quantized",
        lambda f: told(f, transform_config={"config_groups": {"u": {"type": "hadamard"}}}),
        "has a transform_config of compressed-tensors",
    ),
    "a scale per group": (
        "int-quantized",
        lambda f: changed(f, weight_scale=torch.ones(64, 2)),
        r"weight_scale is F32 \[64, 2\], expected F32 or BF16 or F16 \[64, 1\] or \[64\]",
    ),
    "no scale": (
        "int-quantized",
        lambda f: changed(f, weight_scale=None),
        "is I8, expected beside it what",
    ),
    "short words": (
        "pack-quantized",
        lambda f: changed(f, weight_packed=torch.zeros(64, 8, dtype=torch.int32)),
        r"weight_packed is I32 \[64, 8\], expected I32 \[64, 16\]",
    ),
    "zero points": (
        "torchao",
        lambda f: changed(f, _weight_zero_point=torch.ones(64, 1, dtype=torch.int8)),
        "_weight_zero_point is not zero, expected symmetric codes",
    ),
    "no torchao scale": ("torchao", lambda f: changed(f, _weight_scale=None), "has no _weight_scale beside it"),
    "other subclass": (
        "torchao",
        lambda f: retyped(f, "Int4Tensor"),
        f"{NAME} is a Int4Tensor of torchao",
    ),
    "no headers": ("torchao", lambda f: retyped(f, None), "have no account of torchao's tensors in their headers"),
    "nothing quantised": ("llm-int8", dense_after_all, "no quantised tensor of bitsandbytes"),
    "damaged": ("nf4", lambda f: (f / "model.safetensors").write_bytes(b"x" * 20), "model.safetensors cannot be read"),
    "another program": ("nf4", lambda f: told(f, quant_method="awq"), "is quantised by 'awq', expected dense weights"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_not_right_is_told_in_one_sentence(what: str, tmp_path: Path) -> None:
    layout, break_it, message = BAD[what]
    quantised.write(tmp_path, layout)
    break_it(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        flex_kernels.load_prepared(tmp_path)
    assert "\n" not in str(caught.value)


def test_another_format_than_the_files_have(tmp_path: Path) -> None:
    quantised.write(tmp_path, "nf4")
    with pytest.raises(ValueError, match=r"experts.down_proj is in nf4, expected int8"):
        flex_kernels.load_prepared(tmp_path, "int8")


def rewritten(folder: Path, file: Path, tensors: dict, header: dict, about: dict) -> None:
    """`folder` with tensors in its file that a program made of the weights there."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, header)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": about}))


def dense_weights(folder: Path) -> tuple[Path, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A tiny model in files; its linear layers, in bf16, and the rest.

    No row is shorter than a block: bitsandbytes 0.50's own dequantize_4bit takes the wrong scales there on a CPU.
    """
    tiny(**SIZES, shared_expert_intermediate_size=64).to(torch.bfloat16).save_pretrained(folder)
    file = folder / "model.safetensors"
    held = load_file(file)
    linear = {name: tensor for name, tensor in held.items() if name.endswith("_proj.weight")}
    return file, linear, {name: tensor for name, tensor in held.items() if name not in linear}


def assert_means(folder: Path, meant: dict[str, torch.Tensor], rtol: float) -> None:
    """Every weight is what the program itself makes of its file, in its own dtype."""
    again = folder / "meant"
    flex_kernels.load_prepared(folder).save_pretrained(again)
    ours = load_file(again / "model.safetensors")
    for name, tensor in meant.items():
        torch.testing.assert_close(ours[name], tensor, rtol=rtol if ".experts." in name else 0, atol=0, msg=name)


@pytest.mark.parametrize("double", [False, True])
def test_what_bitsandbytes_itself_writes_in_4_bits(double: bool, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    file, linear, rest = dense_weights(tmp_path)
    tensors, meant = dict(rest), {}
    for name, weight in linear.items():
        codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double)
        tensors |= {name: codes} | {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
        meant[name] = functional.dequantize_4bit(codes, state)
    rewritten(tmp_path, file, tensors, {"format": "pt"}, quantised.BITSANDBYTES)
    assert_means(tmp_path, meant, 2**-7)  # a scale in bf16, and the product rounded to bf16 in both


def test_what_bitsandbytes_itself_writes_in_8_bits(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    file, linear, rest = dense_weights(tmp_path)
    tensors, meant = dict(rest), {}
    for name, weight in linear.items():
        layer = bitsandbytes.nn.Linear8bitLt(*weight.T.shape, bias=False, has_fp16_weights=False)
        layer.weight = bitsandbytes.nn.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False)
        state = layer.to("cpu").state_dict()
        tensors |= {name.removesuffix("weight") + key: part for key, part in state.items()}
        meant[name] = bitsandbytes.functional.int8_vectorwise_dequant(state["weight"], state["SCB"]).bfloat16()
    rewritten(tmp_path, file, tensors, {"format": "pt"}, {"load_in_8bit": True, "quant_method": "bitsandbytes"})
    assert_means(tmp_path, meant, 2**-7)  # one rounding to bf16, either way


@pytest.mark.parametrize("kind", ["int-quantized", "pack-quantized"])
def test_what_compressed_tensors_itself_writes(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    file, linear, rest = dense_weights(tmp_path)
    tensors, meant = dict(rest), {}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=8, strategy="channel"))
    compressor = BaseCompressor.get_value_from_registry(kind)
    for name, weight in linear.items():
        scale = weight.abs().amax(1, keepdim=True) / 127.5
        state = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
        tensors |= {name.removesuffix("weight") + key: part for key, part in state.items()}
        meant[name] = compressor.decompress(state, scheme)["weight"]
    groups = {"group_0": json.loads(scheme.model_dump_json())}
    rewritten(tmp_path, file, tensors, {"format": "pt"}, quantised.LAYOUTS[kind][2] | {"config_groups": groups})
    assert_means(tmp_path, meant, 0)


@pytest.mark.filterwarnings("ignore")
def test_what_torchao_itself_writes(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    from torchao.core.config import config_to_dict
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    file, linear, rest = dense_weights(tmp_path)
    state, meant = dict(rest), {}
    for name, weight in linear.items():
        layer = torch.nn.Linear(*weight.T.shape, bias=False, dtype=weight.dtype)
        layer.weight.data = weight
        quantize_(layer, Int8WeightOnlyConfig())
        state[name], meant[name] = layer.weight.data, layer.weight.dequantize()
    tensors, header = flatten_tensor_state_dict(state)
    about = {"quant_method": "torchao", "quant_type": {"default": config_to_dict(Int8WeightOnlyConfig())}}
    rewritten(tmp_path, file, tensors, header | {"format": "pt"}, about)
    assert_means(tmp_path, meant, 0)
