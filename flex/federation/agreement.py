"""What all who take part in a run must agree in, and what is each one's own: settings, base, versions.

A run on one machine agrees with itself; when it is resumed, it is held against its own file by the same list. Sites
elsewhere say what they have (`SiteAbout`), and whoever differs is named.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from typing import Any

from flex.config import STRATEGIES, TASKS, AnchorSettings, RunConfig, TrainSettings
from flex.errors import FlexError
from flex.federation.messages import SiteAbout
from flex.methods import Method

# Where a machine has its base and data: said by each site, never sent to one.
PATHS = {
    *("model.path", "model.device", "data.train", "data.test", "data.general"),
    *("data.files", "data.test_files"),
}
# Files that stand for themselves in a configuration: a site may have them elsewhere (`config.AT_SITES`).
TASK_FILES = {f"evaluate.{need}" for need in TASKS.values() if need}
# Settings that do not decide a job's numbers, or whose content is compared instead.
NOT_COMPARED = {
    *PATHS,
    *TASK_FILES,
    *("output", "workers", "data.columns", "anchor.text", "train.methods", "train.seeds", "train.track"),
    *("train.rates", "strategy.etas"),  # a job's files say its own
    *("train.tune_factors", "train.tune_etas", "train.tune_by"),
    *("train.skip_failed", "train.timeout"),
    *("train.gradient_checkpointing", "evaluate.batch_size"),
}
# What a site chooses for itself: paths, and what its files call things and its machine can bear. Which anchors it has
# is its own too (`config.AT_SITES`), as is which examples; both are in the fingerprint of its data (`SiteAbout.data`).
SITE_OWN = {
    *PATHS,
    *TASK_FILES,
    *("data.columns", "anchor.text", "threads", "train.gradient_checkpointing", "evaluate.batch_size"),
}


def comparable(config: RunConfig) -> dict[str, Any]:
    """Every setting that decides a job's numbers, flat. Base and data are compared by fingerprint."""
    from flex.federation.strategy import make_strategy  # not above: a client trains where Flower is not installed

    # A setting that is left out is its default, and that of its strategy.
    config = dataclasses.replace(config, anchor=config.anchors or AnchorSettings())
    name = config.strategy.name
    strategy = make_strategy(name, 1, **config.strategy.given(name))
    defaults = {f"strategy.{key}": getattr(strategy, key) for key in STRATEGIES[name]}
    return {key: value for key, value in {**flat(config), **defaults}.items() if key not in NOT_COMPARED}


def flat(config: RunConfig) -> dict[str, Any]:
    """Every setting by its full name, `section.key`."""
    return {
        f"{section}.{key}" if isinstance(part, dict) else section: value
        for section, part in dataclasses.asdict(config).items()
        for key, value in (part.items() if isinstance(part, dict) else [("", part)])
    }


def settings_digest(config: RunConfig) -> str:
    """A name for the settings that all sites of a run share."""
    shared = {key: value for key, value in comparable(config).items() if key not in SITE_OWN}
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]


def first_round_alone(method: Method, train: TrainSettings) -> int | None:
    """The first round in which nothing is averaged any more; None for a method that has no such rounds."""
    if not method.last_phases:
        return None
    return train.rounds + 1 - (train.finetune_rounds or max(1, train.rounds // 10))


@cache
def versions() -> dict[str, str]:
    """Of what decides the numbers. How torch was built (its part after a `+`) is the machine's."""
    try:
        own = metadata.version("flex-moe")
    except metadata.PackageNotFoundError:  # run from its source
        own = "source"
    return {"flex-moe": own, "torch": metadata.version("torch").partition("+")[0]}


def check_sites(sites: Sequence[SiteAbout], config: RunConfig) -> None:
    """Raises FlexError where a site has another base, other settings, or another version, by name."""
    own = settings_digest(config)
    if other := [site for site in sites if site.settings != own]:
        raise FlexError(
            f"client {other[0].client_id!r} has other settings ({other[0].settings or 'none'}) than this run ({own}); "
            "expected the configuration of this run, as its package brings it"
        )
    for what in ("base", *versions()):
        groups: dict[str, list[str]] = {}
        for site in sites:
            value = {"base": site.fingerprint, **site.versions}.get(what, "unknown")
            groups.setdefault(str(value), []).append(site.client_id)
        if len(groups) > 1:
            said = "; ".join(f"{', '.join(map(repr, names))} has {value}" for value, names in groups.items())
            raise FlexError(f"the clients differ in {what} ({said}); expected the same {what} at all of them")
