"""The wall at a site: an app from anybody, run as the SuperNode's user, gets at neither data nor state.

Needs root, to be two users. A child that is forked after its imports takes the SuperNode's user id and runs what
somebody could submit; the worker's files and socket have the modes of docs/deploy.md.
"""

import json
import os
import pickle
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sites import federation, worker_of

from flex.deploy.door import Door
from flex.deploy.frames import receive_frame
from flex.deploy.shim import ask
from flex.errors import FlexError
from flex.federation.flower import ConfigRecord, RecordDict
from flex.federation.messages import CONFIG

WORKER, NODE, STRANGER, GROUP = 61001, 61002, 61003, 61010

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be two users")


@pytest.fixture
def site() -> Iterator[tuple[Path, Path, int]]:
    """(data file, state folder, socket) of a worker with its own user's files, which serves the SuperNode's user."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        deployment, _ = federation(folder, train={"methods": ("flex",), "rounds": 3})
        folder.chmod(0o755)  # the way to the socket is open to all; what is private is closed by its own mode
        (folder / "srv").mkdir()
        state = folder / "srv" / "state"
        data = folder / "a-train.jsonl"
        worker = worker_of(folder, deployment, "a", state)
        for path in (state, data):
            os.chown(path, WORKER, GROUP)
        state.chmod(0o700)
        data.chmod(0o600)
        path = folder / "run" / "w.sock"
        door = Door(path, NODE, GROUP, lambda uid, why: None)
        stopped = threading.Event()
        thread = threading.Thread(target=worker.serve, args=(door.questions, stopped.is_set))
        thread.start()
        try:
            yield data, state, path
        finally:
            stopped.set()
            thread.join()
            door.close()


def as_user(uid: int, groups: list[int], spy: Callable[[], dict[str, str]]) -> dict[str, str]:
    """What `spy` finds when it runs as this user."""
    here, there = os.pipe()
    if (child := os.fork()) == 0:
        found = {"failed": "the child did not get to its end"}
        try:
            os.setgroups(groups)
            os.setgid(groups[0] if groups else uid)
            os.setuid(uid)
            found = spy()
        finally:
            os.write(there, json.dumps(found).encode())
            os._exit(0)
    os.close(there)
    with os.fdopen(here, "rb") as pipe:
        found = json.loads(pipe.read())
    os.waitpid(child, 0)
    return found


def outcome(attempt: Callable[[], object]) -> str:
    try:
        return f"GOT {attempt()!r}"[:200]
    except (OSError, FlexError) as error:
        return f"{type(error).__name__}: {error}"


def test_what_an_app_from_anybody_gets(site):
    data, state, path = site

    def pickled() -> object:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.sendall(pickle.dumps({"kind": "query"}))
            return receive_frame(connection, "the worker")[0]["error"]

    def query(what: str) -> object:
        return dict(ask(str(path), "query", RecordDict({CONFIG: ConfigRecord({"ask": what})})))

    def spy() -> dict[str, str]:
        return {
            "data": outcome(lambda: data.read_text()),
            "state": outcome(lambda: os.listdir(state)),
            "record": outcome(lambda: (state / "record.jsonl").read_text()),
            "planted": outcome(lambda: (state / "x").write_text("x")),
            "memory": outcome(lambda: Path(f"/proc/{os.getppid()}/mem").open("rb").read(1)),
            "environment": outcome(lambda: Path(f"/proc/{os.getppid()}/environ").read_bytes()),
            "kill": outcome(lambda: os.kill(os.getppid(), 0)),
            "replace the socket": outcome(lambda: path.unlink()),
            "pickle": outcome(pickled),
            "read": outcome(lambda: ask(str(path), "read", RecordDict())),
            "query data": outcome(lambda: query("data")),
            "query who": outcome(lambda: query("who")),
            "train": outcome(lambda: ask(str(path), "train", RecordDict({CONFIG: ConfigRecord({"server-round": 1})}))),
        }

    found = as_user(NODE, [GROUP], spy)
    denied = ("data", "state", "record", "planted", "memory", "environment", "kill", "replace the socket")
    assert all(found[name].startswith("PermissionError") for name in denied), found
    assert "speaks another language" in found["pickle"]
    assert "the question is 'read'; expected one of train, evaluate, query" in found["read"]
    for name in ("query data", "query who", "train"):  # of the right user, but of no job of this site
        assert "the question names no job" in found[name]
    entries = [json.loads(line) for line in (state / "record.jsonl").read_text().splitlines()]
    assert [(e["peer"], bool(e["refused"]), e["bytes"]) for e in entries] == [(NODE, True, 0)] * 3


def test_a_stranger_does_not_reach_the_socket_and_a_member_of_the_group_is_not_served(site):
    _, _, path = site

    def spy() -> dict[str, str]:
        return {"ask": outcome(lambda: ask(str(path), "query", RecordDict()))}

    assert "belongs to another user and group" in as_user(STRANGER, [STRANGER], spy)["ask"]
    sentence = f"user id {STRANGER} may not ask this worker; expected user id {NODE}"
    assert sentence in as_user(STRANGER, [GROUP], spy)["ask"]
