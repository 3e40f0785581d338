"""`make bench-gpu` on the CPU twin, on a tiny layer: every part runs, resumes, and writes what it promises."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.device import Cpu
from flex_kernels import plan

ROOT = Path(__file__).resolve().parents[2]
PEERS = {"eager", "grouped_mm", "raw grouped_mm"}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(plan.INTERPRET, reason="starts processes of its own"),
]


def bench(*arguments: str, expect: int = 0, **environment: str) -> str:
    program = ["-m", "benchmarks.gpu"]
    if "TRITON_INTERPRET" in environment:  # some pairs of Triton and NumPy need the tests' shim to interpret at all
        code = (
            "import interp_shim, runpy; interp_shim.install(); runpy.run_module('benchmarks.gpu', run_name='__main__')"
        )
        program = ["-c", code]
        environment["PYTHONPATH"] = str(ROOT / "tests" / "support")
    result = subprocess.run(
        [sys.executable, *program, "--device", "cpu", "--tiny", *arguments],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == expect, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that one call of all parts but the sweep writes."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "RESULTS.md").write_text("# Results\n\n## avx2\n\nof a CPU\n\n## zen\n\nof another\n")
    bench("--output", str(folder / "cpu.json"), "--table", str(folder / "RESULTS.md"))
    return folder


@pytest.fixture
def content(results: Path) -> dict:
    return json.loads((results / "cpu.json").read_text())


def test_every_part_is_measured(content: dict) -> None:
    parts = {row["part"] for row in content["figures"]}
    assert parts == {"first", "ceilings", "plan", "layers", "scoring", "step", "round", "small", "first call"}
    missing = {(row["part"], row["provider"]) for row in content["skipped"]}
    assert missing <= {("layers", "liger"), ("small", "liger"), ("sanitize", "flex")}, content["skipped"]
    assert all(row["reason"] for row in content["skipped"])
    assert content["ceilings"]["copy_gb_s"] > 0
    assert content["ceilings"]["bf16_tflop_s"] > 0
    assert set(content["machine"]) >= {"device", "driver", "torch", "triton", "transformers", "python"}


def test_a_figure_says_what_it_is(content: dict) -> None:
    rows = [row for row in content["figures"] if row["part"] == "layers"]
    places = {(row["tokens"], row["pass"], row["provider"]) for row in rows}
    assert len(places) == len(rows)
    names = {"flex", "flex bare", "bmm", *PEERS}
    wanted = {(tokens, what, name) for tokens in (24, 40) for what in ("fwd", "bwd", "fwd+bwd") for name in names}
    assert wanted <= places
    for row in rows:
        assert row["ms_min"] <= row["ms_low_quartile"] <= row["ms"] <= row["ms_high_quartile"] <= row["ms_max"]
        flops = (
            {"fwd": 3, "bwd": 4, "fwd+bwd": 7} if row["provider"] != "flex bare" else {"fwd": 2, "bwd": 2, "fwd+bwd": 4}
        )
        expected = 6 * row["tokens"] * 32 * 24 * flops[row["pass"]]
        assert row["tflop_s"] * row["ms"] * 1e9 == pytest.approx(expected)
        ceiling = content["ceilings"]["bf16_tflop_s"]
        assert row["percent_of_ceiling"] == pytest.approx(100 * row["tflop_s"] / ceiling)


def test_the_first_part_says_right_the_same_bits_and_where_the_time_is(content: dict) -> None:
    rows = {(row["pass"], row["provider"]): row for row in content["figures"] if row["part"] == "first"}
    assert rows["right", "flex"]["right"]
    assert (rows["same bits", "flex"]["same_bits"], rows["same bits", "flex"]["repeats"]) == (True, 20)
    for provider in ("flex", "grouped_mm"):
        kernels = rows["kernels", provider]["kernels"]
        times = [microseconds for microseconds, _ in kernels.values()]
        assert times == sorted(times, reverse=True)
        assert times[0] > 0
        assert all(count >= 1 for _, count in kernels.values())
    layers = [row for row in content["figures"] if row["part"] == "layers" and row["tokens"] == 40]
    assert {row["provider"] for row in layers if "kernels" in row} == {"flex", "grouped_mm"}


def test_ratios_are_the_peers_time_over_ours(content: dict) -> None:
    figures = {(r["tokens"], r["pass"], r["provider"]): r["ms"] for r in content["figures"] if r["part"] == "layers"}
    assert {ratio["peer"] for ratio in content["ratios"]} >= PEERS
    assert not {ratio["peer"] for ratio in content["ratios"]} & {"bmm", "flex", "flex bare"}
    for ratio in content["ratios"]:
        assert set(ratio) == {"shape", "tokens", "pass", "peer", "ratio"}
        place = ratio["tokens"], ratio["pass"]
        assert ratio["ratio"] == pytest.approx(figures[*place, ratio["peer"]] / figures[*place, "flex"])
    for part in ("step", "round"):
        assert {ratio["peer"] for ratio in content["other_ratios"][part]} == {"eager", "grouped_mm"}


def test_saved_bytes_are_under_half(content: dict) -> None:
    saved = {row["provider"]: row.get("saved_bytes") for row in content["figures"] if row["part"] == "layers"}
    assert 0 < saved["flex"] < 0.5 * saved["grouped_mm"]


def test_the_table_has_its_own_section(results: Path) -> None:
    text = (results / "RESULTS.md").read_text()
    assert "## avx2\n\nof a CPU\n" in text
    assert "## zen\n\nof another\n" in text
    assert text.count("\n## ") == 3
    for title in (
        "Kernel by kernel",
        "The layer with one graft",
        "What the graft costs",
        "The routing plan",
        "Scoring a layer",
        "Few tokens",
    ):
        assert f"### {title}" in text
    assert "Not measured:\n\n- " in text
    for name in ("bars", "roofline"):
        assert (results / f"cpu-{name}.png").stat().st_size > 0


def test_a_second_call_measures_nothing_again(results: Path, content: dict) -> None:
    bench("--part", "plan", "scoring", "--output", str(results / "cpu.json"))
    assert json.loads((results / "cpu.json").read_text())["figures"] == content["figures"]


def test_out_of_time_says_so_and_goes_on_later(tmp_path: Path) -> None:
    output = ["--part", "plan", "--output", str(tmp_path / "cpu.json")]
    assert "The minutes are spent" in bench(*output, "--minutes", "0", expect=3)
    assert not (tmp_path / "cpu.json").exists()
    bench(*output)
    assert json.loads((tmp_path / "cpu.json").read_text())["figures"]


def test_figures_of_another_machine_are_not_mixed(tmp_path: Path) -> None:
    machine = {"device": "other", "driver": "1"}
    (tmp_path / "cpu.json").write_text(json.dumps({"machine": machine, "figures": [], "skipped": []}))
    said = bench("--part", "plan", "--output", str(tmp_path / "cpu.json"), expect=2)
    assert "holds figures of {'device': 'other', 'driver': '1'}" in said


def test_another_driver_goes_on_and_is_written_down(tmp_path: Path) -> None:
    bench("--part", "ceilings", "--output", str(tmp_path / "cpu.json"))
    content = json.loads((tmp_path / "cpu.json").read_text())
    content["machine"]["driver"] = "580.1"
    (tmp_path / "cpu.json").write_text(json.dumps(content))
    bench("--part", "plan", "--output", str(tmp_path / "cpu.json"))
    after = json.loads((tmp_path / "cpu.json").read_text())
    assert after["machine"]["driver"] == "580.1 and none"
    assert {row["part"] for row in after["figures"]} == {"ceilings", "plan"}


def test_a_report_is_made_from_a_folder_of_results(tmp_path: Path) -> None:
    bench("--part", "ceilings", "layers", "--output", str(tmp_path))
    (figures,) = tmp_path.glob("*.json")
    assert not list(tmp_path.glob("*.png"))
    bench("--report", str(figures), "--table", str(tmp_path / "RESULTS.md"))
    assert "### The layer with one graft" in (tmp_path / "RESULTS.md").read_text()
    assert f"--output {tmp_path}" in (tmp_path / "RESULTS.md").read_text()
    assert len(list(tmp_path.glob("*.png"))) == 2


class LosesTheDevice:
    """After the first failure every call fails."""

    kind, lost = "cpu", False

    def synchronize(self) -> None:
        if self.lost:
            raise RuntimeError("an illegal memory access was encountered")

    def fail(self) -> None:
        self.lost = True
        raise RuntimeError("an illegal memory access was encountered")


def test_what_fails_with_the_device_is_not_skipped_for_good(tmp_path: Path) -> None:
    from benchmarks.gpu.record import Key, Record
    from benchmarks.gpu.session import DeviceLost, Session

    record = Record(tmp_path / "cpu.json", {"device": "cpu", "driver": "none"})
    session = Session(LosesTheDevice(), record, True, 60.0)
    key = Key("sweep", "tiny", 24, "down", "64x64x64")
    assert session.attempt(key, lambda: 1 / 0) is None
    assert record.skipped.pop(key).startswith("ZeroDivisionError")
    with pytest.raises(DeviceLost, match="the device is lost after sweep tiny 24 down"):
        session.attempt(key, session.device.fail)
    assert record.skipped == {}


def test_backwards_are_measured_one_after_another_where_memory_is_short() -> None:
    from benchmarks.gpu.layer_part import crowded

    saved = {"flex": 10, "grouped_mm": 20}
    assert not crowded(saved, 4, 120)
    assert crowded(saved, 4, 119)
    assert not crowded(saved, 4, None)


class FullDevice(Cpu):
    """So little memory that no two graphs have room."""

    memory_bytes = 1


def test_short_memory_measures_every_provider_all_the_same(tmp_path: Path) -> None:
    from benchmarks.gpu import layer_part
    from benchmarks.gpu.record import Record
    from benchmarks.gpu.session import Session

    record = Record(tmp_path / "cpu.json", {"device": "cpu", "driver": "none"})
    session = Session(FullDevice(), record, True, 600.0)
    layer_part.measure_layer(session, session.models[0], 24)
    measured = {key.provider for key in record.figures if key.what == "bwd"}
    assert measured >= {"flex", "flex bare", "bmm", *PEERS}
    assert [key.provider for key in record.figures if key.what == "bwd"][-1] == "flex"


def test_the_sweep_ranks_tiles(tmp_path: Path) -> None:
    bench("--part", "sweep", "--output", str(tmp_path / "cpu.json"), TRITON_INTERPRET="1")
    content = json.loads((tmp_path / "cpu.json").read_text())
    assert content["skipped"] == []
    sweep = json.loads((tmp_path / "cpu-sweep.json").read_text())
    ranking = sweep["ranking"]
    (row,) = sweep["tables"]
    assert (row["few_rows"], row["block_m"]) == (True, 32)
    assert row["times_of_the_best"].keys() == {"tiny, T=40", "tiny, T=24"}
    assert min(row["times_of_the_best"].values()) >= 1.0
    assert [(place["shape"], place["tokens"]) for place in ranking] == [("tiny", 40), ("tiny", 24)]
    for place in ranking:
        assert set(place["kernels"]) == {"gate_up", "down", "d_preactivations", "d_hidden"}
        for rows in place["kernels"].values():
            assert len(rows) == 2
            assert [row["ms"] for row in rows] == sorted(row["ms"] for row in rows)
            assert sum(row["default"] for row in rows) == 1
        best = [rows[0] for rows in place["kernels"].values()]
        assert place["best_sum_by_block_m"]["32"]["ms"] == pytest.approx(sum(row["ms"] for row in best))


def test_a_table_loses_least_over_all_shapes() -> None:
    from benchmarks.gpu import sweep
    from benchmarks.gpu.record import Key
    from benchmarks.shapes import Shape

    times = {
        "a": {"64x64x64": 1.0, "64x128x64": 1.2, "128x64x64": 2.0},
        "b": {"64x64x64": 30.0, "64x128x64": 11.0, "128x64x64": 10.0},
        "c": {"64x64x64": 1.0, "64x128x64": 1.1},
    }
    figures = {
        Key("sweep", shape, 8, kernel, tile): {"ms": ms, "default": False}
        for shape, of_shape in times.items()
        for kernel in sweep.KERNELS
        for tile, ms in of_shape.items()
    }
    models = [Shape(name, 0, 16, 4, 2, 16, "") for name in times]
    (row,) = sweep.tables(sweep.ranking(figures, models))  # no tile of 128 rows was measured on every shape
    assert row["block_m"] == 64
    assert set(row["tiles"].values()) == {"64x128x64"}
    assert row["times_of_the_best"] == {"a, T=8": 1.2, "b, T=8": 1.1, "c, T=8": 1.1}
    many = [Shape("b", 0, 16, 1, 200, 16, "8 tokens, 1,600 rows an expert")]
    rows = sweep.tables(sweep.ranking(figures, [*models[::2], *many]))
    assert [(row["few_rows"], row["block_m"]) for row in rows] == [(True, 64), (False, 64), (False, 128)]
    assert set(rows[2]["tiles"].values()) == {"128x64x64"}


def test_without_a_device_the_sweep_says_so(tmp_path: Path) -> None:
    said = bench("--part", "sweep", "--output", str(tmp_path / "cpu.json"))
    assert "Triton needs a device, or TRITON_INTERPRET=1" in said


def test_tiles_compile_without_a_device(tmp_path: Path) -> None:
    """The defaults alone; in a call without `--tiny` all candidates."""
    bench("--part", "tiles", "--jobs", "1", "--output", str(tmp_path / "cpu.json"))
    rows = json.loads((tmp_path / "cpu.json").read_text())["figures"]
    assert {row["pass"] for row in rows} == {"gate_up", "down", "d_preactivations", "d_hidden"}
    assert len(rows) == 8
    for row in rows:
        assert row["faults"] == [], row
        assert row["hgmma"] > 0


def test_predictions_have_the_floors_of_the_design(tmp_path: Path) -> None:
    _, h100, h200 = bench("--predict").split("### ")
    floors = {"Qwen1.5-MoE-A2.7B": (0.90, 1.08), "Mixtral-8x7B": (10.96, 14.61), "Qwen3-30B-A3B": (0.88, 0.98)}
    # With few rows an expert, reading the weights once is the floor: 1.06 GB at 3.0 TB/s.
    few_rows = {"Qwen1.5-MoE-A2.7B": (0.38, 0.38), "Qwen3-30B-A3B": (0.43, 0.43)}
    for text, tokens, wanted in ((h200, 8192, floors), (h100, 2048, few_rows)):
        rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")][2:]
        cells = {(row[0].strip(), int(row[1])): [float(cell) for cell in row[5:10]] for row in rows}
        assert len(cells) == 15
        for name, (forward, backward) in wanted.items():
            assert cells[name, tokens][:2] == pytest.approx([forward, backward], rel=0.01)
        for floor_forward, floor_backward, forward, backward, both in cells.values():
            assert floor_forward < forward
            assert floor_backward < backward
            assert both == pytest.approx(forward + backward, abs=0.02)
