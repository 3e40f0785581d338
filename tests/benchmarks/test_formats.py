"""The bench of formats runs: every way is held against fp64, and measured."""

import pytest
import torch

from benchmarks import formats
from benchmarks.shapes import Shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_way_is_checked_and_measured(dtype: torch.dtype, capsys: pytest.CaptureFixture) -> None:
    ways = formats.Ways(Shape("small", 12, 64, 6, 2, 128, "every line in no time"), dtype, compiled=False)
    ways.check()
    assert capsys.readouterr().out.count("to fp64") == len(ways.layers.modules)
    for what in formats.PASSES:
        assert set(ways.measure(what, 12, 0.0)) == set(ways.names(what)) >= {"flex dense", "flex int8", "flex nf4"}
    for other in formats.OTHERS:
        assert (other in ways.layers.modules) != any(said.startswith(f"{other}: ") for said in ways.missing)
    assert ways.bits("flex nf4") == 4.25
    assert ways.bits("flex int8") < 8.6


def test_a_wrong_way_is_found() -> None:
    ways = formats.Ways(Shape("small", 12, 64, 6, 2, 128, "every line in no time"), torch.float32, compiled=False)
    modules = ways.layers.modules
    modules["eager"] = modules["flex int8"]
    ways.check()
    assert "eager" not in modules
    assert any(said.startswith("eager: ") for said in ways.missing)


def test_a_wrong_way_of_flex_ends_the_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = formats.Ways(Shape("small", 12, 64, 6, 2, 128, "every line in no time"), torch.float32, compiled=False)
    right = ways.layers.forward
    monkeypatch.setattr(ways.layers, "forward", lambda name, tokens: lambda: 2 * right(name, tokens)())
    with pytest.raises(AssertionError, match=r"flex dense: .* to fp64"):
        ways.check()
