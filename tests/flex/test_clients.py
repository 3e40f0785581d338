"""Whose record is whose, from a file a client; the same data by a column gives the same clients."""

import os
import shutil

import pytest
from tiny import records, save_data, write_records

from flex.config import DataConfig, read_config, write_config
from flex.data.clients import read_clients
from flex.errors import FlexError


@pytest.fixture
def files(tmp_path):
    """(files, test_files) of the clients a and b, and one.jsonl with both."""
    save_data(tmp_path)
    parts = []
    for part, count, start in (("train", 10, 0), ("test", 6, 20)):
        paths = {c: write_records(tmp_path / f"{c}-{part}.jsonl", records(c, count, start)) for c in "ab"}
        parts.append({c: str(path) for c, path in paths.items()})
    return parts


def test_a_file_a_client_is_the_same_as_one_file_with_a_column(tmp_path, files):
    train, test = files
    columns = DataConfig(train=str(tmp_path / "train.jsonl"), test=str(tmp_path / "test.jsonl"))
    assert read_clients(DataConfig(files=train, test_files=test)) == read_clients(columns)
    # Held out by the client's name, the order by name too, and no column is asked for.
    one, other = (read_clients(DataConfig(files=own)) for own in (train, dict(reversed(train.items()))))
    assert one == other == read_clients(DataConfig(train=columns.train))
    (only,) = read_clients(DataConfig(files=train, clients=("b",)))
    assert (only.client_id, len(only.train), len(only.test)) == ("b", 8, 2)


def test_a_seed_in_a_clients_path_stands_for_its_number(files):
    config = DataConfig(files={"a": "a-{seed}.jsonl"}).for_seed(3)
    assert config.files == {"a": "a-3.jsonl"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"clients": ("c",)}, "data.clients names 'c'; data.files has a, b"),
        ({"test_files": {"a": "A"}}, "data.test_files has no file for 'b'; expected one for every client"),
        ({"files": {"a": "A", "b": "A"}}, "is the training data of 'a' and the training data of 'b'; expected a file"),
        ({"test_files": {"a": "A", "b": "B"}}, "is the training data of 'a' and the test data of 'a'"),
        ({"files": {"a": "A", "b": "link"}}, "is the training data of 'a' and the training data of 'b'"),
        ({"test_files": {"a": "copy", "b": "B-test"}}, "all 10 examples of "),
        ({"files": {"a": "A", "b": "none.jsonl"}}, "no data file at none.jsonl"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, files, change, sentence):
    train, test = files
    os.link(train["a"], tmp_path / "link.jsonl")
    shutil.copy(train["a"], tmp_path / "copy.jsonl")
    paths = {"A": train["a"], "B": train["b"], "B-test": test["b"]}
    paths |= {name: str(tmp_path / f"{name}.jsonl") for name in ("link", "copy")}
    values = {
        key: {name: paths.get(path, path) for name, path in value.items()} if isinstance(value, dict) else value
        for key, value in change.items()
    }
    with pytest.raises(FlexError) as caught:
        read_clients(DataConfig(**{"files": train, **values}))
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"files": {"a": "x"}, "train": "y"}, "data.train and data.files both name files; expected one of the two"),
        ({"files": {"a": "x"}, "test": "y"}, "data.test is one file, but data.files has one for each client"),
        ({"train": "y", "test_files": {"a": "x"}}, "data.test_files needs data.files"),
        ({"files": {"a": "x"}, "test_files": {"b": "y"}}, "data.test_files names ['b'], which data.files does not"),
        ({"files": {" ": "x"}}, "data.files has a file for ' '; expected the name of a client"),
        ({"files": {"a": ""}}, "data.files has an empty path for 'a'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, sentence):
    with pytest.raises(FlexError) as caught:
        DataConfig(**settings)
    assert sentence in str(caught.value)


def test_tables_of_files_and_columns_are_written_and_read_again(tmp_path):
    words = ['data.files={"site 1" = "a.jsonl", b = "b=1.jsonl"}', "data.columns.instruction=question"]
    config = read_config(None, words)
    assert config.data.files == {"site 1": "a.jsonl", "b": "b=1.jsonl"}
    assert config.data.columns == {"instruction": "question"}
    write_config(config, tmp_path / "config.toml")
    assert read_config(tmp_path / "config.toml") == config
    with pytest.raises(FlexError, match=r"data.files is 'x'; expected a table"):
        read_config(None, ["data.files=x"])
    with pytest.raises(FlexError, match=r"data.files.a is 3, an int; expected a str"):
        read_config(None, ["data.files={a = 3}"])
