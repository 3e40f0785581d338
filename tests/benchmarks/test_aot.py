"""Every Triton kernel compiles for GPUs that are not here: no spills, shared memory that fits, HGMMA on sm_90.

In a process of its own: compiling needs a Triton that was imported without `TRITON_INTERPRET`. `make aot` compiles
every configuration; here are the ones that training uses.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flex_kernels import plan

ROOT = Path(__file__).parents[2]
CHIPS = ("sm80", "sm90", "sm100", "gfx942")
GEMMS = {
    "_gate_up_fwd_kernel",
    "_grouped_rows_kernel",
    "_d_preactivations_kernel",
    "_score_experts_kernel",
    "_score_neurons_kernel",
}
OTHERS = {
    "_combine_bwd_kernel",
    "_combine_fwd_kernel",
    "_count_pairs_kernel",
    "_graft_logits_bwd_kernel",
    "_graft_logits_fwd_kernel",
    "_grafted_route_fwd_kernel",
    "_place_pairs_kernel",
    "_reduce_products_kernel",
    "_route_bwd_kernel",
    "_route_fwd_kernel",
    "_schedule_kernel",
    "_sum_batches_kernel",
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(plan.INTERPRET, reason="the plain run of the suite compiles"),
]


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_every_kernel_compiles_for_every_chip(tmp_path: Path) -> None:
    result = run("-m", "benchmarks.aot", "--quick", "--jobs", "1", "--json", str(tmp_path / "aot.json"))
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "aot.json").read_text())["kernels"]
    for chip in CHIPS:
        assert {row["kernel"] for row in rows if row["target"] == chip} == GEMMS | OTHERS
    for row in rows:
        assert not row["faults"], row
        if row["kernel"] in GEMMS and row["dtype"] == "bf16":
            assert row["matrix_instructions"] > 0, row
            assert (row["tma"] > 0) == ("tma=1" in row["options"]), row
        if not any(f"format={name}" in row["options"] for name in ("int8", "nf4")):  # the tables are made for dense
            assert row["per_processor"] <= row["resident"], row
    # Beside codes, which are read by pointers, a launch may go without TMA; every product has one that goes with it.
    with_tma = {(row["kernel"], row["target"]) for row in rows if row["tma"] > 0 and row["dtype"] == "bf16"}
    assert with_tma == {(kernel, chip) for kernel in GEMMS for chip in ("sm90", "sm100")}


def test_another_number_of_tokens_compiles_nothing() -> None:
    script = """
from benchmarks import aot
found = {}
with aot.compiling_for("sm90", found):
    aot.layer_case(num_tokens=8192)
    first = len(found)
    for num_tokens in (8193, 7001, 5000):
        aot.layer_case(num_tokens=num_tokens)
print(first, len(found))
"""
    result = run("-c", script)
    first, after = result.stdout.split()
    assert int(first) > 5, result.stderr
    assert first == after


def test_faults_are_found() -> None:
    script = """
from benchmarks import aot
good = aot.Compiled("_grouped_rows_kernel", "sm90", "bf16", "", 128, 0, 0, 1000, 8, 8, 2, 4, 0, 2, 2, 0.1)
bad = {"spills": 2, "hgmma": 0, "hgmma_waits": 9, "shared_bytes": 1 << 20}
print(good.faults(), aot.dataclasses.replace(good, **bad).faults())
spilling = aot.dataclasses.replace(good, spills=2)
print(spilling.faults(), spilling.faults(outside_the_loop=False))
print([aot.CHIPS["sm90"].resident(*of) for of in ((128, 0, 8), (129, 0, 8), (168, 113 << 10, 4), (168, 114 << 10, 4))])
print([aot.CHIPS["gfx942"].resident(*of) for of in ((128, 0, 8), (100, 48 << 10, 4))])
"""
    result = run("-c", script)
    assert result.stdout.startswith("[] ["), result.stderr
    for fault in ("2 spills", "no HGMMA", "shared memory", "waits for the one before"):
        assert fault in result.stdout
    assert result.stdout.splitlines()[1:] == ["['2 spills'] []", "[2, 1, 2, 1]", "[2, 1]"]
