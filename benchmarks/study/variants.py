"""What the study compares: starts of the graft (one line each), and the settings they are tried in."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.dolly import dolly_clients, dolly_settings
from flex.config import RunConfig, read_config
from flex.demo.data import demo_config, write_demo_data


@dataclass(frozen=True)
class Variant:
    """`group`: variants of one group have the same number of trained parameters and the same steps."""

    title: str
    group: str
    method: str = "flex"
    graft: dict[str, Any] = field(default_factory=dict)


# The paper's start. A variant says what differs from it, so that no default of the package decides what was measured.
_PAPER = {"target": "output", "refit": False, "ridge": 1e-2, "refit_scale": 1.0, "gate": "zeros", "training": "full"}
ONE, TWO, LORA, OTHER = "one expert wide", "two experts wide", "LoRA on the graft", "no graft"
RIVAL = "something else kept private"
_CORRECTION = {"target": "correction"}
# Of the down projection; fitted hard it takes the LoRA's part.
_SMALL = {"refit": True, "ridge": 1.0, "refit_scale": 0.1}
VARIANTS = {
    "fedavg": Variant("FedAvg", OTHER, "fedavg"),
    "local": Variant("local LoRA", OTHER, "local"),
    "rule": Variant("the paper's rule", ONE, graft={"criterion": "reconstruction"}),
    "random": Variant("random expert (control)", ONE, graft={"criterion": "random"}),
    "fresh": Variant("fresh module (control)", ONE, graft={"criterion": "fresh"}),
    "zero": Variant("fresh, down projection 0 (control)", ONE, graft={"criterion": "zero"}),
    "scaled": Variant("best scaled expert", ONE, graft={"criterion": "scaled"}),
    "routed": Variant("most used expert", ONE, graft={"criterion": "routed_mass"}),
    "rule-refit": Variant("the paper's rule, refitted", ONE, graft={"criterion": "reconstruction", "refit": True}),
    "neurons": Variant("neurons", ONE, graft={"criterion": "neurons"}),
    "neurons-refit": Variant("neurons, refitted", ONE, graft={"criterion": "neurons", "refit": True}),
    "scaled-corr": Variant("best scaled expert, correction", ONE, graft={"criterion": "scaled", **_CORRECTION}),
    "random-corr": Variant(
        "random expert, refitted to the correction", ONE, graft={"criterion": "random", **_CORRECTION, **_SMALL}
    ),
    "neurons-corr": Variant("neurons, correction", ONE, graft={"criterion": "neurons", **_CORRECTION}),
    "neurons-corr-refit": Variant(
        "neurons, refitted to the correction", ONE, graft={"criterion": "neurons", **_CORRECTION, **_SMALL}
    ),
    "neurons-corr-refit-3": Variant(
        "the same, chosen after 3 shared rounds", ONE,
        graft={"criterion": "neurons", **_CORRECTION, **_SMALL, "after_rounds": 3},
    ),
    "rule-convex": Variant(
        "the paper's rule, convex", ONE, graft={"criterion": "reconstruction", "combine": "convex", "logit_bias": 0.0}
    ),
    "rule-router": Variant(
        "the paper's rule, gate from the router", ONE, graft={"criterion": "reconstruction", "gate": "router"}
    ),
    "random-2": Variant("two random experts (control)", TWO, graft={"criterion": "random", "experts": 2}),
    "renormalized-2": Variant("two experts, router's weights", TWO, graft={"criterion": "renormalized", "experts": 2}),
    "subset-2": Variant("two experts, best scales", TWO, graft={"criterion": "scaled_subset", "experts": 2}),
    "rule-lora": Variant("the paper's rule", LORA, graft={"criterion": "reconstruction", "training": "lora"}),
    "random-lora": Variant("random expert (control)", LORA, graft={"criterion": "random", "training": "lora"}),
    "fresh-lora": Variant("fresh module (control)", LORA, graft={"criterion": "fresh", "training": "lora"}),
    "neurons-corr-lora": Variant(
        "neurons, refitted to the correction", LORA,
        graft={"criterion": "neurons", "training": "lora", **_CORRECTION, **_SMALL},
    ),
    "private-lora-small": Variant(
        "no graft, but a second, private LoRA", LORA, "flex-private-lora",
        graft={"criterion": "reconstruction", "training": "lora"},
    ),
    "private-lora": Variant("a second, private LoRA", RIVAL, "flex-private-lora"),
    "adapt": Variant("the most used expert, trained in place", RIVAL, "flex-adapt"),
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """`metric`: what its test part is judged by; `variants`: empty for all."""

    title: str
    metric: str
    seeds: tuple[int, ...]
    variants: tuple[str, ...] = ()


_CORE = (
    *("fedavg", "rule", "random", "fresh", "zero", "scaled", "neurons", "neurons-refit"),
    *("scaled-corr", "random-corr", "neurons-corr", "neurons-corr-refit"),
)
_REAL = ("fedavg", "rule", "random", "fresh", "neurons-refit", "scaled-corr", "random-corr", "neurons-corr-refit")
_FEW = ("rule", "random", "fresh", "neurons-corr-refit")
SETTINGS = {
    "demo": Setting("the demo's clients, all their examples", "exact_match", (5, 6, 7, 8, 9, 10)),
    "demo-20": Setting("the demo's clients, 20 examples each", "exact_match", (5, 6, 7), _CORE),
    "demo-2000": Setting("the demo's clients, 2,000 examples each", "exact_match", (5, 6, 7), _FEW),
    "dolly-4": Setting("Dolly, four clients of one category each", "loss", (0, 1, 2), _REAL),
    "dolly-10": Setting("Dolly, ten Dirichlet(0.5) clients", "loss", (0, 1, 2), _FEW),
}


def configure(setting: str, variant: str, seed: int, folder: Path, base: Path | None, dolly: Path | None) -> RunConfig:
    """The run of one (setting, variant, seed); writes its data below `folder` where they are not there yet."""
    job, method = folder / setting / variant / f"seed{seed}", VARIANTS[variant].method
    graft = {**_PAPER, **VARIANTS[variant].graft} if VARIANTS[variant].graft else {}
    common = [f"graft.{key}={json.dumps(value)}" for key, value in graft.items()]
    common += [f'train.methods=["{method}"]', f"train.seeds=[{seed}]", "workers=1", "threads=1", 'anchor.what="none"']
    if setting.startswith("demo"):
        many = 2000 if setting == "demo-2000" else None
        data = folder / (f"data-{many}-seed{seed}" if many else f"data-seed{seed}")
        if not (data / "train.jsonl").exists():
            write_demo_data(data, seed, many)
        paths = {name: str(data / f"{name}.jsonl") for name in ("train", "test")}
        own = [f"data.{name}={json.dumps(path)}" for name, path in paths.items()]
        own += ['data.general=""', "evaluate.every=3", "evaluate.rouge=false", "data.max_test=100"]
        own += ["data.max_train=20"] if setting == "demo-20" else []
        return demo_config(job, [*own, *common])
    if base is None or dolly is None:
        raise SystemExit(f"the setting {setting} needs --base (a pretrained MoE) and --dolly (a folder)")
    data = dolly_clients(folder / f"{setting}-seed{seed}", dolly, 10 if setting == "dolly-10" else 0, seed)
    own = [*dolly_settings(base, data, job), "evaluate.every=2", "evaluate.rouge=false"]
    return read_config(None, [*own, *common])
