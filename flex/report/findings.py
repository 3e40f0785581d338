"""What the numbers of a run say, in plain sentences, and what they do not say.

Methods are compared seed by seed: d_s = score of FLEx - score of the other, mean and standard deviation over the seeds
that both have. A difference is judged against its *noise*: the larger of that standard deviation and the sampling error
of a share measured on n test answers, sqrt((p(1-p) + q(1-q)) / n), which stands in where two seeds agree by chance (it
is too large for ROUGE-L and for methods that err on the same questions: the verdict rather doubts than claims). Up to
once the noise the two are called level, beyond twice the noise (and with the same sign in every seed) better or
worse, between them unsettled.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from flex.report.numbers import AFTER, BEFORE, CONTROLS, Measure, format_bytes, format_count, primary_measure, spread

Row = dict[str, Any]

IN_WORDS = {"exact_match": "exact match", "rouge_l": "ROUGE-L", "loss": "loss"}

# What stands in place of FLEx's graft, and what a run does not show where that does as well.
IN_PLACE = {
    "flex-paper": ("the paper's rule", "that this graft is better than the paper's"),
    "flex-random": ("a random expert", "that it matters what is grafted"),
    "flex-fresh": ("a fresh module", "that starting from pretrained weights matters"),
    "flex-private-lora": ("a private LoRA", "that a graft is better than a private LoRA"),
    "flex-adapt": ("an expert adapted in place", "that a graft is better than adapting an expert"),
}
OF_CAPACITY = ("flex-random", "flex-fresh")  # without these a run cannot tell a good graft from mere private capacity


@dataclass(frozen=True)
class Difference:
    """`mean` = first - second; `gain` is the same, positive where the first is better; `ahead` counts seeds."""

    measure: Measure
    mean: float
    spread: float | None
    sampling_error: float | None
    ahead: int
    num_seeds: int

    @property
    def gain(self) -> float:
        return self.mean if self.measure.higher_is_better else -self.mean

    @property
    def noise(self) -> float:
        return max(self.spread or 0.0, self.sampling_error or 0.0)

    @property
    def verdict(self) -> str:
        """better | ahead | level | behind | worse, or "open" where nothing tells how large the noise is."""
        noise = self.noise
        if (self.spread is None and self.sampling_error is None) or not math.isfinite(self.mean):
            return "open"
        if abs(self.gain) <= noise:
            return "level"
        agree = self.ahead == (self.num_seeds if self.gain > 0 else 0)
        if abs(self.gain) > 2 * noise and agree:
            return "better" if self.gain > 0 else "worse"
        return "ahead" if self.gain > 0 else "behind"

    def __str__(self) -> str:
        return self.measure.format_signed(self.mean, self.spread)


def difference(first: Row, second: Row, measure: Measure, when: str = AFTER) -> Difference | None:
    """Paired over the seeds that both methods have; None where they share none."""
    a, b = first[when].get(measure), second[when].get(measure)
    seeds = sorted(set(a["values"]) & set(b["values"])) if a and b else []
    if not seeds:
        return None
    deltas = [a["values"][seed] - b["values"][seed] for seed in seeds]
    sampling_error = None
    if measure.name != "loss" and a["num_examples"] and b["num_examples"]:
        shares = [statistics.fmean(stat["values"][seed] for seed in seeds) for stat in (a, b)]
        counts = (a["num_examples"], b["num_examples"])
        sampling_error = math.sqrt(sum(max(0.0, p * (1 - p)) / n for p, n in zip(shares, counts, strict=True)))
    sign = 1 if measure.higher_is_better else -1
    ahead = sum(sign * delta > 0 for delta in deltas)
    return Difference(measure, statistics.fmean(deltas), spread(deltas), sampling_error, ahead, len(seeds))


def findings(summary: list[Row]) -> list[str]:
    """Sentences, the most important first: the verdict, the controls, groups, loss, forgetting, cost, cautions."""
    rows = {row["method"]: row for row in summary}
    measure = primary_measure(summary)
    sentences = _unfinished(summary)
    if measure is None:
        return [*sentences, "There is no evaluation yet, so there is nothing to compare."]
    main = rows.get("flex")
    if main is None or measure not in main[AFTER]:
        return [*sentences, _without_flex(summary, measure)]
    sentences.append(_headline(main, summary, measure))
    sentences += _controls(main, rows, measure)
    sentences += _groups(main, summary)
    sentences += _loss_disagrees(main, rows, measure)
    sentences += _forgetting(summary, measure)
    sentences += _aggregation(summary, measure)
    sentences += _budget(rows)
    sentences += _choices(main)
    sentences += _seeds(summary)
    return sentences


def _unfinished(summary: list[Row]) -> list[str]:
    missing = []
    for row in summary:
        if not row["finished"]:
            done = [
                f"seed {seed} at round {at or 0}" + (f" of {planned}" if planned else "")
                for seed, (at, planned) in row["rounds"].items()
                if planned is None or (at or 0) < planned
            ]
            missing.append(f"{row['label']} ({', '.join(done) or 'not evaluated'})")
    return [f"This run is not finished, so everything here is preliminary: {_join(missing)}."] if missing else []


def _without_flex(summary: list[Row], measure: Measure) -> str:
    scored = [row for row in summary if measure in row[AFTER]]
    parts = [f"{row['label']} {_value(row, measure)}" for row in scored]
    name = IN_WORDS[measure.name]
    return f"FLEx itself has no result here. {name[0].upper()}{name[1:]} on the test sets: {_join(parts)}."


def _headline(main: Row, summary: list[Row], measure: Measure) -> str:
    others = [row for row in summary if row["method"] != "flex" and row["method"] not in CONTROLS]
    standing = _standing(main, others, measure)
    text = f"FLEx reaches {_value(main, measure)} {IN_WORDS[measure.name]} on the clients' own test sets"
    return f"{text}: {standing}." if standing else f"{text}; there is no other method here to compare it with."


def _controls(main: Row, rows: dict[str, Row], measure: Measure) -> list[str]:
    """Same size, same training; only what stands in place of the graft differs."""
    verdicts: dict[str, str] = {}
    parts = []
    for method in CONTROLS:
        name = IN_PLACE[method][0]
        found = difference(main, rows[method], measure) if method in rows else None
        if found is None:
            continue
        verdicts[method] = found.verdict
        noise = measure.format(found.noise)
        ending = {
            "level": f"{name} does as well ({found}, within the noise of {noise})",
            "worse": f"{name} does better than FLEx ({found})",
            "behind": f"{name} is ahead of FLEx ({found}, less than twice the noise of {noise}: not settled)",
            "better": f"{name} does worse ({found})",
            "ahead": f"{name} is a little behind ({found}, less than twice the noise of {noise}: not settled)",
            "open": f"{name} differs ({found}), and one seed does not tell whether that means anything",
        }
        parts.append(ending[found.verdict])
    sentences = []
    if parts:
        text = f"In place of FLEx's graft, {_join(parts)}; the numbers are FLEx minus the other."
        sentences.append(text + _what_controls_show(main, rows, measure, verdicts))
    if not any(method in verdicts for method in OF_CAPACITY):
        sentences.append(
            "The controls (a random expert, a fresh module) are not in this run, so it cannot tell whether the choice "
            "of the graft matters or only the private capacity."
        )
    return sentences


def _what_controls_show(main: Row, rows: dict[str, Row], measure: Measure, verdicts: dict[str, str]) -> str:
    as_good = [method for method, verdict in verdicts.items() if verdict in ("level", "behind", "worse")]
    if as_good:
        text = f" So this run does not show {_join([IN_PLACE[method][1] for method in as_good], 'or')}"
        fedavg = difference(main, rows["fedavg"], measure) if "fedavg" in rows else None
        gains = fedavg is not None and fedavg.verdict == "better" and as_good != ["flex-paper"]
        return text + ("; the gain over FedAvg comes from having a private module." if gains else ".")
    if not any(method in verdicts for method in OF_CAPACITY):
        return ""
    if all(verdict == "better" for verdict in verdicts.values()):
        return " So the graft earns its place here."
    return " Whether it matters what is grafted is left open."


def _groups(main: Row, summary: list[Row]) -> list[str]:
    others = [row for row in summary if row["method"] not in ("base", "flex", *CONTROLS)]
    sentences = []
    for measure in main[AFTER]:
        if measure.split == "test" and measure.group and measure.name == "exact_match":
            standing = _standing(main, others, measure)
            ending = f": {standing}." if standing else "."
            sentences.append(f"On “{measure.group}” FLEx has {_value(main, measure)}{ending}")
    return sentences


def _loss_disagrees(main: Row, rows: dict[str, Row], measure: Measure) -> list[str]:
    """Loss and exact match need not agree; say so where a method that is not ahead has the lower loss."""
    loss = Measure("test", "", "loss")
    parts = []
    for method, row in rows.items():
        by_loss = difference(main, row, loss) if method != "flex" and measure != loss else None
        by_score = difference(main, row, measure)
        if by_loss and by_score and by_loss.gain < 0 <= by_score.gain and by_loss.verdict != "level":
            seeds = f"lower in {by_loss.num_seeds - by_loss.ahead} of {by_loss.num_seeds}"
            parts.append(
                f"{row['label']} {_value(row, loss)} ({seeds} {'seed' if by_loss.num_seeds == 1 else 'seeds'})"
            )
    if not parts:
        return []
    return [
        f"Test loss tells another story than {IN_WORDS[measure.name]}: FLEx has {_value(main, loss)}; {_join(parts)}."
    ]


def _forgetting(summary: list[Row], like: Measure) -> list[str]:
    """The general set, by the measure of the verdict where it was taken there."""
    names = [like.name, "exact_match", "loss"]
    names = [name for name in names if any(("general", "", name) in row[AFTER] for row in summary)]
    if not names:
        return []
    measure = Measure("general", "", names[0])
    scored = [row for row in summary if measure in row[AFTER]]
    base = next((row for row in scored if row["method"] == "base"), None)
    trained = [row for row in scored if row["method"] != "base"]
    parts = [f"{row['label']} {_value(row, measure)}" for row in trained]
    start = f"the base model has {_value(base, measure)}, after training " if base else ""
    if not trained:
        return []
    sign = 1 if measure.higher_is_better else -1
    lost = base is not None and all(
        sign * (base[AFTER][measure]["mean"] - r[AFTER][measure]["mean"]) > 0 for r in trained
    )
    ending = " Every method forgets." if lost else ""
    return [f"General questions ({IN_WORDS[measure.name]}): {start}{_join(parts)}.{ending}"]


def _aggregation(summary: list[Row], measure: Measure) -> list[str]:
    """Where a client's own weights and the averaged ones differ by more than the noise, the reader must know."""
    parts = []
    for row in summary:
        if row["method"] in ("base", "local") or measure not in row[BEFORE] or measure not in row[AFTER]:
            continue
        both = difference({AFTER: row[AFTER]}, {AFTER: row[BEFORE]}, measure)
        if both and both.verdict not in ("level", "open"):
            parts.append(f"{row['label']} {both}")
    if not parts:
        return []
    return [f"Averaging changes the scores ({IN_WORDS[measure.name]} after minus before aggregation): {_join(parts)}."]


def _budget(rows: dict[str, Row]) -> list[str]:
    main, fedavg = rows["flex"], rows.get("fedavg")
    parameters, sent = main["trained_parameters"], main["bytes_per_round"]
    if not parameters:
        return []
    text = (f"Each client trains {format_count(parameters.get('personal'))} private parameters beside the "
            f"{format_count(parameters.get('shared'))} that are averaged")  # fmt: skip
    if sent:
        other = fedavg["bytes_per_round"] if fedavg else None
        same = (
            " (as with FedAvg)"
            if other and other == sent
            else f" (FedAvg {format_bytes(other['up'])})"
            if other
            else ""
        )
        text += f" and all clients together send {format_bytes(sent['up'])} a round{same}"
    text += "."
    smaller = [rows[method]["label"] for method in ("local", "fedavg") if method in rows]
    if smaller and parameters.get("personal"):
        verb = "train" if len(smaller) > 1 else "trains"
        text += f" {_join(smaller)} {verb} no such module: part of the distance to FLEx may be its mere size."
    return [text]


def _choices(main: Row) -> list[str]:
    counts = main["grafts"]
    if not counts or not (counts["worse_than_zero"] or counts["little_used"]):
        return []
    parts = []
    if counts["worse_than_zero"]:
        parts.append(
            f"in {counts['worse_than_zero']} the chosen expert reconstructs its layer worse than no expert at all would"
        )
    if counts["little_used"]:
        parts.append(f"in {counts['little_used']} the client's router hardly uses it")
    return [f"Warning about the choice: of {counts['choices']} grafts, {_join(parts)}."]


def _seeds(summary: list[Row]) -> list[str]:
    fewest = min((len(row["seeds"]) for row in summary if row["method"] != "base"), default=0)
    if fewest == 1:
        return ["There is one seed only: nothing here says how much another seed would differ."]
    return [f"{fewest} seeds are few: small differences need more of them."] if 1 < fewest < 5 else []


def _standing(main: Row, others: list[Row], measure: Measure) -> str:
    """ "better than A (+1.0 ± 0.2) and B (...), level with C (...)", empty if there is nothing to compare with."""
    words = {
        "better": "better than {}",
        "ahead": "a little ahead of {}, which is not settled",
        "level": "level with {}",
        "behind": "a little behind {}, which is not settled",
        "worse": "worse than {}",
        "open": "beside {}, which one seed cannot judge",
    }
    found = [(row, difference(main, row, measure)) for row in others]
    clauses = []
    for verdict, word in words.items():
        parts = [f"{_named(row)} ({diff})" for row, diff in found if diff and diff.verdict == verdict]
        if parts:
            clauses.append(word.format(_join(parts)))
    return "; ".join(clauses)


def _named(row: Row) -> str:
    return {"base": "the untrained base", "local": "local training"}.get(row["method"], row["label"])


def _value(row: Row, measure: Measure) -> str:
    stat = row[AFTER][measure]
    return measure.format(stat["mean"], stat["spread"]) + (" %" if measure.name == "exact_match" else "")


def _join(parts: list[str], word: str = "and") -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + f" {word} " + parts[-1]
