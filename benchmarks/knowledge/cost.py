"""What an anchor costs: a client's turn with it beside one without, in turn, on the demo's base.

Seconds are of the processor, one thread: they depend less on who else is at work than those of the clock.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from flex.demo.data import demo_config, write_demo_data
from flex.methods import MAIN
from flex.runs.world import load_world

SEED, TURNS = 31, 5
WAYS = {
    "distill, a quarter of the batch": {"what": "distill", "batch_size": 4},
    "distill, half of it": {"what": "distill", "batch_size": 8},
    "both, a quarter": {"what": "both", "batch_size": 4},
    "gate, a quarter": {"what": "gate", "batch_size": 4},
}


def show(client: str = "workshop") -> None:
    """Prints the median of the turns' ratios, and their spread."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        plain = demo_config(folder, ["threads=1", f'train.methods=["{MAIN}"]'])
        write_demo_data(Path(plain.data.for_seed(SEED).train).parent, SEED)
        world = load_world(plain, SEED)
        anchors = {"none": None}
        for name, settings in WAYS.items():
            anchors[name] = load_world(plain.with_values(anchor=settings), SEED, world.base).anchor
        site = world.sites(plain, MAIN, SEED, Path(folder) / "job")[client]
        shared = site.model.shared_arrays()
        site.train(1, shared)  # the grafts are chosen here
        seconds: dict[str, list[float]] = {name: [] for name in anchors}
        for turn in range(TURNS + 1):
            for name, anchor in anchors.items():
                site.model.anchor = anchor
                started = time.process_time()
                site.train(2, shared)
                if turn:  # in the first the teacher is asked
                    seconds[name].append(time.process_time() - started)
    print(f"a turn without an anchor: {statistics.median(seconds['none']):.2f} s of one processor")
    for name in WAYS:
        ratios = sorted(mine / other for mine, other in zip(seconds[name], seconds["none"], strict=True))
        print(f"{name}: {statistics.median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f})")
