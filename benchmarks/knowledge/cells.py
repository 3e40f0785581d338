"""What the study of anchors compares: methods with and without one, kinds and weights; and the run of each, on the demo
and on Dolly."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.dolly import dolly_clients, dolly_settings
from flex.commands.anchors import anchors
from flex.config import RunConfig, read_config
from flex.demo.data import BASE_FOLDER, demo_config, write_demo_data
from flex.methods import METHODS

# Seeds: the default is chosen on the first, judged on the others; on Dolly nothing is chosen.
CHOOSING, TEST, DOLLY = (31, 32, 33), (41, 42, 43, 44, 45, 46), (50, 51, 52, 53, 54, 55)
DEMO = (3, 4)  # those of `flex demo`; its jobs are the cells with the default anchor, with ROUGE-L besides
# A cell says all that decides its anchor, so that no default of the package decides what was measured.
ANCHOR = {"batch_size": 4, "examples": 256, "top_k": 64, "gate_factor": 10.0}
WEIGHTS = (0.03, 0.1, 0.3)
RIVALS = ("fedavg", "local", "flex-private-lora", "ditto", "flex-paper", "flex-random", "flex-fresh")


@dataclass(frozen=True)
class Cell:
    """A method and its anchor. `kind`: as in `AnchorSettings.what`; `text`: what the anchors are of, the "mixture" that
    the base was pretrained on, or "drawn" from the base."""

    method: str
    kind: str = "none"
    weight: float = 0.0
    text: str = "mixture"

    @property
    def title(self) -> str:
        label = METHODS[self.method].label
        if self.kind == "none":
            return label if self.method == "base" else f"{label}, no anchor"
        return f"{label}, {self.kind} {self.weight:g}{', drawn text' if self.text == 'drawn' else ''}"

    def anchor(self, text: Path) -> list[str]:
        values: dict[str, Any] = {"what": self.kind}
        if self.kind != "none":
            values |= {"text": str(text), "weight": self.weight, **ANCHOR}
        return [f"anchor.{name}={json.dumps(value)}" for name, value in values.items()]


def _cells() -> dict[str, Cell]:
    cells = {"base": Cell("base"), "flex": Cell("flex")}
    for kind in ("distill", "both", "gate"):
        cells |= {f"flex-{kind}-{weight:g}": Cell("flex", kind, weight) for weight in WEIGHTS}
    cells["flex-distill-0.1-drawn"] = Cell("flex", "distill", 0.1, "drawn")
    cells |= {method: Cell(method) for method in RIVALS}
    cells |= {
        f"{method}-distill-{weight:g}": Cell(method, "distill", weight) for method in RIVALS for weight in WEIGHTS
    }
    return cells


CELLS = _cells()
DEFAULT = "flex-distill-0.1"  # the demo's


@dataclass(frozen=True)
class RealText:
    """What the runs on Dolly need. `base`: a pretrained MoE that has seen no record of the clients; `dolly`: a folder
    with train.jsonl.gz and test.jsonl.gz; `anchors`: a text that the base was pretrained on; `held`: one like it that
    nobody has seen, of which perplexity and cloze are made."""

    base: Path
    dolly: Path
    anchors: Path
    held: Path


def configure_dolly(name: str, seed: int, folder: Path, given: RealText) -> RunConfig:
    """As `configure`, for four clients of one category each."""
    cell, data = CELLS[name], dolly_clients(folder / f"data-seed{seed}", given.dolly, 0, seed)
    own = [*dolly_settings(given.base, data, folder / name / f"seed{seed}"), "evaluate.rouge=false"]
    own += ["train.rounds=12", "train.steps=10"]  # in fewer a client hardly learns, and nothing is forgotten
    own += ['evaluate.tasks=["test", "perplexity", "cloze"]', f"evaluate.text={json.dumps(str(given.held))}"]
    own += [f'train.methods=["{cell.method}"]', f"train.seeds=[{seed}]", "workers=1", "threads=1"]
    own += cell.anchor(given.anchors)
    own += ["anchor.batch_size=1"] if cell.kind != "none" else []  # a quarter of the batch, as in the demo
    return read_config(None, own)


def configure(name: str, seed: int, folder: Path) -> RunConfig:
    """The run of one cell and seed; writes its data below `folder` where they are not there yet."""
    cell, data = CELLS[name], folder / f"data-seed{seed}"
    if not (data / "anchor.jsonl").exists():
        write_demo_data(data, seed)
    text = data / "anchor.jsonl"
    if cell.text == "drawn":
        text = folder / "drawn.jsonl"
        if not text.exists():
            anchors(str(BASE_FOLDER), text, ANCHOR["examples"], 100, 0)
    own = [f"data.{part}={json.dumps(str(data / f'{part}.jsonl'))}" for part in ("train", "test", "general")]
    own += [f'train.methods=["{cell.method}"]', f"train.seeds=[{seed}]", "workers=1", "threads=1"]
    own += ["evaluate.rouge=false", *cell.anchor(text)]
    return demo_config(folder / name / f"seed{seed}", own)
