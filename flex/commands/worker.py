"""`flex worker` and `flex node`: a site's side of a run at several sites. See docs/deploy.md."""

import grp
import os
import pwd
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from flex.deploy.certificates import wait_for_server
from flex.deploy.package import CA, KEY, Package, read_package, split_address
from flex.deploy.processes import Child, Flower, environment, free_port, program, until_stopped
from flex.deploy.shim import SOCKET, connected
from flex.errors import FlexError, require

LOOK_S, AGAIN_S = 0.3, 2.0
REFUSED = ("Failed to activate SuperNode", "Failed to register SuperNode")
# After this Flower's SuperNode (1.41) neither tries again nor ends: its site would be away until somebody looks.
BROKEN = "SSL/TLS handshake error detected"


@dataclass(frozen=True)
class Place:
    """Where a worker keeps its state and listens, and whom it serves."""

    state: Path
    socket: Path
    user: str | None
    group: str | None


def place(folder: Path, state: Path | None, socket: Path | None, user: str | None, group: str | None) -> Place:
    return Place(state or folder / "state", socket or default_socket(folder), user, group)


def default_socket(folder: Path) -> Path:
    return folder / "socket" / "worker.sock"


def log(folder: Path, state: Path | None) -> int:
    """`flex worker --log`: the site's own record."""
    from flex.deploy.record import Record, record_table
    from flex.deploy.worker import RECORD

    path = (state or folder / "state") / RECORD
    require(path.exists(), f"no record at {path}; expected the state folder of a worker (--state)")
    Console().print(record_table(Record(path).entries()))
    return 0


def worker(
    folder: Path,
    overrides: Sequence[str],
    where: Place,
    accept: bool,
    node_options: Sequence[str] | None,
) -> int:
    """`flex worker`: takes turns until it is stopped.

    Args:
        overrides: the site's own settings, as `section.key=value`.
        node_options: of the SuperNode to run beside it, if one is to.
    """
    from flex.deploy.door import Door
    from flex.deploy.record import Entry
    from flex.deploy.worker import Worker, state_of

    package = read_package(folder)
    peer = _user(where.user)
    group = _group(where.group)
    with state_of(package, where.state, accept) as state, until_stopped() as stopped:
        taking = Worker(package, overrides, state)
        for note in taking.world.notes:
            print(f"note: {note}", file=sys.stderr)
        door = Door(where.socket, peer, group, lambda uid, why: taking.record.write(Entry("", uid, refused=why)))
        node = None
        try:
            if node_options is not None:
                command = [sys.executable, "-m", "flex.cli", "node", str(folder), "--socket", str(where.socket)]
                node = Child([*command, *node_options], os.environ)
            if peer == os.getuid():
                print(
                    "note: the SuperNode runs as this user: fine for a trial, no wall (docs/deploy.md)", file=sys.stderr
                )
            counts = f"{len(taking.client.train)} training and {len(taking.client.test)} test examples"
            anchor = taking.world.anchor
            anchors = f", {len(anchor.examples)} anchors {anchor.fingerprint}" if anchor else ""
            has = f"{counts}{anchors}, base {taking.world.base.fingerprint}"
            print(f"site {package.name}: {has}; at {where.socket} for user id {peer}", flush=True)
            taking.serve(door.questions, lambda: stopped.is_set() or (node is not None and node.ended is not None))
            if node is not None and node.ended is not None and not stopped.is_set():
                raise FlexError(f"the SuperNode ended with code {node.ended}; what it said is above")
        finally:
            if node is not None:
                node.end()
            door.close()
    return 0


def node(folder: Path, socket: Path | None, key: Path | None, home: Path | None, wait: float) -> int:
    """`flex node`: the SuperNode of a site, until it is stopped; waits so many seconds for a server that lets it in."""
    package = read_package(folder)
    host, port = split_address(package.address)
    key, socket = key or folder / KEY, (socket or default_socket(folder)).absolute()
    ends = time.monotonic() + wait
    _check_key(key)
    wait_for_server(host, port, folder / CA, wait)
    connected(str(socket)).close()
    with until_stopped() as stopped:
        env = environment((home or folder / "node").absolute())
        while (child := _until_ended(package, folder, key, socket, env, stopped)) is not None:
            if child.said(BROKEN):
                print(
                    f"note: what came from {package.address} was not what left it (bytes changed on the way, or "
                    "another server); the SuperNode starts again",
                    file=sys.stderr,
                    flush=True,
                )
                ends = time.monotonic() + wait  # the server takes the one before for connected until it is silent
            elif not child.said(*REFUSED):
                raise FlexError(f"the SuperNode ended with code {child.ended}; what it said is above")
            # A server that has just started registers one key after another; and it takes a SuperNode that was killed
            # for connected for another minute, in which it lets no other in.
            elif time.monotonic() > ends:
                raise FlexError(
                    f"the server at {package.address} does not know the key {key} of site {package.name!r}, or has a "
                    "SuperNode of it; expected `flex deploy server` to have registered it, and no other to run"
                )
            else:
                print(
                    f"note: the server at {package.address} does not let this site in yet; the SuperNode starts again",
                    file=sys.stderr,
                    flush=True,
                )
            stopped.wait(AGAIN_S)
    return 0


def _until_ended(
    package: Package, folder: Path, key: Path, socket: Path, env: dict[str, str], stopped: threading.Event
) -> Flower | None:
    """Runs a SuperNode; the child once it has ended by itself or is of no more use, None where it was stopped."""
    child = _supernode(package, folder, key, socket, env)
    try:
        while not stopped.wait(LOOK_S):
            if child.ended is not None or child.said(BROKEN):
                return child
            if child.look_after():
                print("note: the SuperNode lost its SuperExec and got another one", file=sys.stderr, flush=True)
    finally:
        child.end()
    return None


def _supernode(package: Package, folder: Path, key: Path, socket: Path, env: dict[str, str]) -> Flower:
    here, port = "127.0.0.1", str(free_port())
    values = f'{SOCKET}="{socket}" partition-id={package.index} client-id="{package.name}"'
    command = [
        program("flower-supernode"),
        *("--root-certificates", str(folder / CA), "--auth-supernode-private-key", str(key)),
        *("--superlink", package.address, "--host", here, "--port", port),
        *("--node-config", values),
    ]
    return Flower(command, env, None, ["--insecure", "--runtime-api-address", f"{here}:{port}"])


def _check_key(path: Path) -> None:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise FlexError(f"cannot read the site's key {path} ({error.strerror}); expected it with --key FILE") from None
    require(b"PRIVATE KEY" in text, f"{path} is no private key; expected the secret half of the site's key pair")


def _user(name: str | None) -> int:
    """The user id that the worker serves: of a name or a number; its own where none is given."""
    if name is None:
        return os.getuid()
    if name.isdecimal():
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        raise FlexError(f"--node-user is {name!r}; expected a user of this machine, or a number") from None


def _group(name: str | None) -> int | None:
    if name is None or name.isdecimal():
        return None if name is None else int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise FlexError(f"--group is {name!r}; expected a group of this machine, or a number") from None
