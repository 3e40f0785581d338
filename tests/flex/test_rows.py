"""The formats a data file may have: the same records from each, and what a broken one is told."""

import gzip
import json
import sys

import pytest
from tiny import records, write_records

from flex.data.records import read_records
from flex.errors import FlexError

ROWS = records("a", 5)


def write_csv(path, rows, separator=","):
    def cell(value):
        return '"' + str(value).replace('"', '""') + '"'

    lines = [separator.join(rows[0]), *(separator.join(map(cell, row.values())) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_csv_and_tsv_give_the_records_of_json_lines(tmp_path):
    expected = read_records(write_records(tmp_path / "x.jsonl", ROWS), clients_by="client")
    plain = write_csv(tmp_path / "x.csv", ROWS)
    packed = tmp_path / "y.csv.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for path in (plain, packed, write_csv(tmp_path / "x.tsv", ROWS, "\t")):
        assert read_records(path, clients_by="client") == expected


def test_a_long_text_with_lines_and_quotes_stays_whole(tmp_path):
    rows = [{"instruction": 'say "x",\nthen y', "response": "word " * 40_000}]
    (record,) = read_records(write_csv(tmp_path / "x.csv", rows))
    assert record == {**rows[0]}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("instruction,response\na,b\nc\n", "x.csv, line 3 has 1 values; expected 2, one for each column of line 1"),
        ('instruction,response\n"a\nb",c\n1,2,3\n', "x.csv, line 4 has 3 values"),
        ("instruction,response,response\n", "x.csv, line 1 names the column 'response' twice"),
        ('instruction,response\n"a,b\n', "x.csv cannot be read as CSV: unexpected end of data"),
        ("", "x.csv holds no records"),
        ("instruction,response\n", "x.csv holds no records"),
        ("question,answer\na,b\n", "x.csv, line 2 has no column 'instruction'; it has 'question', 'answer'"),
    ],
)
def test_a_broken_csv_gets_one_sentence(tmp_path, content, sentence):
    (tmp_path / "x.csv").write_text(content)
    with pytest.raises(FlexError) as caught:
        read_records(tmp_path / "x.csv")
    assert sentence in str(caught.value)


def test_a_folder_that_nobody_saved_is_refused(tmp_path):
    with pytest.raises(FlexError, match="is a folder that `datasets` did not save"):
        read_records(tmp_path)


def test_without_the_library_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    for name, library in (("x.parquet", "pyarrow"), ("saved", "datasets")):
        with pytest.raises(FlexError) as caught:
            read_records(tmp_path / name)
        assert str(caught.value) == (
            f"{tmp_path / name} needs the library {library}, which is not installed; expected "
            "`pip install flex-moe[data]`, or the data as JSON lines or CSV"
        )


def test_parquet_and_a_saved_folder_give_the_records_of_json_lines(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs flex-moe[data]")
    expected = read_records(write_records(tmp_path / "x.jsonl", ROWS), clients_by="client")
    saved = datasets.Dataset.from_list(ROWS)
    saved.to_parquet(str(tmp_path / "x.parquet"))
    saved.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(str(tmp_path / "both"))
    for name in ("x.parquet", "saved", "both/train"):
        found = read_records(tmp_path / name, clients_by="client")
        assert found == expected
        assert found[2].where == f"{tmp_path / name}, row 3"
    with pytest.raises(FlexError, match=r"both holds several splits \(test, train\); expected one: .*both/test"):
        read_records(tmp_path / "both")


def test_a_class_of_a_saved_folder_is_its_name_and_conversations_are_read(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs flex-moe[data]")
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    saved = datasets.Dataset.from_list([{"messages": turns, "ward": index} for index in (1, 0)])
    saved = saved.cast_column("ward", datasets.ClassLabel(names=["north", "south"]))
    saved.save_to_disk(str(tmp_path / "saved"))
    found = read_records(tmp_path / "saved", clients_by="ward")
    assert found == [{"messages": turns, "ward": "south"}, {"messages": turns, "ward": "north"}]


def test_a_damaged_parquet_file_gets_one_sentence(tmp_path):
    pytest.importorskip("pyarrow", reason="needs flex-moe[data]")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(FlexError, match=r"x.parquet cannot be read as Parquet"):
        read_records(tmp_path / "x.parquet")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text(json.dumps({"x": 1}))
    with pytest.raises(FlexError, match="cannot be read as a folder of `datasets`"):
        read_records(tmp_path / "saved")
