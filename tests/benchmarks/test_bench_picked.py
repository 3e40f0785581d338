"""`make bench SHAPE=... PEER=...`: a kernel of one's own is checked, measured and printed, and RESULTS.md stays."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import results
from benchmarks.conftest import DTYPES, Picked
from benchmarks.tables import rows_of
from benchmarks.verdict import BEST, FORWARD, TRAINING
from flex_kernels import plan

ROOT = Path(__file__).resolve().parents[2]
MINE = """
import torch

class Mine:
    def __init__(self, gate_up_proj, down_proj):
        self.weights = list(zip(gate_up_proj, down_proj))

    def __call__(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for expert, (gate_up, down) in enumerate(self.weights):
            gate, up = (hidden_states @ gate_up.T).chunk(2, dim=-1)
            weight = (top_k_weights * (top_k_index == expert)).sum(1, keepdim=True)
            out = out + weight * ((torch.nn.functional.silu(gate) * up) @ down.T)
        return out

def wrong(gate_up_proj, down_proj):
    return lambda hidden_states, top_k_index, top_k_weights: Mine(gate_up_proj, down_proj)(
        hidden_states, top_k_index, 2 * top_k_weights
    )
"""
pytestmark = pytest.mark.skipif(plan.INTERPRET, reason="starts processes of its own")


def bench(folder: Path, *options: str) -> subprocess.CompletedProcess:
    (folder / "mine.py").write_text(MINE)
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_experts.py", "--benchmark-only", "-q"]
    # Its own run, whoever runs this test: side by side with others pytest-benchmark does not measure.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(
        [*command, "--benchmark-quiet", "-p", "no:cacheprovider", *options],
        env={**environment, "PYTHONPATH": str(folder)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_peer_of_ones_own_is_measured_and_nothing_is_written(tmp_path: Path) -> None:
    before = results.RESULTS.read_bytes()
    ran = bench(tmp_path, "--shape", "16,32,4,2,24", "--peer", "mine:Mine,batched_mm", "--dtype", "float32")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for title in (FORWARD, TRAINING):
        (row,) = rows_of(ran.stdout, title)
        assert (row["shape"], row["dtype"]) == ("16,32,4,2,24", "float32")
        times = [float(row[f"{name} ms"]) for name in ("flex", "mine:Mine", "batched_mm")]
        assert min(times) > 0
        assert "eager ms" not in row
        assert row[BEST].endswith("x")
    assert results.RESULTS.read_bytes() == before


def test_a_wrong_kernel_gets_no_number(tmp_path: Path) -> None:
    ran = bench(tmp_path, "--shape", "16,32,4,2,24", "--peer", "mine:wrong", "--dtype", "float32")
    assert ran.returncode == 1
    assert "mine:wrong at 16,32,4,2,24, result 0: relative error" in ran.stdout
    assert rows_of(ran.stdout, FORWARD) == []


def test_what_cannot_be_picked_ends_in_a_line(tmp_path: Path) -> None:
    ran = bench(tmp_path, "--shape", "1,2")
    assert ran.returncode == 4
    assert "SHAPE=1,2: expected T,H,E,K,I" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--shape", "demo 8,8", "SHAPE=8,8: expected T,H,E,K,I"),
        ("--peer", "nobody", "PEER=nobody: no such peer; expected module:callable or one of batched_mm, "),
        ("--peer", "eager,flex", "PEER=flex: no such peer"),
        ("--peer", "nowhere:Mine", "PEER=nowhere:Mine: No module named 'nowhere'; expected module:callable"),
        ("--peer", "os:nothing", "PEER=os:nothing: module 'os' has no attribute 'nothing'; expected module:callable"),
        ("--peer", "os:name", "PEER=os:name: no such peer"),
        ("--dtype", "int8", "DTYPE=int8: expected float32 or bfloat16"),
    ],
)
def test_what_can_be_picked_is_named(option: str, value: str, said: str) -> None:
    given = SimpleNamespace(getoption=lambda name: value if name == option else "")
    with pytest.raises(ValueError, match=re.escape(said)):
        Picked.of(given)


def test_nothing_picked_is_everything_usual() -> None:
    picked = Picked.of(SimpleNamespace(getoption=lambda name: ""))
    assert picked == Picked((), ("grouped_mm", "eager"), DTYPES, anything=False)


def test_make_hands_on_what_was_picked() -> None:
    # A make above this one (make test) would have its own options handed on, and its folders printed last.
    own = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in own}

    def last_line(*given: str) -> str:
        command = ["make", "-n", "bench", *given]
        shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        return " ".join(shown.stdout.replace("\\\n", " ").splitlines()[-1].split())

    assert last_line("SHAPE=demo 1,2,3,1,5", "PEER=a:B,eager", "DTYPE=float32").endswith(
        "-m pytest --benchmark-only -q benchmarks/bench_experts.py --benchmark-quiet"
        ' --shape "demo 1,2,3,1,5" --peer "a:B,eager" --dtype "float32"'
    )
    assert last_line("PEER=eager").endswith('benchmarks/bench_experts.py --benchmark-quiet --peer "eager"')
    assert last_line().endswith("-m pytest --benchmark-only -q benchmarks")
