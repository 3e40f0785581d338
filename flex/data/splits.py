"""How records are divided: by client, and into training and test parts."""

import random
from collections.abc import Sequence

from flex.data.records import Record
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
