"""Checkpoints in the layouts of other programs, written from what is published of them, with plain torch."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from prepared import tiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from flex_kernels.reference import NF4_VALUES

Tensors = dict[str, Tensor]
SIZES = {"hidden_size": 64, "moe_intermediate_size": 64}  # whole blocks of 64; the shared expert's rows of 16 are none
BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
TORCHAO = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2}}}
SCHEME = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None, "dynamic": False}


def nf4_parts(name: str, weight: Tensor, double: bool, **state: object) -> tuple[Tensors, Tensor]:
    """What bitsandbytes writes for a weight in NF4, and the weight that it means."""
    values = torch.tensor(NF4_VALUES)
    blocks = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    absmax = blocks.abs().amax(1)
    codes = (blocks / absmax.clamp(min=1e-30)[:, None])[..., None].sub(values).abs().argmin(-1)
    packed = codes.flatten()[: weight.numel()].to(torch.uint8)
    about = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    parts = {"absmax": absmax, "quant_map": values}
    if double:
        offset, table = absmax.mean(), torch.linspace(-1, 1, 256)
        centred = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256)
        outer = centred.abs().amax(1)
        inner = (centred / outer[:, None])[..., None].sub(table).abs().argmin(-1).flatten()[: len(absmax)]
        absmax = table[inner] * outer.repeat_interleave(256)[: len(absmax)] + offset
        parts |= {"absmax": inner.to(torch.uint8), "nested_absmax": outer, "nested_quant_map": table}
        about |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
    text = json.dumps(about | state).encode()
    parts["quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    meant = (values[codes] * absmax[:, None]).flatten()[: weight.numel()].view(weight.shape)
    return {name: (packed[::2] << 4 | packed[1::2])[:, None], **{f"{name}.{k}": v for k, v in parts.items()}}, meant


def nf4(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    return nf4_parts(name, weight, double=False)


def nf4_double(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    return nf4_parts(name, weight, double=True)


def llm_int8(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    largest = weight.abs().amax(1)
    codes = (weight * 127 / largest[:, None]).round().to(torch.int8)
    stem = name.removesuffix("weight")
    beside = {f"{stem}SCB": largest, f"{stem}weight_format": torch.tensor(0, dtype=torch.uint8)}
    return {name: codes, **beside}, codes * largest[:, None] / 127


def compressed(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 127.5).bfloat16()
    codes = (weight / scale.float()).round().clamp(-128, 127).to(torch.int8)
    return {name: codes, f"{name}_scale": scale}, codes * scale.float()


def compressed_packed(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    parts, meant = compressed(name, weight)
    words = torch.nn.functional.pad(parts.pop(name).long() + 128, (0, -weight.shape[1] % 4)).unflatten(1, (-1, 4))
    packed = sum(words[..., i] << 8 * i for i in range(4))
    shape = torch.tensor(weight.shape)
    return {f"{name}_packed": packed.to(torch.int32), f"{name}_shape": shape, **parts}, meant


def torchao(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    scale = weight.abs().amax(-1, keepdim=True) / 127
    codes, (module, _, own) = (weight / scale).round().to(torch.int8), name.rpartition(".")
    stem = f"{module}._{own}_"
    zeros = torch.zeros_like(scale, dtype=torch.int8)
    return {f"{stem}qdata": codes, f"{stem}scale": scale, f"{stem}zero_point": zeros}, codes * scale


def _scheme(kind: str) -> dict:
    groups = {"group_0": {"targets": ["Linear"], "weights": SCHEME, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups, "ignore": ["re:.*gate$"]}


LAYOUTS: dict[
    str, tuple[str, Callable, dict]
] = {  # the format that it is, how a weight is written, what config.json says
    "nf4": ("nf4", nf4, BITSANDBYTES),
    "nf4-double": ("nf4", nf4_double, BITSANDBYTES | {"bnb_4bit_use_double_quant": True}),
    "llm-int8": ("int8", llm_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "int-quantized": ("int8", compressed, _scheme("int-quantized")),
    "pack-quantized": ("int8", compressed_packed, _scheme("pack-quantized")),
    "torchao": (
        "int8",
        torchao,
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}},
    ),
}


def write(
    folder: Path, layout: str, model: PreTrainedModel | None = None, experts: bool = True, fused: bool = False
) -> PreTrainedModel:
    """A tiny model as another program quantises it, all linear layers but the routers. Returns what it means, dense.

    Args:
        experts: whether they are quantised too.
        fused: all experts of a layer as one tensor, as in transformers 5's models.
    """
    _, quantise, about = LAYOUTS[layout]
    model = model or tiny(**SIZES)
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors, headers = load_file(file), {"format": "pt"}
    if fused:
        tensors = {k: v for k, v in tensors.items() if ".experts." not in k}
        tensors |= {k: v.detach() for k, v in model.state_dict().items() if ".experts." in k}
    written, meant = {}, {}
    for name, tensor in tensors.items():
        linear = any(part in name for part in ("_proj", ".experts.", "lm_head", "shared_expert_gate."))
        quantised = linear and tensor.dim() > 1 and (experts or ".experts." not in name)
        written[name], meant[name] = tensor, tensor
        if quantised:
            del written[name]
            parts, meant[name] = quantise(name, tensor.float())
            written |= parts
        headers[name] = json.dumps({"_type": "Int8Tensor" if quantised else "Tensor"})
    headers["tensor_names"] = json.dumps(list(tensors))
    # the dense model, by transformers' own loader
    save_file({name: tensor.contiguous() for name, tensor in meant.items()}, file, {"format": "pt"})
    dense = type(model).from_pretrained(folder, experts_implementation="flex", dtype=torch.float32).eval()
    save_file(
        {name: tensor.contiguous() for name, tensor in written.items()}, file, headers if layout == "torchao" else {}
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": about}))
    return dense
