"""The table of who got what, which stands in the terminal before anything trains."""

import statistics
from collections import Counter
from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from flex.data.clients import Tally

MOST_CLIENTS, MOST_LABELS = 20, 8  # shown one by one; the rest is summed up


def split_table(tallies: Sequence[Tally]) -> Table:
    """Clients x sizes and training records of each label; the most frequent labels have columns of their own."""
    parts = list(dict.fromkeys(part for tally in tallies for part in tally.sizes))
    whole = Counter()
    for tally in tallies:
        whole.update(tally.labels)
    labels = sorted(name for name, _ in whole.most_common(MOST_LABELS))
    others = len(whole) - len(labels)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, caption_justify="left", caption_style="dim")
    heads = [*parts, *labels, *([f"{others} others"] if others else [])]
    table.add_column("client", no_wrap=True)
    for head in heads:
        table.add_column(Text(head.replace("_", " ")), justify="right")

    def row(name: str, sizes: dict[str, int], counts: dict[str, int]) -> None:
        cells = [sizes.get(part, 0) for part in parts] + [counts.get(label, 0) for label in labels]
        cells += [sum(counts.values()) - sum(counts.get(label, 0) for label in labels)] if others else []
        table.add_row(Text(name), *map(str, cells))

    for tally in tallies[:MOST_CLIENTS]:
        row(tally.client_id, tally.sizes, tally.labels)
    if len(tallies) > MOST_CLIENTS:
        table.add_row(Text(f"... {len(tallies) - MOST_CLIENTS} more"))
    if len(tallies) > 1:
        table.add_section()
        row(f"all {len(tallies)}", {part: sum(t.sizes.get(part, 0) for t in tallies) for part in parts}, whole)
        sizes = [tally.sizes["train"] for tally in tallies]
        table.caption = f"training records a client: {min(sizes)} to {max(sizes)}, median {statistics.median(sizes):g}"
    return table
