"""`benchmarks/gpu/step.py`: flex's own rounds, the same on every provider, and without Flower."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from flex.store.files import load_tensors
from flex_kernels import plan

ROOT = Path(__file__).resolve().parents[2]
BATCH_SIZE, LENGTH = 3, 8
pytestmark = pytest.mark.skipif(plan.INTERPRET, reason="transformers' own experts, or a process of its own")


@pytest.fixture
def step() -> ModuleType:
    """Imported late: it needs transformers' Qwen2-MoE."""
    from benchmarks.gpu import step

    return step


@pytest.fixture
def session(step, tmp_path: Path):
    from benchmarks.gpu.device import Cpu
    from benchmarks.gpu.record import Record
    from benchmarks.gpu.session import Session

    return Session(Cpu(), Record(tmp_path / "cpu.json", {}), tiny=True, seconds=60.0)


@pytest.fixture
def base(step, session):
    return step.make_base(session)


@pytest.fixture
def clients(step, base):
    return step.make_clients(BATCH_SIZE + 1, LENGTH, base.model.config.vocab_size)


def two_rounds(step, base, clients, provider: str) -> tuple[list[dict], list[dict]]:
    """The shared states before and after each of two rounds, and each client's last file."""
    with step.runtime(base, clients, provider, BATCH_SIZE) as made:
        rounds = step.federated_rounds(made)
        shared = [made[0].model.shared_arrays(), next(rounds), next(rounds)]
        files = [load_tensors(site.store.folder / "round-0003.safetensors")[0] for site in made]
    return [{name: torch.from_numpy(array) for name, array in state.items()} for state in shared], files


def test_a_peer_trains_what_flex_trains(step, base, clients) -> None:
    """After two rounds by hand, on `eager`: the same shared state and the same personal files, to a small share of
    what the rounds changed."""
    ours, our_files = two_rounds(step, base, clients, "flex")
    theirs, their_files = two_rounds(step, base, clients, "eager")
    assert ours[0].keys() == theirs[0].keys()
    for name, start in ours[0].items():
        torch.testing.assert_close(start, theirs[0][name], rtol=0, atol=0)
        change = (ours[2][name] - start).norm()
        assert change > 0, name
        assert (ours[2][name] - theirs[2][name]).norm() < 0.02 * change, name
    for ours, theirs in zip(our_files, their_files, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5)


def test_a_round_goes_on_from_the_personal_files(step, base, clients) -> None:
    shared, files = two_rounds(step, base, clients, "flex")
    assert all("lora" in name for name in shared[0])
    steps = {float(value) for file in files for name, value in file.items() if name.startswith("moments:step/")}
    assert steps == {2 * step.DEFAULTS.train.steps}
    grafts = [name for name in files[0] if name.startswith("parameters:") and name.endswith("down_proj")]
    assert len(grafts) == len(base.layers)
    assert not any(torch.equal(files[0][name], files[1][name]) for name in grafts)


def test_the_base_is_as_it_was_afterwards(step, base, clients) -> None:
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    for provider in step.PROVIDERS:
        with step.runtime(base, clients, provider, BATCH_SIZE, steps=1) as made:
            step.step_of(made)()
    after = base.model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def test_a_peer_that_computes_something_else_is_refused(step, session, base, clients, monkeypatch) -> None:
    step.check_all(session, base, clients, BATCH_SIZE)
    right = step.ByHand.forward
    monkeypatch.setattr(step.ByHand, "forward", lambda *given: 1.001 * right(*given))
    with pytest.raises(AssertionError, match="flex: loss or gradients differ by"):
        step.check_all(session, base, clients, BATCH_SIZE)


def test_the_model_is_bf16_and_what_trains_is_fp32(step, session, monkeypatch) -> None:
    monkeypatch.setattr(type(session), "dtype", torch.bfloat16)
    base = step.make_base(session)
    clients = step.make_clients(BATCH_SIZE, LENGTH, base.model.config.vocab_size)
    step.check_all(session, base, clients, BATCH_SIZE)
    with step.runtime(base, clients, "flex", BATCH_SIZE) as made:
        assert {parameter.dtype for parameter in made[0].model.parts.frozen.values()} == {torch.bfloat16}
        assert {parameter.dtype for parameter in made[0].model.parts.trained().values()} == {torch.float32}


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 1), (600.0, 2)])
def test_where_the_minutes_end_one_round_is_enough(step, session, seconds: float, rounds: int) -> None:
    session.seconds = seconds
    calls: list[None] = []
    values = step.round_times(session, lambda: calls.append(None))
    assert values["rounds"] == rounds
    assert len(calls) == rounds + 1


@pytest.mark.slow
def test_neither_flower_nor_rouge_is_needed(tmp_path: Path) -> None:
    for package in ("flwr", "rouge_score"):
        (tmp_path / f"{package}.py").write_text(f"raise ImportError('{package} is blocked')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    blocked = subprocess.run([sys.executable, "-c", "import flwr"], env=environment, capture_output=True, check=False)
    assert b"flwr is blocked" in blocked.stderr
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--part", "step", "round"]
    command += ["--output", str(tmp_path / "cpu.json")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    content = json.loads((tmp_path / "cpu.json").read_text())
    assert content["skipped"] == []
    places = {(row["pass"], row["tokens"], row["provider"]) for row in content["figures"]}
    wanted = {("step", 40), ("step", 24), ("round", 240)}
    assert places == {(*place, provider) for place in wanted for provider in ("flex", "grouped_mm", "eager")}
