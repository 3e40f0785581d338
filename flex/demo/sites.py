"""The demo for several sites: a file for each of them with its own examples and nothing else, and a configuration."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from flex.config import config_text
from flex.demo.data import BASE_FOLDER, demo_config, write_demo_data
from flex.errors import FlexError

SITES = ("farm", "clinic", "workshop")
METHODS = ("flex", "scaffold")
SEED, ROUNDS = 3, 3


def write_sites(folder: Path, sites: Sequence[str] = SITES, methods: Sequence[str] = METHODS) -> list[Path]:
    """Writes `flex.toml`, `model/` and for each site `NAME/{train,test,general}.jsonl`; returns what is new.

    The training files have no column that says whose an example is: all of a file is its site's.

    Raises:
        FlexError: `folder` cannot be written.
    """
    try:
        shutil.copytree(BASE_FOLDER, folder / "model", dirs_exist_ok=True)
        data = write_demo_data(folder / "all", SEED)
        for name in sites:
            (folder / name).mkdir(exist_ok=True)
            for path in (data.train, data.test):
                own = [record for record in map(json.loads, path.read_text().splitlines()) if record["client"] == name]
                lines = [json.dumps({key: value for key, value in record.items() if key != "client"}) for record in own]
                (folder / name / path.name).write_text("\n".join(lines) + "\n")
            shutil.copyfile(data.general, folder / name / data.general.name)
        overrides = [
            f"data.{part}={json.dumps(str((folder / 'all').absolute() / f'{part}.jsonl'))}"
            for part in ("train", "test", "general")
        ]
        overrides += [f"data.clients={json.dumps(list(sites))}", f"train.methods={json.dumps(list(methods))}"]
        overrides += [f"train.seeds=[{SEED}]", f"train.rounds={ROUNDS}", "threads=1", "workers=1"]
        overrides += ['anchor.what="none"', 'anchor.text=""']  # one more file at every site, for nothing that is shown
        (folder / "flex.toml").write_text(config_text(demo_config(folder / "run", overrides)))
    except OSError as error:
        raise FlexError(f"cannot write the example to {folder}: {error}") from None
    return [folder / "flex.toml", folder / "model", *(folder / name for name in sites)]
