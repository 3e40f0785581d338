"""More clients than stay encoded: the same examples, few of them in memory; a sample of clients is evaluated."""

import json
from pathlib import Path

from rich.console import Console
from tiny import read_log, tiny_config

from flex.data import examples
from flex.data.examples import EncodedWhenAsked
from flex.federation.client import about
from flex.runs.run import run
from flex.runs.world import load_world


def many(folder: Path, **train: object):
    config = tiny_config(folder, train={"methods": ("fedavg",), "rounds": 2, "steps": 1, "batch_size": 2, **train})
    lines = [
        {"instruction": f"which is larger , {i % 40} or {i} ?", "response": f"{i} kg", "client": "x"} for i in range(36)
    ]
    (folder / "many.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"train": str(folder / "many.jsonl"), "test": "", "general": "", "group_by": "", "test_fraction": 0.3}
    return config.with_values(data={**data, "split": "iid", "num_clients": 12}, evaluate={"rouge": False})


def test_examples_are_encoded_when_asked_for_and_the_same(tmp_path, monkeypatch):
    config = many(tmp_path)
    plain = load_world(config, 0)
    monkeypatch.setattr(examples, "MANY", 5)
    monkeypatch.setattr(examples, "PARTS_KEPT", 3)
    lazy = load_world(config, 0, plain.base)
    assert lazy.data_fingerprint == plain.data_fingerprint
    for one, other in zip(lazy.clients, plain.clients, strict=True):
        assert isinstance(one.train, EncodedWhenAsked)
        assert list(one.train) == other.train
        assert one.train[-1] == other.train[-1]
        assert len(one.test) == len(other.test)
        assert one.fingerprint() == other.fingerprint()
    assert len(EncodedWhenAsked._kept) <= 3


def test_before_a_run_trains_every_part_is_encoded_once(tmp_path, monkeypatch):
    config, encoded = many(tmp_path), []
    monkeypatch.setattr(examples, "MANY", 5)
    encode = examples.encode
    monkeypatch.setattr(examples, "encode", lambda part, *rest: encoded.append(id(part)) or encode(part, *rest))
    world = load_world(config, 0)
    first = len(encoded)  # whether every answer is cut: one part is enough to see that none is
    assert first == 1
    fingerprints = world.client_fingerprints
    assert world.identity["data"] == world.data_fingerprint
    told = [about(world.base, client, config) for client in world.clients]
    sites = [site.about() for site in world.sites(config, "fedavg", 0, tmp_path / "job").values()]
    assert [site.data for site in sites] == [one.data for one in told] == list(fingerprints.values())
    assert all(one.truncated == {"train": 0, "test": 0} for one in told)
    assert len(encoded) == len(set(encoded)) == 24


def test_a_run_of_many_evaluates_the_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "MANY", 5)
    config = many(tmp_path, clients_per_round=3).with_values(evaluate={"clients": 4, "every": 1})
    folder = run(config, Console(quiet=True))
    events = read_log(folder / "metrics.jsonl")
    scored = {
        at: {
            e["client_id"]
            for e in events
            if e["event"] == "evaluate" and e["when"] == "after_aggregation" and e["round"] == at
        }
        for at in (1, 2)
    }
    assert len(scored[1]) == 4
    assert scored[1] == scored[2]
    assert len({e["client_id"] for e in events if e["event"] == "train" and e["round"] == 1}) == 3
