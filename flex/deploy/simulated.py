"""The sites' half in Flower's simulation: every site of a configuration on this machine, in Flower's own processes.

The same messages and the same server as with sites elsewhere; what a worker would look up at home comes from one
configuration with paths (`sites` of the run's configuration).
"""

import functools
from pathlib import Path

import torch

from flex.config import RunConfig, read_config
from flex.deploy.job import JOB, JobName
from flex.federation.client import Site
from flex.federation.client_app import make_client_app
from flex.federation.flower import Context, Message
from flex.federation.rounds import identity
from flex.runs.workers import job_folder
from flex.runs.world import Worlds

STATE = "simulated"  # the sites' personal files, in the coordinator's folder


@functools.cache
def _worlds(path: str) -> tuple[RunConfig, Worlds]:
    """The base is loaded once a process."""
    config = read_config(Path(path))
    if config.threads:
        torch.set_num_threads(config.threads)
    return config, Worlds(config)


_at_hand: dict[tuple[str, JobName], dict[str, Site]] = {}  # the sites of one job: they share the base


def site_of(message: Message, context: Context) -> Site:
    """The site that a node plays, by its number."""
    said, run = message.content.config_records[JOB], context.run_config
    config, worlds = _worlds(str(run["sites"]))
    name = JobName(str(said["method"]), int(said["seed"]))
    if (str(run["sites"]), name) not in _at_hand:
        _at_hand.clear()
        folder = job_folder(Path(str(run["folder"])) / STATE, (name.seed, name.method))
        sites = worlds.of(name.seed).sites(config, name.method, name.seed, folder)
        _at_hand[str(run["sites"]), name] = sites
    return _at_hand[str(run["sites"]), name][config.data.clients[identity(context)[1]]]


app = make_client_app(site_of)
