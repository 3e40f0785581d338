"""csrc behind the signatures of `pytorch`, and the one door to it: checks first, then pointers.

csrc knows no torch, it gets raw addresses and sizes; anything that could make it read a wrong address is refused here,
or, for `grafted_route`, in its bindings, which look at torch's tensors through DLPack's C functions.
It is two modules. `flex_kernels._native` computes on the CPU: fp32 and bf16, accumulated in fp32; the experts' weights
may have either dtype or be codes of any format of `weights.py`, which are dequantised where they are packed, and read
in place where a product has few rows. Threads are torch's own: as many as `torch.get_num_threads()`, in torch's OpenMP
pool. The same input gives the same bits for any number of threads. The instruction set is the best one here; the
environment variable `FLEX_ISA` (amx, avx512_bf16, avx512, avx2, portable) forces another. If it was not built, `covers`
says no (and says so once, as a warning), and PyTorch computes instead. `flex_kernels._cuda` has the routing plan alone;
it is built if nvcc is there (`setup.py`, FLEX_CUDA) and imports without a driver.
"""

import importlib
import warnings
from collections.abc import Iterable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from flex_kernels.backends.call import LayerCall
from flex_kernels.described import Remembered
from flex_kernels.weights import CODE_DTYPES, Experts, Stored

# What results are made like: their dtype is then no matter of `torch.set_default_dtype`.
_MADE_LIKE = [
    torch.empty(0, dtype=dtype, device="cpu") for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.int32)
]
MAX_PAIRS = torch.iinfo(torch.int32).max
DTYPES = (torch.float32, torch.bfloat16)
FROZEN = (*DTYPES, *CODE_DTYPES)
# stage -> dtypes of hidden states, and of weights; None: any
STAGES: dict[str, tuple[tuple[torch.dtype, ...], tuple[torch.dtype, ...]] | None] = {
    "routing_plan": None,
    "experts": (DTYPES, FROZEN),
    "score": (DTYPES, FROZEN),
    "grafted_route": (DTYPES, DTYPES),
}


@cache
def module() -> ModuleType | None:
    """The compiled module, or None if it could not be built."""
    try:
        # torch is imported first, so that the module shares its OpenMP runtime.
        native = importlib.import_module("flex_kernels._native")
        native.know_tensors(Tensor, nn.Parameter, *_MADE_LIKE)
        return native
    except (ImportError, AttributeError, RuntimeError) as error:
        warnings.warn(
            f"flex_kernels: the native module is not there ({error}); PyTorch computes instead, slower. "
            "`pip install -e .` with a C++ compiler at hand builds it.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


@cache
def cuda_module() -> ModuleType | None:
    """The compiled CUDA module, or None if it was not built."""
    try:
        return importlib.import_module("flex_kernels._cuda")
    except ImportError:
        return None


def covers(stage: str, dtype: torch.dtype, weight_dtype: torch.dtype) -> bool:
    """Does csrc compute this stage on this machine's CPU, for hidden states and weights of these dtypes?"""
    if stage not in STAGES:
        return False
    dtypes = STAGES[stage]
    return (dtypes is None or (dtype in dtypes[0] and weight_dtype in dtypes[1])) and module() is not None


def routing_plan(expert_indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.routing_plan`: sorted_pairs [T*K], tokens_per_expert [E], expert_offsets [E+1], all int32.

    On a CUDA device it is one launch, without a synchronisation; negative ids are skipped like those `>= E`.

    Raises:
        TypeError: `expert_indices` is not an integer tensor on the CPU or a CUDA device.
        ValueError: 2^31 pairs and more; on the CPU a negative id; on CUDA more experts than a block's shared memory
            counts (6,143).
        RuntimeError: the CUDA module was not built, or CUDA refuses the launch.
    """
    dtype, device, num_pairs = expert_indices.dtype, expert_indices.device, expert_indices.numel()
    on_cpu = expert_indices.is_cpu
    if not (on_cpu or expert_indices.is_cuda) or dtype not in (torch.int32, torch.int64):
        raise TypeError(f"expert_indices is {dtype} on {device}, expected int32 or int64 on the CPU or a CUDA device")
    if not on_cpu and cuda_module() is None:
        raise RuntimeError("flex_kernels._cuda was not built; `FLEX_CUDA=1 pip install -e .` with nvcc builds it")
    if num_pairs > MAX_PAIRS:
        raise ValueError(f"expert_indices has {num_pairs} entries, expected fewer than 2^31")
    ids = (expert_indices.to(torch.int64) if on_cpu and dtype != torch.int64 else expert_indices).contiguous()
    like = {"dtype": torch.int32, "device": device}
    results = (torch.empty(num_pairs, **like), torch.empty(num_experts, **like), torch.empty(num_experts + 1, **like))
    addresses = [tensor.data_ptr() for tensor in results]
    if not on_cpu:
        _plan_on_cuda(ids, num_experts, addresses)
    else:
        module().routing_plan(ids.data_ptr(), num_pairs, num_experts, *addresses)
    return results


def _plan_on_cuda(ids: Tensor, num_experts: int, addresses: list[int]) -> None:
    processors = torch.cuda.get_device_properties(ids.device).multi_processor_count
    launch = cuda_module().plan_launch(ids.numel(), num_experts, processors)
    counts = ids.new_empty(launch.num_counts, dtype=torch.int32)
    with torch.cuda.device_of(ids):
        cuda_module().routing_plan(
            launch,
            ids.data_ptr(),
            ids.dtype == torch.int64,
            ids.numel(),
            num_experts,
            counts.data_ptr(),
            *addresses,
            ids.device.index,
            torch.cuda.current_stream(ids.device).cuda_stream,
        )


def grafted_route_fwd(
    hidden_states: Tensor,
    router_weight: Tensor,
    graft_logit_weight: Tensor | None,
    graft_logit_bias: Tensor | None,
    top_k: int,
    renormalize: bool,
    keep_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`pytorch.grafted_route_fwd`: one pass over the hidden states, no copies of them or of the weights."""
    gate = (graft_logit_weight, graft_logit_bias)
    tensors = [None if x is None else x.contiguous() for x in (hidden_states, router_weight, *gate)]
    threads = torch.get_num_threads()
    results = module().grafted_route(*tensors, top_k, renormalize, keep_logits, False, threads)
    if results is None:
        _refuse_route(*tensors, top_k)
    return results if keep_logits else (*results, hidden_states.new_empty(0, len(router_weight)))


def plain_grafted_route(*arguments: Any) -> tuple[Tensor, ...] | None:
    """`grafted_route_fwd`, whose arguments these are, of tensors as they come: without the logits unless they are kept;
    None where they are not plain (`described.py`) or not as csrc reads them."""
    return module().grafted_route(*arguments, True, torch.get_num_threads())


def _refuse_route(
    hidden_states: Tensor,
    router_weight: Tensor,
    graft_logit_weight: Tensor | None,
    graft_logit_bias: Tensor | None,
    top_k: int,
) -> None:
    """Says why csrc would not read them."""
    (num_tokens, hidden_size), num_experts, dtype = hidden_states.shape, len(router_weight), hidden_states.dtype
    _scalar(dtype)
    _check("hidden_states", hidden_states, dtype, (num_tokens, hidden_size))
    _check("router_weight", router_weight, dtype, (num_experts, hidden_size))
    if graft_logit_weight is not None:
        _check("graft_logit_weight", graft_logit_weight, torch.float32, (hidden_size,))
        _check("graft_logit_bias", graft_logit_bias, torch.float32, (1,))
    raise ValueError(f"top_k is {top_k}, expected 1 to {num_experts}, the number of experts")


def experts_fwd(call: LayerCall, save_preactivations: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`pytorch.experts_fwd`: out [T, H], preactivations [T*K, 2I], graft_preactivations [T, 2I_g]."""
    described, kept = _described(call)
    out = torch.empty_like(kept[0])
    preactivations, graft_preactivations = _empty_preactivations(call, save_preactivations)
    module().experts_forward(
        described, out.data_ptr(), preactivations.data_ptr(), graft_preactivations.data_ptr(), torch.get_num_threads()
    )
    return out, preactivations, graft_preactivations


def preactivations_fwd(call: LayerCall) -> tuple[Tensor, Tensor]:
    """`pytorch.preactivations_fwd`: [T*K, 2I] and [T, 2I_g]."""
    described, _kept = _described(call)
    preactivations, graft_preactivations = _empty_preactivations(call, True)
    module().experts_forward(
        described, 0, preactivations.data_ptr(), graft_preactivations.data_ptr(), torch.get_num_threads()
    )
    return preactivations, graft_preactivations


def experts_bwd(
    d_out: Tensor, call: LayerCall, preactivations: Tensor, graft_preactivations: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`pytorch.experts_bwd`: every gradient but those of the experts' weights; not needed: an empty tensor."""
    rows = (d_out, preactivations, graft_preactivations if call.has_graft else None)
    described, kept = _described(call, *rows)
    x, weights, graft, needs = kept[0], kept[3], kept[6:9], call.needs

    def wanted(need: bool, like: Tensor | None) -> Tensor:
        return torch.empty_like(like) if need and like is not None else x.new_empty(0)

    grads = (
        wanted(needs.hidden, x),
        wanted(needs.routing_weights, weights),
        wanted(needs.graft, graft[0]),
        wanted(needs.graft, graft[1]),
        wanted(needs.graft_logits, graft[2]),
    )
    addresses = [_address(tensor) for tensor in kept[9:]]
    gradients = module().Gradients(*(grad.data_ptr() for grad in grads))
    module().experts_backward(described, *addresses, gradients, torch.get_num_threads())
    return grads


def score_experts(
    hidden_states: Tensor,
    target: Tensor,
    gate_up_proj: Experts,
    down_proj: Experts,
    batch_offsets: Tensor,
    activation: str,
) -> Tensor:
    """`reference.score_experts`: [B, E, 3] fp32."""
    scoring, _kept = _scoring(hidden_states, target, gate_up_proj, down_proj, activation)
    offsets = batch_offsets.to("cpu", torch.int64).contiguous()
    scores = torch.empty(len(offsets) - 1, gate_up_proj.shape[0], 3, dtype=torch.float32)
    module().score_experts(scoring, offsets.data_ptr(), len(offsets) - 1, scores.data_ptr(), torch.get_num_threads())
    return scores


def score_neurons(
    hidden_states: Tensor, target: Tensor, gate_up_proj: Experts, down_proj: Experts, activation: str
) -> tuple[Tensor, Tensor]:
    """`reference.score_neurons`: energy [E, I] fp32 and correlation [E, I] fp32."""
    scoring, _kept = _scoring(hidden_states, target, gate_up_proj, down_proj, activation)
    energy = torch.empty(down_proj.shape[0], down_proj.shape[2], dtype=torch.float32)
    correlation = torch.empty_like(energy)
    module().score_neurons(scoring, energy.data_ptr(), correlation.data_ptr(), torch.get_num_threads())
    return energy, correlation


def _described(call: LayerCall, *rows: Tensor) -> tuple[object, list[Experts | None]]:
    """The layer as csrc reads it, and the tensors that must live as long as it is used: the call's nine, then `rows`,
    of a backward `d_out` and the pre-activations."""
    tensors = (*call.tensors, *rows)
    if isinstance(call.gate_up_proj, Stored):
        sizes = _checked_sizes(call, *rows)
    else:
        like = (*_likeness(tensors), call.combine, call.activation)
        sizes = _SIZES.get(like) or _SIZES.put(like, _checked_sizes(call, *rows))
    kept = [None if tensor is None else tensor.contiguous() for tensor in tensors]
    described = module().Layer(*sizes, *[_address(tensor) for tensor in kept[:9]])
    _set_scales(described, *kept[4:6])
    return described, kept


_SIZES = Remembered()


def _checked_sizes(call: LayerCall, *rows: Tensor) -> tuple[Any, ...]:
    """What csrc is told of a layer beside its addresses."""
    (num_tokens, hidden_size), top_k = call.hidden_states.shape, call.routing_weights.shape[1]
    num_experts, _, width = call.down_proj.shape
    num_pairs = num_tokens * top_k
    if num_pairs > MAX_PAIRS:
        raise ValueError(
            f"hidden_states has {num_tokens} tokens of {top_k} experts each, expected fewer than 2^31 pairs"
        )
    dtype, weight_dtype, graft_width = call.hidden_states.dtype, call.gate_up_proj.dtype, call.graft_width
    _check_codes(call.gate_up_proj, hidden_size)
    _check_codes(call.down_proj, width)
    expected = {
        "hidden_states": (dtype, (num_tokens, hidden_size)),
        "sorted_pairs": (torch.int32, (num_pairs,)),
        "expert_offsets": (torch.int32, (num_experts + 1,)),
        "routing_weights": (torch.float32, (num_tokens, top_k)),
        "gate_up_proj": (weight_dtype, (num_experts, 2 * width, hidden_size)),
        "down_proj": (weight_dtype, (num_experts, hidden_size, width)),
    }
    if call.has_graft:
        expected |= {
            "graft_gate_up_proj": (dtype, (2 * graft_width, hidden_size)),
            "graft_down_proj": (dtype, (hidden_size, graft_width)),
            "graft_logits": (torch.float32, (num_tokens,)),
        }
    if rows:
        expected |= {"d_out": (dtype, (num_tokens, hidden_size)), "preactivations": (dtype, (num_pairs, 2 * width))}
        expected |= {"graft_preactivations": (dtype, (num_tokens, 2 * graft_width))} if call.has_graft else {}
    tensors = [tensor for tensor in (*call.tensors, *rows) if tensor is not None]
    for tensor, (name, like) in zip(tensors, expected.items(), strict=True):
        _check(name, tensor, *like)
    sizes = (num_tokens, hidden_size, num_experts, width, top_k, graft_width if call.has_graft else -1)
    return *sizes, _scalar(dtype), _scalar(weight_dtype), call.convex, _activation(call.activation)


def _empty_preactivations(call: LayerCall, wanted: bool) -> tuple[Tensor, Tensor]:
    """For [T*K, 2I] and the graft's [T, 2I_g]; without rows if not wanted."""
    (tokens, top_k), dtype = call.routing_weights.shape if wanted else (0, 0), call.hidden_states.dtype
    preactivations = torch.empty(tokens * top_k, call.gate_up_proj.shape[1], dtype=dtype)
    if not call.has_graft:
        return preactivations, torch.empty(0, 0, dtype=dtype)
    return preactivations, torch.empty(tokens, call.graft_gate_up_proj.shape[0], dtype=dtype)


def _scoring(
    hidden_states: Tensor, target: Tensor, gate_up_proj: Experts, down_proj: Experts, activation: str
) -> tuple[object, list[Experts]]:
    """As `_described`. A target that is wider than the hidden states keeps its precision: both go to fp32."""
    if target.dtype != hidden_states.dtype:
        hidden_states, target = hidden_states.float(), target.float()
    num_experts, hidden_size, width = down_proj.shape
    dtype, weight_dtype, shape = hidden_states.dtype, gate_up_proj.dtype, (len(hidden_states), hidden_size)
    _check_codes(gate_up_proj, hidden_size)
    _check_codes(down_proj, width)
    kept = [
        _checked("hidden_states", hidden_states, dtype, shape),
        _checked("target", target, dtype, shape),
        _checked("gate_up_proj", gate_up_proj, weight_dtype, (num_experts, 2 * width, hidden_size)),
        _checked("down_proj", down_proj, weight_dtype, (num_experts, hidden_size, width)),
    ]
    sizes = (len(hidden_states), hidden_size, num_experts, width)
    names = (_scalar(dtype), _scalar(weight_dtype), _activation(activation))
    described = module().Scoring(*sizes, *names, *map(_address, kept))
    _set_scales(described, *kept[2:])
    return described, kept


def _likeness(tensors: Iterable[Tensor | None]) -> tuple[tuple[Any, ...] | None, ...]:
    """All that the checks here look at: what was right once is right for tensors that are alike."""
    return tuple([None if x is None else (x.shape, x.dtype, x.is_cpu) for x in tensors])


def _checked(name: str, tensor: Experts, dtype: torch.dtype, shape: tuple[int, ...]) -> Experts:
    """The tensor, contiguous: from here on only its address is known."""
    _check(name, tensor, dtype, shape)
    return tensor.contiguous()


def _check(name: str, tensor: Experts, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.device.type != "cpu" or tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype} on {tensor.device}, expected {dtype} on the CPU")
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")


def _check_codes(weights: Experts, columns: int) -> None:
    """Codes and scales are as long as csrc will read them."""
    if not isinstance(weights, Stored):
        return
    *leading, _ = weights.shape
    groups = -(-columns // weights.format.group) if weights.format.group else 0
    codes = groups * weights.format.group // weights.format.codes_per_byte if groups else columns
    _check("the codes", weights.codes, weights.codes.dtype, (*leading, codes))
    _check("the scales", weights.scales, weights.format.scales, (*leading, groups) if groups else (*leading,))


def _address(tensor: Experts | None) -> int:
    if tensor is None:
        return 0
    return tensor.codes.data_ptr() if isinstance(tensor, Stored) else tensor.data_ptr()


def _set_scales(described: object, gate_up_proj: Experts, down_proj: Experts) -> None:
    if isinstance(gate_up_proj, Stored):
        described.set_scales(gate_up_proj.scales.data_ptr(), down_proj.scales.data_ptr())


@cache
def _scalar(dtype: torch.dtype) -> object:
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8", torch.uint8: "nf4"}
    if dtype not in names:
        raise TypeError(f"csrc computes in float32 and bfloat16, got {dtype}")
    return getattr(module().Scalar, names[dtype])


def _activation(activation: str) -> object:
    return getattr(module().Activation, activation)
