"""Dolly as clients, and the settings that the studies train a small base on it with."""

import gzip
import json
from collections import defaultdict
from pathlib import Path
from random import Random

import numpy as np

DOLLY_CATEGORIES = ("closed_qa", "information_extraction", "classification", "summarization")


def dolly_settings(base: Path, data: Path, output: Path) -> list[str]:
    """Eight rounds of five steps, for `read_config`; `{seed}` in the path of the data stands for the seed."""
    own = [f"model.path={json.dumps(str(base))}", f"output={json.dumps(str(output))}", 'data.clients_by="client"']
    own += [f"data.{name}={json.dumps(str(data / f'{name}.jsonl'))}" for name in ("train", "test")]
    own += ["data.max_length=256", "lora.rank=8", "lora.alpha=16.0", "lora.dropout=0.0"]
    own += ["train.rounds=8", "train.steps=5", "train.batch_size=4", "train.learning_rate=2e-3"]
    own += ["train.graft_learning_rate=2e-3", "train.final_learning_rate=2e-4", "graft.calibration_sequences=64"]
    return own


def dolly_clients(folder: Path, dolly: Path, clients: int, seed: int, train: int = 120, test: int = 40) -> Path:
    """Dolly's records with a column `client`: one category each (`clients` 0), or mixed by a Dirichlet(0.5) draw."""
    if (folder / "test.jsonl").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator, rng = np.random.default_rng(seed), Random(f"dolly/{seed}")
    shares = (
        np.eye(len(DOLLY_CATEGORIES)) if clients == 0 else generator.dirichlet([0.5] * len(DOLLY_CATEGORIES), clients)
    )
    for part, count in (("train", train), ("test", test)):
        pools = defaultdict(list)
        with gzip.open(dolly / f"{part}.jsonl.gz", "rt") as file:
            for line in file:
                record = json.loads(line)
                pools[record["category"]].append(record)
        for pool in pools.values():
            rng.shuffle(pool)
        lines = []
        for number, share in enumerate(shares):
            name = DOLLY_CATEGORIES[number] if clients == 0 else f"client {number}"
            for _ in range(count):
                open_shares = np.array([s if pools[c] else 0 for s, c in zip(share, DOLLY_CATEGORIES, strict=True)])
                if open_shares.sum() == 0:
                    open_shares = np.array([float(bool(pools[c])) for c in DOLLY_CATEGORIES])
                category = generator.choice(DOLLY_CATEGORIES, p=open_shares / open_shares.sum())
                lines.append(json.dumps(pools[category].pop() | {"client": name}))
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    return folder
