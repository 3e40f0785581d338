"""What `python -m benchmarks.deployed` prints, from a log; and the payload that it is asked for."""

from benchmarks.deployed import LAYERS, PROJECTIONS, rank_for, report
from flex.store.events import Exchanged, Trained


def test_the_rank_gives_the_payload():
    numbers = LAYERS * PROJECTIONS * 2 * 1024 * rank_for(19, 1024)
    assert abs(4 * numbers / 19e6 - 1) < 0.01


def test_the_tables_say_medians_and_peaks():
    events = []
    for at, seconds in ((1, 20.0), (2, 12.0), (3, 13.0)):
        events.append(Exchanged(at, seconds, 2.0, 0))
        events += [Trained(at, site, bytes_up=1_000_000) for site in ("a", "b")]
    lines = list(report(events, {"worker": 600_000_000, "SuperLink": 164_000_000}, 61.0, 2))
    assert lines[2] == "| 2 | 1 | 2 | 13.0 | 2.0 | 11.0 (10.0 to 18.0) | 61 |"
    assert lines[-3:-1] == ["| SuperLink | 164 |", "| worker | 600 |"]
