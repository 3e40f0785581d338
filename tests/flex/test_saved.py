"""What a run saved answers and is scored, without the training data: files of prompts, standard input, talk."""

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from tiny import records, tiny_config, write_records

from flex.cli import main
from flex.commands import saved as saved_module
from flex.data.prompts import read_prompts
from flex.errors import FlexError
from flex.runs.run import run
from flex.store.events import AFTER, Evaluated
from flex.store.events import read_events as events_of

PROMPTS = ["which is larger , 3 or 4 ?", "which is larger , 30 or 14 ?", "which is larger , 5 or 5 ?"]
SHORT = ["--max-new-tokens", "3"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two clients whose training data are gone."""
    folder = tmp_path_factory.mktemp("saved")
    train = {"methods": ("fedavg", "flex"), "rounds": 2, "steps": 2, "graft_learning_rate": 0.05}
    run(tiny_config(folder, train=train), Console(quiet=True))
    (folder / "data" / "train.jsonl").rename(folder / "data" / "gone.jsonl")
    return folder


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every base that is loaded."""
    found: list[int] = []
    original = saved_module.load_bare_world
    monkeypatch.setattr(saved_module, "load_bare_world", lambda *a: found.append(1) or original(*a))
    return found


def ask(folder: Path, *words: str) -> int:
    return main(["generate", "--run", str(folder / "run"), "--client", "a", *SHORT, *words])


def one_by_one(folder: Path, capsys: pytest.CaptureFixture[str], prompts: list[str]) -> list[str]:
    answers = []
    for prompt in prompts:
        assert ask(folder, "--prompt", prompt) == 0
        answers.append(capsys.readouterr().out.removesuffix("\n"))
    return answers


@pytest.mark.parametrize("form", ["text", "rows", "data", "stdin"])
def test_a_file_of_prompts_gets_the_answers_of_the_single_ones(
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    loads: list[int],
    form: str,
) -> None:
    wanted = one_by_one(finished, capsys, PROMPTS)
    loads.clear()
    path = tmp_path / ("prompts.txt" if form == "text" else "prompts.jsonl")
    rows = [{"instruction": prompt, "id": index} for index, prompt in enumerate(PROMPTS)]
    if form == "rows":
        write_records(path, rows)
    elif form == "data":
        write_records(path, [{**row, "context": "", "response": "secret"} for row in rows])
    else:
        path.write_text("\n\n".join(PROMPTS) + "\n")
    if form == "stdin":
        monkeypatch.setattr("sys.stdin", io.StringIO(path.read_text()))
    given = "-" if form == "stdin" else str(path)
    assert ask(finished, "--prompts", given, "--batch-size", "2") == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["response"] for answer in answers] == wanted
    assert [answer["instruction"] for answer in answers] == PROMPTS
    if form in ("rows", "data"):
        assert [answer["id"] for answer in answers] == [0, 1, 2]
    assert len(loads) == 1


def test_a_conversation_in_a_row_is_answered_with_what_came_before(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": role, "content": f"{number} kg"} for number, role in enumerate(("user", "assistant", "user"))]
    answered = [*turns, {"role": "assistant", "content": "secret"}]
    write_records(tmp_path / "p.jsonl", [{"messages": turns}, {"messages": answered}, {"messages": turns[2:]}])
    assert ask(finished, "--prompts", str(tmp_path / "p.jsonl")) == 0
    first, second, alone = (json.loads(line)["messages"] for line in capsys.readouterr().out.splitlines())
    assert first == second
    assert first[:3] == turns
    assert first[3]["role"] == "assistant"
    assert alone[-1]["role"] == "assistant"
    assert len(alone) == 2


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "holds no prompts; expected one or more, one a line"),
        (" \n\n", "holds no prompts"),
        ('{"response": "x"}\n', "line 1 asks nothing; expected 'instruction' or 'messages', it has 'response'"),
        ('{"instruction": "x"}\n{oops\n', "line 2 is not JSON"),
        ('{"instruction": "x", "context": 3}\n', "line 1 has a context that is no string"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}\n', "line 1 has turns of nobody; expected user and"),
        ('{"messages": ["x"]}\n', "line 1 has messages that are no turns"),
    ],
)
def test_prompts_that_cannot_be_read_get_one_sentence_before_the_model_is_loaded(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], loads: list[int], text: str, sentence: str
) -> None:
    (tmp_path / "p").write_text(text)
    assert ask(finished, "--prompts", str(tmp_path / "p")) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert loads == []


def test_prompts_and_options_that_do_not_fit_are_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(finished, "--prompts", "nowhere.txt") == 2
    assert "no data file at nowhere.txt" in capsys.readouterr().err
    assert ask(finished, "--prompts", "x", "--context", "y") == 2
    assert "--context goes with --prompt" in capsys.readouterr().err
    assert ask(finished, "--prompts", "x", "--batch-size", "0") == 2
    assert "--batch-size is 0; expected 1 or more" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        ask(finished)


def test_text_that_begins_like_json_is_text(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("[INST] hello [/INST]\n{x} is what?\n")
    assert [p.turns[0]["content"] for p in read_prompts(str(tmp_path / "p.txt"))] == [
        "[INST] hello [/INST]",
        "{x} is what?",
    ]
    (tmp_path / "p.json").write_text('[\n{"question": "x"},\n"y"]')
    (first, second) = read_prompts(str(tmp_path / "p.json"), {"instruction": "question"})
    assert [first.turns[0]["content"], second.turns[0]["content"]] == ["x", "y"]


def test_chat_answers_line_by_line_with_the_conversation_so_far(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, loads: list[int]
) -> None:
    def talk(text: str, *words: str) -> list[str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert main(["chat", "--run", str(finished / "run"), "--client", "a", *SHORT, *words]) == 0
        return capsys.readouterr().out.splitlines()

    alone = one_by_one(finished, capsys, PROMPTS[:2])
    loads.clear()
    fresh = talk(f"{PROMPTS[0]}\n\n/new\n{PROMPTS[1]}\n/quit\n{PROMPTS[2]}\n")
    assert [line.strip() for line in fresh] == alone
    assert len(loads) == 1
    seen = []
    original = saved_module.Saved.answers
    monkeypatch.setattr(
        saved_module.Saved, "answers", lambda s, c, ids, *a: seen.append(ids[0]) or original(s, c, ids, *a)
    )
    talk(f"{PROMPTS[0]}\n{PROMPTS[1]}\n")
    assert len(seen[1]) > len(seen[0]) + 5
    assert seen[1][: len(seen[0])] == seen[0]  # what was asked and answered stands in front
    # 128 positions: the oldest exchanges leave when there is no more room, and a turn too long is not taken.
    seen.clear()
    talk("\n".join([PROMPTS[0]] * 12) + "\n")
    assert max(map(len, seen)) + 3 <= 128
    assert len(seen) == 12
    monkeypatch.setattr("sys.stdin", io.StringIO("3 " * 200 + "\n" + PROMPTS[0] + "\n"))
    assert main(["chat", "--run", str(finished / "run"), "--client", "a", *SHORT]) == 0
    came = capsys.readouterr()
    assert "and the model has room for 128, an answer of 3 included" in came.err
    assert [line.strip() for line in came.out.splitlines()] == alone[:1]


def losses(printed: str) -> dict[str, float]:
    """Of the first table; a later one says what the layers do."""
    first = printed.partition("mean over the layers")[0]
    rows = [line.replace("│", " ").split() for line in first.splitlines() if line.startswith("│")]
    return {row[0]: float(row[2]) for row in rows}


def test_eval_needs_no_training_data(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    score = ["eval", "--run", str(finished / "run")]
    events = events_of(finished / "run" / "flex-seed0" / "metrics.jsonl")
    last = [e for e in events if isinstance(e, Evaluated) and (e.when, e.split, e.round) == (AFTER, "test", 2)]
    told = {e.client_id: pytest.approx(e.loss, abs=6e-4) for e in last}
    assert main(score) == 0  # the run's own test file is there
    printed = capsys.readouterr().out
    assert losses(printed) == told
    assert "so nothing says that the test examples are still those of the run" in printed
    test = finished / "data" / "test.jsonl"
    assert main([*score, "--test", str(test)]) == 0
    printed = capsys.readouterr().out
    assert losses(printed) == told
    assert "test.jsonl" in printed
    write_records(tmp_path / "mine.jsonl", [{k: v for k, v in r.items() if k != "client"} for r in records("b", 5)])
    assert main([*score, "--test", str(tmp_path / "mine.jsonl"), "--client", "b"]) == 0
    assert losses(capsys.readouterr().out).keys() == {"b"}
    write_records(tmp_path / "more.jsonl", [*records("a", 2), *records("z", 2)])
    assert main([*score, "--test", str(tmp_path / "more.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert losses(printed).keys() == {"a"}
    assert "has records of z, no clients of this run" in printed


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--test", "nowhere.jsonl"], "no data file at nowhere.jsonl"),
        (["--test", "BARE"], "has no column 'client'"),
        (["--test", "OTHERS"], "has no record of a, b; its 'client' names z"),
        (["--test", "OTHERS", "--client", "b"], "has no record of b; its 'client' names z"),
        (["--test", "OTHERS", "--client", "q"], "no client 'q' in this run; its clients are a, b"),
    ],
)
def test_a_test_file_that_does_not_fit_is_refused_before_the_model_is_loaded(
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    loads: list[int],
    words: list[str],
    sentence: str,
) -> None:
    bare = write_records(tmp_path / "bare.jsonl", [{"instruction": "x", "response": "y"}])
    others = write_records(tmp_path / "others.jsonl", records("z", 2))
    words = [{"BARE": str(bare), "OTHERS": str(others)}.get(word, word) for word in words]
    assert main(["eval", "--run", str(finished / "run"), *words]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert loads == []


def test_without_any_data_eval_says_what_is_missing(finished: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    config = tmp_path / "copy" / "run" / "config.toml"
    config.write_text(config.read_text().replace(str(finished / "data"), str(tmp_path / "nowhere")))
    assert main(["eval", "--run", str(tmp_path / "copy" / "run")]) == 2
    said = capsys.readouterr().err
    assert "train.jsonl is not there, nor a test file of the run; expected them, or --test FILE" in said
    with pytest.raises(FlexError, match="no data file at"):
        read_prompts(str(tmp_path / "nowhere"))
