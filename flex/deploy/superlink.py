"""The coordinator's SuperLink: started with TLS and node authentication, sites registered by their keys."""

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flex.config import to_toml
from flex.deploy.certificates import check_dates, check_server
from flex.deploy.folder import KEYS, SERVER, Deployment
from flex.deploy.package import CA
from flex.deploy.processes import Flower, call, check_port, environment, program
from flex.errors import FlexError

NODES = "nodes.json"  # site -> node id and the key it was registered with
CONNECTION = "flex"  # the name of the SuperLink in Flower's configuration
START_S = 120.0
DATABASE, LOG = "superlink.db", "superlink.log"


def start(deployment: Deployment, listen: str) -> Flower:
    """Starts the SuperLink and waits until it answers.

    Raises:
        FlexError: the certificate is not valid, the port is taken, or it does not come up.
    """
    keys, server = deployment.folder / KEYS, deployment.folder / SERVER
    for certificate in (keys / CA, keys / "server.crt"):
        check_dates(certificate)
    check_port(listen, deployment.port)
    command = [
        program("flower-superlink"),
        *("--ssl-ca-certfile", str(keys / CA)),
        *("--ssl-certfile", str(keys / "server.crt"), "--ssl-keyfile", str(keys / "server.key")),
        *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
        *("--host", listen, "--port", str(deployment.port), "--database", str(server / DATABASE)),
    ]
    runtime = ["--root-certificates", str(keys / CA), "--runtime-api-address", f"127.0.0.1:{deployment.port}"]
    child = Flower(command, environment(server / "superlink"), server / LOG, runtime)
    ends = time.monotonic() + START_S
    while True:
        try:
            check_server("127.0.0.1", deployment.port, keys / CA)
            return child
        except FlexError as error:
            if child.ended is not None or time.monotonic() > ends:
                child.end()
                raise FlexError(f"the SuperLink did not start ({error}); {server / LOG} says why") from None
        time.sleep(0.3)


def register(deployment: Deployment) -> dict[str, int]:
    """Registers the keys that the SuperLink does not have, takes out those of sites that left; node ids by site."""
    path = deployment.folder / SERVER / NODES
    known: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    wanted = {name: _fingerprint(deployment.public_key(name)) for name in deployment.sites}
    for name, entry in list(known.items()):
        if wanted.get(name) != entry["key"]:
            flwr(deployment, "supernode", "unregister", str(entry["node"]))
            del known[name]
            _write(path, json.dumps(known))
    for name, key in wanted.items():
        if name not in known:
            told = flwr(deployment, "supernode", "register", str(deployment.public_key(name)), as_json=True)
            known[name] = {"node": int(told["node-id"]), "key": key}
            _write(path, json.dumps(known))
    return {name: known[name]["node"] for name in deployment.sites}


def wait_for_nodes(deployment: Deployment, seconds: float) -> dict[int, str]:
    """`nodes`, again and again while a server that has just started registers them."""
    ends = time.monotonic() + seconds
    while True:
        try:
            return nodes(deployment)
        except FlexError:
            if time.monotonic() > ends:
                raise
        time.sleep(0.3)


def nodes(deployment: Deployment) -> dict[int, str]:
    """node id -> site, in the order of the configuration; FlexError where a site is not registered."""
    path = deployment.folder / SERVER / NODES
    known = json.loads(path.read_text()) if path.exists() else {}
    missing = [name for name in deployment.sites if name not in known]
    if missing:
        raise FlexError(f"{missing[0]!r} is not registered; expected `flex deploy server` to run since the last change")
    return {known[name]["node"]: name for name in deployment.sites}


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)


def _fingerprint(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise FlexError(f"cannot read the public key {path}: {error.strerror}") from None


def flwr(deployment: Deployment, *command: str, options: Sequence[str] = (), as_json: bool = False) -> Any:
    """One of Flower's commands for this federation's SuperLink; its JSON where it is asked for."""
    home = deployment.folder / SERVER / "cli"
    home.mkdir(parents=True, exist_ok=True)
    values = {"address": f"127.0.0.1:{deployment.port}", "root-certificates": str(deployment.ca)}
    body = "".join(f"{key} = {to_toml(value)}\n" for key, value in values.items())
    (home / "config.toml").write_text(f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n{body}')
    asked = ["--format", "json"] if as_json else []
    said = call([program("flwr"), *command, CONNECTION, *options, *asked], environment(home))
    if not as_json:
        return said
    try:
        return json.loads(said[said.index("{") :])
    except ValueError:
        raise FlexError(f"`flwr {command[0]}` answered {said[-200:]!r}; expected JSON") from None


def has_ended(deployment: Deployment, run_id: int) -> bool:
    """Whether Flower says that this run has ended.

    Raises:
        FlexError: the SuperLink does not answer.
    """
    check_server("127.0.0.1", deployment.port, deployment.ca)
    told = flwr(deployment, "list", options=["--run-id", str(run_id)], as_json=True)
    if not told.get("runs"):
        raise FlexError(f"Flower does not know the run {run_id}: {told.get('error-message', told)}")
    return any(str(run.get("status")).startswith("finished") for run in told["runs"])


def stop(deployment: Deployment, run_id: int) -> None:
    """Ends a run at the server."""
    flwr(deployment, "stop", str(run_id))
