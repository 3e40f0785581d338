"""What the numbers of a run say, in plain sentences, and what they do not say.

Methods are compared seed by seed: d_s = score of FLEx - score of the other, mean and standard deviation over the seeds
that both have. A difference is judged against its *noise*: the larger of that standard deviation and the sampling error
of a share measured on n test answers, sqrt((p(1-p) + q(1-q)) / n), which stands in where two seeds agree by chance. It
is too large for ROUGE-L and for methods that err on the same questions, so the verdict errs towards "not settled".
Up to once the noise, and where the difference is printed as zero, the two are level; beyond twice the noise (and with
the same sign in every seed) better or worse; between them unsettled.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from flex.evaluation.measures import KINDS
from flex.methods import AVERAGED, MAIN, METHODS, Method
from flex.report.numbers import Measure, Row, format_count, little_used, primary_measure, spread, worse_than_zero
from flex.store.events import AFTER, BEFORE

LABEL = METHODS[MAIN].label
CONTROLS = {method: row for method, row in METHODS.items() if row.control_of == MAIN}


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
    def printed_gain(self) -> float:
        """As the reader sees it; what is zero in print is no difference."""
        return self.measure.kind.printed(self.gain)

    @property
    def noise(self) -> float:
        return max(self.spread or 0.0, self.sampling_error or 0.0)

    @property
    def verdict(self) -> str:
        """better | ahead | level | behind | worse, or "open" where nothing tells how large the noise is."""
        if not math.isfinite(self.mean):
            return "open"
        if self.printed_gain == 0:
            return "level"
        if self.spread is None and self.sampling_error is None:
            return "open"
        if abs(self.gain) <= self.noise:
            return "level"
        agree = self.ahead == (self.num_seeds if self.gain > 0 else 0)
        if abs(self.gain) > 2 * self.noise and agree:
            return "better" if self.gain > 0 else "worse"
        return "ahead" if self.gain > 0 else "behind"

    def __str__(self) -> str:
        return self.measure.format_signed(self.mean, self.spread)


def difference(first: Row, second: Row, measure: Measure, whens: tuple[str, str] = (AFTER, AFTER)) -> Difference | None:
    """Paired over the seeds that both methods have; None if they share none. `whens`: which scores of each."""
    a, b = first.scores[whens[0]].get(measure), second.scores[whens[1]].get(measure)
    if a is None or b is None or not (seeds := sorted(set(a.values) & set(b.values))):
        return None
    deltas = [a.values[seed] - b.values[seed] for seed in seeds]
    sampling_error = None
    if measure.kind.is_share and a.num_examples and b.num_examples:
        shares = [(statistics.fmean(stat.values[seed] for seed in seeds), stat.num_examples) for stat in (a, b)]
        sampling_error = math.sqrt(sum(max(0.0, p * (1 - p)) / n for p, n in shares))
    sign = 1 if measure.higher_is_better else -1
    ahead = sum(sign * measure.kind.printed(delta) > 0 for delta in deltas)
    return Difference(measure, statistics.fmean(deltas), spread(deltas), sampling_error, ahead, len(seeds))


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
    return [
        *sentences,
        _headline(main, others, measure),
        *_controls(main, rows, measure),
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


def _headline(main: Row, others: list[Row], measure: Measure) -> str:
    standing = _standing(main, others, measure)
    text = f"{LABEL} reaches {_value(main, measure)} {measure.kind.in_words} on the clients' own test sets"
    return f"{text}: {standing}." if standing else f"{text}; there is no other method here to compare it with."


def _controls(main: Row, rows: dict[str, Row], measure: Measure) -> list[str]:
    """Same size, same training; only what stands in place of the graft differs."""
    compared = ((row, difference(main, rows[key], measure)) for key, row in CONTROLS.items() if key in rows)
    found = [(row, diff) for row, diff in compared if diff]
    endings = {
        "level": "does as well ({}, within the noise of {})",
        "worse": f"does better than {LABEL} ({{}})",
        "behind": f"is ahead of {LABEL} ({{}}, less than twice the noise of {{}}: not settled)",
        "better": "does worse ({})",
        "ahead": "is a little behind ({}, less than twice the noise of {}: not settled)",
        "open": "differs ({}), and one seed does not tell whether that means anything",
    }
    parts = [f"{row.in_place} {endings[d.verdict].format(d, measure.format(d.noise))}" for row, d in found]
    sentences = []
    if parts:
        text = f"In place of {LABEL}'s graft, {_join(parts)}; the numbers are {LABEL} minus the other."
        sentences.append(text + _what_controls_show(main, rows, measure, found))
    if not any(row.capacity for row, _ in found):
        named = ", ".join(row.in_place for row in CONTROLS.values() if row.capacity)
        sentences.append(
            f"The controls ({named}) are not in this run, so it cannot tell whether the choice "
            "of the graft matters or only the private capacity."
        )
    return sentences


def _what_controls_show(
    main: Row, rows: dict[str, Row], measure: Measure, found: list[tuple[Method, Difference]]
) -> str:
    as_good = [row for row, diff in found if diff.verdict in ("level", "behind", "worse")]
    if as_good:
        text = f" So this run does not show {_join([row.unproven for row in as_good], 'or')}"
        averaged = difference(main, rows[AVERAGED], measure) if AVERAGED in rows else None
        # Another well-chosen graft that does as well says nothing of mere capacity.
        mere_capacity = any(row.capacity or row.private != METHODS[MAIN].private for row in as_good)
        gains = averaged is not None and averaged.verdict == "better" and mere_capacity
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
            standing = _standing(main, others, measure)
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
        if by_loss and by_score and by_loss.gain < 0 <= by_score.printed_gain and by_loss.verdict != "level":
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
    """Where a client's own weights and the averaged ones differ by more than the noise, the reader must know."""
    parts = []
    for row in summary:
        both = difference(row, row, measure, (AFTER, BEFORE)) if row.declared.averages else None
        if both and both.verdict not in ("level", "open"):
            parts.append(f"{row.label} {both}")
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
        parts = [f"{row.declared.sentence_name} ({diff})" for row, diff in found if diff and diff.verdict == verdict]
        if parts:
            clauses.append(word.format(_join(parts)))
    return "; ".join(clauses)


def _value(row: Row, measure: Measure) -> str:
    stat = row.after[measure]
    return measure.format(stat.mean, stat.spread) + measure.kind.unit


def _join(parts: list[str], word: str = "and") -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + f" {word} " + parts[-1]
