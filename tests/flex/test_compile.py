"""`train.compile`: the same losses as without it, for LoRA and graft, with and without recomputed layers; a compiler
that is not there is named before anything trains."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from rich.console import Console
from same_run import assert_same_run, plug_pulled
from tiny import read_log, tiny_config

from flex.errors import FlexError
from flex.federation.agreement import settings_digest
from flex.model import compiled
from flex.runs.run import run

QUIET = Console(quiet=True)
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # inductor's own


@pytest.fixture(autouse=True)
def a_backend_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Traced whole, forward and backward, and run by PyTorch's own operations: the same bits, no compiler's wait."""
    torch._dynamo.reset()
    compiled.check_compiler.cache_clear()
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    yield
    compiled.check_compiler.cache_clear()
    torch._dynamo.reset()


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_losses_and_openings_are_those_of_a_run_without_it(tmp_path, recomputed: bool) -> None:
    train = {"methods": ("flex",), "rounds": 1, "steps": 2, "gradient_checkpointing": recomputed}
    config = tiny_config(tmp_path, train=train, evaluate={"rouge": False})
    run(config, QUIET)
    torch._dynamo.utils.counters.clear()
    run(dataclasses.replace(config.with_values(train={"compile": True}), output=str(tmp_path / "compiled")), QUIET)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]
    eager, ours = (read_log(tmp_path / name / "flex-seed0" / "metrics.jsonl") for name in ("run", "compiled"))
    for a, b in zip(eager, ours, strict=True):
        if "loss" in a:
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
            assert (b.get("opening") or []) == pytest.approx(a.get("opening") or [], rel=1e-5)


def test_a_compiled_run_resumes_to_the_same_bits(tmp_path) -> None:
    train = {"methods": ("flex",), "rounds": 2, "steps": 2, "compile": True}
    config = tiny_config(tmp_path, train=train, lora={"dropout": 0.1}, evaluate={"rouge": False})
    run(config, QUIET)
    (tmp_path / "run").rename(tmp_path / "whole")
    with plug_pulled(2):
        run(config, QUIET)
    run(config, QUIET)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_the_model_is_itself_again_after_the_steps() -> None:
    model = torch.nn.Linear(2, 2)
    with compiled.compiled(model, True):
        assert "forward" in vars(model)
        model(torch.ones(1, 2))
    with compiled.compiled(model, False):
        assert "forward" not in vars(model)


def test_it_is_a_setting_that_decides_bits(tmp_path) -> None:
    config = tiny_config(tmp_path)
    assert settings_digest(config) != settings_digest(config.with_values(train={"compile": True}))


def test_without_a_compiler_one_sentence_before_anything_trains(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> object:
        raise RuntimeError("No working C++ compiler found in ['g++']\nand more lines")

    monkeypatch.setattr(torch, "compile", broken)
    config = tiny_config(tmp_path, train={"compile": True, "methods": ("flex",)})
    with pytest.raises(FlexError, match=r"torch.compile cannot compile on cpu here: No working C\+\+ .*; expected a C"):
        run(config, QUIET)
    assert not list((tmp_path / "run").rglob("*.safetensors"))
