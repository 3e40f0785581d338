"""A learning rate for every method, from one small grid, on a validation part of the clients' own training records.

    RUN/tune/x0.3, RUN/tune/x1, ...   runs with all rates times that factor, which train without the validation part,
                                      are scored on it, and read no test record
    RUN/tuned.json                    each method's loss with each factor, and the factor of the lowest

The run itself then trains on all training records with each method's own factor (`train.rates`).
"""

import dataclasses
import json
import math
import statistics
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


def tune(config: RunConfig, console: Console) -> RunConfig:
    """The run with each method's factor: what is in tuned.json, or else the best of `train.tune_factors` by the loss on
    the validation parts, mean over clients, of the run's first seed.

    Raises:
        FlexError: as a run does; or a method has no finite loss with any factor.
    """
    folder = Path(config.output)
    losses = _read(folder / TUNED)
    methods = [method for method in config.train.methods if METHODS[method].trains]
    missing = tuple(method for method in methods if method not in losses)
    if missing:
        for factor in config.train.tune_factors:
            for method, loss in _losses(config, missing, factor, console).items():
                losses.setdefault(method, {})[f"{factor:g}"] = loss
        _write(folder / TUNED, losses)
    rates = {method: _best(method, losses[method]) for method in methods}
    for method, factor in rates.items():
        found = ", ".join(f"x{name} {loss:.4f}" for name, loss in losses[method].items())
        console.print(f"tuned {method}: rates x{factor:g} (validation loss {found})", highlight=False)
    return config.with_values(train={"rates": {**config.train.rates, **rates}})


def _losses(config: RunConfig, methods: tuple[str, ...], factor: float, console: Console) -> dict[str, float]:
    """The validation loss of each method with all its rates times `factor`; infinite where it diverges."""
    seed, fraction = config.train.seeds[0], config.data.validation_fraction or FRACTION
    tried = config.with_values(
        data={"scored": "validation", "validation_fraction": fraction, "general": ""},
        train={
            "methods": methods,
            "seeds": (seed,),
            "rates": dict.fromkeys(methods, factor),
            "keep": "last",
            "patience": 0,
        },
        evaluate={"rouge": False, "every": 0},
    )
    tried = dataclasses.replace(tried, output=str(Path(config.output) / "tune" / f"x{factor:g}"))
    try:
        run(tried, console)
    except FlexError as error:
        if DIVERGED not in str(error):
            raise
        if len(methods) == 1:
            return {methods[0]: math.inf}
        return {m: loss for method in methods for m, loss in _losses(config, (method,), factor, console).items()}
    found: dict[str, list[float]] = {method: [] for method in methods}
    for event in read_events(Path(tried.output) / METRICS):
        mine = isinstance(event, Evaluated) and (event.split, event.when) == ("test", AFTER)
        if mine and event.round == config.train.rounds and event.method in found:
            found[event.method].append(event.loss)
    return {method: statistics.fmean(values) for method, values in found.items()}


def _best(method: str, losses: dict[str, float]) -> float:
    finite = {factor: loss for factor, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        raise FlexError(f"{method} has no finite validation loss with any of train.tune_factors; expected smaller ones")
    return float(min(finite, key=finite.__getitem__))


def _read(path: Path) -> dict[str, dict[str, float]]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise FlexError(f"{path} cannot be read: {error}; expected what --tune wrote, or no such file") from None


def _write(path: Path, losses: dict[str, dict[str, float]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(losses, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise FlexError(f"cannot write {path}: {error}") from None
