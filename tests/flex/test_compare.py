"""Several runs on one page, and the numbers of one as a table."""

import csv
import json
import re
from pathlib import Path

import pytest
from synthetic_run import scored, synthetic_events, typed, write_run

from flex.cli import main
from flex.errors import FlexError
from flex.report import compare, summarise
from flex.report.flat import COLUMNS, flat_rows

HEADER = {"event": "run", "title": "x", "data": {str(seed): f"data {seed}" for seed in range(8)}}


def make(folder: Path, exact: list[float], settings: str = "", data: dict | None = None) -> Path:
    events = scored("flex", exact) + scored("fedavg", [0.3 + 0.001 * i for i in range(len(exact))])
    write_run(folder, [HEADER | ({"data": data} if data else {}), *events])
    (folder / "config.toml").write_text(settings)
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    one = make(tmp_path / "one", [0.5 + 0.001 * i for i in range(8)], "[train]\nrounds = 3\nseeds = [0]\n")
    two = make(tmp_path / "two_&", [0.6 + 0.002 * i for i in range(8)], "[train]\nrounds = 5\nseeds = [1]\n")
    return [one, two]


def test_one_page_has_the_scores_the_settings_and_the_differences(runs, tmp_path, capsys):
    words = ["compare", *map(str, runs), "--to", str(tmp_path / "page.html")]
    words += ["--csv", str(tmp_path / "all.csv"), "--latex", str(tmp_path / "table.tex")]
    assert main(words) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / n) for n in ("page.html", "all.csv", "table.tex")]
    text = (tmp_path / "page.html").read_text()
    assert "<script" not in text
    assert not re.search(r'(?:src|href)="http', text)
    assert "two_&amp;" in text
    assert "train.rounds" in text
    assert "train.seeds" not in text
    assert "+10.3" in text  # FLEx of the second minus that of the first
    assert '<span class="better">better</span>' in text
    rows = list(csv.DictReader((tmp_path / "all.csv").read_text().splitlines()))
    assert {row["run"] for row in rows} == {"one", "two_&"}
    table = (tmp_path / "table.tex").read_text()
    assert "two\\_\\&" in table
    assert "\\textbf{60.7}" in table
    assert table.count("\\\\") == 1 + 4


def test_the_difference_is_of_pairs_with_the_same_data(runs, tmp_path):
    other = make(tmp_path / "three", [0.9] * 8, data={str(seed): "other" for seed in range(8)})
    found = compare.load([runs[0], runs[1], other])
    pairs = compare.paired_with_first(found, compare.measures(found)[0])
    assert {(name, label) for name, label, _ in pairs} == {("two_&", "FLEx"), ("two_&", "FedAvg")}
    by_label = {label: diff for _, label, diff in pairs}
    assert by_label["FLEx"].mean == pytest.approx(0.1 + 0.001 * 3.5)
    assert by_label["FLEx"].verdict == "better"
    assert by_label["FedAvg"].mean == pytest.approx(0)
    assert by_label["FedAvg"].verdict == "unsettled"
    assert by_label["FLEx"].p == pytest.approx(2 * 2 / 2**8)  # Holm over two
    assert "can be paired" in compare.page([found[0], found[2]])


def test_runs_that_cannot_be_compared_are_refused(runs, tmp_path):
    for folders, said in (
        (runs[:1], "compare got 1 run; expected two or more"),
        ([runs[0], runs[0]], "twice; expected each run once"),
        ([runs[0], tmp_path / "nothing"], "no metrics.jsonl in"),
    ):
        with pytest.raises(FlexError, match=said):
            compare.load(folders)


def test_names_are_paths_where_two_folders_have_one_name(runs, tmp_path):
    again = make(tmp_path / "deeper" / "one", [0.1, 0.2])
    assert [run.name for run in compare.load([runs[0], again])] == [str(runs[0]), str(again)]


def test_unfinished_and_old_runs_are_shown(tmp_path):
    events = synthetic_events(seeds=(0,), rouge=True)
    cut = [e for e in events if not (e.get("method") == "flex" and e["event"] in ("evaluate", "done"))]
    found = compare.load([write_run(tmp_path / "a", events), write_run(tmp_path / "b", cut)])
    assert "unfinished" in compare.page(found)
    assert compare.settings_that_differ(found) == []


def test_csv_of_a_run(tmp_path, capsys):
    folder = make(tmp_path / "run", [0.5 + 0.001 * i for i in range(8)])
    assert main(["report", "--run", str(folder), "--csv", str(tmp_path / "run.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "run.csv").read_text().splitlines()))
    assert tuple(rows[0]) == COLUMNS
    exact = {row["method"]: row for row in rows if row["measure"] == "exact_match"}
    assert float(exact["flex"]["mean"]) == pytest.approx(0.5035)
    assert exact["flex"]["p"] == ""
    assert float(exact["fedavg"]["main_minus_this"]) == pytest.approx(0.2)
    assert float(exact["fedavg"]["p_holm"]) == pytest.approx(2 / 2**8)
    assert exact["fedavg"]["verdict"] == "better"
    assert (exact["fedavg"]["seeds"], exact["fedavg"]["main_ahead_in_seeds"]) == ("0 1 2 3 4 5 6 7", "8/8")
    assert main(["report", "--run", str(folder), "--csv", str(tmp_path / "run.csv" / "x")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_csv_says_the_learning_rates(tmp_path):
    events = [json.loads(json.dumps(e)) for e in synthetic_events(methods=("flex",), seeds=(0,))]
    for event in events:
        if event["event"] == "job":
            event["learning_rates"] = {"learning_rate": 0.003, "graft_learning_rate": 0.001}
    rows = flat_rows(summarise(typed(events)))
    assert {(row["learning_rate"], row["graft_learning_rate"]) for row in rows} == {(0.003, 0.001)}


@pytest.mark.parametrize(
    ("words", "said"), [(["--num-seeds", "0"], "1 or more"), (["--num-seeds", "2", "--seeds", "1"], "one of the two")]
)
def test_numbers_of_seeds_that_make_no_sense(words, said, capsys):
    assert main(["train", "--model", "x", *words]) == 2
    assert said in capsys.readouterr().err
