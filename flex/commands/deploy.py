"""`flex deploy`: the coordinator's side of a run at several sites. See docs/deploy.md."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from flex.config import read_config
from flex.deploy import superlink
from flex.deploy.app_files import write_app
from flex.deploy.certificates import wait_for_server
from flex.deploy.folder import PACKAGES, SERVER, Deployment, init, read_deployment, update
from flex.deploy.processes import until_stopped
from flex.deploy.progress import DONE, ENDED, PROGRESS, Listener, last_run
from flex.errors import FlexError, require
from flex.runs.progress import Tell, job_lines
from flex.store.files import is_locked

console = Console()
LOOK_S = 0.3
QUIET_S = 20.0  # after this long without a word, Flower is asked whether the run still lives
MOST_UNANSWERED = 3


def make(
    folder: Path, path: Path, overrides: list[str], address: str, sites: list[str], keys: list[str], wheels: Path | None
) -> int:
    """`flex deploy init`."""
    deployment = init(folder, read_config(path, overrides), address, sites, _keys(keys), wheels)
    return _say_packages(deployment)


def remake(
    folder: Path, path: Path, overrides: list[str], sites: list[str], keys: list[str], wheels: Path | None
) -> int:
    """`flex deploy update`."""
    deployment = update(folder, read_config(path, overrides), sites, _keys(keys), wheels)
    return _say_packages(deployment)


def example(folder: Path) -> int:
    """`flex deploy example`: the demo, cut up."""
    from flex.demo.sites import write_sites

    for path in write_sites(folder):
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)
    return 0


def _keys(words: list[str]) -> dict[str, Path]:
    pairs = {}
    for word in words:
        name, sign, file = word.partition("=")
        require(bool(sign and name and file), f"--key got {word!r}; expected NAME=FILE.pub")
        require(name not in pairs, f"--key names {name!r} twice; expected one key a site")
        pairs[name] = Path(file)
    return pairs


def _say_packages(deployment: Deployment) -> int:
    console.print(
        f"run {deployment.run_name} of {len(deployment.sites)} sites at {deployment.address}", highlight=False
    )
    for name in deployment.sites:
        path = deployment.folder / PACKAGES / f"{name}.tar.gz"
        console.print(f"for {name}: {path}", markup=False, highlight=False, soft_wrap=True)
    return 0


def server(folder: Path, listen: str) -> int:
    """`flex deploy server`: the SuperLink, until it is stopped."""
    deployment = read_deployment(folder)
    with until_stopped() as stopped:
        child = superlink.start(deployment, listen)
        try:
            known = superlink.register(deployment)
            print(f"ready at {listen}:{deployment.port}; sites: {', '.join(known)}", flush=True)
            while not stopped.wait(LOOK_S):
                if child.ended is not None:
                    raise FlexError(
                        f"the SuperLink ended with code {child.ended}; {deployment.folder / SERVER / superlink.LOG} "
                        "says why"
                    )
                if child.look_after():
                    log = deployment.folder / SERVER / superlink.LOG
                    print(f"note: the SuperLink lost its SuperExec and got another one; {log} says why", flush=True)
        finally:
            child.end()
    return 0


def run(folder: Path, wait: float) -> int:
    """`flex deploy run`: every method and seed that is not done, with progress by site; then the report."""
    deployment = read_deployment(folder)
    wait_for_server("127.0.0.1", deployment.port, deployment.ca, wait)
    superlink.wait_for_nodes(deployment, wait)
    before = last_run(deployment.folder / PROGRESS) if is_locked(deployment.run) else None
    if before is not None:  # whoever called then was ended without a chance to stop it
        console.print("a run that was begun before is at work; it is shown from its beginning", highlight=False)
        ended = _shown(deployment, before)
    if before is None or ended == _without_a_word(deployment):
        ended = _shown(deployment, _start(deployment, wait))
    require(ended == DONE, f"{ended}; `flex deploy run {folder}` goes on from the last round that is whole")
    from flex.commands.train import report_on  # torch, peft and transformers: only when there is something to show

    return report_on(deployment.run)


def _start(deployment: Deployment, wait: float) -> int:
    """Hands the app to Flower; the run's number there."""
    app = write_app(deployment.folder / SERVER / "app")
    settings = f'folder="{deployment.folder}" wait={float(wait)}'
    told = superlink.flwr(deployment, "run", str(app), options=["--run-config", settings], as_json=True)
    require("run-id" in told, f"Flower did not take the run: {told.get('error-message', told)}")
    return int(told["run-id"])


def _shown(deployment: Deployment, run_id: int) -> str:
    """Shows a run until it ends, and stops it where it is interrupted here; how it ended."""
    try:
        return _follow(deployment, run_id)
    except KeyboardInterrupt:
        _stop(deployment, run_id)
        raise


def _without_a_word(deployment: Deployment) -> str:
    log = deployment.folder / SERVER / superlink.LOG
    return f"the run ended at the server without a word (was it restarted? {log})"


def _stop(deployment: Deployment, run_id: int) -> None:
    try:
        superlink.stop(deployment, run_id)
    except FlexError as error:
        print(f"flex: the run goes on at the server ({error})", file=sys.stderr)


def _follow(deployment: Deployment, run_id: int) -> str:
    """Shows how far the run is until it ends; how it ended."""
    listener = Listener(deployment.folder / PROGRESS, run_id)
    looked, unanswered, gone = time.monotonic(), 0, False
    with job_lines(console) as place:
        lines: dict[str, Tell] = {}
        while True:
            for line in (new := listener.new()):
                if (ended := _show(line, lines, place)) is not None:
                    return ended
            if new:
                looked, unanswered, gone = time.monotonic(), 0, False
            elif gone:  # and nothing has come since: its last word would have been there before
                return _without_a_word(deployment)
            elif time.monotonic() - looked > QUIET_S:
                try:
                    gone = superlink.has_ended(deployment, run_id)
                    unanswered = 0
                except FlexError:  # a machine that is busy answers late: once is no proof
                    unanswered += 1
                    gone = unanswered >= MOST_UNANSWERED
                looked = time.monotonic()
            time.sleep(LOOK_S)


def _show(line: dict[str, Any], lines: dict[str, Tell], place: Callable[[str], Tell]) -> str | None:
    """Shows one line of progress; how the run ended, where that is what it says."""
    values = {key: value for key, value in line.items() if key not in ("run", "pid", "time", "job")}
    job = line.get("job")
    if job is None:
        if ENDED in values:
            return str(values[ENDED])
        console.print(values["what"], markup=False, highlight=False)
        return None
    if not console.is_terminal and values.get("what") and not values.get("ended"):
        print(f"{job}: {values['what']}", flush=True)
    if job not in lines:
        lines[job] = place(job)
    lines[job](**values)
    return None
