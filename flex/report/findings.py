"""What the numbers of a run say, in plain sentences, and what they do not say.

Methods are compared in pairs: the same seed and client, once with each. A verdict is of the sign-flip test over these
pairs (`evaluation/paired.py`), its p-values corrected for all the comparisons shown with it (Holm): better or worse at
5 %, else not settled. Fewer than three seeds, or pairs so few that no p-value could get there, are not judged at all.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace

from flex.evaluation.measures import KINDS
from flex.evaluation.paired import FEWEST_SEEDS, LEVEL, PairedTest, holm, paired_test, smallest_p
from flex.methods import AVERAGED, MAIN, METHODS, Method
from flex.report.numbers import Measure, Row, format_count, little_used, primary_measure, spread, worse_than_zero
from flex.store.events import AFTER, BEFORE

LABEL = METHODS[MAIN].label
TOO_FEW = "so few seeds"
CONTROLS = {method: row for method, row in METHODS.items() if row.control_of == MAIN}


@dataclass(frozen=True)
class Difference:
    """`mean` = first - second over the seeds, with its deviation; `ahead` counts the seeds in which the first is ahead.

    test: over pairs of seed and client; None where a score is not finite. p: its p-value, corrected for `family`
    comparisons.
    """

    measure: Measure
    mean: float
    spread: float | None
    ahead: int
    num_seeds: int
    test: PairedTest | None
    p: float = 1.0
    family: int = 1

    @property
    def gain(self) -> float:
        """Positive where the first is better."""
        return self.mean if self.measure.higher_is_better else -self.mean

    @property
    def printed_gain(self) -> float:
        """As the reader sees it; what is zero in print is no difference."""
        return self.measure.kind.printed(self.gain)

    @property
    def verdict(self) -> str:
        """better | worse | unsettled, or "open" where the seeds or pairs are too few for any verdict."""
        if self.test is None or self.num_seeds < FEWEST_SEEDS:
            return "open"
        if smallest_p(self.test.num_pairs) * self.family > LEVEL:
            return "open"
        if self.p > LEVEL or self.printed_gain == 0:
            return "unsettled"
        return "better" if self.printed_gain > 0 else "worse"

    @property
    def interval(self) -> str:
        """ "[+3.1, +8.0]", of the mean over the pairs; empty where they are too few to bound it."""
        if self.test is None or self.test.low is None or self.test.high is None:
            return ""
        return f"[{self.measure.format_signed(self.test.low)}, {self.measure.format_signed(self.test.high)}]"

    @property
    def judged(self) -> str:
        """The difference with all that the verdict rests on."""
        if self.verdict == "open":
            return str(self)
        interval = f" {self.interval}" if self.interval else ""
        return f"{self}{interval}, p {format_p(self.p)}, ahead in {self.ahead} of {self.num_seeds} seeds"

    def __str__(self) -> str:
        return self.measure.format_signed(self.mean, self.spread)


def format_p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def difference(first: Row, second: Row, measure: Measure, whens: tuple[str, str] = (AFTER, AFTER)) -> Difference | None:
    """Paired over the seeds that both methods have; None if they share none. `whens`: which scores of each."""
    a, b = first.scores[whens[0]].get(measure), second.scores[whens[1]].get(measure)
    if a is None or b is None or not (seeds := sorted(set(a.values) & set(b.values))):
        return None
    deltas = [a.values[seed] - b.values[seed] for seed in seeds]
    sign = 1 if measure.higher_is_better else -1
    ahead = sum(sign * measure.kind.printed(delta) > 0 for delta in deltas)
    test = paired_test(first.pairs(measure, whens[0]), second.pairs(measure, whens[1]))
    p = 1.0 if test is None else test.p
    return Difference(measure, statistics.fmean(deltas), spread(deltas), ahead, len(seeds), test, p)


def differences(first: Row, others: Iterable[Row], measure: Measure) -> dict[str, Difference]:
    """`first` beside each of the others, by method; their p-values are corrected for all of them together."""
    found = {row.method: diff for row in others if (diff := difference(first, row, measure)) is not None}
    corrected = holm([diff.p for diff in found.values()])
    return {
        method: replace(diff, p=p, family=len(found))
        for (method, diff), p in zip(found.items(), corrected, strict=True)
    }


def findings(summary: list[Row]) -> list[str]:
    """Sentences, the most important first: the verdict, the controls, groups, loss, forgetting, cautions."""
    rows = {row.method: row for row in summary}
    measure = primary_measure(summary)
    sentences = [*_unfinished(summary), *_extended(summary), *_kept(summary)]
    if measure is None:
        return [*sentences, "There is no evaluation yet, so there is nothing to compare."]
    main = rows.get(MAIN)
    if main is None or measure not in main.after:
        name = measure.kind.in_words
        parts = [f"{row.label} {_value(row, measure)}" for row in summary if measure in row.after]
        text = f"{LABEL} itself has no result here. {name[0].upper()}{name[1:]} on the test sets: {_join(parts)}."
        return [*sentences, text]
    others = [row for row in summary if row.method != MAIN and not row.declared.control_of]
    found = differences(main, [row for row in summary if row.method != MAIN], measure)
    return [
        *sentences,
        _headline(main, others, measure, found),
        *_controls(rows, found),
        *_groups(main, [row for row in others if row.declared.trains]),
        *_loss_disagrees(main, summary, measure),
        *_forgetting(summary, measure),
        *_aggregation(summary, measure),
        *_size(main, others),
        *_choices(main),
        *_seeds(summary),
    ]


def _unfinished(summary: list[Row]) -> list[str]:
    missing = []
    for row in (row for row in summary if not row.finished):
        rounds = [(job.seed, job.last_round or 0, job.info.num_rounds) for job in row.jobs if not job.finished]
        parts = [f"seed {seed} at round {at}" + (f" of {planned}" if planned else "") for seed, at, planned in rounds]
        missing.append(f"{row.label} ({', '.join(parts)})")
    return [f"This run is not finished, so everything here is preliminary: {_join(missing)}."] if missing else []


def _extended(summary: list[Row]) -> list[str]:
    """What a run became that was planned otherwise; said once where it is the same for several methods or seeds."""
    changes: dict[tuple[object, ...], list[str]] = {}
    for row in summary:
        for job in row.jobs:
            for e in job.extended:
                key = (e.round, e.num_rounds, tuple(e.joined), tuple(e.left), (e.started or "").partition("T")[0])
                names = changes.setdefault(key, [])
                names += [] if row.label in names else [row.label]
    sentences = []
    for (after, planned, joined, left, day), names in changes.items():
        who = [f"client {name} joined" for name in joined] + [f"client {name} left" for name in left]
        sentences.append(
            f"{_join(names)} went on after round {after}, to {planned} rounds{f' ({day})' if day else ''}"
            f"{': ' + _join(who) if who else ''}; earlier rounds keep the rates they had, so these are not the numbers "
            "of a run that was planned so."
        )
    return sentences


def _kept(summary: list[Row]) -> list[str]:
    parts = []
    for row in summary:
        for job in (job for job in row.jobs if job.done is not None and job.done.kept is not None):
            seed = f", seed {job.seed}" if len(row.jobs) > 1 else ""
            early = ", where it was stopped" if job.done.stopped else ""
            parts.append(f"{row.label} round {job.done.kept} of {job.done.round}{early}{seed}")
    return [f"Kept is the round with the lowest validation loss: {'; '.join(parts)}."] if parts else []


def _headline(main: Row, others: list[Row], measure: Measure, found: dict[str, Difference]) -> str:
    standing = _standing(others, found)
    text = f"{LABEL} reaches {_value(main, measure)} {measure.kind.in_words} on the clients' own test sets"
    return f"{text}: {standing}." if standing else f"{text}; there is no other method here to compare it with."


def _controls(rows: dict[str, Row], compared: dict[str, Difference]) -> list[str]:
    """Same size, same training; only what stands in place of the graft differs."""
    found = [(row, compared[key]) for key, row in CONTROLS.items() if key in rows and key in compared]
    endings = {
        "worse": f"does better than {LABEL} ({{}})",
        "better": "does worse ({})",
        "unsettled": f"is not told apart from {LABEL} ({{}})",
        "open": "differs ({}), which " + TOO_FEW + " cannot judge",
    }
    parts = [f"{row.in_place} {endings[d.verdict].format(d.judged)}" for row, d in found]
    sentences = []
    if parts:
        text = f"In place of {LABEL}'s graft, {_join(parts)}; the numbers are {LABEL} minus the other."
        sentences.append(text + _what_controls_show(compared, found))
    if not any(row.capacity for row, _ in found):
        named = ", ".join(row.in_place for row in CONTROLS.values() if row.capacity)
        sentences.append(
            f"The controls ({named}) are not in this run, so it cannot tell whether the choice "
            "of the graft matters or only the private capacity."
        )
    return sentences


def _what_controls_show(compared: dict[str, Difference], found: list[tuple[Method, Difference]]) -> str:
    as_good = [row for row, diff in found if diff.verdict in ("unsettled", "worse")]
    if as_good:
        text = f" So this run does not show {_join([row.unproven for row in as_good], 'or')}"
        # Another well-chosen graft that does as well says nothing of mere capacity.
        mere_capacity = any(row.capacity or row.private != METHODS[MAIN].private for row in as_good)
        gains = AVERAGED in compared and compared[AVERAGED].verdict == "better" and mere_capacity
        label = METHODS[AVERAGED].label
        return text + (f"; the gain over {label} comes from having a private module." if gains else ".")
    if not any(row.capacity for row, _ in found):
        return ""
    if all(diff.verdict == "better" for _, diff in found):
        return " So the graft earns its place here."
    return " Whether it matters what is grafted is left open."


def _groups(main: Row, others: list[Row]) -> list[str]:
    sentences = []
    for measure in main.after:
        if measure.split == "test" and measure.group and measure.kind.of_groups:
            standing = _standing(others, differences(main, others, measure))
            ending = f": {standing}." if standing else "."
            sentences.append(f"On “{measure.group}” {LABEL} has {_value(main, measure)}{ending}")
    return sentences


def _loss_disagrees(main: Row, summary: list[Row], measure: Measure) -> list[str]:
    """Loss and exact match need not agree; say so where a method that is not ahead has the lower loss."""
    loss = Measure("test", "", "loss")
    parts = []
    for row in summary:
        by_loss = difference(main, row, loss) if row is not main and measure != loss else None
        by_score = difference(main, row, measure)
        if by_loss and by_score and by_loss.printed_gain < 0 <= by_score.printed_gain:
            seeds = "1 seed" if by_loss.num_seeds == 1 else f"{by_loss.num_seeds} seeds"
            parts.append(f"{row.label} {_value(row, loss)} (lower in {by_loss.num_seeds - by_loss.ahead} of {seeds})")
    name = measure.kind.in_words
    text = f"Test loss tells another story than {name}: {LABEL} has"
    return [f"{text} {_value(main, loss)}; {_join(parts)}."] if parts else []


def _forgetting(summary: list[Row], like: Measure) -> list[str]:
    """The general set, by the measure of the verdict where it was taken there."""
    likely = [Measure("general", "", name) for name in (like.name, *KINDS)]
    measure = next((m for m in likely if any(m in row.after for row in summary)), None)
    scored = [row for row in summary if measure in row.after]
    base = next((row for row in scored if not row.declared.trains), None)
    trained = [row for row in scored if row.declared.trains]
    if measure is None or not trained:
        return []
    start = f"the base model has {_value(base, measure)}, after training " if base else ""
    values = _join([f"{row.label} {_value(row, measure)}" for row in trained])
    sign = 1 if measure.higher_is_better else -1
    means = [sign * measure.kind.printed(row.after[measure].mean) for row in ([base, *trained] if base else [])]
    ending = " Every method forgets." if means and all(mean < means[0] for mean in means[1:]) else ""
    return [f"General questions ({measure.kind.in_words}): {start}{values}.{ending}"]


def _aggregation(summary: list[Row], measure: Measure) -> list[str]:
    """Where a client's own weights and the averaged ones are told apart, the reader must know."""
    parts = []
    for row in summary:
        both = difference(row, row, measure, (AFTER, BEFORE)) if row.declared.averages else None
        if both and both.verdict in ("better", "worse"):
            parts.append(f"{row.label} {both.judged}")
    name = measure.kind.in_words
    return [f"Averaging changes the scores ({name} after minus before aggregation): {_join(parts)}."] if parts else []


def _size(main: Row, others: list[Row]) -> list[str]:
    private = (main.trained_parameters or {}).get("personal")
    smaller = [r.label for r in others if r.method in METHODS and r.declared.trains and not r.declared.private]
    if not smaller or not private:
        return []
    verb = "train" if len(smaller) > 1 else "trains"
    module = f"no private module such as {LABEL}'s of {format_count(private)} parameters"
    return [f"{_join(smaller)} {verb} {module}: part of the distance to {LABEL} may be its mere size."]


def _choices(main: Row) -> list[str]:
    worse, unused = sum(map(worse_than_zero, main.grafts)), sum(map(little_used, main.grafts))
    parts = []
    if worse:
        parts.append(f"in {worse} the chosen expert reconstructs its layer worse than no expert at all would")
    if unused:
        parts.append(f"in {unused} the client's router hardly uses it")
    return [f"Warning about the choice: of {len(main.grafts)} grafts, {_join(parts)}."] if parts else []


def _seeds(summary: list[Row]) -> list[str]:
    fewest = min((len(row.seeds) for row in summary if row.declared.trains), default=0)
    if 0 < fewest < FEWEST_SEEDS:
        have = "There is one seed only" if fewest == 1 else f"There are {fewest} seeds only"
        return [f"{have}, so nothing here is judged: a verdict needs {FEWEST_SEEDS} or more (--num-seeds 5)."]
    return []


def _standing(others: list[Row], found: dict[str, Difference]) -> str:
    """ "better than A (+1.0 ± 0.2, p = 0.004, ...) and B (...), not told apart from C (...)", empty if there is nothing
    to compare with."""
    words = {
        "better": "better than {}",
        "unsettled": "not told apart from {}",
        "worse": "worse than {}",
        "open": "beside {}, which " + TOO_FEW + " cannot judge",
    }
    clauses = []
    for verdict, word in words.items():
        named = [(row, found[row.method]) for row in others if row.method in found]
        parts = [f"{row.declared.sentence_name} ({diff.judged})" for row, diff in named if diff.verdict == verdict]
        if parts:
            clauses.append(word.format(_join(parts)))
    return "; ".join(clauses)


def _value(row: Row, measure: Measure) -> str:
    stat = row.after[measure]
    return measure.format(stat.mean, stat.spread) + measure.kind.unit


def _join(parts: list[str], word: str = "and") -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + f" {word} " + parts[-1]
