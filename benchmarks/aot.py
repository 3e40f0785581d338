"""Compile every Triton kernel for GPUs that are not here, and read the machine code (`make aot`).

The launchers themselves run, on tensors without memory (torch's meta device), for a forced target: what is compiled is
exactly what a launch on that chip would compile. Nothing is launched. Of each kernel the table shows registers, spills,
shared memory and matrix instructions, and how many programs fit a processor of those that are started; the exit code is
1 if a default configuration spills a register, asks for more shared memory than the chip has, or is a 16-bit GEMM for
sm_90 without HGMMA or with one that waits for the one before (ptxas: "serialized").

    python -m benchmarks.aot [--quick] [--targets sm90,gfx942] [--jobs N] [--json FILE]
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.exit("TRITON_INTERPRET is set: @triton.jit would make interpreted functions, which cannot be compiled")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where this is left open

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from flex_kernels.backends.call import LayerCall, Needs
from flex_kernels.backends.triton import launch, stages
from flex_kernels.weights import FORMATS, QUANTIZED, Experts, Stored

KIB = 1 << 10


@dataclasses.dataclass(frozen=True)
class Chip:
    """What to compile for, how `launch.py` sees it, and the shared memory one program may ask for."""

    gpu: GPUTarget
    target: launch.Target
    shared_bytes: int

    def resident(self, registers: int, shared_bytes: int, num_warps: int) -> int:
        """How many programs of this size run on one processor at a time; registers are a thread's."""
        registers = triton.cdiv(registers, 8) * 8
        if self.gpu.backend == "hip":  # four units of 512 registers a lane
            return min(512 // registers * 4 // num_warps, self.shared_bytes // max(shared_bytes, 1))
        # A program costs 1 KB more than it asks for, and the processor has one for the first.
        by_memory = (self.shared_bytes + KIB) // (shared_bytes + KIB)
        return min(64 * KIB // (registers * num_warps * self.gpu.warp_size), by_memory)


CHIPS = {
    "sm80": Chip(GPUTarget("cuda", 80, 32), launch.Target("sm80", 108), 163 * KIB),
    "sm86": Chip(GPUTarget("cuda", 86, 32), launch.Target("small", 84), 99 * KIB),
    "sm90": Chip(GPUTarget("cuda", 90, 32), launch.Target("sm90", 132), 227 * KIB),
    "sm100": Chip(GPUTarget("cuda", 100, 32), launch.Target("sm100", 148), 227 * KIB),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), launch.Target("gfx942", 304), 64 * KIB),
}
QUICK_CHIPS = ("sm80", "sm90", "sm100", "gfx942")
PERSISTENT_KERNELS = ("_gate_up_fwd_kernel", "_grouped_rows_kernel", "_d_preactivations_kernel")
GEMM_KERNELS = (*PERSISTENT_KERNELS, "_score_experts_kernel", "_score_neurons_kernel")
MATRIX_OPERATIONS = ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA")
SPILLS = ("LDL", "STL")
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One kernel for one target: how it was specialised, and what came out."""

    kernel: str
    target: str
    dtype: str
    options: str
    registers: int
    spills: int  # loads and stores to local memory, or AMD's spilled registers
    loop_spills: int  # those among the matrix instructions, which every step pays for; AMD's are not told apart
    shared_bytes: int
    matrix_instructions: int  # HGMMA, HMMA, UTC*MMA or MFMA, whatever the chip has
    hgmma: int
    hgmma_waits: int
    tma: int
    async_copies: int
    resident: int  # programs that one processor runs at a time
    per_processor: int  # of a persistent kernel: how many are started
    compile_s: float

    def faults(self, outside_the_loop: bool = True) -> list[str]:
        """What a default configuration must not have.

        `outside_the_loop=False`: of a candidate that is going to be measured. It may spill before and after the loop of
        its product; a tile pays for that once.
        """
        spills = self.spills if outside_the_loop else self.loop_spills
        found = [f"{spills} spills"] if spills else []
        if self.shared_bytes > CHIPS[self.target].shared_bytes:
            found.append(f"{self.shared_bytes} bytes of shared memory, {CHIPS[self.target].shared_bytes} are there")
        if self.target == "sm90" and self.kernel in GEMM_KERNELS and self.dtype != "fp32" and not self.hgmma:
            found.append("no HGMMA")
        if self.hgmma_waits > max(self.hgmma, 2):
            found.append("HGMMA that waits for the one before")
        return found


class CompileOnlyDriver(DriverBase):
    """As much of a driver as `JITFunction.run(warmup=True)` asks for. The device's name is the target's."""

    def __init__(self, name: str):
        self.name = name

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return CHIPS[self.name].gpu

    def get_current_device(self) -> str:
        return self.name

    def get_current_stream(self, device: str | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_benchmarker(self) -> Callable:
        raise RuntimeError("there is no device to measure")


@contextlib.contextmanager
def compiling_for(target: str, found: dict[str, Compiled]) -> Iterator[None]:
    """Inside, every kernel launch compiles for `target` and lands in `found` (by the hash of what was compiled)."""
    jit_function = triton.runtime.JITFunction
    original_run = jit_function.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        start = time.perf_counter()
        kernel = original_run(self, *args, grid=grid, warmup=True, **kwargs)
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        if kernel.hash not in found:
            programs = triton.cdiv(grid[0], CHIPS[target].target.num_processors)
            found[kernel.hash] = describe(kernel, self, args, kwargs, target, programs, time.perf_counter() - start)
        return kernel

    triton.runtime.driver.set_active(CompileOnlyDriver(target))
    launch.force_target(CHIPS[target].target)
    jit_function.run = compile_only
    try:
        yield
    finally:
        jit_function.run = original_run
        launch.force_target(None)


def describe(kernel, function, args: tuple, kwargs: dict, target: str, programs: int, seconds: float) -> Compiled:
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    dtype = next((names[a.dtype] for a in args if isinstance(a, Tensor) and a.is_floating_point()), "int")
    shown = {k: int(v) if isinstance(v, bool) else v for k, v in kwargs.items() if k != "num_warps" or v != 4}
    name, shared_bytes = function.fn.__name__, kernel.metadata.shared
    code = read_cubin(kernel.asm["cubin"]) if "cubin" in kernel.asm else read_amdgcn(kernel.asm["amdgcn"])
    return Compiled(
        kernel=name,
        target=target,
        dtype=dtype,
        options=" ".join(f"{k.lower()}={v}" for k, v in shown.items()),
        shared_bytes=shared_bytes,
        resident=CHIPS[target].resident(code["registers"], shared_bytes, kernel.metadata.num_warps),
        per_processor=programs if name in PERSISTENT_KERNELS else 0,
        compile_s=round(seconds, 2),
        **code,
    )


def read_cubin(cubin: bytes) -> dict[str, int]:
    """Registers and instruction counts from the machine code, with the tools in Triton's own wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run(
                [NVIDIA_TOOLS / tool, *options, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, *options in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-ndf", "-c"))
        )
    blocks = [operations_of(block) for block in re.split(r"^\.L_x_\d+:", code, flags=re.MULTILINE)]
    operations = [operation for block in blocks for operation in block]

    def count(*prefixes: str, among: list[str] = operations) -> int:
        return sum(operation.startswith(prefixes) for operation in among)

    in_loops = [block for block in blocks if count(*MATRIX_OPERATIONS, among=block)]
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "spills": count(*SPILLS),
        "loop_spills": sum(count(*SPILLS, among=block) for block in in_loops),
        "matrix_instructions": count(*MATRIX_OPERATIONS),
        "hgmma": count("HGMMA"),
        "hgmma_waits": count("WARPGROUP.DEPBAR"),
        "tma": count("UTMALDG", "UTMASTG"),
        "async_copies": count("LDGSTS"),
    }


def operations_of(code: str) -> list[str]:
    """The names of the instructions in what `nvdisasm` prints."""
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", code, re.MULTILINE)


def read_amdgcn(code: str) -> dict[str, int]:
    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", code).group(1))

    return {
        "registers": field("vgpr_count"),
        "spills": field("vgpr_spill_count"),  # scalar registers spill into vector registers, not into memory
        "loop_spills": field("vgpr_spill_count"),
        "matrix_instructions": len(re.findall(r"^\s+v_mfma", code, re.MULTILINE)),
        "hgmma": 0,
        "hgmma_waits": 0,
        "tma": 0,
        "async_copies": 0,
    }


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def frozen(format: str, num_experts: int, rows: int, columns: int, dtype: torch.dtype) -> Experts:
    """Experts in a format of `weights.py`."""
    if format == "dense":
        return empty(num_experts, rows, columns, dtype=dtype)
    if format == "int8":
        codes, scales = (num_experts, rows, columns), (num_experts, rows)
    else:
        groups = triton.cdiv(columns, FORMATS[format].group)
        codes, scales = (num_experts, rows, groups * FORMATS[format].group // 2), (num_experts, rows, groups)
    kept = FORMATS[format]
    return Stored(empty(*codes, dtype=kept.codes), empty(*scales, dtype=kept.scales), columns)


def layer_case(
    dtype: torch.dtype = torch.bfloat16,
    num_tokens: int = 8192,
    hidden_size: int = 2048,
    intermediate_size: int = 1408,
    graft_size: int = 1408,
    combine: str = "additive",
    activation: str = "silu",
    training: bool = True,
    needs: tuple[bool, bool, bool, bool] = (True, True, True, True),
    format: str = "dense",
) -> None:
    """One call of the layer (Qwen1.5-MoE-A2.7B unless said otherwise), forward and backward."""
    num_experts, top_k = 60, 4
    hidden_states = empty(num_tokens, hidden_size, dtype=dtype)
    sorted_pairs = empty(num_tokens * top_k, dtype=torch.int32)
    expert_offsets = empty(num_experts + 1, dtype=torch.int32)
    routing_weights = empty(num_tokens, top_k, dtype=torch.float32)
    gate_up_proj = frozen(format, num_experts, 2 * intermediate_size, hidden_size, dtype=dtype)
    down_proj = frozen(format, num_experts, hidden_size, intermediate_size, dtype=dtype)
    graft = (None, None, None)
    if graft_size:
        graft = (
            empty(2 * graft_size, hidden_size, dtype=dtype),
            empty(hidden_size, graft_size, dtype=dtype),
            empty(num_tokens, dtype=torch.float32),
        )
    plan = (sorted_pairs, expert_offsets, routing_weights)
    call = LayerCall(hidden_states, *plan, gate_up_proj, down_proj, *graft, combine, activation, Needs(*needs))
    out, *saved = stages.experts_fwd(call, training)
    if training:
        stages.preactivations_fwd(call)
        stages.experts_bwd(out, call, *saved)


def combine_case(dtype: torch.dtype, has_graft: bool, form: str) -> None:
    """The combine on its own, forward and backward."""
    expert_out, routing_weights = empty(512, 4, 2048, dtype=dtype), empty(512, 4, dtype=torch.float32)
    graft = (empty(512, 2048, dtype=dtype), empty(512, dtype=torch.float32)) if has_graft else (None, None)
    out = stages.combine_fwd(expert_out, routing_weights, *graft, form)
    stages.combine_bwd(out, expert_out, routing_weights, *graft, form, True, True, has_graft, has_graft)


def route_case(dtype: torch.dtype, num_experts: int = 60, top_k: int = 4, renormalize: bool = True) -> None:
    """The router, its plan, and the graft's gate, forward and backward; router and gate as one, too."""
    logits, hidden_states = empty(512, num_experts, dtype=dtype), empty(512, 2048, dtype=dtype)
    weight, bias = empty(2048, dtype=torch.float32), empty(1, dtype=torch.float32)
    weights, indices = stages.route_fwd(logits, top_k, renormalize)
    stages.route_bwd(weights, logits, indices, renormalize)
    d_logits = stages.graft_logits_fwd(hidden_states, weight, bias)
    stages.graft_logits_bwd(d_logits, hidden_states, weight, True, True)
    stages.routing_plan(indices, num_experts)
    stages.routing_plan(indices[:16], num_experts)  # so few that they are one launch
    router_weight = empty(num_experts, 2048, dtype=dtype)
    for gate, keep_logits in (((weight, bias), True), ((weight, bias), False), ((None, None), False)):
        stages.grafted_route_fwd(hidden_states, router_weight, *gate, top_k, renormalize, keep_logits)


def score_case(dtype: torch.dtype, hidden_size: int = 2048, intermediate_size: int = 1408) -> None:
    """Scoring of experts and neurons."""
    hidden_states = empty(512, hidden_size, dtype=dtype)
    gate_up_proj = empty(60, 2 * intermediate_size, hidden_size, dtype=dtype)
    down_proj = empty(60, hidden_size, intermediate_size, dtype=dtype)
    batch_offsets = empty(9, dtype=torch.int32)
    stages.score_experts(hidden_states, hidden_states, gate_up_proj, down_proj, batch_offsets, "silu")
    stages.score_neurons(hidden_states, hidden_states, gate_up_proj, down_proj, "silu")


def quick_cases(target: str) -> Iterator[Callable[[], None]]:
    """Every kernel in the forms that training uses most; few rows, fp32 and formats on one chip of each maker."""
    yield partial(layer_case, combine="convex")
    if target in ("sm90", "gfx942"):
        yield partial(layer_case, num_tokens=512)
        yield partial(layer_case, dtype=torch.float32)
        for format in QUANTIZED:
            yield partial(layer_case, format=format)
    yield partial(combine_case, torch.bfloat16, True, "convex")
    yield partial(route_case, torch.bfloat16)
    yield partial(score_case, torch.bfloat16)


def all_cases() -> Iterator[Callable[[], None]]:
    """dtype x tile height x alignment x graft; then every activation and form; then every set of wanted gradients.

    fp16 compiles to the same code as bf16 but for the names of its instructions: it comes in the main form only.
    """
    sizes = [
        {"hidden_size": hidden_size, "intermediate_size": intermediate_size}
        for hidden_size, intermediate_size in ((2048, 1408), (2064, 1424), (2040, 1400), (2047, 1407))
    ]
    wide = (torch.bfloat16, torch.float32)
    for dtype, num_tokens, size, graft_size, training in itertools.product(
        wide, (512, 8192), sizes, (0, 1408, 1000), (True, False)
    ):
        yield partial(layer_case, dtype, num_tokens, **size, graft_size=graft_size, training=training)
    for activation, form, training in itertools.product(("gelu", "gelu_tanh"), ("additive", "convex"), (True, False)):
        yield partial(layer_case, activation=activation, combine=form, training=training)
    for needs, form in itertools.product(itertools.product((True, False), repeat=4), ("additive", "convex")):
        if any(needs):
            yield partial(layer_case, needs=needs, combine=form)
    for format, dtype, num_tokens, size in itertools.product(QUANTIZED, wide, (512, 8192), (sizes[0], sizes[3])):
        yield partial(layer_case, dtype, num_tokens, **size, combine="convex", format=format)
    yield partial(layer_case, torch.float16, combine="convex")
    yield partial(layer_case, torch.float16, num_tokens=512)
    for dtype in (*wide, torch.float16):
        for has_graft, form in ((False, "additive"), (True, "additive"), (True, "convex")):
            yield partial(combine_case, dtype, has_graft, form)
        for (num_experts, top_k), renormalize in itertools.product(
            ((60, 4), (128, 8), (8, 2), (512, 10)), (True, False)
        ):
            yield partial(route_case, dtype, num_experts, top_k, renormalize)
        for size in sizes:
            yield partial(score_case, dtype, **size)


def compile_all(target: str, quick: bool) -> list[Compiled]:
    found: dict[str, Compiled] = {}
    with compiling_for(target, found):
        for case in quick_cases(target) if quick else all_cases():
            case()
    return list(found.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the forms that training uses only")
    parser.add_argument("--targets", help=f"some of {','.join(CHIPS)}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="targets compiled at a time")
    parser.add_argument("--json", type=Path, help="also write every row to this file")
    arguments = parser.parse_args()
    start = time.perf_counter()
    targets = arguments.targets.split(",") if arguments.targets else QUICK_CHIPS if arguments.quick else CHIPS
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
        compiled = [row for rows in pool.map(compile_all, targets, itertools.repeat(arguments.quick)) for row in rows]
    columns = "{kernel:26} {target:7} {dtype:5} {registers:>5} {spills:>6} {shared_bytes:>7} {matrix_instructions:>5}"
    columns += " {hgmma:>5} {hgmma_waits:>5} {tma:>4} {async_copies:>5} {resident:>4} {per_processor:>4} {compile_s:>5}"
    columns += "  {options}"
    heads = ("kernel", "target", "dtype", "options", "regs", "spills", "in loop", "shared", "mma")
    heads += ("hgmma", "waits", "tma", "async", "fit", "of", "s")
    print(columns.format(**dict(zip((field.name for field in dataclasses.fields(Compiled)), heads, strict=True))))
    for row in compiled:
        faults = "".join(f"  FAULT: {fault}" for fault in row.faults())
        print(columns.format(**dataclasses.asdict(row)) + faults)
    faulty = [row for row in compiled if row.faults()]
    seconds = time.perf_counter() - start
    print(f"Triton {triton.__version__}: {len(compiled)} kernels in {seconds:.0f} s, {len(faulty)} with a fault")
    if arguments.json:
        rows = [{**dataclasses.asdict(row), "faults": row.faults()} for row in compiled]
        arguments.json.write_text(json.dumps({"triton": triton.__version__, "kernels": rows}, indent=1))
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
