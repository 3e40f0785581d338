"""What a federation costs the server: real job, messages, strategy, checks, checkpoint, log and report.

All on the in-process grid; the turn alone is a stub that adds noise to what it was sent. Every case in a process of its
own, for its memory.

    python -m benchmarks.server_cost                   all cases, as JSON lines and a table
    python -m benchmarks.server_cost payload-19 ...    some of them

Seconds are of one processor (`time.process_time`), so that what else the machine does counts little; waiting for a disk
is not in them. `server` is a round without what the clients' half takes (stub, their half of the messages). Bytes are
those of the tensors, all clients together. Peak memory is the process's largest resident set over that of its imports;
it holds both sides, of the clients' one message and one reply at a time.
"""

import argparse
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tables import table


@dataclass(frozen=True)
class Case:
    """`floats`: numbers that are shared. `rounds`: of which the last ends with an evaluation of all sites."""

    sites: int
    a_round: int
    floats: int
    rounds: int = 3
    secure: bool = False


LORA_32 = 9_437_184 // 2  # 19 MB: as many bytes in fp32 as a LoRA of rank 32 of Qwen1.5-MoE-A2.7B has in bf16
SMALL = 65_536  # the demo's LoRA is half of it
CASES = {
    "payload-19": Case(5, 5, LORA_32),
    "payload-19-secure": Case(5, 5, LORA_32, secure=True),
    "payload-500": Case(2, 2, 125_000_000, rounds=2),
    "sites-10": Case(10, 10, LORA_32),
    "sites-100": Case(100, 100, LORA_32, rounds=2),
    "sites-1000": Case(1000, 100, SMALL),
    "sites-10000": Case(10_000, 100, SMALL),
}
COLUMNS = {
    "case": "case",
    "sites": "sites",
    "a_round": "a round",
    "payload_mb": "MB a message",
    "start_s": "start s",
    "server_s": "server s a round",
    "clients_s": "clients s a round",
    "scores_s": "scoring all s",
    "up_mb": "MB up a round",
    "down_mb": "MB down a round",
    "peak_mb": "peak MB over imports",
    "disk_mb": "disk MB",
    "report_s": "report s",
    "report_mb": "report MB",
}


def tensors(floats: int) -> dict[str, np.ndarray]:
    """Of 2,048 columns, as a LoRA's are many: one of at most 4 million numbers after another."""
    found, left = {}, floats
    while left > 0:
        rows = max(1, min(left, 4 << 20) // 2048)
        found[f"layer.{len(found)}.lora.weight"] = np.zeros((rows, 2048), np.float32)
        left -= rows * 2048
    return found


class StubSite:
    """A site whose turn is a noise on what it was sent."""

    def __init__(self, number: int, config, start, folder: Path):
        from flex.federation.masked_site import MaskedSite

        self.client_id, self.number, self.config, self.start = f"site-{number:05d}", number, config, start
        self.client = type("Client", (), {"train": [None] * 100})
        self.model = type("Model", (), {"shared_arrays": staticmethod(lambda: start)})
        self.masked = MaskedSite(folder / self.client_id, self.client_id)

    def about(self):
        from flex.federation.agreement import settings_digest, versions
        from flex.federation.messages import SiteAbout

        sizes = {"shared": sum(a.size for a in self.start.values()), "personal": 0}
        about = SiteAbout(self.client_id, "base", 100, 20, {"train": 0, "test": 0}, sizes)
        return type(about)(**{**vars(about), "settings": settings_digest(self.config), "versions": versions()})

    def hides(self, round_index: int) -> bool:
        return self.config.strategy.secure

    def train(self, round_index: int, shared, kept=None):
        from flex.federation.client import TurnReport

        rng = np.random.default_rng([self.number, round_index])
        update = {}
        for name, array in shared.items():  # one noise for all rows: a draw a number would take longer than the server
            update[name] = array + (1e-3 * rng.normal(size=array.shape[1])).astype(np.float32)
        numbers = {"num_examples": 100, "loss": 1.0, "opening": None, "tokens": 1000, "seconds": 1.0}
        return TurnReport(update, numbers)

    def evaluate(self, round_index: int, shared, splits=()):
        from flex.store.events import AFTER, Evaluated

        return [Evaluated(round_index, self.client_id, AFTER, "test", 20, 1.0, 0.5)]


def measure(name: str, case: Case, folder: Path) -> dict[str, Any]:
    """One case, in this process."""
    from flex.config import RunConfig
    from flex.federation.client_app import make_client_app
    from flex.federation.local import InProcessGrid
    from flex.federation.rounds import identity
    from flex.report import write_report
    from flex.runs.job import Job
    from flex.runs.progress import Bar
    from flex.store.events import METRICS

    config = RunConfig().with_values(
        train={"methods": ("fedavg",), "rounds": case.rounds, "clients_per_round": case.a_round % case.sites},
        strategy={"secure": case.secure},
    )
    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    start = tensors(case.floats)
    sites = {f"site-{n:05d}": StubSite(n, config, start, folder / "sites") for n in range(case.sites)}
    app, at_sites = make_client_app(lambda _, context: sites[identity(context)[0]]), [0.0]

    def timed(message, context):
        began = time.process_time()
        try:
            return app(message, context)
        finally:
            at_sites[0] += time.process_time() - began

    grid = InProcessGrid(timed, list(sites))
    job = Job(config, "fedavg", 0, folder / "fedavg-seed0", grid, lambda _: {}, Bar(lambda **_: None))
    marks: list[tuple[float, float]] = []
    scored: list[float] = []
    keep = job._keep

    def marked(*arguments) -> bool:
        ended = keep(*arguments)
        marks.append((time.process_time(), at_sites[0]))
        return ended

    def begun(strategy, started):
        found, configure = resume(strategy, started), strategy.configure_evaluate

        def scoring(*arguments):
            scored.append(time.process_time())
            return configure(*arguments)

        strategy.configure_evaluate = scoring
        marks.append((time.process_time(), at_sites[0]))
        return found

    resume, job._keep, job._resume = job._resume, marked, begun
    began = time.process_time()
    job.run()
    rounds = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(marks)]
    rounds.pop()  # ends with an evaluation
    log = (folder / "fedavg-seed0" / METRICS).read_bytes()
    (folder / METRICS).write_bytes(log)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    report_began = time.process_time()
    page = write_report(folder)
    events = [json.loads(line) for line in log.splitlines()]
    trained = [event for event in events if event["event"] == "train"]
    up, down = (sum(event[f"bytes_{way}"] for event in trained) / case.rounds / 1e6 for way in ("up", "down"))
    disk = sum(path.stat().st_size for path in (folder / "fedavg-seed0").rglob("*") if path.is_file())
    seconds, sites_s = (sum(column) / len(rounds) for column in zip(*rounds, strict=True))
    return {
        "case": name,
        "sites": case.sites,
        "a_round": case.a_round,
        "payload_mb": sum(array.nbytes for array in start.values()) / 1e6,
        "start_s": marks[0][0] - began,
        "server_s": seconds - sites_s,
        "clients_s": sites_s,
        "scores_s": marks[-1][0] - scored[0],
        "up_mb": up,
        "down_mb": down,
        "peak_mb": peak - imported,
        "disk_mb": disk / 1e6,
        "report_s": time.process_time() - report_began,
        "report_mb": page.stat().st_size / 1e6,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--note", default="", help="what else the machine did; stands above the table")
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(arguments.one, CASES[arguments.one], Path(folder))))
        return 0
    if wrong := [name for name in arguments.cases if name not in CASES]:
        parser.error(f"no case {wrong[0]!r}; expected some of {', '.join(CASES)}")
    rows = []
    for name in arguments.cases or CASES:
        came = subprocess.run(
            [sys.executable, "-m", "benchmarks.server_cost", "--one", name],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
            text=True,
        )
        rows.append(json.loads(came.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]), flush=True)
    print(f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"{arguments.note}\n" if arguments.note else "")
    print("\n".join(table(list(COLUMNS.values()), [[_cell(row[key]) for key in COLUMNS] for row in rows])))
    return 0


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


if __name__ == "__main__":
    sys.exit(main())
