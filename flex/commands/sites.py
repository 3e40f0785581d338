"""The options of `flex deploy`, `flex worker` and `flex node`, and what each of them calls."""

import argparse
from pathlib import Path

from flex.config import to_toml
from flex.errors import FlexError

# The options of a site that are settings; their text as it stands.
OWN = {
    "model": "model.path",
    "data": "data.train",
    "test": "data.test",
    "general": "data.general",
    "anchors": "anchor.text",
    "device": "model.device",
}


def add_parsers(commands: argparse._SubParsersAction) -> None:
    """Adds the three commands."""
    deploy = commands.add_parser("deploy", help="a run at several sites: the coordinator's side (docs/deploy.md)")
    actions = deploy.add_subparsers(dest="action", required=True, metavar="ACTION")
    init = actions.add_parser("init", help="certificates, systemd units, and a package for each site")
    _add_folder(init, "a folder that is not there yet")
    init.add_argument("config", type=Path, metavar="CONFIG.toml", help="the run; what is a site's own is left out")
    init.add_argument("--address", required=True, metavar="HOST:PORT", help="how the sites reach this machine")
    init.add_argument("--sites", nargs="+", required=True, metavar="NAME")
    _add_packages(init)
    update = actions.add_parser("update", help="another configuration or other sites: new packages, another run")
    _add_folder(update)
    update.add_argument("config", type=Path, metavar="CONFIG.toml", help="the run, as it is to be")
    update.add_argument("--sites", nargs="+", default=[], metavar="NAME", help="all of them (default: as before)")
    _add_packages(update)
    server = actions.add_parser("server", help="run the SuperLink and register the sites' keys, until stopped")
    _add_folder(server)
    server.add_argument("--listen", default="0.0.0.0", metavar="ADDRESS", help="(default: %(default)s, everywhere)")
    example = actions.add_parser("example", help="the demo's model and data, cut up for three sites, to try it out")
    _add_folder(example, "a folder for them")
    run = actions.add_parser("run", help="train and score at the sites; called again, it goes on")
    _add_folder(run)
    run.add_argument("--wait", type=float, default=600, metavar="S", help="for sites to connect (default: %(default)s)")

    worker = commands.add_parser("worker", help="take a site's turns: owns its model, data and state (docs/deploy.md)")
    _add_package(worker)
    worker.add_argument("--model", help="folder or hub name of the base")
    worker.add_argument("--data", help="this site's training examples, every line of them")
    worker.add_argument("--test", help="this site's test examples; without it a share of --data is held out")
    worker.add_argument("--general", help="held-out examples that belong to nobody: what is forgotten shows there")
    worker.add_argument(
        "--anchors", metavar="FILE", help="this site's general text, where the run holds sites to the base ([anchor])"
    )
    worker.add_argument("--device", help="auto, cpu, cuda, cuda:0, ...")
    worker.add_argument("--threads", type=int, help="of torch (default: the configuration's)")
    worker.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    worker.add_argument("--state", type=Path, metavar="DIR", help="personal state and record (default: PACKAGE/state)")
    worker.add_argument("--node-user", metavar="USER", help="whose SuperNode is served (default: this user)")
    worker.add_argument("--group", metavar="GROUP", help="of the socket (default: this process's)")
    worker.add_argument("--accept", action="store_true", help="take a configuration that has changed")
    worker.add_argument("--log", action="store_true", help="show what was asked and what left, and end")
    worker.add_argument("--with-node", action="store_true", help="run the SuperNode too: a trial, as one user")
    worker.add_argument("--key", type=Path, metavar="FILE", help="with --with-node: as for flex node")

    node = commands.add_parser("node", help="run a site's SuperNode: connects its worker to the server")
    _add_package(node)
    node.add_argument("--key", type=Path, metavar="FILE", help="the site's secret key (default: the package's)")
    node.add_argument("--wait", type=float, default=120, metavar="S", help="for the server (default: %(default)s)")
    node.add_argument("--home", type=Path, metavar="DIR", help="Flower's own files (default: PACKAGE/node)")


def _add_folder(parser: argparse.ArgumentParser, what: str = "the federation's folder") -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help=what)


def _add_packages(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--key", action="append", default=[], metavar="NAME=FILE.pub", help="a site's own public key; may be repeated"
    )
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="wheels to put into each package")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")


def _add_package(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="PACKAGE", help="the folder that the coordinator sent, unpacked")
    parser.add_argument("--socket", type=Path, metavar="FILE", help="of the worker (default: in PACKAGE/socket)")


def dispatch(given: argparse.Namespace) -> int:
    """Does what was asked for.

    Raises:
        FlexError: what was asked for cannot be, or a file cannot be read or written.
    """
    try:
        return _dispatched(given)
    except OSError as error:
        if error.filename is None:
            raise
        raise FlexError(
            f"cannot read or write {error.filename} ({error.strerror}); expected a folder of the user who calls this"
        ) from None


def _dispatched(given: argparse.Namespace) -> int:
    if given.command == "node":
        from flex.commands import worker

        return worker.node(given.folder, given.socket, given.key, given.home, given.wait)
    if given.command == "worker":
        from flex.commands import worker

        if given.log:
            return worker.log(given.folder, given.state)
        values = {key: getattr(given, name) for name, key in {**OWN, "threads": "threads"}.items()}
        overrides = [f"{key}={to_toml(value)}" for key, value in values.items() if value is not None]
        beside = [] if given.key is None else ["--key", str(given.key)]
        return worker.worker(
            given.folder,
            [*overrides, *given.overrides],
            worker.place(given.folder, given.state, given.socket, given.node_user, given.group),
            given.accept,
            beside if given.with_node else None,
        )
    from flex.commands import deploy

    match given.action:
        case "init":
            packages = (given.sites, given.key, given.wheels)
            return deploy.make(given.folder, given.config, given.overrides, given.address, *packages)
        case "update":
            return deploy.remake(given.folder, given.config, given.overrides, given.sites, given.key, given.wheels)
        case "example":
            return deploy.example(given.folder)
        case "server":
            return deploy.server(given.folder, given.listen)
        case _:
            return deploy.run(given.folder, given.wait)
