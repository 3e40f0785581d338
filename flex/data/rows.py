"""Rows of a data file, whatever its format, each with the place where it stands.

    JSON lines, JSON   one object a line, or one array of objects (also the default for endings nobody knows)
    .csv, .tsv         a line of column names, then one record a line; every value is text
    .parquet, a folder that `datasets` saved (`save_to_disk`): with the libraries of `pip install flex-moe[data]`

A text file may be packed (`.gz`).
"""

import csv
import gzip
import importlib
import itertools
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from flex.errors import FlexError, first_line

Row = tuple[Any, str]  # what stands there, and where: "x.jsonl, line 3"
FORMATS = "JSON lines (.jsonl, .jsonl.gz), .csv, .tsv, .parquet or a folder that `datasets` saved"
SEPARATORS = {".csv": ",", ".tsv": "\t"}


def read_rows(path: Path) -> Iterator[Row]:
    """Every row of a file, in order.

    Raises:
        FlexError: the file is missing or damaged, a library that its format needs is, or a row cannot be parsed.
    """
    if path.is_dir():
        yield from _saved_folder(path)
        return
    if not path.is_file():
        raise FlexError(f"no data file at {path}; expected {FORMATS}")
    packed = path.suffix.lower() == ".gz"
    ending = Path(path.stem if packed else path.name).suffix.lower()
    if ending == ".parquet":
        yield from _parquet(path)
        return
    separator = SEPARATORS.get(ending)
    kind, newline = ("JSON lines", None) if separator is None else (ending[1:].upper(), "")
    try:
        with (gzip.open if packed else open)(path, "rt", encoding="utf-8-sig", newline=newline) as file:
            yield from json_rows(file, path) if separator is None else _csv(file, path, separator)
    except (UnicodeDecodeError, EOFError, OSError, zlib.error, csv.Error) as error:
        raise FlexError(f"{path} cannot be read as {kind}: {error}") from None


def json_rows(file: TextIO, path: Path) -> Iterator[Row]:
    """Of every line, or of every entry where the whole file is one array."""
    lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
    start, first = next(lines, (1, ""))
    if first.lstrip().startswith("[") and _starts_array(first):
        for index, value in enumerate(_parsed(first + file.read(), str(path)), 1):
            yield value, f"{path}, entry {index}"
        return
    for number, line in itertools.chain([(start, first)] if first else [], lines):
        yield _parsed(line, f"{path}, line {number}"), f"{path}, line {number}"


def _starts_array(line: str) -> bool:
    """Whether a file that begins with this line is one array: it goes on past the line, or it holds objects."""
    try:
        return all(isinstance(value, dict) for value in json.loads(line))
    except ValueError:
        return True
    except RecursionError:
        return False


def _parsed(text: str, where: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise FlexError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise FlexError(f"{where} is not JSON that can be read: {error}") from None
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise FlexError(f"{where} holds half of a character (a \\ud… alone); expected whole ones") from None
    return value


def _csv(file: TextIO, path: Path, separator: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # a document may be longer than the 128 KiB that it begins with
    reader = csv.reader(file, delimiter=separator, strict=True)
    names = next(reader, [])
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if twice is not None:
        raise FlexError(f"{path}, line 1 names the column {twice!r} twice; expected each once")
    line = reader.line_num
    for values in reader:
        where, line = f"{path}, line {line + 1}", reader.line_num
        if values and len(values) != len(names):
            raise FlexError(f"{where} has {len(values)} values; expected {len(names)}, one for each column of line 1")
        if values:
            yield dict(zip(names, values, strict=True)), where


def _parquet(path: Path) -> Iterator[Row]:
    parquet = _library("pyarrow.parquet", path)
    try:
        with parquet.ParquetFile(path) as file:
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in file.iter_batches())
            for number, row in enumerate(rows, 1):
                yield row, f"{path}, row {number}"
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these two kinds
        raise FlexError(f"{path} cannot be read as Parquet: {first_line(error)}") from None


def _saved_folder(path: Path) -> Iterator[Row]:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(part.parent.name for part in path.glob("*/state.json"))
        raise FlexError(
            f"{path} holds several splits ({', '.join(splits)}); expected one: {path}/{(splits or ['train'])[0]}"
        )
    if not (path / "state.json").is_file():
        raise FlexError(f"{path} is a folder that `datasets` did not save (save_to_disk); expected {FORMATS}")
    datasets = _library("datasets", path)
    try:
        saved = datasets.load_from_disk(str(path))
        names = {name: kind for name, kind in saved.features.items() if isinstance(kind, datasets.ClassLabel)}
        for number, row in enumerate(saved, 1):
            yield {k: _label(names.get(k), v) for k, v in row.items()}, f"{path}, row {number}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FlexError(f"{path} cannot be read as a folder of `datasets`: {first_line(error)}") from None


def _label(kind: Any, value: Any) -> Any:
    """A class by its name; a folder of `datasets` keeps its number, and -1 for none."""
    if kind is None or value is None:
        return value
    return kind.int2str(value) if value >= 0 else None


def _library(name: str, path: Path) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise FlexError(
            f"{path} needs the library {name.partition('.')[0]}, which is not installed; "
            "expected `pip install flex-moe[data]`, or the data as JSON lines or CSV"
        ) from None
