"""How records are divided: by client, and into training and test parts."""

import random
from collections import Counter
from collections.abc import Sequence

from flex.data.records import Record, texts_of
from flex.errors import FlexError


def split_clients(records: list[Record], column: str, chosen: Sequence[str] = ()) -> dict[str, list[Record]]:
    """Records by the value of `column`, in the order of `chosen`, or of the values' names where nothing is chosen."""
    clients: dict[str, list[Record]] = {}
    for record in records:
        clients.setdefault(str(record[column]), []).append(record)
    for name in chosen:
        if name not in clients:
            raise FlexError(f"no record has {column} = {name!r}; the values are {', '.join(sorted(clients))}")
    return {name: clients[name] for name in (chosen or sorted(clients))}


def split_held_out(records: list[Record], fraction: float, name: str) -> tuple[list[Record], list[Record]]:
    """(train, test), by a shuffle that depends on the client's name alone: every method and seed tests on the same."""
    order = list(range(len(records)))
    random.Random(f"held out {name}").shuffle(order)
    cut = max(1, round(len(records) * fraction))
    return [records[i] for i in sorted(order[cut:])], [records[i] for i in sorted(order[:cut])]


def split_validation(records: list[Record], fraction: float, name: str, seed: int) -> tuple[list[Record], list[Record]]:
    """(train, validation) of a client's training records, by a shuffle that depends on its name and the run's seed
    alone: every method chooses by the same ones. Records of the same texts stay together: none is on both
    sides.

    Args:
        fraction: of the records, rounded, one at least; 0: no validation part.

    Raises:
        FlexError: nothing would be left to train on.
    """
    if not fraction:
        return records, []
    order = list(dict.fromkeys(texts_of(record) for record in records))
    random.Random(f"validation {seed} {name}").shuffle(order)
    wanted, chosen = max(1, round(len(records) * fraction)), set()
    sizes = Counter(texts_of(record) for record in records)
    for one in order[:-1]:
        if wanted <= 0:
            break
        chosen.add(one)
        wanted -= sizes[one]
    if not chosen:
        raise FlexError(
            f"client {name!r} has too few training examples ({len(records)}, {len(order)} of them different) to keep "
            "any for validation; expected two or more, or data.validation_fraction = 0"
        )
    return [r for r in records if texts_of(r) not in chosen], [r for r in records if texts_of(r) in chosen]
