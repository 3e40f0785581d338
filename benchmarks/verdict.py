"""What the tables of RESULTS.md come to, read from the tables themselves: it covers all machines that they do."""

from collections.abc import Mapping

from benchmarks.tables import rows_of, table

BEST = "gain over best"
FORWARD, TRAINING = "Forward, no gradients", "Forward and backward, trained graft"
DTYPES = ("float32", "bfloat16")


def verdict(sections: Mapping[str, str]) -> list[str]:
    """Lines: in how many places flex is the fastest, where it is not, and its gain by instruction set and dtype."""
    gains = {
        (section, title, row["dtype"], row["shape"]): float(row[BEST].removesuffix("x"))
        for section, text in sections.items()
        for title in (FORWARD, TRAINING)
        for row in rows_of(text, title)
        if row.get(BEST, "–") != "–"
    }
    if not gains:
        return ["**Verdict:** nothing is measured yet.", ""]
    slower = sorted((gain, place) for place, gain in gains.items() if gain < 1)
    places = f"{len(gains) - len(slower)} of {len(gains)} places"
    said = [
        f"**Verdict:** in {places} (instruction set, shape, dtype, pass) flex is at least as fast as its best peer."
    ]
    if slower:
        named = (
            f"{shape} on {section}, {dtype}, {title[0].lower()}{title[1:]}: {gain:.2f}x"
            for gain, (section, title, dtype, shape) in slower
        )
        said.append(f"Slower: {'; '.join(named)}.")
    rows = []
    for section in dict.fromkeys(place[0] for place in gains):
        for dtype in DTYPES:
            ranges = [_range(gains, section, title, dtype) for title in (FORWARD, TRAINING)]
            rows.append([section, dtype, *ranges])
    return [" ".join(said), "", *table(["gain over the best peer", "dtype", FORWARD, TRAINING], rows)]


def _range(gains: Mapping[tuple[str, str, str, str], float], section: str, title: str, dtype: str) -> str:
    found = sorted(gain for place, gain in gains.items() if place[:3] == (section, title, dtype))
    return f"{found[0]:.2f}x to {found[-1]:.2f}x" if found else "–"
