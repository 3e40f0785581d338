"""What a round at several sites costs on Flower's network: seconds beyond the sites' turns, bytes, memory by process.

    python -m benchmarks.deployed                  the demo's model and method at three sites on loopback
    python -m benchmarks.deployed 19               a random model whose LoRA has so many megabytes, at as many sites
    python -m benchmarks.deployed 500 --sites 2    such messages want 20 GB of memory

Real processes: a SuperLink, and for each site a worker with its SuperNode. Memory is the largest resident set that a
process of a kind has had, as the kernel keeps it, looked up twice a second.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.tables import table
from flex.config import config_text, read_config
from flex.deploy.processes import Child, children, free_port
from flex.store.events import Event, Exchanged, Trained, read_events

SITES = ("farm", "clinic", "workshop")
ROUNDS = 3
LAYERS, PROJECTIONS = 4, 4
START_S = 300.0
# What a process is called by, the first that its command line has.
KINDS = {
    "flower-superlink": "SuperLink",
    "flower-supernode": "SuperNode",
    "flower-superexec": "SuperExec",
    "flwr-serverapp": "server of the run",
    "flwr-clientapp": "shim of a message",
    "flex.cli worker": "worker",
    "flex.cli node": "flex node",
    "flex.cli deploy server": "flex deploy server",
    "flex.cli deploy run": "flex deploy run",
}


def rank_for(megabytes: float, hidden: int) -> int:
    """The LoRA rank with which the four attention projections of `LAYERS` layers have so many megabytes in fp32."""
    return round(megabytes * 1e6 / 4 / (LAYERS * PROJECTIONS * 2 * hidden))


def write_base(folder: Path, hidden: int) -> None:
    """A random model with wide attention and small experts, and the demo's tokenizer, into the demo's folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    config.hidden_size, config.num_hidden_layers, config.num_experts = hidden, LAYERS, 4
    config.intermediate_size = 128
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def prepare(folder: Path, megabytes: float | None, sites: tuple[str, ...]) -> None:
    """The demo, cut up for the sites; where megabytes are asked for, with another model and next to no training."""
    flex("deploy", "example", folder)
    path = folder / "flex.toml"
    config = read_config(path).with_values(data={"clients": sites}, evaluate={"rouge": False})
    if megabytes is None:
        config = config.with_values(train={"methods": ("flex",), "rounds": ROUNDS})
    else:
        hidden = 1024 if megabytes < 100 else 2048
        write_base(folder / "model", hidden)
        rank = rank_for(megabytes, hidden)
        train = {"methods": ("fedavg",), "rounds": ROUNDS, "steps": 1, "batch_size": 1}
        config = config.with_values(train=train, lora={"rank": rank, "alpha": rank})
        for site in sites:
            for part in ("train", "test", "general"):
                file = folder / site / f"{part}.jsonl"
                file.write_text("\n".join(file.read_text().splitlines()[:4]) + "\n")
    path.write_text(config_text(config))


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "flex.cli", *map(str, words)]


def flex(*words: object) -> None:
    done = subprocess.run(command(*words), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"flex {words[0]} {words[1]} failed:\n{done.stdout}{done.stderr}")


class Peaks:
    """The largest resident set of the processes of each kind below this one, in bytes."""

    def __init__(self):
        self.of: dict[str, int] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.5):
            for pid in _below(os.getpid()):
                try:
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    status = Path(f"/proc/{pid}/status").read_text()
                except OSError:  # it has just ended
                    continue
                kind = next((name for called, name in KINDS.items() if called in words), None)
                peak = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)
                if kind:
                    self.of[kind] = max(self.of.get(kind, 0), peak * 1024)


def _below(pid: int) -> Iterator[int]:
    for child in children(pid):
        yield child
        yield from _below(child)


def run(folder: Path, sites: tuple[str, ...]) -> tuple[list[Event], dict[str, int], float]:
    """(the log of the run, peaks by kind of process, seconds of `flex deploy run`)."""
    example, fed = folder / "example", folder / "fed"
    flex("deploy", "init", fed, example / "flex.toml", "--address", f"127.0.0.1:{free_port()}", "--sites", *sites)
    peaks, log = Peaks(), folder / "log"
    log.touch()
    started = [Child(command("deploy", "server", fed, "--listen", "127.0.0.1"), os.environ, log)]
    try:
        for site in sites:
            own = example / site
            words = ("worker", fed / "packages" / site, "--model", example / "model", "--data", own / "train.jsonl")
            started.append(Child(command(*words, "--test", own / "test.jsonl", "--with-node"), os.environ, log))
        ends = time.monotonic() + START_S
        while log.read_text(errors="replace").count("SuperNode ID") < len(sites):
            if time.monotonic() > ends or any(child.ended is not None for child in started):
                sys.exit(f"the sites did not come:\n{log.read_text(errors='replace')}")
            time.sleep(0.2)
        began = time.monotonic()
        flex("deploy", "run", fed)
        seconds = time.monotonic() - began
    finally:
        peaks.stop()
        for child in reversed(started):
            child.end()
    (job,) = (fed / "run").glob("*-seed*/metrics.jsonl")
    return read_events(job), peaks.of, seconds


def report(events: list[Event], peaks: dict[str, int], seconds: float, sites: int) -> Iterator[str]:
    """Lines of two tables: the rounds, and memory by kind of process."""
    rounds = [event for event in events if isinstance(event, Exchanged)]
    turns = [event for event in events if isinstance(event, Trained)]
    beyond = [event.seconds - event.turn_seconds for event in rounds]
    last = [event for event in turns if event.round == rounds[-1].round]
    row = {
        "sites": sites,
        "MB a message": f"{last[0].bytes_up / 1e6:.3g}",
        "MB up a round": f"{sum(event.bytes_up for event in last) / 1e6:.3g}",
        "seconds a round": f"{statistics.median(event.seconds for event in rounds):.1f}",
        "longest turn": f"{statistics.median(event.turn_seconds for event in rounds):.1f}",
        "beyond": f"{statistics.median(beyond):.1f} ({min(beyond):.1f} to {max(beyond):.1f})",
        "whole run, seconds": f"{seconds:.0f}",
    }
    yield from table(list(row), [list(row.values())])
    yield from table(["process", "peak MB"], [(kind, f"{peak / 1e6:.0f}") for kind, peak in sorted(peaks.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("megabytes", nargs="?", type=float, help="of a message (default: the demo's)")
    parser.add_argument("--sites", type=int, default=3, choices=(2, 3), help="(default: %(default)s)")
    given = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    sites = SITES[: given.sites]
    with tempfile.TemporaryDirectory(prefix="fx") as name:  # short: a worker's socket has at most 107 bytes
        folder = Path(name)
        prepare(folder / "example", given.megabytes, sites)
        for line in report(*run(folder, sites), len(sites)):
            print(line)


if __name__ == "__main__":
    main()
