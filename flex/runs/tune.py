"""A learning rate for every method, from one small grid, on a validation part of the clients' own training records.

    RUN/tune/x0.3, RUN/tune/x1, ...   runs with all rates times that factor, which train without the validation part,
                                      are scored on it, and read no test record
    RUN/tune/x0.3-eta0.01, ...        the same with that step of the server, of methods whose strategy takes one
    RUN/tuned.json                    each method's loss with each of these, by the end of their names

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

    What is in tuned.json holds; for other methods it is the best of `train.tune_factors` and `train.tune_etas` by the
    loss on the validation parts, mean over clients, of the run's first seed.

    Raises:
        FlexError: as a run does; or a method has no finite loss with any of them.
    """
    folder = Path(config.output)
    losses = _read(folder / TUNED)
    methods = [method for method in config.train.methods if METHODS[method].trains]
    for etas in (None,), config.train.tune_etas:
        missing = tuple(m for m in methods if m not in losses and config.strategy.has_eta(m) == (etas != (None,)))
        found: dict[str, dict[str, float]] = {method: {} for method in missing}
        for tried in (Try(factor, eta) for factor in config.train.tune_factors for eta in etas) if missing else ():
            for method, loss in _losses(config, missing, tried, console).items():
                found[method][tried.name] = loss
        if missing:
            losses |= found
            _write(folder / TUNED, losses)
    best = {method: _best(method, losses[method]) for method in methods}
    for method, chosen in best.items():
        told = ", ".join(f"x{name} {loss:.4f}" for name, loss in losses[method].items())
        console.print(f"tuned {method}: rates x{chosen.name} (validation loss {told})", highlight=False)
    rates, etas = {m: t.factor for m, t in best.items()}, {m: t.eta for m, t in best.items() if t.eta is not None}
    return config.with_values(
        train={"rates": {**config.train.rates, **rates}}, strategy={"etas": {**config.strategy.etas, **etas}}
    )


def _losses(config: RunConfig, methods: tuple[str, ...], at: Try, console: Console) -> dict[str, float]:
    """The validation loss of each method at a point of the grid; infinite where it diverges."""
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
            return {methods[0]: math.inf}
        return {m: loss for method in methods for m, loss in _losses(config, (method,), at, console).items()}
    found: dict[str, list[float]] = {method: [] for method in methods}
    for event in read_events(Path(tried.output) / METRICS):
        mine = isinstance(event, Evaluated) and (event.split, event.when) == ("test", AFTER)
        if mine and event.round == config.train.rounds and event.method in found:
            found[event.method].append(event.loss)
    return {method: statistics.fmean(values) for method, values in found.items()}


def _best(method: str, losses: dict[str, float]) -> Try:
    finite = {name: loss for name, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        raise FlexError(
            f"{method} has no finite validation loss with any of train.tune_factors and train.tune_etas; "
            "expected smaller ones"
        )
    factor, _, eta = min(finite, key=finite.__getitem__).partition("-eta")
    return Try(float(factor), float(eta) if eta else None)


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
