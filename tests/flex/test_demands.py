"""What is wrong is said before the base is loaded, or right after; nothing has trained or been written then."""

import re

import pytest
from rich.console import Console
from tiny import records, tiny_config, write_records
from transformers import AutoTokenizer

from flex.errors import FlexError
from flex.runs import world
from flex.runs.run import run

QUIET = Console(quiet=True)


@pytest.fixture
def not_loaded(monkeypatch):
    """Whoever loads the base fails the test."""

    def load(*arguments):
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(world, "load_base", load)


def spoil_tokenizer(folder, **changes):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    (folder / "chat_template.jinja").unlink(missing_ok=True)  # one that is gone leaves its file behind
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"data": {"clients_by": "ward"}}, "line 1 has no column 'ward'"),
        ({"data": {"columns": {"instruction": "query"}}}, "has no column 'query', which data.columns names"),
        ({"data": {"train": "none.jsonl"}}, "no data file at none.jsonl"),
        ({"data": {"max_length": 16}}, "data.max_length is 16, and every answer of all 20 training examples is cut"),
        ({"graft": {"after_rounds": 2}}, "graft.after_rounds is 2, so that flex"),
    ],
)
@pytest.mark.usefixtures("not_loaded")
def test_data_and_settings_are_looked_at_before_the_base(tmp_path, sections, sentence):
    config = tiny_config(tmp_path)
    long = [{**record, "response": "cat " * 60} for client in "ab" for record in records(client, 10)]
    if sections.get("data", {}).get("max_length"):
        write_records(tmp_path / "data" / "train.jsonl", long)
    with pytest.raises(FlexError) as caught:
        run(config.with_values(**sections), QUIET)
    assert sentence in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("not_loaded")
def test_a_tokenizer_that_cannot_do_it_is_told_before_the_base(tmp_path):
    config = tiny_config(tmp_path)
    spoil_tokenizer(tmp_path / "model", chat_template=None)
    with pytest.raises(FlexError, match="the tokenizer has no chat template"):
        run(config, QUIET)
    spoil_tokenizer(tmp_path / "model", eos_token=None)
    with pytest.raises(FlexError, match="no end-of-sequence token"):
        run(config.with_values(data={"template": "auto"}), QUIET)


@pytest.mark.usefixtures("not_loaded")
def test_the_data_of_every_seed_is_looked_at_first(tmp_path):
    config = tiny_config(tmp_path, train={"seeds": (0, 1)})
    (tmp_path / "data" / "train-0.jsonl").write_bytes((tmp_path / "data" / "train.jsonl").read_bytes())
    with pytest.raises(FlexError, match=r"no data file at .*train-1.jsonl"):
        run(config.with_values(data={"train": str(tmp_path / "data" / "train-{seed}.jsonl")}), QUIET)


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"lora": {"targets": ("q_proj", "qkv")}}, "lora.targets names ['qkv'], which the model lacks"),
        ({"lora": {"rank": 64}}, "lora.rank is 64; expected at most 32"),
        ({"graft": {"width": 1000, "criterion": "neurons"}}, "graft.width is 1000; expected at most 96"),
        ({"train": {"clients_per_round": 3}}, "clients_per_round"),
    ],
)
def test_what_only_the_base_can_tell_is_told_right_after(tmp_path, sections, sentence):
    with pytest.raises(FlexError) as caught:
        run(tiny_config(tmp_path, **sections), QUIET)
    assert sentence in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_template_that_the_tokenizer_decides_is_told_and_written(tmp_path, capsys):
    config = tiny_config(tmp_path, train={"methods": ("base",)}, evaluate={"rouge": False})
    config = config.with_values(data={"template": "auto"})
    run(config, Console(width=200))
    said = 'note: data.template = "auto" stands for "chat": the tokenizer has a chat template'
    assert said in capsys.readouterr().out
    assert 'template = "chat"' in (tmp_path / "run" / "config.toml").read_text()
    assert '"template": "chat"' in (tmp_path / "run" / "metrics.jsonl").read_text()
    run(config, QUIET)  # and the same command resumes it


def test_examples_longer_than_the_base_was_made_for_are_noted(tmp_path):
    config = tiny_config(tmp_path).with_values(data={"max_length": 512})
    assert not world.load_world(config, 0).notes
    long = [{**record, "response": "cat " * 150} for record in records("a", 5)]
    write_records(tmp_path / "data" / "train.jsonl", [*long, *records("b", 5)])
    (note,) = world.load_world(config, 0).notes
    assert re.fullmatch(r"the longest example has 1\d\d tokens, but the base was made for 128; data.max_length.*", note)
