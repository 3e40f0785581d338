"""One bad site of several: what it may send, and that it neither ends nor owns the run. The others' bits are those of a
run in which it fails outright."""

import re

import numpy as np
import pytest
from rich.console import Console
from tiny import read_log, save_data, save_model, tiny_config
from toy import CLIENTS, START, TARGET, assert_same_bits, make_toy_app, strategy_of

from flex.config import RunConfig
from flex.errors import FlexError
from flex.federation.client import Site
from flex.federation.flower import Array, ArrayRecord, MetricRecord
from flex.federation.guard import Guard
from flex.federation.local import InProcessGrid
from flex.federation.messages import ARRAYS, METRICS, NUM_EXAMPLES, json_record, to_arrays
from flex.federation.rounds import run_rounds
from flex.federation.seal import SEAL, digest
from flex.federation.strategy import make_strategy
from flex.report import write_report
from flex.runs.run import run

BAD = "ben"
SIZES = dict(zip(CLIENTS, (20, 30, 40, 50), strict=True))


class Spoilt:
    """The toy's app, one client of which changes what it sends."""

    def __init__(self, folder, spoil, kind="train", from_round=1, **options):
        folder.mkdir(exist_ok=True)
        self.app, self.spoil, self.kind, self.from_round = make_toy_app(folder, **options), spoil, kind, from_round

    def __call__(self, message, context):
        reply = self.app(message, context)
        round_index = int(message.content["config"]["server-round"])
        bad = context.node_config["client-id"] == BAD and message.metadata.message_type == self.kind
        if bad and round_index >= self.from_round:
            self.spoil(message, reply, round_index)
            reply.content[SEAL]["sha256"] = digest(reply.content)  # it seals what it sends
        return reply


def play(folder, spoil, rounds=2, strategy=None, guard=None, kind="train", from_round=1, **options):
    """(shared state, reports, its error)"""
    reports = []
    grid = InProcessGrid(Spoilt(folder, spoil, kind, from_round), CLIENTS)
    strategy = strategy or strategy_of("fedavg")
    guard = guard or Guard(sizes=SIZES, told=("loss",))
    shared = run_rounds(strategy, grid, START, rounds, guard=guard, on_round=lambda *r: reports.append(r[2]), **options)
    return shared, reports


def honest(folder, **options):
    return play(folder, lambda *_: None, **options)


def without_it(folder, from_round=1, **options):
    def fail(message, reply, round_index):
        raise OSError("unplugged")

    return play(folder, fail, skip_failed=True, from_round=from_round, **options)


def arrays(change):
    """Its tensors, as `change` makes them of what it trained and what it was sent."""

    def spoil(message, reply, round_index):
        changed = change(to_arrays(reply.content[ARRAYS]), to_arrays(message.content[ARRAYS]))
        reply.content[ARRAYS] = ArrayRecord({name: Array(np.asarray(a)) for name, a in changed.items()})

    return spoil


def metrics(**changed):
    def spoil(message, reply, round_index):
        kept = {**reply.content[METRICS], **{name.replace("_", "-"): value for name, value in changed.items()}}
        reply.content[METRICS] = MetricRecord({name: value for name, value in kept.items() if value is not None})

    return spoil


def times(factor):
    return arrays(lambda a, w: {n: np.float32(w[n] + factor * (a[n] - w[n])) for n in a})


REFUSED = {
    "NaN": (arrays(lambda a, w: {**a, "w": a["w"] * np.nan}), "client 'ben' sent 'w' with NaN or infinite values"),
    "infinity": (arrays(lambda a, w: {**a, "w": a["w"] + np.inf}), "client 'ben' sent 'w' with NaN or infinite"),
    "shape": (arrays(lambda a, w: {**a, "w": a["w"][:2]}), r"client 'ben' sent 'w' with shape \(2,\); expected \(8,\)"),
    "missing": (arrays(lambda a, w: {"w": a["w"]}), "client 'ben' did not send 'scale'"),
    "extra": (arrays(lambda a, w: {**a, "x": a["w"]}), "client 'ben' sent 'x', which the server did not send out"),
    "dtype": (arrays(lambda a, w: {**a, "w": a["w"].astype(np.float64)}), "client 'ben' sent 'w' as float64"),
    "x 1,000": (times(1000), "client 'ben' sent an update of norm .*, over 100 times the median"),
    "1e30": (arrays(lambda a, w: {n: a[n] * 0 + np.float32(1e30) for n in a}), "over 100 times the median"),
    "3e38": (arrays(lambda a, w: {n: a[n] * 0 + np.float32(3e38) for n in a}), "over 100 times the median"),
    "unchanged": (arrays(lambda a, w: w), "client 'ben' sent back what it was sent, unchanged"),
    "1e-300 examples": (metrics(num_examples=1e-300), "client 'ben' reported num-examples 1e-300; expected a number"),
    "negative examples": (metrics(num_examples=-30), "client 'ben' reported num-examples -30; expected a number"),
    "no examples": (metrics(num_examples=None), "client 'ben' reported num-examples None"),
    "NaN examples": (metrics(num_examples=np.nan), "client 'ben' reported num-examples nan; expected a finite number"),
    "NaN loss": (metrics(loss=float("nan")), "client 'ben' reported loss nan; expected a finite number"),
    "no loss": (metrics(loss=None), "client 'ben' reported no 'loss'; expected num-examples, loss"),
    "an odd metric": (metrics(extra=1.0), "client 'ben' sent the metric 'extra', unlike the others"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_reply_stops_the_run_by_name_or_is_left_out(case, tmp_path):
    spoil, sentence = REFUSED[case]
    with pytest.raises(FlexError, match=sentence):
        play(tmp_path / "stops", spoil)
    came, reports = play(tmp_path / "goes-on", spoil, skip_failed=True)
    alone, _ = without_it(tmp_path / "without")
    assert_same_bits(came, alone)
    for report in reports:
        (event,) = report.left_out
        assert (event.round, event.client_id, event.doing) == (report.round_index, BAD, "train")
        assert re.search(sentence, event.reason)
        assert [turn.client_id for turn in report.train] == ["anna", "cleo", "dora"]


@pytest.mark.parametrize("strategy", ["scaffold", "fedadam"])
def test_it_is_left_out_whatever_the_strategy(strategy, tmp_path):
    came, _ = play(tmp_path / "a", REFUSED["NaN"][0], strategy=strategy_of(strategy), skip_failed=True)
    assert_same_bits(came, without_it(tmp_path / "b", strategy=strategy_of(strategy))[0])


def test_a_control_variate_that_is_not_finite_is_left_out(tmp_path):
    def spoil(message, reply, round_index):
        control = reply.content["control"]
        control["c/w"] = Array(np.full(8, np.nan, np.float32)).data

    came, reports = play(tmp_path / "a", spoil, strategy=strategy_of("scaffold"), skip_failed=True)
    assert "'c/w' with NaN" in reports[0].failed[BAD]
    assert_same_bits(came, without_it(tmp_path / "b", strategy=strategy_of("scaffold"))[0])


def test_last_rounds_update_again(tmp_path):
    kept = {}

    def replay(message, reply, round_index):
        kept.setdefault("first", reply.content[ARRAYS])
        reply.content[ARRAYS] = kept["first"]

    with pytest.raises(FlexError, match="client 'ben' sent its update of round 1 again in round 2"):
        play(tmp_path / "a", replay)
    kept.clear()
    came, reports = play(tmp_path / "b", replay, skip_failed=True)
    assert [list(report.failed) for report in reports] == [[], [BAD]]
    assert_same_bits(came, without_it(tmp_path / "c", from_round=2)[0])
    # A server that was started again knows what came before from its log.
    told = {BAD: {reports[0].train[1].update.sha256: 1}}
    with pytest.raises(FlexError, match="update of round 1 again in round 3"):
        play(tmp_path / "d", replay, rounds=3, start_round=3, guard=Guard(sizes=SIZES, seen=told))


def test_a_weight_is_at_most_what_was_declared(tmp_path):
    came, reports = play(tmp_path / "a", metrics(num_examples=1e15))
    assert_same_bits(came, honest(tmp_path / "b")[0])
    turn = reports[0].train[1]
    assert (turn.update.reported, turn.metrics[NUM_EXAMPLES]) == (1e15, 30)
    assert [t.update.reported for t in reports[0].train if t.client_id != BAD] == [None] * 3


def distance(a, b):
    return np.sqrt(sum(((a[name].astype(np.float64) - b[name]) ** 2).sum() for name in a))


@pytest.mark.parametrize("spoil", [times(1000), times(50), REFUSED["1e30"][0], times(-10)])
def test_an_update_is_no_longer_than_the_bound(spoil, tmp_path):
    bound = 1.0
    guard = Guard(bound, SIZES)
    came, reports = play(tmp_path / "a", spoil, rounds=1, guard=guard, skip_failed=True)
    good, clean = honest(tmp_path / "b", rounds=1, guard=Guard(bound, SIZES))
    assert distance(came, good) <= 2 * bound * SIZES[BAD] / sum(SIZES.values()) * 1.001
    if BAD not in reports[0].failed:
        turn = reports[0].train[1]
        assert turn.update.scale * turn.update.norm == pytest.approx(bound)
    for turn in clean[0].train:
        assert turn.update.scale == pytest.approx(min(1, bound / turn.update.norm))


def test_two_sites_cannot_outvote_each_other_and_the_bound_still_holds(tmp_path):
    grid = InProcessGrid(Spoilt(tmp_path, times(1e6)), ["anna", BAD])
    came = run_rounds(make_strategy("fedavg", 2), grid, START, 1, guard=Guard(0.5), evaluate_every=None)
    assert distance(came, START) <= 0.5 * 1.001


@pytest.mark.parametrize("aggregate", ["median", "trimmed-mean"])
@pytest.mark.parametrize("name", ["fedavg", "fedprox", "scaffold", "fedavgm", "fedadagrad", "fedyogi", "fedadam"])
@pytest.mark.parametrize("factor", [-1, -90, 90])
def test_an_update_that_pulls_the_other_way_is_outvoted(factor, name, aggregate, tmp_path):
    """Number by number the shared state stays within what the honest clients sent, but for the server's own step."""
    strategy = strategy_of(name, aggregate=aggregate)
    came, reports = play(tmp_path / "a", times(factor), rounds=1, strategy=strategy)
    sent = {}

    def listen(message, reply, seconds):
        if message.metadata.message_type == "train":
            sent[grid.clients[message.metadata.dst_node_id]] = to_arrays(reply.content[ARRAYS])

    (tmp_path / "b").mkdir()
    grid = InProcessGrid(make_toy_app(tmp_path / "b"), CLIENTS, on_message=listen)
    run_rounds(strategy_of(name), grid, START, 1)
    if name in ("fedavg", "fedprox", "scaffold"):
        for tensor in came:
            values = np.stack([sent[client][tensor] for client in CLIENTS if client != BAD])
            assert (values.min(0) - 1e-6 <= came[tensor]).all()
            assert (came[tensor] <= values.max(0) + 1e-6).all()
    assert not reports[0].left_out
    assert reports[0].train[1].update.cosine * np.sign(factor) > 0.3  # and it shows


@pytest.mark.parametrize("aggregate", ["median", "trimmed-mean"])
def test_the_shared_part_is_learnt_beside_a_liar(aggregate, tmp_path):
    came, _ = play(tmp_path / "a", times(-5), rounds=40, strategy=strategy_of("fedavg", aggregate=aggregate))
    assert np.abs(came["w"] - TARGET).max() < 0.1
    owned, _ = play(tmp_path / "b", times(-5), rounds=40)
    assert not np.abs(owned["w"] - TARGET).max() < 0.5  # what the mean makes of it


def test_norms_and_cosines_are_those_of_numpy(tmp_path):
    sent = []
    (tmp_path / "a").mkdir()
    grid = InProcessGrid(
        make_toy_app(tmp_path / "a"), CLIENTS, on_message=lambda m, r, s: sent.append(to_arrays(r.content[ARRAYS]))
    )
    start = {"w": np.arange(8, dtype=np.float32), "scale": np.float32(0.5)}
    reports = []
    run_rounds(strategy_of("fedavg"), grid, start, 1, evaluate_every=None, on_round=lambda *r: reports.append(r[2]))
    flat = [np.concatenate([np.ravel(a[name] - start[name]) for name in start]).astype(np.float64) for a in sent]
    for k, turn in enumerate(reports[0].train):
        others = sum(d for j, d in enumerate(flat) if j != k)
        assert turn.update.norm == pytest.approx(np.linalg.norm(flat[k]), rel=1e-5)
        wanted = flat[k] @ others / np.linalg.norm(flat[k]) / np.linalg.norm(others)
        assert turn.update.cosine == pytest.approx(wanted, abs=1e-5)


EVALUATIONS = {
    "NaN": (metrics(loss=float("nan")), "client 'ben' reported loss nan"),
    "events": (
        lambda m, r, i: r.content.__setitem__("events", json_record([{"event": "done"}])),
        "client 'ben' sent events that are no scores",
    ),
    "another round": (
        lambda m, r, i: r.content.__setitem__(
            "events", json_record([{"event": "evaluate", "round": 9, "client_id": "", "when": "x", "split": "test"}])
        ),
        "client 'ben' sent scores of round 9 in round",
    ),
    "a text for a number": (
        lambda m, r, i: r.content.__setitem__(
            "events",
            json_record(
                [{"event": "evaluate", "round": i, "client_id": "", "when": "x", "split": "test", "loss": "high"}]
            ),
        ),
        "client 'ben' sent an event 'evaluate' whose loss is 'high'",
    ),
}


@pytest.mark.parametrize("case", EVALUATIONS)
def test_bad_scores_are_left_out_of_the_evaluation_alone(case, tmp_path):
    spoil, sentence = EVALUATIONS[case]
    with pytest.raises(FlexError, match=sentence):
        play(tmp_path / "a", spoil, kind="evaluate")
    scored = []
    came, reports = play(tmp_path / "b", spoil, kind="evaluate", skip_failed=True, on_scores=scored.append)
    assert_same_bits(came, honest(tmp_path / "c")[0])
    assert [len(report.train) for report in reports] == [4, 4]
    for report in (scored[0], reports[1]):  # of the last round they come in the round itself
        assert [(e.client_id, e.doing) for e in report.left_out] == [(BAD, "evaluate")]
        assert [turn.client_id for turn in report.evaluate] == ["anna", "cleo", "dora"]


def test_where_nobody_trained_nobody_is_a_free_rider(tmp_path):
    class Idle(Spoilt):
        def __call__(self, message, context):
            reply = self.app(message, context)
            if message.metadata.message_type == "train":
                reply.content[ARRAYS] = message.content[ARRAYS]
                reply.content[SEAL]["sha256"] = digest(reply.content)
            return reply

    grid = InProcessGrid(Idle(tmp_path, None), CLIENTS)
    assert_same_bits(run_rounds(strategy_of("fedavg"), grid, START, 3), START)


@pytest.mark.parametrize(
    ("count", "aggregate", "values", "wanted"),
    [
        (3, "median", [0, 5, 100], 5),
        (4, "median", [0, 4, 6, 100], 5),
        (3, "trimmed-mean", [0, 5, 100], 5),
        (5, "trimmed-mean", [-100, 1, 2, 3, 100], 2),
        (6, "trimmed-mean", [-100, -50, 1, 2, 50, 100], 1.5),  # 0.2 * 6 rounded up: two at each end
        (2, "trimmed-mean", [1, 2], 1.5),
    ],
)
def test_the_middle_of_values(count, aggregate, values, wanted):
    from flex.federation.robust import middle

    came = middle(np.array([[value] * 3 for value in values], np.float32), aggregate)
    np.testing.assert_array_equal(came, np.full(3, wanted, np.float32))
    assert (came.dtype, len(values)) == (np.float32, count)


def spoil_site(monkeypatch, client, change, from_round=1):
    """`client`'s turns of the real thing give what `change` makes of its report."""
    train = Site.train

    def spoilt(site, round_index, shared, *more):
        turn = train(site, round_index, shared, *more)
        if site.client_id == client and round_index >= from_round:
            change(turn, shared)
        return turn

    monkeypatch.setattr(Site, "train", spoilt)


def poison(turn, shared):
    turn.update = {name: array * np.nan for name, array in turn.update.items()}


@pytest.fixture
def three(tmp_path):
    save_model(tmp_path / "model")
    save_data(tmp_path / "data", "abc")
    return tiny_config(tmp_path, train={"methods": ("base", "fedavg")}, evaluate={"rouge": False})


def test_a_run_goes_on_without_a_site_and_its_report_says_so(three, tmp_path, monkeypatch):
    spoil_site(monkeypatch, "b", poison, from_round=2)
    with pytest.raises(FlexError, match=r"client 'b' sent '.*' with NaN or infinite values in round 2"):
        run(three, Console(quiet=True))
    going_on = three.with_values(train={"skip_failed": True})  # the same run: round 1 is done
    run(going_on, Console(quiet=True))
    events = read_log(tmp_path / "run" / "metrics.jsonl")
    (left_out,) = [event for event in events if event["event"] == "left_out"]
    assert (left_out["round"], left_out["client_id"], left_out["doing"]) == (2, "b", "train")
    trained = {(event["round"], event["client_id"]): event for event in events if event["event"] == "train"}
    assert list(trained) == [(1, "a"), (1, "b"), (1, "c"), (2, "a"), (2, "c")]
    for event in trained.values():
        assert event["update_norm"] > 0
        assert -1 <= event["update_cosine"] <= 1
    assert [event["method"] for event in events if event["event"] == "done"] == ["base", "fedavg"]
    text = write_report(tmp_path / "run").read_text()
    assert "with NaN or infinite values in round 2" in text
    assert "How far each client moved the shared part" in text


def test_a_run_bounds_updates_and_weights(three, tmp_path, monkeypatch):
    def loud(turn, shared):
        turn.update = {name: shared[name] + 20 * (array - shared[name]) for name, array in turn.update.items()}
        turn.metrics["num_examples"] = 10**15

    spoil_site(monkeypatch, "b", loud)
    run(three.with_values(strategy={"max_update_norm": 0.05}), Console(quiet=True))
    events = read_log(tmp_path / "run" / "metrics.jsonl")
    limits = [(e["what"], e["kept"]) for e in events if e["event"] == "limited" and e["client_id"] == "b"]
    assert limits == [("update norm", pytest.approx(0.05)), ("examples", 10)] * 2
    assert {e["num_examples"] for e in events if e["event"] == "train"} == {10}
    assert "What was cut down" in write_report(tmp_path / "run").read_text()


@pytest.mark.parametrize(
    ("section", "values", "sentence"),
    [
        ("strategy", {"aggregate": "mode"}, "strategy.aggregate is 'mode'; expected one of mean, median, trimmed-mean"),
        ("strategy", {"trim": 0.1}, "strategy.trim is 0.1, which strategy.aggregate = 'mean' has no use for"),
        ("strategy", {"aggregate": "trimmed-mean", "trim": 0.5}, "strategy.trim is 0.5; expected a number between"),
        ("strategy", {"max_update_norm": -1.0}, "strategy.max_update_norm is -1.0"),
        (
            "strategy",
            {"name": "scaffold", "max_update_norm": 1.0},
            "strategy.max_update_norm is 1.0, which does not",
        ),
        ("train", {"timeout": 0.0}, "train.timeout is 0.0; expected a number above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(section, values, sentence):
    with pytest.raises(FlexError, match=sentence):
        RunConfig().with_values(**{section: values})


def test_two_clients_are_too_few_for_a_median(tmp_path):
    config = tiny_config(tmp_path, train={"methods": ("fedavg",)}, strategy={"aggregate": "median"})
    with pytest.raises(FlexError, match=r"strategy.aggregate is .median. with 2 clients a round; expected 3 or more"):
        run(config, Console(quiet=True))
