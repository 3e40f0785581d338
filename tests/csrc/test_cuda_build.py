"""csrc's CUDA code on a machine without a device: machine code without spills, sizes of a launch, the wheel.

What it computes is compared on a device, in `test_kernels_gpu.py`.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from flex_kernels import plan
from flex_kernels.backends import native

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
ARCHS = ("sm_80", "sm_90a", "sm_100")
WARP = 32
needs_module = pytest.mark.skipif(native.cuda_module() is None, reason="flex_kernels._cuda was not built here")


def nvcc_release() -> int:
    text = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"release (\d+)\.", text).group(1))


@pytest.mark.skipif(NVCC is None or nvcc_release() < 13, reason="needs nvcc 13 or later, which compiles for sm_100")
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ids=lambda path: path.name)
def test_compiles_without_spills(source: Path, arch: str, tmp_path: Path) -> None:
    command = [NVCC, "-std=c++17", "-O3", "-Xptxas", "-v", f"-arch={arch}", "-cubin", str(source)]
    result = subprocess.run(
        [*command, "-o", str(tmp_path / "kernel.cubin")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr, result.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert spills, result.stderr
    assert set(spills) == {("0", "0")}, result.stderr


@needs_module
@pytest.mark.parametrize("num_processors", [1, 132])
@pytest.mark.parametrize("num_experts", [1, 8, 60, 128, 1364, 1365, 6143])
@pytest.mark.parametrize("num_pairs", [0, 1, 31, 1024, 1025, 32768, 262_144, 2**31 - 1])
def test_a_launch_covers_every_pair_and_fits(num_pairs: int, num_experts: int, num_processors: int) -> None:
    launch = native.cuda_module().plan_launch(num_pairs, num_experts, num_processors)
    assert 1 <= launch.num_blocks <= num_processors  # all blocks are resident at once
    assert 1 <= launch.warps_per_block <= 8
    assert launch.pairs_per_warp % WARP == 0
    assert launch.num_blocks * launch.warps_per_block * launch.pairs_per_warp >= num_pairs
    assert launch.shared_bytes == 4 * (launch.warps_per_block + 1) * (num_experts + 1) <= 48 << 10
    assert launch.num_counts == launch.num_blocks * (num_experts + 1)


@needs_module
def test_few_experts_leave_room_for_all_warps() -> None:
    plan_launch = native.cuda_module().plan_launch
    assert [plan_launch(32768, n, 132).warps_per_block for n in (128, 1364, 1365, 6143)] == [8, 8, 7, 1]
    assert [plan_launch(n, 60, 132).num_blocks for n in (1, 1024, 1025, 32768, 262_144)] == [1, 1, 2, 32, 132]


@needs_module
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2**31, 8, 132), "num_pairs is 2147483648, expected 0 to"),
        ((-1, 8, 132), "num_pairs is -1"),
        ((64, 0, 132), "num_experts is 0, the CUDA routing plan takes 1 to 6143"),
        ((64, 6144, 132), "num_experts is 6144"),
        ((64, 8, 0), "num_processors is 0"),
    ],
    ids=["pairs", "negative", "no experts", "experts", "processors"],
)
def test_sizes_out_of_range_are_refused(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        native.cuda_module().plan_launch(*arguments)


def test_the_door_refuses_what_is_not_on_a_device() -> None:
    with pytest.raises(TypeError, match=r"torch.int64 on meta, expected int32 or int64 on the CPU or a CUDA device"):
        native.routing_plan(torch.zeros(2, 2, dtype=torch.int64, device="meta"), 2)


@needs_module
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a device")
def test_what_cuda_refuses_arrives_as_an_exception() -> None:
    module = native.cuda_module()
    with pytest.raises(RuntimeError, match=r"flex routing_plan: cudaSetDevice: \w+"):
        module.routing_plan(module.plan_launch(0, 1, 1), 0, True, 0, 1, 0, 0, 0, 0, 0, 0)


def test_which_plan_runs_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {}
    for name in ("triton", "cuda", "torch"):
        monkeypatch.setattr(plan, "CUDA_ROUTING_PLAN", name)
        chosen[name] = plan.backend_name(plan.cuda_backend("routing_plan", torch.float32))
    assert chosen == {"triton": "triton", "cuda": "native", "torch": "torch"}
    monkeypatch.setattr(plan, "CUDA_ROUTING_PLAN", "fastest")
    with pytest.raises(ValueError, match="FLEX_ROUTING_PLAN is 'fastest', expected triton, cuda or torch"):
        plan.cuda_backend("routing_plan", torch.float32)
    assert plan.backend_name(plan.cuda_backend("experts", torch.float32)) == "triton"


@pytest.mark.slow
@pytest.mark.parametrize("want_cuda", ["0", "1"])
def test_a_wheel_has_the_packages_and_what_was_built(want_cuda: str, tmp_path: Path) -> None:
    if want_cuda == "1" and NVCC is None:
        pytest.skip("needs nvcc")
    ignore = shutil.ignore_patterns(".git", ".venv*", "build", "*.so", "__pycache__", "*.egg-info")
    runs = {str(ROOT): {"runs"}}  # results at the top; flex/runs is a package
    copied = tmp_path / "source"
    shutil.copytree(ROOT, copied, ignore=lambda folder, names: ignore(folder, names) | runs.get(str(folder), set()))
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps", "--quiet"]
    result = subprocess.run(
        [*command, "--wheel-dir", str(tmp_path)],
        cwd=tmp_path / "source",
        env={**os.environ, "FLEX_CUDA": want_cuda, "FLEX_CUDA_ARCHS": "90a"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("flex_moe-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    sources = [path for package in ("flex", "flex_kernels") for path in (ROOT / package).rglob("*.py")]
    assert {str(path.relative_to(ROOT)) for path in sources} == {name for name in names if name.endswith(".py")}
    built = {name.partition(".")[0] for name in names if name.endswith(".so")}
    assert built == {"flex_kernels/_native"} | ({"flex_kernels/_cuda"} if want_cuda == "1" else set())
    assets = {str(path.relative_to(ROOT)) for path in (ROOT / "flex" / "demo" / "assets").rglob("*") if path.is_file()}
    assert assets <= set(names)
