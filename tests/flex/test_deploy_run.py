"""A run at several sites, without Flower's network: the bits of the run on one machine, and what is refused."""

import contextlib
import io
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from same_run import without_times
from sites import at_work, federation, run_sites, unnamed, worker_of
from tiny import read_log, records, save_data, save_model, write_records

from flex.deploy.folder import read_deployment, update
from flex.deploy.job import JOB, JobName, job_record
from flex.deploy.record import Record, record_table
from flex.deploy.worker import MOST_SCORED, state_of
from flex.errors import FlexError
from flex.federation.flower import ConfigRecord, RecordDict
from flex.federation.messages import (
    ABOUT,
    ARRAYS,
    CONFIG,
    EVENTS,
    METRICS,
    SCORED,
    SCORES,
    SPLITS,
    Arrays,
    to_arrays,
    to_record,
)
from flex.federation.rounds import ClientFailed
from flex.federation.seal import SEAL
from flex.report.terminal import write_report
from flex.runs.run import run
from flex.store.events import AFTER

METHODS = ("base", "flex", "scaffold")


def same_tensors(one: Path, other: Path) -> bool:
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def log_of(job: Path) -> list[dict]:
    return without_times(read_log(job / "metrics.jsonl"))


def test_sites_give_the_bits_of_one_machine(tmp_path):
    deployment, config = federation(tmp_path, train={"methods": METHODS}, evaluate={"every": 1})
    run(config, Console(quiet=True))
    with at_work(tmp_path, deployment, "ab") as loop:
        run_sites(tmp_path, deployment, loop)
    alone, apart = Path(config.output), deployment.run
    for method in METHODS:
        job = f"{method}-seed0"
        assert log_of(alone / job) == log_of(apart / job)
        for path in (alone / job).glob("server/*.safetensors"):
            assert same_tensors(path, apart / job / "server" / path.name)
        for path in (alone / job).glob("clients/*/*.safetensors"):
            state = deployment.folder / "packages" / path.parent.name / "state" / deployment.run_name
            assert same_tensors(path, state / job / "clients" / path.parent.name / path.name)
    assert not list(apart.rglob("clients"))  # the server has nobody's personal state
    clients = read_log(apart / "run.jsonl")[0]["clients"]
    assert [(c["client_id"], c["num_train"], c["num_test"]) for c in clients] == [("a", 10, 6), ("b", 10, 6)]
    assert write_report(apart).exists()
    told = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert any(line.get("what") == "round 1, train: waiting for b" for line in told) or any(
        line.get("what") == "round 1, train: all sites answered" for line in told
    )


class Asking:
    """A site's worker, and a server that asks it whatever it likes."""

    def __init__(self, folder: Path, **sections: dict):
        sections = {"train": {"methods": ("flex", "base"), "rounds": 3}, **sections}
        self.folder = folder
        self.deployment, self.config = federation(folder, **sections)
        self.worker = worker_of(folder, self.deployment, "a")
        self.base = ""

    def ask(self, kind: str, shared: Arrays | None = None, method="flex", seed=0, run=None, settings=None, **config):
        package = self.worker.package
        job = job_record(JobName(method, seed), run or package.run, settings or package.digest, self.base)
        content = {JOB: job, CONFIG: ConfigRecord(config)}
        if shared is not None:
            content[ARRAYS] = to_record(shared)
        return self.worker.answer(kind, RecordDict(content), peer=0)

    def start(self) -> Arrays:
        return to_arrays(self.ask("query", ask="start")[ARRAYS])

    def train(self, at: int, shared: Arrays) -> Arrays:
        return to_arrays(self.ask("train", shared, **{"server-round": at})[ARRAYS])

    def evaluate(self, at: int, shared: Arrays, **options):
        return self.ask("evaluate", shared, **{"server-round": at}, **options)


def test_a_site_answers_who_it_is(tmp_path):
    asking = Asking(tmp_path)
    told = json.loads(asking.ask("query", ask="about").config_records[ABOUT]["json"])
    assert (told["client_id"], told["num_train"], told["num_test"]) == ("a", 10, 6)
    assert told["settings"] == asking.worker.package.digest
    assert set(told["versions"]) == {"flex-moe", "torch"}
    assert len(told["data"]) == 16
    assert not any(str(tmp_path) in str(value) for value in told.values())  # no path leaves a site


def test_a_site_counts_rounds(tmp_path):
    asking = Asking(tmp_path)
    start = asking.start()
    for at in (0, 2, 9999, -1):
        with pytest.raises(FlexError, match=rf"round {at}: site 'a' has trained up to round 0; expected round 1"):
            asking.train(at, start)
    first = asking.train(1, start)
    again = asking.train(1, start)  # a server that lost the round asks again, and gets the same
    assert all((first[name] == again[name]).all() for name in first)
    asking.train(2, first)
    with pytest.raises(FlexError, match="trained up to round 2; expected round 2 or 3"):
        asking.train(1, start)
    asking.train(3, first)
    with pytest.raises(FlexError, match="expected round 3"):
        asking.train(4, first)


def test_a_worker_that_starts_again_counts_on(tmp_path):
    asking = Asking(tmp_path)
    first = asking.train(1, asking.start())
    asking.worker = worker_of(tmp_path, asking.deployment, "a")
    with pytest.raises(FlexError, match="trained up to round 1; expected round 1 or 2"):
        asking.train(3, first)
    asking.train(2, first)


def test_who_is_drawn_decides_which_round_is_next(tmp_path):
    asking = Asking(tmp_path, train={"methods": ("fedavg",), "rounds": 9, "clients_per_round": 1})
    start = to_arrays(asking.ask("query", method="fedavg", ask="start")[ARRAYS])
    allowed = asking.worker._next_rounds(0)
    assert len(allowed) == 1
    others = [at for at in range(1, 10) if at not in allowed]
    with pytest.raises(FlexError, match=f"expected round {allowed[0]}"):
        asking.ask("train", start, method="fedavg", **{"server-round": others[0]})
    assert asking.ask("train", start, method="fedavg", **{"server-round": allowed[0]}).array_records
    later = asking.worker._drawn(allowed[0])
    if not later:  # who is not drawn again is scored all the same at the end
        assert asking.ask("evaluate", start, method="fedavg", **{"server-round": 9}).metric_records
    else:
        with pytest.raises(FlexError, match=f"expected round {later[0]}"):
            asking.ask("evaluate", start, method="fedavg", **{"server-round": 9})


def test_scores_are_given_when_the_own_configuration_says(tmp_path):
    asking = Asking(tmp_path)
    start = asking.start()
    for at in (1, 2, 3):
        if at < 3:
            with pytest.raises(FlexError, match="does not score itself then"):
                asking.evaluate(at, start)
        asking.train(at, start)
    seen = []
    for step in range(MOST_SCORED):  # a server may not try one shared state after another on the test set
        changed = {name: array + step for name, array in start.items()}
        seen.append(asking.evaluate(3, changed)[METRICS]["loss"])
    assert len(set(seen)) == MOST_SCORED
    assert asking.evaluate(3, start)[METRICS]["loss"] == seen[0]
    with pytest.raises(FlexError, match="has scored 3 different shared states in this round"):
        asking.evaluate(3, {name: array - 1 for name, array in start.items()})
    assert asking.evaluate(0, {}, method="base").metric_records


def test_a_turn_gives_the_scores_of_the_round_before_and_the_record_says_so(tmp_path):
    asking = Asking(tmp_path, evaluate={"every": 1})
    start = asking.start()
    first = asking.train(1, start)
    alone = asking.evaluate(1, first)
    came = asking.ask("train", first, **{"server-round": 2, SPLITS: " ".join(SCORED)})
    scores = json.loads(came.config_records[SCORES]["json"])
    assert scores == json.loads(alone.config_records[EVENTS]["json"])
    of_layers = scores.pop()
    assert (of_layers["event"], of_layers["round"]) == ("added", 1)
    assert {(e["round"], e["when"], e["split"]) for e in scores} == {(1, AFTER, split) for split in SCORED}
    entries = list(Record(asking.worker.state / "record.jsonl").entries())
    assert [(e.asked, e.round, e.scored, e.events) for e in entries[1:]][1:] == [
        ("evaluate", 1, None, 3),
        ("train", 2, 1, 5),  # beside those of its own model of round 2, before aggregation
    ]
    console = Console(record=True, width=300, quiet=False, file=io.StringIO())
    console.print(record_table(iter(entries)))
    assert "train, score 1" in console.export_text()


def test_turns_count_among_the_shared_states_that_are_scored(tmp_path):
    asking = Asking(tmp_path, evaluate={"every": 2})
    start = asking.start()
    asking.train(1, start)
    question = {"server-round": 2, SPLITS: " ".join(SCORED)}
    with pytest.raises(FlexError, match="round 1: site 'a' does not score itself then"):
        asking.ask("train", start, **question)
    asking.train(2, start)
    question["server-round"] = 3
    for step in range(MOST_SCORED):
        asking.ask("train", {name: array + step / 100 for name, array in start.items()}, **question)
    sentence = "round 2: site 'a' has scored 3 different shared states in this round"
    asking.worker = worker_of(tmp_path, asking.deployment, "a")  # which its record tells
    with pytest.raises(FlexError, match=sentence):
        asking.ask("train", {name: array - 1 for name, array in start.items()}, **question)
    with pytest.raises(FlexError, match=sentence):
        asking.evaluate(2, {name: array - 1 for name, array in start.items()})
    assert asking.ask("train", start, **question).array_records  # a run that is resumed asks for the same again


def test_mu_and_the_rest_in_a_message_change_nothing(tmp_path):
    asking = Asking(tmp_path)
    start = asking.start()
    plain = asking.train(1, start)
    odd = {"server-round": 1, "proximal-mu": -1e9, "steps": 99, "learning_rate": 5.0, "evaluate": True}
    came = asking.ask("train", start, **odd)
    assert all((plain[name] == array).all() for name, array in to_arrays(came[ARRAYS]).items())
    assert json.loads(came.config_records["events"]["json"])  # the choice of grafts, and no scores
    assert not any(e["event"] == "evaluate" for e in json.loads(came.config_records["events"]["json"]))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"run": "other"}, r"site 'a' has the package of run \w+ .*, the server that of run other"),
        ({"settings": "0" * 16}, r"\(settings 0{16}\); expected the package that `flex deploy` made last"),
        ({"method": "fedavg"}, "takes no part in fedavg seed 0"),
        ({"seed": 7}, "takes no part in flex seed 7"),
    ],
)
def test_a_question_of_another_run_is_refused_by_name(tmp_path, options, sentence):
    asking = Asking(tmp_path)
    with pytest.raises(FlexError, match=sentence):
        asking.ask("query", ask="start", **options)
    assert next(iter(asking.worker.record.entries())).refused


def test_another_base_is_refused_at_the_site(tmp_path):
    asking = Asking(tmp_path)
    asking.base = "0" * 16
    with pytest.raises(FlexError, match=r"site 'a' has base \w+, the others have 0{16}; expected the same model"):
        asking.start()


def test_a_message_without_a_job_is_refused(tmp_path):
    asking = Asking(tmp_path)
    with pytest.raises(FlexError, match="the question names no job"):
        asking.worker.answer("train", RecordDict({CONFIG: ConfigRecord({"server-round": 1})}), peer=0)


def test_a_fault_of_the_program_says_nothing_of_the_site(tmp_path, monkeypatch, capfd):
    asking = Asking(tmp_path)
    start = asking.start()

    def fails(*arguments):
        raise ZeroDivisionError("patient 17")

    monkeypatch.setattr("flex.federation.client.Site.train", fails)
    with pytest.raises(FlexError) as caught:
        asking.train(1, start)
    assert "patient" not in str(caught.value)
    assert "ZeroDivisionError" in str(caught.value)
    assert "patient 17" in capfd.readouterr().err


def test_what_leaves_is_recorded(tmp_path):
    asking = Asking(tmp_path)
    start = asking.start()
    came = asking.ask("train", start, **{"server-round": 1})
    entries = list(Record(asking.worker.state / "record.jsonl").entries())
    assert [(e.asked, e.round, e.refused) for e in entries] == [("start", 0, ""), ("train", 1, "")]
    turn = entries[-1]
    update = to_arrays(came[ARRAYS])
    norm = sum(float(((update[n] - start[n]).astype("float64") ** 2).sum()) for n in update) ** 0.5
    assert turn.norm == pytest.approx(norm)
    assert set(turn.tensors) == set(start)
    assert turn.bytes == sum(len(array.data) for array in came[ARRAYS].values())
    assert turn.numbers["num-examples"] == 10
    assert len(turn.sha256) == 64
    assert turn.start == came.config_records[SEAL]["start"]
    assert turn.time


def test_nothing_leaves_that_cannot_be_recorded(tmp_path, monkeypatch):
    asking = Asking(tmp_path)
    asking.worker.record.path = tmp_path / "gone" / "record.jsonl"
    with pytest.raises(FlexError, match=r"record cannot be written .* nothing has left"):
        asking.start()


def test_a_changed_configuration_waits_for_the_site(tmp_path):
    deployment, config = federation(tmp_path)
    package = worker_of(tmp_path, deployment, "a").package
    with state_of(package, tmp_path / "state", accept=False):
        pass
    busy = pytest.raises(FlexError, match="another worker has the state folder")
    with state_of(package, tmp_path / "state", accept=False), busy:
        state_of(package, tmp_path / "state", accept=True).__enter__()
    update(deployment.folder, config.with_values(train={"learning_rate": 0.5}), [], {}, None)
    newer = worker_of(tmp_path, read_deployment(deployment.folder), "a").package
    assert newer.run != package.run
    sentence = r"train.learning_rate: 0.003 before, 0.5 now.*expected `flex worker .* --accept`"
    with pytest.raises(FlexError, match=sentence), state_of(newer, tmp_path / "state", accept=False):
        pass
    with state_of(newer, tmp_path / "state", accept=True):
        pass
    with state_of(newer, tmp_path / "state", accept=False):
        pass


def test_a_setting_that_is_not_the_sites_is_refused(tmp_path):
    deployment, _ = federation(tmp_path)
    package = worker_of(tmp_path, deployment, "a").package
    from flex.deploy.worker import with_own

    with pytest.raises(FlexError, match=r"train.steps is not a site's own setting; expected one of .*model.path"):
        with_own(package, ["model.path='x'", "data.train='y'", "train.steps=9"])
    with pytest.raises(FlexError, match="no model is named"):
        with_own(package, ["data.train='y'"])
    with pytest.raises(FlexError, match="no data is named"):
        with_own(package, ["model.path='x'"])
    assert with_own(package, ["model.path='x'", "data.train='y'", "threads=3"]).threads == 3


ANCHORED = {"train": {"methods": ("flex",)}, "anchor": {"text": "elsewhere.jsonl", "examples": 6, "batch_size": 2}}


def test_sites_are_held_to_the_base_on_texts_of_their_own(tmp_path):
    def write(name: str, start: int) -> None:
        write_records(tmp_path / f"{name}-anchors.jsonl", [unnamed(r) for r in records("b", 8, start=start)])

    for name in "ab":
        write(name, 30)
    deployment, config = federation(tmp_path, **ANCHORED)
    run(config.with_values(anchor={"text": str(tmp_path / "a-anchors.jsonl")}), Console(quiet=True))
    with at_work(tmp_path, deployment, "ab") as loop:
        run_sites(tmp_path, deployment, loop)
    alone, apart = Path(config.output) / "flex-seed0", deployment.run / "flex-seed0"
    assert log_of(alone) == log_of(apart)
    assert same_tensors(alone / "server/round-0002.safetensors", apart / "server/round-0002.safetensors")
    known = read_log(deployment.run / "run.jsonl")[0]["client_data"]["0"]
    assert known["a"].split("+")[1] == known["b"].split("+")[1]  # which text it was is kept, by its fingerprint

    write("b", 20)  # a text of its own is allowed, but not another one than the run began with
    longer = config.with_values(train={"rounds": 3})
    deployment = update(deployment.folder, longer, (), {}, None)
    with at_work(tmp_path, deployment, "ab", accept=True) as loop, pytest.raises(FlexError, match="'b' has other data"):
        run_sites(tmp_path, deployment, loop)
    shutil.rmtree(deployment.run)
    deployment = update(deployment.folder, longer.with_values(train={"rounds": 1}), (), {}, None)
    with at_work(tmp_path, deployment, "ab", accept=True) as loop:
        run_sites(tmp_path, deployment, loop)
    known = read_log(deployment.run / "run.jsonl")[0]["client_data"]["0"]
    assert known["a"].split("+")[1] != known["b"].split("+")[1]


def test_a_site_with_another_base_is_named(tmp_path):
    deployment, _ = federation(tmp_path, sites="abc")
    with at_work(tmp_path, deployment, "ac") as loop:
        save_model(tmp_path / "model", seed=5)
        with at_work(tmp_path, deployment, "b") as odd:
            loop._contexts[1001], loop._contexts[1002] = odd._contexts[1000], loop._contexts[1001]
            loop.clients = {1000: "a", 1001: "b", 1002: "c"}
            with pytest.raises(FlexError, match=r"differ in base \('a', 'c' has \w+; 'b' has \w+\)"):
                run_sites(tmp_path, deployment, loop)


def test_a_stopped_run_goes_on_with_the_same_bits(tmp_path):
    """The server dies between two rounds; every worker starts anew; nothing is lost or swapped."""
    deployment, config = federation(tmp_path, train={"methods": ("flex",), "rounds": 3})
    run(config, Console(quiet=True))
    with at_work(tmp_path, deployment, "ab") as loop:
        deliver, count = loop._deliver, [0]

        def dies(message):
            count[0] += message.metadata.message_type == "train"
            if count[0] == 4:  # the second site's turn of the second round: the first one's is done
                raise ConnectionError("the server was killed")
            return deliver(message)

        loop._deliver = dies
        with pytest.raises(ConnectionError):
            run_sites(tmp_path, deployment, loop)
    with at_work(tmp_path, deployment, "ab") as loop:
        run_sites(tmp_path, deployment, loop)
    alone, apart = Path(config.output) / "flex-seed0", deployment.run / "flex-seed0"
    assert same_tensors(alone / "server/round-0003.safetensors", apart / "server/round-0003.safetensors")
    for name in "ab":
        own = deployment.folder / "packages" / name / "state" / deployment.run_name / "flex-seed0/clients" / name
        assert same_tensors(alone / "clients" / name / "round-0003.safetensors", own / "round-0003.safetensors")
    assert log_of(alone) == log_of(apart)


@pytest.mark.parametrize("clients_per_round", [0, 2])
def test_a_run_that_scores_every_round_goes_on_with_the_same_log(clients_per_round, tmp_path):
    """The server dies between two turns that bring scores: nothing is missing in its log, and nothing there twice."""
    save_model(tmp_path / "model")
    save_data(tmp_path / "data", "abc")
    train = {"methods": ("scaffold",), "rounds": 3, "clients_per_round": clients_per_round}
    deployment, config = federation(tmp_path, "abc", train=train, evaluate={"every": 1, "rouge": False})
    run(config, Console(quiet=True))
    sent = []
    per_round = clients_per_round or 3
    for dies_at in (2, per_round + 2, per_round + 2, 0):  # in round 1, 2 and 3, after one client's turn
        with at_work(tmp_path, deployment, "abc") as loop:
            deliver, count = loop._deliver, [0]

            def dies(message, deliver=deliver, count=count, dies_at=dies_at):
                kind = message.metadata.message_type
                count[0] += kind == "train"
                if dies_at and count[0] == dies_at:
                    raise ConnectionError("the server was killed")
                sent.append((dies_at, kind, message.content[CONFIG].get("server-round", 0)))
                return deliver(message)

            loop._deliver = dies
            with pytest.raises(ConnectionError) if dies_at else contextlib.nullcontext():
                run_sites(tmp_path, deployment, loop)
    assert log_of(Path(config.output) / "scaffold-seed0") == log_of(deployment.run / "scaffold-seed0")
    last = Counter((kind, at) for dies_at, kind, at in sent if not dies_at and kind != "query")
    wanted = Counter({("train", 3): per_round, ("evaluate", 2): 3 - per_round, ("evaluate", 3): 3})
    assert last == wanted


def test_a_full_disk_at_a_site_is_a_sentence(tmp_path, monkeypatch):
    deployment, _ = federation(tmp_path)
    with at_work(tmp_path, deployment, "ab") as loop:
        monkeypatch.setattr("flex.store.files._stream", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space")))
        with pytest.raises(
            (FlexError, ClientFailed), match=r"'a' failed in round 1 \(train\): cannot write .*No space"
        ):
            run_sites(tmp_path, deployment, loop)


def test_other_data_than_the_run_began_with_is_named(tmp_path):
    deployment, _ = federation(tmp_path, train={"methods": ("base", "flex")})
    with at_work(tmp_path, deployment, "ab") as loop:
        run_sites(tmp_path, deployment, loop)
    for path in (deployment.run / "flex-seed0").glob("metrics.jsonl"):
        path.write_text("\n".join(line for line in path.read_text().splitlines() if '"done"' not in line) + "\n")
    lines = (tmp_path / "b-train.jsonl").read_text().splitlines()
    (tmp_path / "b-train.jsonl").write_text("\n".join(lines[1:]) + "\n")
    odd = pytest.raises(FlexError, match="site 'b' has other data than when this run began")
    with at_work(tmp_path, deployment, "ab") as loop, odd:
        run_sites(tmp_path, deployment, loop)


def test_a_site_joins_and_one_leaves_a_run_at_work(tmp_path):
    deployment, config = federation(tmp_path, sites="abc", train={"methods": ("flex",), "rounds": 2})
    both = update(deployment.folder, config, ["a", "b"], {}, None)
    with at_work(tmp_path, both, "ab") as loop:
        run_sites(tmp_path, both, loop)
    more = config.with_values(train={"rounds": 4})
    new = update(deployment.folder, more, ["b", "c"], {}, None)
    assert new.run_name == both.run_name
    with at_work(tmp_path, new, "bc", accept=True) as loop:
        run_sites(tmp_path, new, loop)
    trained = [(e["round"], e["client_id"]) for e in log_of(new.run / "flex-seed0") if e["event"] == "train"]
    assert trained == [(1, "a"), (1, "b"), (2, "a"), (2, "b"), (3, "b"), (3, "c"), (4, "b"), (4, "c")]
