"""The rounds on a toy problem: what is learnt, counted and refused, on this Grid and on others."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from toy import CLIENTS, START, TARGET, RelayGrid, assert_same_bits, make_toy_app, strategy_of

from flex.errors import FlexError
from flex.federation.flower import ClientApp, ConfigRecord, Message, MetricRecord, RecordDict, become_server, empty_run
from flex.federation.local import InProcessGrid
from flex.federation.messages import sent_bytes, sent_tensors, to_arrays, to_record
from flex.federation.rounds import ClientFailed, ask_about, ask_clients, run_rounds
from flex.federation.seal import sealed
from flex.federation.strategy import STRATEGIES, make_strategy, sample_clients


def train(folder: Path, name: str = "fedavg", rounds: int = 10, shared=START, **options):
    folder.mkdir(exist_ok=True)
    grid = InProcessGrid(make_toy_app(folder), CLIENTS)
    return run_rounds(strategy_of(name), grid, shared, rounds, **options)


def kept_in(reports: list) -> dict:
    """What `run_rounds` tells, in its order."""
    return {"on_round": lambda *r: reports.append(r[2]), "on_scores": reports.append}


@pytest.mark.parametrize("name", STRATEGIES)
def test_learns_the_shared_part(name, tmp_path):
    came = train(tmp_path, name, rounds=40)
    assert np.abs(came["w"] - TARGET).max() < (0.05 if name in ("fedavg", "fedprox", "scaffold") else 0.5)  # from 1.3


def test_same_start_same_bits(tmp_path):
    random.seed(1)
    first = train(tmp_path / "a")
    random.seed(2)
    assert_same_bits(train(tmp_path / "b"), first)


@pytest.mark.parametrize("name", STRATEGIES)
def test_any_grid_gives_the_same_bits(name, tmp_path):
    wanted = train(tmp_path / "here", name, rounds=3)
    for seed in range(2):
        (folder := tmp_path / f"there-{seed}").mkdir()
        grid, reports = RelayGrid(InProcessGrid(make_toy_app(folder), CLIENTS), seed), []
        assert list(ask_clients(grid).values()) == CLIENTS
        came = run_rounds(strategy_of(name), grid, START, 3, **kept_in(reports))
        assert_same_bits(came, wanted)
        assert [(r.round_index, bool(r.train), bool(r.evaluate), r.unscored) for r in reports] == [
            (1, True, False, True),
            (1, False, True, False),
            (2, True, False, True),
            (2, False, True, False),
            (3, True, True, False),
        ]
        for report in reports:
            for turns in (report.train, report.evaluate):
                assert [turn.client_id for turn in turns] in ([], CLIENTS)


def test_report_keeps_every_client_apart(tmp_path):
    reports, messages = [], []
    grid = InProcessGrid(make_toy_app(tmp_path), CLIENTS, on_message=lambda *m: messages.append(m))
    run_rounds(
        strategy_of("scaffold", clients_per_round=2),
        grid,
        START,
        2,
        **kept_in(reports),
    )
    for report in (reports[0], reports[2]):
        picked = sample_clients(4, 2, report.round_index)
        assert [turn.client_id for turn in report.train] == [CLIENTS[i] for i in picked]
    for report in reports[1:]:
        assert [turn.client_id for turn in report.evaluate] == CLIENTS
        assert [turn.metrics["num-examples"] for turn in report.evaluate] == [20, 30, 40, 50]
        assert report.failed == {}
    assert len({turn.metrics["loss"] for turn in reports[1].evaluate}) == 4
    down, up, seconds = messages[0]
    assert seconds > 0
    names = [(t["name"], t["shape"], t["dtype"]) for t in sent_tensors(down.content)]
    assert names == [
        ("w", [8], "float32"),
        ("scale", [], "float32"),
        ("c/w", [8], "float32"),
        ("c/scale", [], "float32"),
    ]
    assert names == [(t["name"], t["shape"], t["dtype"]) for t in sent_tensors(up.content)]
    turn = reports[0].train[0]
    assert turn.bytes_down == sent_bytes(down.content) == sum(t["bytes"] for t in sent_tensors(down.content))
    assert turn.bytes_down == turn.bytes_up == 2 * (8 * 4 + 128) + 2 * (4 + 128)  # values and numpy's header
    assert reports[1].evaluate[0].bytes_up == 0


def test_nothing_shared_is_a_run_too(tmp_path):
    app = ClientApp(mods=[sealed])

    @app.train()
    def train_alone(message, context):
        metrics = MetricRecord({"num-examples": 1, "loss": 0.5})
        return Message(RecordDict({"arrays": to_record({}), "metrics": metrics}), reply_to=message)

    assert run_rounds(strategy_of("fedavg"), InProcessGrid(app, CLIENTS), {}, 2, evaluate_every=None) == {}


def test_when_to_evaluate_is_said_to_the_clients(tmp_path):
    def rounds_with(every):
        told, held = [], []
        grid = InProcessGrid(
            make_toy_app(tmp_path),
            CLIENTS,
            on_message=lambda m, r, s: told.append(m.content["config"].get("evaluate", "no training")),
        )
        run_rounds(
            strategy_of("fedavg"),
            grid,
            START,
            5,
            evaluate_every=every,
            on_round=lambda r, s, report: held.append(bool(report.evaluate) or report.unscored),
        )
        in_training = [flag for flag in told if flag != "no training"]
        assert in_training == [flag for flag in held for _ in CLIENTS]
        return [r for r, flag in enumerate(held, 1) if flag]

    assert rounds_with(1) == [1, 2, 3, 4, 5]
    assert rounds_with(2) == [2, 4, 5]
    assert rounds_with(0) == [5]
    assert rounds_with(None) == []


def test_config_reaches_the_clients(tmp_path):
    came = []
    grid = InProcessGrid(
        make_toy_app(tmp_path), CLIENTS[:1], on_message=lambda m, r, s: came.append(m.content["config"])
    )
    run_rounds(make_strategy("fedprox", 1), grid, START, 1, train_config={"a": 1}, evaluate_config={"b": "two"})
    assert dict(came[0]) == {"a": 1, "evaluate": True, "proximal-mu": 0.01, "server-round": 1}
    assert dict(came[1]) == {"b": "two", "server-round": 1}


def test_a_client_cannot_change_what_the_next_one_gets(tmp_path):
    (tmp_path / "greedy").mkdir()
    greedy = InProcessGrid(make_toy_app(tmp_path / "greedy", greedy=True), CLIENTS)
    assert_same_bits(run_rounds(strategy_of("fedavg"), greedy, START, 3), train(tmp_path / "modest", rounds=3))


def test_a_failing_client_stops_the_run_by_name(tmp_path):
    at_work = []
    app = make_toy_app(tmp_path, fail="ben", error=ZeroDivisionError("no examples left"))
    grid = InProcessGrid(app, CLIENTS, on_message=lambda m, r, s: at_work.append(grid.clients[m.metadata.dst_node_id]))
    sentence = r"client 'ben' failed in round 1 \(train\): ZeroDivisionError: no examples left"
    with pytest.raises(ClientFailed, match=sentence) as caught:
        run_rounds(strategy_of("fedavg"), grid, START, 3)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert caught.value.__cause__.__traceback__ is not None
    assert at_work == ["anna", "ben"]  # nobody after it was trained in vain


def test_a_client_with_bad_input_gives_its_sentence(tmp_path):
    grid = InProcessGrid(make_toy_app(tmp_path, fail="ben", error=FlexError("the disk is full")), CLIENTS)
    with pytest.raises(FlexError, match=r"client 'ben' failed in round 1 \(train\): the disk is full$"):
        run_rounds(strategy_of("fedavg"), grid, START, 3)


def test_a_failing_client_can_be_left_out(tmp_path):
    reports = []
    for folder, options in (("a", {"fail": "ben", "error": OSError("unplugged")}), ("b", {})):
        (tmp_path / folder).mkdir()
        grid = InProcessGrid(make_toy_app(tmp_path / folder, **options), CLIENTS)
        shared = run_rounds(
            strategy_of("fedavg"),
            grid,
            START,
            2,
            skip_failed=True,
            on_round=lambda *r: reports.append(r[2]),
        )
    assert reports[1].failed == {"ben": "OSError: unplugged"}
    assert [turn.client_id for turn in reports[1].train] == ["anna", "cleo", "dora"]
    assert reports[-1].failed == {}
    assert grid.raised == {}
    assert np.isfinite(shared["w"]).all()


def test_a_round_without_any_client_stops(tmp_path):
    grid = InProcessGrid(make_toy_app(tmp_path, fail="anna", error=OSError("unplugged")), ["anna"])
    with pytest.raises(ClientFailed, match="every client failed in round 1: anna: OSError: unplugged"):
        run_rounds(make_strategy("fedavg", 1), grid, START, 2, skip_failed=True)


def test_a_client_app_that_returns_no_message():
    app = ClientApp(mods=[sealed])
    app.train()(lambda message, context: None)
    with pytest.raises(ClientFailed, match=r"client 'anna' .* the ClientApp returned NoneType; expected a Message"):
        run_rounds(make_strategy("fedavg", 1), InProcessGrid(app, ["anna"]), START, 1)


def test_nodes_that_die_or_keep_silent_are_named(tmp_path):
    grid = RelayGrid(InProcessGrid(make_toy_app(tmp_path), CLIENTS), seed=3)
    grid.clients = ask_clients(grid)
    nodes = {client_id: node for node, client_id in grid.clients.items()}
    grid.dead = nodes["cleo"]
    with pytest.raises(ClientFailed, match=r"client 'cleo' failed in round 1 \(train\): node unavailable"):
        run_rounds(strategy_of("fedavg"), grid, START, 1)
    with pytest.raises(FlexError, match=r"client 'cleo' did not answer the question 'about': node unavailable"):
        ask_about(grid)
    grid.dead, grid.deaf = None, nodes["dora"]
    with pytest.raises(ClientFailed, match=r"client 'dora' failed in round 1 \(train\): no reply within 5 s"):
        run_rounds(strategy_of("fedavg"), grid, START, 1, timeout=5)
    reports = []
    run_rounds(strategy_of("fedavg"), grid, START, 1, skip_failed=True, on_round=lambda *r: reports.append(r[2]))
    assert list(reports[0].failed) == ["dora"]


def test_nodes_that_do_not_say_who_they_are(tmp_path):
    app = ClientApp(mods=[sealed])
    with pytest.raises(FlexError, match="client 'anna' did not answer the question 'who': "):
        ask_clients(InProcessGrid(app, ["anna"]))

    @app.query()
    def everyone_is_anna(message, context):
        answer = ConfigRecord({"client-id": "anna", "client-index": 0})
        return Message(RecordDict({"client": answer}), reply_to=message)

    with pytest.raises(FlexError, match="expected each client once"):
        ask_clients(InProcessGrid(app, CLIENTS))


@pytest.mark.parametrize("ids", [[], ["anna", "anna"]])
def test_clients_must_have_different_names(ids):
    with pytest.raises(FlexError, match="client_ids is"):
        InProcessGrid(ClientApp(), ids)


def test_flowers_own_loop_and_strategies_run_on_the_grid(tmp_path):
    from flwr.serverapp.strategy import FedAdam  # beside flex.flower: a strategy that is not ours

    app = make_toy_app(tmp_path)

    grid = InProcessGrid(app, CLIENTS)
    ours = strategy_of("fedavg").start(grid, to_record(START), num_rounds=2)
    assert_same_bits(to_arrays(ours.arrays), train(tmp_path / "ours", rounds=2))

    def sum_of_losses(contents, key):
        return MetricRecord({"loss": sum(c["metrics"]["loss"] for c in contents)})

    shared = run_rounds(FedAdam(train_metrics_aggr_fn=sum_of_losses), InProcessGrid(app, CLIENTS), START, 2)
    assert {a.dtype for a in shared.values()} == {np.dtype(np.float32)}  # Flower's FedAdam computes in float64


def test_the_rest_of_the_grid_interface(tmp_path):
    grid = InProcessGrid(make_toy_app(tmp_path), CLIENTS)
    messages = [grid.create_message(RecordDict(), "query", node, "1") for node in grid.get_node_ids()]
    ids = grid.push_messages(messages)
    replies = grid.pull_messages(ids)
    assert [reply.content["client"]["client-id"] for reply in replies] == CLIENTS
    assert grid.pull_messages(ids) == []
    assert grid.run.run_id == 1
    grid.set_run(empty_run(2))
    assert grid.run.run_id == 2


@pytest.mark.parametrize(
    ("module", "call"),
    [("flwr.supercore.task_identity", become_server), ("flwr.supercore.run", empty_run)],
)
def test_a_flower_that_moved_its_private_parts_is_named(module, call, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RuntimeError, match=r"flwr \S+ has moved .* expected a release like 1.41"):
        call(1)


def test_import_is_quiet_and_leaves_no_trace(tmp_path):
    code = (
        "import os, flex.federation.strategy, flex.federation.flower;"
        "assert os.environ['FLWR_TELEMETRY_ENABLED'] == '0' and os.environ['FLWR_DISABLE_UPDATE_CHECK'] == '1';"
        "import sys; assert 'torch' not in sys.modules and 'ray' not in sys.modules;"
        "import flex.federation.flower as flower, flex.federation.local as local;"
        "local.InProcessGrid(flower.ClientApp(), ['anna']);"
        "flower.Message(flower.RecordDict(), 1, 'train')"  # the grid has told Flower who writes
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FLWR_")}
    came = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**kept, "HOME": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert (came.returncode, came.stdout, came.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
