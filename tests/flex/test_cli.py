"""The command line: what its options mean, what it prints of names from outside, what Ctrl-C is told."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from tiny import tiny_config

from flex.cli import main
from flex.commands import graft, saved, train
from flex.config import RunConfig, read_config, write_config
from tools.pretrain import pretrain

NASTY = "x [/nope] :car:"


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The runs that `flex train` would have begun."""
    runs: list[RunConfig] = []

    def begin(path: Path | None, overrides: list[str]) -> int:
        runs.append(read_config(path, overrides))
        return 0

    monkeypatch.setattr(train, "train", begin)
    return runs


@pytest.mark.parametrize("text", ["2024-11-26", "7", "true", "[x]", "'a'", '"', "a = b", "😀", " x\\", "\x7f"])
def test_named_options_are_texts_as_they_stand(trained: list[RunConfig], text: str) -> None:
    options = ["--output", text, "--model", text, "--data", text, "--test", text, "--clients-by", text]
    assert main(["train", *options, "--clients", text, "0"]) == 0
    (config,) = trained
    data = config.data
    assert {config.output, config.model.path, data.train, data.test, data.clients_by} == {text}
    assert data.clients == (text, "0")


def test_set_has_the_last_word(trained: list[RunConfig]) -> None:
    assert main(["train", "--model", "one", "--set", "model.path=two", "--set", "train.rounds=3"]) == 0
    assert (trained[0].model.path, trained[0].train.rounds) == ("two", 3)


def test_lists_may_be_written_with_commas(trained: list[RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--methods", "fedavg,flex", "base", "--seeds", "0,1", "2", "--rounds", "7", "--strategy", "fedadam"]
    assert main(["train", *words]) == 0
    config = trained[0]
    assert config.train.methods == ("fedavg", "flex", "base")
    assert (config.train.seeds, config.train.rounds, config.strategy.name) == ((0, 1, 2), 7, "fedadam")
    assert main(["train", "--seeds", "0,x"]) == 2
    assert capsys.readouterr().err == "flex: --seeds got 'x'; expected whole numbers\n"


def test_another_column_frees_a_configurations_clients(trained: list[RunConfig], tmp_path: Path) -> None:
    write_config(RunConfig().with_values(data={"clients_by": "category", "clients": ("x", "y")}), tmp_path / "c.toml")
    for words, clients in (
        ([], ("x", "y")),
        (["--clients-by", "site"], ()),
        (["--clients-by", "site", "--clients", "z"], ("z",)),
    ):
        assert main(["train", str(tmp_path / "c.toml"), *words]) == 0
        assert trained.pop().data.clients == clients


def test_a_configuration_after_the_clients_is_told_where_to_stand(
    trained: list[RunConfig], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["train", "--clients", "a", "b", "c.toml"]) == 2
    assert capsys.readouterr().err == (
        "flex: --clients took 'c.toml' for a client; expected the configuration before the options: "
        "flex train c.toml --clients ...\n"
    )
    assert trained == []
    write_config(RunConfig(), tmp_path / "c.toml")
    assert main(["train", str(tmp_path / "c.toml"), "--clients", "b.toml"]) == 0
    assert trained[0].data.clients == ("b.toml",)


def test_a_file_a_client_and_columns_by_option(trained: list[RunConfig], tmp_path: Path) -> None:
    there = RunConfig().with_values(data={"train": "t", "test": "u", "clients": ("x",), "clients_by": "category"})
    write_config(there, tmp_path / "c.toml")
    words = ["--data", "site1=a.jsonl", "s 2=b=1.jsonl", "--test", "site1=c.jsonl", "s 2=d.jsonl"]
    words += ["--columns", "instruction=question", "response=answer"]
    for order in ([str(tmp_path / "c.toml"), *words], [*words, str(tmp_path / "c.toml")]):
        assert main(["train", *order]) == 0
        data = trained.pop().data
        assert (data.train, data.test, data.clients) == ("", "", ())
        assert data.files == {"site1": "a.jsonl", "s 2": "b=1.jsonl"}
        assert data.test_files == {"site1": "c.jsonl", "s 2": "d.jsonl"}
        assert data.columns == {"instruction": "question", "response": "answer"}
    (tmp_path / "one=1.jsonl").touch()
    for path, files in ((tmp_path / "one=1.jsonl", {}), (tmp_path / "c.toml", {})):
        assert main(["train", "--data", str(path)]) == 0
        assert trained.pop().data.files == files
    assert main(["train", "--data", f"site={tmp_path / 'c.toml'}"]) == 0
    assert trained.pop().data.files == {"site": str(tmp_path / "c.toml")}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--data", "a=x", "a=y"], "--data names 'a' twice; expected each once"),
        (["--data", "a=x", "y"], "--data got 'y'; expected NAME=FILE for each client"),
        (["--test", "a=x", "=y"], "--test got '=y'; expected NAME=FILE for each client"),
        (["--columns", "question"], "--columns got 'question'; expected OURS=THEIRS"),
        (["--columns", "prompt=question"], "data.columns names 'prompt', which no example has"),
        (["--data", "a=x", "b=y", "--clients-by", "z"], "--clients-by names a column, but --data has a file for each"),
    ],
)
def test_files_and_columns_that_cannot_be_read_so_are_refused(
    trained: list[RunConfig], capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert main(["train", *words]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--version"], "flex 0."),
        (["--help"], "flex graft --model"),
        (["train", "--help"], "model.path"),
        (["train", "--help"], "flex/config.py lists the settings"),
    ],
)
def test_help(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    assert says in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "function", "goes_on"),
    [
        (["train", "--output", "x"], train.train, True),
        (["demo"], train.demo, True),
        (["graft"], graft.graft, False),
        (["eval", "--run", "x"], saved.evaluate, False),
        (["generate", "--run", "x", "--client", "a", "--prompt", "x"], saved.generate, False),
    ],
)
def test_an_interrupted_command_goes_on_only_where_it_does(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    function: Callable[..., int],
    goes_on: bool,
) -> None:
    monkeypatch.setattr(sys.modules[function.__module__], function.__name__, interrupted)
    assert main(arguments) == 130
    said = "; the same command goes on where the last round ended" if goes_on else ""
    assert capsys.readouterr().err == f"flex: interrupted{said}\n"


def test_an_interrupted_pretraining_says_that_nothing_has_changed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(pretrain, "run", interrupted)
    assert pretrain.main(["--out", str(tmp_path / "base")]) == 130
    assert capsys.readouterr().err == f"pretrain: interrupted; {tmp_path / 'base'} is as it was\n"


@pytest.mark.parametrize(
    ("option", "value"), [("threads", "-1"), ("balance", "-0.5"), ("weight-decay", "nan"), ("learning-rate", "inf")]
)
def test_pretraining_takes_numbers_that_can_be_used(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, option: str, value: str
) -> None:
    assert pretrain.main(["--out", str(tmp_path / "base"), f"--{option}", value]) == 2
    assert f"pretrain: --{option} is {value}; expected a finite number " in capsys.readouterr().err


def interrupted(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_names_from_outside_are_printed_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved, "console", Console(width=200))
    config = tiny_config(tmp_path, train={"rounds": 1, "steps": 1, "batch_size": 2, "methods": ("base",)})
    for part in ("train", "test"):
        path = tmp_path / "data" / f"{part}.jsonl"
        path.write_text(path.read_text().replace('"client": "a"', f'"client": "{NASTY}"'))
    write_config(config, tmp_path / "c.toml")
    folder = tmp_path / "[red]x" / ("long name " * 20)
    assert main(["train", str(tmp_path / "c.toml"), "--output", str(folder), "--set", "evaluate.rouge=false"]) == 0
    assert f"report: {folder}{os.sep}report.html\n" in capsys.readouterr().out
    assert main(["eval", "--run", str(folder), "--method", "base"]) == 0
    assert NASTY in capsys.readouterr().out
    (folder / "data-seed3").mkdir()
    assert main(["eval", "--run", str(folder)]) == 2
    assert capsys.readouterr().err == f"flex: {folder} has no job flex-seed0; it has base-seed0\n"


def test_an_answer_has_a_token_at_least(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for count in ("0", "-3"):
        answer = ["--client", "a", "--prompt", "x", "--max-new-tokens", count]
        assert main(["generate", "--run", str(tmp_path), *answer]) == 2
        assert capsys.readouterr().err == f"flex: --max-new-tokens is {count}; expected 1 or more\n"
