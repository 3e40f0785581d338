"""Whose record is whose: every client's training and test records, by one of the ways of `SPLITS`: by a column of one
file, a file a client, or drawn from a seed.

Nothing here needs a tokenizer or a model: what is wrong with the data is found before either is loaded.
"""

import itertools
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from flex.config import DataConfig
from flex.data.mixtures import deal, dirichlet, iid, pathological, shuffled
from flex.data.records import Record, read_records, texts_of, unread_columns
from flex.data.splits import split_clients, split_held_out, split_validation
from flex.errors import FlexError, require

Parts = dict[str, list[Record]]  # records by client


@dataclass(frozen=True)
class ClientRecords:
    """One client's own records."""

    client_id: str
    train: list[Record]
    test: list[Record]
    validation: list[Record] = field(default_factory=list)  # of the training records, never trained on; mostly empty


def read_clients(config: DataConfig, notes: list[str] | None = None, seed: int = 0) -> list[ClientRecords]:
    """Every client's records, in the order that fixes the client's index for the whole run.

    Args:
        notes: takes what a person should know of the files, in sentences: columns that nobody reads, test examples that
            are trained on.
        seed: of the run; draws the validation part, if there is one.

    Raises:
        FlexError: a file or column is missing or not what it should be, two clients or two parts have one file, a
            client has nothing to train or to test on, or all that would be tested is trained on.
    """
    notes = [] if notes is None else notes
    train, test = SPLITS["files" if config.files else config.split](config, notes)
    clients, trained_on = [], 0
    for name, records in train.items():
        parts = (records, test.get(name, [])) if test else split_held_out(records, config.test_fraction, name)
        limits = (config.max_train, config.max_test)
        client = ClientRecords(
            name, *(part[:limit] if limit else part for part, limit in zip(parts, limits, strict=True))
        )
        for part, what in ((client.train, "train"), (client.test, "test")):
            if not part:
                raise FlexError(f"client {name!r} has no {what} examples; expected one or more, or no such client")
        if test and config.scored == "test":
            seen = _trained_on(client, notes)
            trained_on += seen
            if config.files and seen == len(client.test):
                raise FlexError(_all_trained_on(seen, config.test_files[name]))
        train_part, validation = split_validation(client.train, config.validation_fraction, name, seed)
        if config.scored == "validation":
            clients.append(ClientRecords(name, train_part, validation))
        else:
            clients.append(replace(client, train=train_part, validation=validation))
    if trained_on and trained_on == sum(len(client.test) for client in clients):
        raise FlexError(_all_trained_on(trained_on, config.test))
    return clients


def read_tests(
    path: str, config: DataConfig, clients: Sequence[str], client_id: str | None = None, notes: list[str] | None = None
) -> Parts:
    """Test records of a run's clients, without their training data.

    Args:
        path: a file with the column that names the client; with `client_id` also one without, all of it that client's.
        clients: of the run; others in the file are noted and left aside.

    Raises:
        FlexError: the file is missing, damaged or empty, says nothing of whose its records are, or has none of these
            clients.
    """
    named = client_id is None or any(config.clients_by in record for record in read_records(path, config.columns))
    if not named:
        return {client_id: read_records(path, config.columns)}
    records = read_records(path, config.columns, clients_by=config.clients_by)
    parts = split_clients(records, config.clients_by)
    wanted = list(clients) if client_id is None else [client_id]
    if others := [name for name in parts if name not in clients]:
        (notes if notes is not None else []).append(
            f"{path} has records of {', '.join(others)}, no clients of this run"
        )
    found = {name: parts[name] for name in wanted if name in parts}
    if not found:
        raise FlexError(
            f"{path} has no record of {', '.join(wanted)}; its {config.clients_by!r} names {', '.join(parts)}"
        )
    return found


def read_own_tests(config: DataConfig, clients: Sequence[str], notes: list[str]) -> Parts | None:
    """The run's own test records where its training data are gone and a test file is there; None otherwise."""
    files = {name: Path(path) for name, path in config.test_files.items() if name in clients}
    if config.files and files and all(path.exists() for path in files.values()):
        gone = [path for name, path in config.files.items() if name in clients and not Path(path).exists()]
        parts = {name: read_records(files[name], config.columns) for name in clients if name in files} if gone else None
    elif config.split == "column" and config.test and Path(config.test).exists() and not Path(config.train).exists():
        gone, parts = [config.train], read_tests(config.test, config, clients)
    else:
        return None
    if parts is None:
        return None
    notes.append(f"{gone[0]} is not there, so nothing says that the test examples are still those of the run")
    return {name: part[: config.max_test] if config.max_test else part for name, part in parts.items()}


def read_general(config: DataConfig) -> list[Record]:
    """The held-out set that belongs to nobody; empty where none is named."""
    return read_records(config.general, config.columns) if config.general else []


def _from_column(config: DataConfig, notes: list[str]) -> tuple[Parts, Parts]:
    """Both parts from a file each, by the column that names the client."""
    require(bool(config.train), "data.train is empty; expected a .jsonl or .jsonl.gz file (--data FILE)")
    needs = _needs(config)
    read = read_records(config.train, config.columns, clients_by=config.clients_by, needs=needs)
    _note_unread(config.train, read, [*needs, config.clients_by], notes)
    train = split_clients(read, config.clients_by, config.clients)
    if not config.test:
        return train, {}
    tests = read_records(config.test, config.columns, clients_by=config.clients_by, needs=needs)
    return train, split_clients(tests, config.clients_by)


def _from_files(config: DataConfig, notes: list[str]) -> tuple[Parts, Parts]:
    """Both parts from a file a client: all of a file is its client's."""
    for name in config.clients:
        require(name in config.files, f"data.clients names {name!r}; data.files has {', '.join(sorted(config.files))}")
    names = config.clients or sorted(config.files)
    for name in names if config.test_files else ():
        require(
            name in config.test_files,
            f"data.test_files has no file for {name!r}; expected one for every client, or none at all",
        )
    uses = [
        (Path(files[name]), f"{what} of {name!r}")
        for what, files in (("training data", config.files), ("test data", config.test_files))
        for name in names
        if name in files
    ]
    for (one, use), (other, again) in itertools.combinations(uses, 2):
        if one.exists() and other.exists() and os.path.samefile(one, other):
            raise FlexError(f"{other} is the {use} and the {again}; expected a file of its own for each")
    train, test = {}, {}
    for name in names:
        train[name] = read_records(config.files[name], config.columns, needs=_needs(config))
        _note_unread(config.files[name], train[name], _needs(config), notes)
        if config.test_files:
            test[name] = read_records(config.test_files[name], config.columns, needs=_needs(config))
    return train, test


def _drawn(config: DataConfig, notes: list[str]) -> tuple[Parts, Parts]:
    """Both parts dealt out by one mixture, which the training records decide."""
    require(bool(config.train), "data.train is empty; expected a .jsonl or .jsonl.gz file (--data FILE)")
    needs = _needs(config)
    train, test = read_records(config.train, config.columns, needs=needs), []
    _note_unread(config.train, train, needs, notes)
    if config.test:
        test = read_records(config.test, config.columns, needs=needs)
        own = {texts_of(record) for record in train}  # whoever is dealt them: what is shared has seen them
        if seen := sum(texts_of(record) in own for record in test):
            require(seen < len(test), _all_trained_on(seen, config.test))
            notes.append(f"{seen} of {len(test)} test examples are among the training examples")
    elif config.replace:  # before anything is dealt: what one client is tested on may be another's to train on
        train, test = split_held_out(train, config.test_fraction, "all clients")

    def labels(records: list[Record]) -> list[str]:
        return [str(record[config.label_by]) if config.label_by else "" for record in records]

    rng = random.Random(f"{config.split} {config.split_seed}")
    known = labels(train)
    if config.split == "iid":
        mixture = iid(known, config.num_clients)
    elif config.split == "pathological":
        mixture = pathological(known, config.num_clients, config.classes_per_client, rng)
    else:
        mixture = dirichlet(known, config.num_clients, config.alpha, config.min_size, config.replace, rng)
    if strangers := sorted(set(labels(test)) - set(known)) if config.label_by else []:
        notes.append(f"{config.test} has {config.label_by} {', '.join(map(repr, strangers))}, which nobody trains on")
    names = [f"client {number:0{len(str(config.num_clients))}d}" for number in range(1, config.num_clients + 1)]
    parts = []
    for records in (train, test):
        dealt = deal(labels(records), mixture, rng)
        parts.append({n: [records[i] for i in shuffled(own, rng)] for n, own in zip(names, dealt, strict=True)})
    if nobody := len(train) - len({id(record) for own in parts[0].values() for record in own}):
        notes.append(f"{nobody} of {len(train)} training records are no client's")
    for name in config.clients:
        require(name in names, f"data.clients names {name!r}; the clients are {names[0]!r} to {names[-1]!r}")
    chosen = config.clients or names
    return {n: parts[0][n] for n in chosen}, {n: parts[1][n] for n in chosen} if test else {}


SPLITS: dict[str, Callable[[DataConfig, list[str]], tuple[Parts, Parts]]] = {
    "column": _from_column,
    "files": _from_files,
    "iid": _drawn,
    "pathological": _drawn,
    "dirichlet": _drawn,
}


@dataclass(frozen=True)
class Tally:
    """What a client got: how many records of each part, and of its training records how many of each label."""

    client_id: str
    sizes: dict[str, int]
    labels: dict[str, int]


def tally(clients: Sequence[ClientRecords], config: DataConfig) -> list[Tally]:
    """One line a client; without labels where neither `label_by` nor `group_by` says what they are."""
    column = config.label_by or config.group_by
    found = []
    for client in clients:
        sizes = {"train": len(client.train), "test": len(client.test)}
        sizes |= {"validation": len(client.validation)} if client.validation else {}
        counts = Counter(str(r[column]) for r in client.train if r.get(column) is not None) if column else {}
        found.append(Tally(client.client_id, sizes, dict(counts)))
    return found


def _needs(config: DataConfig) -> list[str]:
    return list(dict.fromkeys(column for column in (config.group_by, config.label_by) if column))


def _note_unread(path: str, records: list[Record], read: list[str], notes: list[str]) -> None:
    if unread := unread_columns(records, read):
        notes.append(f"{path} has columns that nobody reads: {', '.join(map(repr, unread))}")


def _trained_on(client: ClientRecords, notes: list[str]) -> int:
    """How many test examples of a client it also trains on."""
    known = {texts_of(record) for record in client.train}
    seen = sum(texts_of(record) in known for record in client.test)
    if seen:
        which = f"{seen} of {len(client.test)} test examples of client {client.client_id!r}"
        notes.append(f"{which} are among its training examples")
    return seen


def _all_trained_on(count: int, path: str) -> str:
    return (
        f"all {count} examples of {path} are trained on; expected others in data.test, or data.test "
        "left out, so that a share of the training file is held out"
    )
