"""One channel: what a client's turn gives comes back in its replies, and the log is made of them alone."""

import json
from pathlib import Path

import pytest
from rich.console import Console
from tiny import read_log, tiny_config

from flex.errors import FlexError
from flex.federation import local
from flex.federation.flower import Message, MessageType, MetricRecord, RecordDict
from flex.federation.guard import Guard
from flex.federation.messages import EVENTS, SCORES, about_of, events_of, json_record, metrics_of, sent_tensors
from flex.federation.rounds import RoundReport, Turn
from flex.runs.job import round_events, sent_events
from flex.runs.run import run, run_events
from flex.store.events import Done, EventLog, Grafted, JobStarted


def test_the_log_of_a_run_can_be_made_again_from_its_messages(tmp_path, monkeypatch):
    recorded = []
    deliver = local.InProcessGrid._deliver

    def record(grid, message):
        reply = deliver(grid, message)
        recorded.append((grid.clients[message.metadata.dst_node_id], message, reply))
        return reply

    monkeypatch.setattr(local.InProcessGrid, "_deliver", record)
    config = tiny_config(tmp_path, train={"methods": ("flex",), "clients_per_round": 1}, evaluate={"every": 1})
    config = config.with_values(data={"max_length": 20})
    with Path(config.data.train).open("a") as file:  # one example that is cut
        file.write(
            json.dumps({"instruction": "which is larger , " * 9, "response": "3 kg", "client": "a", "group": "x"})
        )
    run(config, Console(quiet=True))
    written = read_log(tmp_path / "run" / "metrics.jsonl")

    turns: dict[tuple[int, str], list[Turn]] = {}
    sites = []
    for client, message, reply in recorded:
        kind = message.metadata.message_type
        if kind == MessageType.QUERY:
            if "about" in reply.content.config_records:
                sites.append(about_of(reply, client))
            continue
        content = (sent_tensors(message.content), sent_tensors(reply.content))
        at = int(message.content["config"]["server-round"])
        update = Guard().admit(message, reply, client, at) if kind == MessageType.TRAIN else None
        turn = Turn(client, metrics_of(reply), events_of(reply, client), *content, update)
        turns.setdefault((at, kind), []).append(turn)
        if scores := events_of(reply, client, at - 1, SCORES):
            turns.setdefault((at - 1, MessageType.EVALUATE), []).append(Turn(client, {}, scores, [], []))

    data = next(event["data"] for event in written if event["event"] == "run")
    digests = {"0": {site.client_id: site.data for site in sites}}
    again = [event.to_json() for event in run_events(config, sites, data, "", {}, digests)]
    log = EventLog(tmp_path / "again.jsonl", "flex", 0)
    names = [site.client_id for site in sites]
    rates = {name: getattr(config.train, name) for name in ("learning_rate", "graft_learning_rate")}
    log.write(JobStarted(2, len(sites), sites[0].trained_parameters, clients=names, learning_rates=rates))
    known = set()
    for index in (1, 2):
        report = RoundReport(index, turns[index, MessageType.TRAIN], turns[index, MessageType.EVALUATE])
        for event in [*(sent_events(report.train[0]) if index == 1 else []), *round_events(index, report)]:
            if isinstance(event, Grafted):
                if (event.client_id, event.round, event.layer) in known:
                    continue
                known.add((event.client_id, event.round, event.layer))
            log.write(event)
    log.write(Done(2, tokens=sum(t.metrics["tokens"] for i in (1, 2) for t in turns[i, MessageType.TRAIN])))
    again += read_log(tmp_path / "again.jsonl")
    of_the_process = ("title", "started", "format", "base_model")
    for stream in (written, again):
        for event in stream:
            for key in of_the_process:
                event.pop(key, None)
            if event["event"] == "done":
                event.pop("seconds")
    assert any(event["event"] == "truncated" for event in written)
    # What a round took beyond the turns is the server's own; of messages come the turns.
    assert [event["round"] for event in written if event["event"] == "exchange"] == [1, 2]
    written = [event for event in written if event["event"] != "exchange"]
    assert sorted(map(json.dumps, again)) == sorted(map(json.dumps, written))


def reply_with(record) -> Message:
    message = Message(RecordDict(), 1, MessageType.QUERY)
    return Message(RecordDict({EVENTS: record}), reply_to=message)


@pytest.fixture
def server():
    from flex.federation.flower import become_server

    become_server(1)


def test_a_client_speaks_of_itself_alone(server):
    told = {
        "event": "evaluate",
        "method": "base",
        "seed": 9,
        "round": 1,
        "client_id": "another",
        "when": "x",
        "split": "y",
    }
    (event,) = events_of(reply_with(json_record([told])), "anna")
    assert (event.client_id, event.method, event.seed) == ("anna", None, None)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([{"event": "done", "round": 3}], "client 'anna' sent events that are no scores, no measures of layers"),
        ([{"event": "unknown"}], "client 'anna' sent events that are no scores, no measures of layers"),
        ({"event": "train"}, "client 'anna' sent events that are no scores, no measures of layers"),
        ([{"event": "evaluate"}], "an event 'evaluate' is incomplete"),
    ],
)
def test_other_events_of_a_client_are_refused(server, values, sentence):
    with pytest.raises(FlexError, match=sentence):
        events_of(reply_with(json_record(values)), "anna")


def test_events_that_are_no_json_are_refused(server):
    with pytest.raises(FlexError, match="client 'anna' sent no readable 'events' record; expected JSON"):
        events_of(reply_with(type(json_record([]))({"json": "{"})), "anna")
    assert (
        events_of(
            Message(RecordDict({"m": MetricRecord({"a": 1})}), reply_to=Message(RecordDict(), 1, "query")), "anna"
        )
        == []
    )
