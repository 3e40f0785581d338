"""Many clients on one machine: does memory stay flat, and what does a round cost beyond the clients' local training?

    python -m benchmarks.scale --out runs/scale [--clients 1000] [--per-round 10] [--rounds 30] [--method flex]

The demo's records and base; the records are dealt to `--clients` clients (iid). Per round: the wall clock between two
files of the server, the sum of the clients' own times, and the process's resident memory. `flex_overhead` is what is
left of the wall clock, as a share of the local training. Written to OUT/scale.json and printed.
"""

import argparse
import json
import statistics
import threading
import time
from pathlib import Path

import torch
from rich.console import Console

from flex.demo.data import demo_config, write_demo_data
from flex.federation.flower import Message
from flex.federation.local import InProcessGrid
from flex.runs.run import run
from flex.store.events import METRICS, Trained, read_events

POLL_S = 0.02


class Watch(threading.Thread):
    """When each file of the server came, and how much memory the process held then."""

    def __init__(self, server: Path):
        super().__init__(daemon=True)
        self.server, self.seen, self.over = server, {}, threading.Event()

    def run(self) -> None:
        while not self.over.wait(POLL_S):
            for path in self.server.glob("round-*.safetensors"):
                if path.name not in self.seen:
                    self.seen[path.name] = (time.perf_counter(), resident_mb())


def resident_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def measure(out: Path, clients: int, per_round: int, rounds: int, method: str) -> dict:
    torch.set_num_threads(1)
    data = out / "data"
    if not (data / "train.jsonl").exists():
        write_demo_data(data, 3, max(2000, 2 * clients))
    own = [f"data.train={json.dumps(str(data / 'train.jsonl'))}", 'data.test=""', "data.test_fraction=0.2"]
    own += ['data.split="iid"', f"data.num_clients={clients}", "data.clients=[]", 'data.general=""', "threads=1"]
    own += [f"train.clients_per_round={per_round}", f"train.rounds={rounds}", f'train.methods=["{method}"]']
    own += [
        "train.seeds=[3]",
        'anchor.what="none"',
        "evaluate.rouge=false",
        f"evaluate.clients={per_round}",
        "workers=1",
    ]
    folder = out / f"{method}-{clients}"
    config = demo_config(folder, own)
    watch = Watch(folder / f"{method}-seed3" / "server")
    watch.start()
    started = time.perf_counter()
    busy: dict[int, float] = {}
    plain = InProcessGrid._deliver

    def timed(grid: InProcessGrid, message: Message) -> Message:
        begun = time.perf_counter()
        reply = plain(grid, message)
        if message.metadata.message_type == "train":
            at = int(message.content["config"]["server-round"])
            busy[at] = busy.get(at, 0.0) + time.perf_counter() - begun
        return reply

    InProcessGrid._deliver = timed
    try:
        run(config, Console(quiet=True))
    finally:
        InProcessGrid._deliver = plain
        watch.over.set()
        watch.join()
    times = [watch.seen[name] for name in sorted(watch.seen)]
    events = [e for e in read_events(folder / METRICS) if isinstance(e, Trained)]
    local = {at: sum(e.seconds for e in events if e.round == at) for at in range(1, rounds + 1)}
    # The first round has the start before it, the last one the evaluation after it.
    walls = {at + 1: times[at][0] - times[at - 1][0] for at in range(1, len(times) - 1)}
    shares = [(walls[at] - local[at]) / local[at] for at in walls]
    return {
        "clients": clients,
        "per_round": per_round,
        "rounds": rounds,
        "method": method,
        "round_s": statistics.median(walls.values()),
        "local_training_s": statistics.median(local[at] for at in walls),
        "flex_overhead": statistics.median(shares),
        "messages_s": statistics.median(busy[at] - local[at] for at in walls),
        "resident_mb": [round(memory, 1) for _, memory in times],
        "start_s": times[0][0] - started - local[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/scale"))
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--per-round", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--method", default="flex")
    given = parser.parse_args()
    found = measure(given.out, given.clients, given.per_round, given.rounds, given.method)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "scale.json").write_text(json.dumps(found, indent=1) + "\n")
    memory = found.pop("resident_mb")
    print(json.dumps(found, indent=1))
    print(
        f"resident memory, MB: {memory[0]} after round 1, {memory[len(memory) // 2]} half way, {memory[-1]} at the end"
    )


if __name__ == "__main__":
    main()
