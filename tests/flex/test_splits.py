"""Splits by setting: whose records are whose, what is refused before anything is loaded, and the table of it."""

from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console
from tiny import read_log, tiny_config, write_records

from flex.cli import main
from flex.config import SPLITS, DataConfig, read_config
from flex.data import clients as data_clients
from flex.data.clients import read_clients, tally
from flex.errors import FlexError
from flex.runs.tally import split_table

LABELS = {"qa": 60, "summary": 30, "poem": 10}


def write(folder: Path, test: bool = True) -> dict[str, str]:
    def lines(part: str, share: float) -> list[dict]:
        each = [(label, i) for label, count in LABELS.items() for i in range(int(count * share))]
        return [{"instruction": f"{part} {label} {i}", "response": "x", "label": label} for label, i in each]

    paths = {"train": str(write_records(folder / "train.jsonl", lines("train", 1)))}
    return paths | ({"test": str(write_records(folder / "test.jsonl", lines("test", 0.5)))} if test else {})


def drawn(folder: Path, split: str, test: bool = True, **settings: object) -> list:
    labelled = {"label_by": "label"} if split != "iid" else {}
    return read_clients(DataConfig(**write(folder, test), split=split, **labelled, **settings))


def test_the_table_has_a_function_for_every_split():
    assert data_clients.SPLITS.keys() == SPLITS.keys()


@pytest.mark.parametrize(
    "case",
    [
        {"split": "iid", "num_clients": 4},
        {"split": "pathological", "num_clients": 3, "classes_per_client": 2},
        {"split": "dirichlet", "num_clients": 4, "alpha": 0.5, "min_size": 4},
    ],
    ids=lambda case: case["split"],
)
@pytest.mark.parametrize("test", [True, False])
def test_every_record_is_one_clients(tmp_path, case, test):
    if not test:
        case = {**case, **({"min_size": 8} if case["split"] == "dirichlet" else {})}
    clients = drawn(tmp_path, test=test, **case)
    assert [c.client_id for c in clients] == [f"client {i + 1}" for i in range(case["num_clients"])]
    seen = Counter(r["instruction"] for c in clients for r in (*c.train, *c.test))
    assert set(seen.values()) == {1}
    assert len(seen) == (150 if test else 100)
    again = drawn(tmp_path, test=test, **case)
    assert [c.train for c in again] == [c.train for c in clients]
    other = drawn(tmp_path, test=test, **case, split_seed=1)
    assert [c.train for c in other] != [c.train for c in clients]


def test_the_test_part_has_the_labels_of_the_training_part(tmp_path):
    for client in drawn(tmp_path, "pathological", num_clients=3, classes_per_client=1):
        assert {r["label"] for r in client.train} == {r["label"] for r in client.test}
        assert len({r["label"] for r in client.train}) == 1


def test_replacement_keeps_the_test_part_apart(tmp_path):
    clients = drawn(tmp_path, "dirichlet", test=False, num_clients=5, alpha=0.3, replace=True)
    trained = {r["instruction"] for c in clients for r in c.train}
    tested = {r["instruction"] for c in clients for r in c.test}
    assert not trained & tested
    assert {len(c.train) for c in clients} == {16}
    assert {len(c.test) for c in clients} == {4}
    assert all(len({r["instruction"] for r in c.train}) == 16 for c in clients)


REFUSED = {
    "more classes than there are": (
        {"split": "pathological", "num_clients": 2, "classes_per_client": 4},
        r"classes_per_client is 4; expected at most 3",
    ),
    "an alpha that leaves a client empty": (
        {"split": "dirichlet", "num_clients": 40, "alpha": 0.001},
        r"data\.alpha = 0\.001 leaves a client with no examples",
    ),
    "a client that nobody is": (
        {"split": "iid", "num_clients": 3, "clients": ("anna",)},
        "data.clients names 'anna'; the clients are 'client 1' to 'client 3'",
    ),
    "no number of clients": ({"split": "iid"}, "data.num_clients is 0"),
    "a number without a draw": ({"num_clients": 3}, 'data.split "column"; expected 0'),
    "no column of labels": (
        {"split": "dirichlet", "num_clients": 3, "label_by": ""},
        "data.label_by is empty",
    ),
    "a setting of another split": ({"split": "iid", "num_clients": 2, "alpha": 0.1}, "data.alpha is 0.1, which"),
    "a column that is not there": ({"split": "dirichlet", "num_clients": 2, "label_by": "kind"}, "no column 'kind'"),
    "files without files": ({"split": "files"}, "data.files names none"),
    "files that are dealt out": (
        {"split": "iid", "num_clients": 2, "train": "", "test": "", "files": {"a": "a.jsonl"}},
        "data.files has one for each client",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_a_sentence(tmp_path, case):
    settings, said = REFUSED[case]
    settings = {**write(tmp_path), **({"label_by": "label"} if settings.get("split") in SPLITS else {}), **settings}
    if settings.get("split") in ("iid", "files"):
        settings.pop("label_by", None)
    with pytest.raises(FlexError, match=said) as caught:
        read_clients(DataConfig(**settings))
    assert "\n" not in str(caught.value)


def test_a_test_file_that_is_the_training_file_is_refused(tmp_path):
    path = write(tmp_path)["train"]
    for case in ({"split": "iid", "num_clients": 5}, {"split": "dirichlet", "num_clients": 3, "label_by": "label"}):
        with pytest.raises(FlexError, match=r"all 100 examples of .* are trained on"):
            read_clients(DataConfig(train=path, test=path, **case))


def test_labels_that_nobody_trains_on_are_named(tmp_path):
    paths = write(tmp_path)
    with Path(paths["test"]).open("a") as file:
        file.write('{"instruction": "x", "response": "y", "label": "song"}\n')
    notes: list[str] = []
    config = DataConfig(**paths, split="pathological", label_by="label", num_clients=2, classes_per_client=1)
    read_clients(config, notes)
    assert any("label 'song', which nobody trains on" in note for note in notes)
    assert any("of 100 training records are no client's" in note for note in notes)


def test_the_table_counts_what_each_client_got(tmp_path):
    config = DataConfig(**write(tmp_path), split="dirichlet", label_by="label", num_clients=30, alpha=50.0)
    clients = read_clients(config)
    console = Console(width=120, file=(tmp_path / "out").open("w"))
    console.print(split_table(tally(clients, config)))
    console.file.close()
    lines = (tmp_path / "out").read_text().splitlines()
    first = next(line.split() for line in lines if line.strip().startswith("client 01"))
    counts = Counter(r["label"] for r in clients[0].train)
    wanted = [len(clients[0].train), len(clients[0].test), *(counts[label] for label in sorted(LABELS))]
    assert first[2:] == [str(number) for number in wanted]
    assert any("... 10 more" in line for line in lines)
    assert next(line.split() for line in lines if line.strip().startswith("all 30"))[2:] == [
        "100",
        "50",
        "10",
        "60",
        "30",
    ]


def test_a_run_on_a_drawn_split_shows_it_before_it_trains(tmp_path, capsys):
    config = tiny_config(tmp_path, train={"methods": ("fedavg",), "rounds": 1, "steps": 1}, evaluate={"rouge": False})
    words = ["train", "--model", config.model.path, "--data", config.data.train, "--test", config.data.test]
    words += ["--split", "dirichlet", "--label-by", "group", "--num-clients", "3", "--output", str(tmp_path / "out")]
    words += ["--methods", "fedavg", "--rounds", "1", "--set", "train.steps=1", "--set", "evaluate.rouge=false"]
    words += [
        "--set",
        "data.alpha=5",
        "--set",
        "data.template=chat",
        "--set",
        "data.max_length=64",
        "--set",
        "lora.rank=2",
    ]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert said.index("client 1") < said.index("ROUGE") if "ROUGE" in said else "client 1" in said
    assert "even" in said
    assert read_config(tmp_path / "out" / "config.toml").data.split == "dirichlet"
    assert {e["client_id"] for e in read_log(tmp_path / "out" / "metrics.jsonl") if e["event"] == "train"} == {
        "client 1",
        "client 2",
        "client 3",
    }
