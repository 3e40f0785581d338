"""A learning rate for every method, from one small grid, on a validation part of the clients' own training records.

    RUN/tune/x0.3, RUN/tune/x1, ...   runs with all rates times that factor, which train without the validation part,
                                      are scored on it, and read no test record
    RUN/tune/x0.3-eta0.01, ...        the same with that step of the server, of methods whose strategy takes one
    RUN/tuned.json                    each method's scores with each of these, by the end of their names

The run itself then trains on all training records with each method's own factor (`train.rates`), and with its own step
of the server (`strategy.etas`).
"""

import dataclasses
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from flex.config import RunConfig
from flex.errors import FlexError
from flex.methods import METHODS
from flex.runs.run import run
from flex.store.events import AFTER, METRICS, Evaluated, read_events

TUNED = "tuned.json"
DIVERGED = "expected a finite number"  # what a turn or a score says whose loss is none
FRACTION = 0.2  # of the training records, where data.validation_fraction does not say another


Scores = dict[str, float]  # {"loss", "exact_match"}


@dataclass(frozen=True)
class Try:
    """One point of the grid: a factor on all rates, and the server's step where there is one."""

    factor: float
    eta: float | None = None

    @property
    def name(self) -> str:
        return f"{self.factor:g}" if self.eta is None else f"{self.factor:g}-eta{self.eta:g}"


def tune(config: RunConfig, console: Console) -> RunConfig:
    """The run with each method's factor and step of the server.

    What is in tuned.json was tried; for other methods `train.tune_factors` and `train.tune_etas` are, on the run's
    first seed. `train.tune_by`, on the validation parts, mean over clients, decides; of two alike the lower loss.

    Raises:
        FlexError: as a run does; or a method has no finite loss with any of them.
    """
    folder = Path(config.output)
    scores = _read(folder / TUNED)
    methods = [method for method in config.train.methods if METHODS[method].trains]
    for has_eta in (False, True):
        missing = tuple(m for m in methods if m not in scores and config.strategy.has_eta(m) == has_eta)
        if not missing:
            continue
        found: dict[str, dict[str, Scores]] = {method: {} for method in missing}
        etas = config.train.tune_etas if has_eta else (None,)
        for tried in (Try(factor, eta) for factor in config.train.tune_factors for eta in etas):
            for method, score in _scores(config, missing, tried, console).items():
                found[method][tried.name] = score
        scores |= found
        _write(folder / TUNED, scores)
    by = config.train.tune_by
    best = {method: _best(method, scores[method], by) for method in methods}
    for method, chosen in best.items():
        told = ", ".join(f"x{name} {score[by]:.4f}" for name, score in scores[method].items())
        what = by.replace("_", " ")
        console.print(f"tuned {method}: rates x{chosen.name} (validation {what} {told})", highlight=False)
    rates = {method: chosen.factor for method, chosen in best.items()}
    steps = {method: chosen.eta for method, chosen in best.items() if chosen.eta is not None}
    return config.with_values(
        train={"rates": {**config.train.rates, **rates}}, strategy={"etas": {**config.strategy.etas, **steps}}
    )


def _scores(config: RunConfig, methods: tuple[str, ...], at: Try, console: Console) -> dict[str, Scores]:
    """Each method's scores on the validation parts at a point of the grid; the loss is infinite where it diverges."""
    seed, fraction = config.train.seeds[0], config.data.validation_fraction or FRACTION
    tried = config.with_values(
        data={"scored": "validation", "validation_fraction": fraction, "general": ""},
        train={
            "methods": methods,
            "seeds": (seed,),
            "rates": dict.fromkeys(methods, at.factor),
            "keep": "last",
            "patience": 0,
        },
        strategy={"etas": {} if at.eta is None else dict.fromkeys(methods, at.eta)},
        evaluate={"rouge": False, "every": 0},
    )
    tried = dataclasses.replace(tried, output=str(Path(config.output) / "tune" / f"x{at.name}"))
    try:
        run(tried, console)
    except FlexError as error:
        if DIVERGED not in str(error):
            raise
        if len(methods) == 1:
            return {methods[0]: {"loss": math.inf, "exact_match": 0.0}}
        return {m: score for method in methods for m, score in _scores(config, (method,), at, console).items()}
    found: dict[str, list[Evaluated]] = {method: [] for method in methods}
    for event in read_events(Path(tried.output) / METRICS):
        mine = isinstance(event, Evaluated) and (event.split, event.when) == ("test", AFTER)
        if mine and event.round == config.train.rounds and event.method in found:
            found[event.method].append(event)
    return {
        method: {name: statistics.fmean(getattr(event, name) for event in events) for name in ("loss", "exact_match")}
        for method, events in found.items()
    }


def _best(method: str, scores: dict[str, Scores], by: str) -> Try:
    finite = {name: score for name, score in scores.items() if math.isfinite(score["loss"])}
    if not finite:
        raise FlexError(
            f"{method} has no finite validation loss with any of train.tune_factors and train.tune_etas; "
            "expected smaller ones"
        )
    rank = lambda name: (-finite[name]["exact_match"] if by == "exact_match" else 0.0, finite[name]["loss"])  # noqa: E731
    factor, _, eta = min(finite, key=rank).partition("-eta")
    return Try(float(factor), float(eta) if eta else None)


def _read(path: Path) -> dict[str, dict[str, Scores]]:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        # An earlier version kept losses alone, by which nothing but the loss can choose: those methods are tried again.
        return {method: tried for method, tried in kept.items() if all(isinstance(s, dict) for s in tried.values())}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise FlexError(f"{path} cannot be read: {error}; expected what --tune wrote, or no such file") from None


def _write(path: Path, scores: dict[str, dict[str, Scores]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise FlexError(f"cannot write {path}: {error}") from None
