"""The bench of a call's own cost runs, and says both ways of every call."""

from benchmarks import call_cost
from flex_kernels.backends import native
from flex_kernels.ops import operation


def test_every_call_is_measured_both_ways() -> None:
    on = operation._something_is_on
    rows = call_cost.measure(rounds=2)
    assert operation._something_is_on is on
    calls = [row for row in rows if row[0] != "csrc's part of it"]
    assert len(calls) == 8
    assert {row[1] for row in calls} == {"forward", "forward and backward"}
    assert all(float(row[2]) > 0 and float(row[3]) > 0 for row in calls)
    assert len(rows) == (8 if native.module() is None else 9)
