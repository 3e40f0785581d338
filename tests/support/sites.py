"""Several sites in one process: real packages, workers, sockets and the shim; only Flower's network is left out."""

import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tiny import records, tiny_config, write_records

from flex.config import RunConfig
from flex.deploy import shim
from flex.deploy.door import Door
from flex.deploy.folder import Deployment, init
from flex.deploy.package import read_package
from flex.deploy.progress import Teller
from flex.deploy.server_app import serve
from flex.deploy.shim import SOCKET
from flex.deploy.worker import Worker, state_of
from flex.federation.flower import Context, RecordDict
from flex.federation.local import FIRST_NODE_ID, RUN_ID, InProcessGrid

ADDRESS = "127.0.0.1:8000"


def federation(folder: Path, sites: str = "ab", **sections: dict) -> tuple[Deployment, RunConfig]:
    """The coordinator's folder for a tiny run, the configuration of the same run on one machine, and a file a site."""
    config = tiny_config(folder, **sections).with_values(data={"clients": tuple(sites)})
    for name in sites:
        write_records(folder / f"{name}-train.jsonl", [unnamed(r) for r in records(name, 10)])
        write_records(folder / f"{name}-test.jsonl", [unnamed(r) for r in records(name, 6, start=20)])
    return init(folder / "fed", config, ADDRESS, list(sites), {}, None), config


def unnamed(record: dict) -> dict:
    """A site's own file needs no column that says whose it is."""
    return {key: value for key, value in record.items() if key != "client"}


def own_settings(folder: Path, name: str) -> list[str]:
    anchors = folder / f"{name}-anchors.jsonl"
    return [
        f"model.path='{folder / 'model'}'",
        f"data.train='{folder / f'{name}-train.jsonl'}'",
        f"data.test='{folder / f'{name}-test.jsonl'}'",
        f"data.general='{folder / 'data' / 'general.jsonl'}'",
        *([f"anchor.text='{anchors}'"] if anchors.exists() else []),
    ]


def worker_of(folder: Path, deployment: Deployment, name: str, state: Path | None = None) -> Worker:
    package = read_package(deployment.folder / "packages" / name)
    state = state or package.folder / "state"
    state.mkdir(exist_ok=True)
    return Worker(package, own_settings(folder, name), state)


class Loop(InProcessGrid):
    """Flower's grid as a ServerApp sees it, with the shim of each site at the other end."""

    def __init__(self, sockets: dict[str, Path]):
        super().__init__(shim.app, list(sockets))
        for node, name in self.clients.items():
            self._contexts[node] = Context(RUN_ID, node, {SOCKET: str(sockets[name])}, RecordDict(), {})

    def push_messages(self, messages):
        keys = []
        for message in messages:
            keys.append(key := uuid.uuid4().hex)
            message.metadata.__dict__["_message_id"] = key  # as Flower's own grid does
            self._replies[key] = self._deliver(message)
        return keys


@contextmanager
def at_work(folder: Path, deployment: Deployment, names: str, accept: bool = False) -> Iterator[Loop]:
    """The workers of these sites, each behind its own socket, in threads."""
    with ExitStack() as stack:
        stopped, sockets = threading.Event(), {}
        for name in names:
            package = read_package(deployment.folder / "packages" / name)
            state = stack.enter_context(state_of(package, package.folder / "state", accept))
            worker = worker_of(folder, deployment, name, state)
            sockets[name] = package.folder / "socket" / "w.sock"
            door = Door(sockets[name], os.getuid(), None, lambda uid, why: None)
            stack.callback(door.close)
            thread = threading.Thread(target=worker.serve, args=(door.questions, stopped.is_set))
            thread.start()
            stack.callback(thread.join)
        stack.callback(stopped.set)
        yield Loop(sockets)


def run_sites(folder: Path, deployment: Deployment, loop: Loop) -> None:
    """All jobs, as the ServerApp runs them."""
    clients = {FIRST_NODE_ID + index: name for index, name in enumerate(deployment.sites)}
    serve(deployment, loop, clients, wait=1, teller=Teller(folder / "progress.jsonl", 1))
