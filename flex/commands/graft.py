"""`flex graft`: what would be grafted for each client and layer, and how much it explains."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from flex.commands.saved import no_client
from flex.config import read_config
from flex.federation.client import derived_seed
from flex.graft.calibrate import Calibration, Progress
from flex.graft.choose import choose_grafts
from flex.graft.show import choice_table, curves, heat_map, write_picture
from flex.methods import MAIN, METHODS
from flex.runs.progress import progress_bars
from flex.runs.world import load_world
from flex.store.files import folder_name

console = Console()


def graft(path: Path | None, overrides: list[str], client_id: str | None) -> int:
    """What `flex` would graft for each client and layer, by how much, and a picture of it in the run's folder."""
    config = read_config(path, overrides)
    if config.threads:
        torch.set_num_threads(config.threads)
    seed = config.train.seeds[0]
    world = load_world(config, seed)
    if client_id is not None and client_id not in {c.client_id for c in world.clients}:
        raise no_client(client_id, world)
    for client in world.clients:
        if client_id in (None, client.client_id):
            examples = client.train[: config.graft.calibration_sequences]
            folder = Path(config.output) / "graft" / folder_name(client.client_id)
            with _calibration_bar(client.client_id) as progress:
                calibration = Calibration(
                    world.base, world.encoder, examples, config.evaluate.batch_size, folder, progress
                )
                drawn = str(derived_seed("graft", seed, client.client_id))
                choices = choose_grafts(calibration, config.graft.of(METHODS[MAIN]), drawn)
            console.print(choice_table(client.client_id, len(examples), choices))
            console.print(heat_map(choices, console.width))
            console.print(curves(choices))
            picture = write_picture(folder / "choice.png", client.client_id, choices)
            console.out(f"picture: {picture}\n", highlight=False)
    return 0


@contextmanager
def _calibration_bar(client_id: str) -> Iterator[Progress]:
    """A bar on a terminal, nothing elsewhere."""
    if not console.is_terminal:
        yield lambda what, done, total: None
        return
    with progress_bars(console) as bars:
        task = bars.add_task(client_id, total=None, what="")
        yield lambda what, done, total: bars.update(task, completed=done, total=total, what=what)
