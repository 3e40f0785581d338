"""Which job a message belongs to: every message of a run at several sites says so, in a record of its own."""

from typing import NamedTuple

from flex.deploy.package import Package
from flex.errors import FlexError, require
from flex.federation.flower import ConfigRecord, RecordDict
from flex.methods import METHODS

JOB = "job"


class JobName(NamedTuple):
    """One method and one seed."""

    method: str
    seed: int

    @property
    def trains(self) -> bool:
        return METHODS[self.method].trains


def job_record(name: JobName, run: str, settings: str, base: str = "") -> ConfigRecord:
    """What the server says with every message: the job, and what it takes for agreed."""
    return ConfigRecord({"method": name.method, "seed": name.seed, "run": run, "settings": settings, "base": base})


def job_of(content: RecordDict, package: Package, base: str) -> JobName:
    """The job of a message.

    Raises:
        FlexError: it says none, or is not one for this site: another run, other settings, another base.
    """
    try:
        said = content.config_records[JOB]
        name = JobName(str(said["method"]), int(said["seed"]))
        run, settings, wanted_base = (str(said[key]) for key in ("run", "settings", "base"))
    except (KeyError, TypeError, ValueError):
        raise FlexError("the question names no job; expected method, seed, run, settings and base") from None
    site = f"site {package.name!r}"
    require(
        (run, settings) == (package.run, package.digest),
        f"{site} has the package of run {package.run} (settings {package.digest}), the server that of run {run} "
        f"(settings {settings}); expected the package that `flex deploy` made last",
    )
    require(
        wanted_base in ("", base),
        f"{site} has base {base}, the others have {wanted_base}; expected the same model at every site",
    )
    train = package.config.train
    require(
        name.method in train.methods and name.seed in train.seeds,
        f"{site} takes no part in {name.method} seed {name.seed}: its configuration does not have it",
    )
    return name
