"""The events of a run like the demo's, with plausible numbers, for the tests of the report: as the JSON objects of its
log, which tests change freely, and read back as the events that the report takes."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from flex.report import summarise
from flex.report.numbers import Row
from flex.store import events as log
from flex.store.events import AFTER, BEFORE

Event = dict[str, Any]  # a line of the log

METHODS = ("base", "local", "fedavg", "flex", "flex-paper", "flex-random", "flex-fresh")
CLIENTS = ("aurora", "birch", "cedar", "dune", "ember")

# What the working experiment measured: exact match of shared skill, own conventions and general, then test loss.
LEVELS = {
    "base": (0.00, 0.05, 0.90, 9.81),
    "local": (0.64, 0.32, 0.21, 0.92),
    "fedavg": (0.93, 0.15, 0.11, 1.64),
    "flex": (0.90, 0.44, 0.25, 0.81),
    "flex-paper": (0.88, 0.40, 0.26, 1.21),
    "flex-random": (0.88, 0.43, 0.28, 0.81),
    "flex-fresh": (0.91, 0.42, 0.24, 0.75),
}
DEMO: dict[str, Any] = {"clients": CLIENTS, "rounds": 12, "layers": 4, "experts": 16}


def synthetic_events(
    methods: tuple[str, ...] = METHODS,
    seeds: tuple[int, ...] = (0, 1),
    clients: tuple[str, ...] = CLIENTS[:2],
    rounds: int = 3,
    layers: int = 2,
    experts: int = 8,
    groups: bool = True,
    rouge: bool = False,
    header: bool = True,
) -> list[Event]:
    """The events of a run like the demo's, with plausible numbers."""
    dice = random.Random(7)
    events: list[Event] = []
    if header:
        described = [
            {"client_id": c, "num_train": 80 + 30 * i, "num_test": 150, "description": f"own code words, unit <kg{i}>"}
            for i, c in enumerate(clients)
        ]
        events.append(
            {
                "event": "run",
                "title": "FLEx demo: five clients with their own conventions",
                "base_model": "flex/demo/assets/demo_base (Qwen2-MoE, 2.7 M parameters)",
                "template": "chat",
                "clients": described,
                "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "flwr": "1.41.0"},
                "threads": 2,
            }
        )
    for method in methods:
        for seed in seeds:
            job = _job(dice, method, clients, rounds, layers, experts, groups, rouge)
            events += [{**event, "method": method, "seed": seed} for event in job]
    return events


def _job(
    dice: random.Random,
    method: str,
    clients: tuple[str, ...],
    rounds: int,
    layers: int,
    experts: int,
    groups: bool,
    rouge: bool,
) -> list[Event]:
    level = LEVELS.get(method, LEVELS["fedavg"])
    shift = dice.gauss(0, 0.015)
    if method == "base":
        return [e for c in clients for e in _evaluate(dice, level, 0.0, 0, c, AFTER, groups, rouge)]
    sends, grafted = method != "local", method.startswith("flex")
    events: list[Event] = [
        {
            "event": "job",
            "num_rounds": rounds,
            "num_clients": len(clients),
            "trained_parameters": {"shared": 32768 * sends, "personal": 147972 * grafted + 32768 * (not sends)},
            "started": "2026-03-01T10:00:00",
        },
        {"event": "truncated", "client_id": clients[0], "part": "train", "count": 3, "max_length": 512},
    ]
    tensors = [
        {
            "name": f"model.layers.{layer}.self_attn.{proj}.lora_{ab}.weight",
            "shape": shape,
            "dtype": "float32",
            "bytes": 4096,
        }
        for layer in range(layers if sends else 0)
        for proj in ("q_proj", "v_proj")
        for ab, shape in (("A", [8, 128]), ("B", [128, 8]))
    ]
    events += [{"event": "sent", "direction": way, "tensors": tensors} for way in ("up", "down")]
    if method in ("flex", "flex-paper", "flex-random"):
        events += [_graft(dice, method, c, layer, experts) for c in clients for layer in range(layers)]
    size = sum(tensor["bytes"] for tensor in tensors)
    for round_index in range(1, rounds + 1):
        exchanged = {"seconds": 2.5, "turn_seconds": 2.25, "peak_bytes": 512_000_000}
        events.append({"event": "exchange", "round": round_index, **exchanged})
        for client in clients:
            end = level[3] * 0.35
            loss = end + (8.5 - end) * 0.62**round_index * dice.uniform(0.85, 1.15)
            opening = [0.12 + 0.08 * (layer + 1) / layers * round_index**0.5 for layer in range(layers)]
            events.append(
                {
                    "event": "train",
                    "round": round_index,
                    "client_id": client,
                    "num_examples": 80,
                    "loss": loss,
                    "bytes_down": size,
                    "bytes_up": size,
                    "seconds": 0.4,
                    "peak_bytes": 640_000_000,
                    "opening": opening if grafted else None,
                }
            )
    for client in clients:
        worse = (level[0], level[1], level[2], level[3] * 0.7)
        events += _evaluate(dice, worse, shift, rounds, client, BEFORE, groups, rouge)
        events += _evaluate(dice, level, shift, rounds, client, AFTER, groups, rouge)
    for client in clients:
        events += _of_layers(client, rounds, layers, experts, grafted)
    return [*events, {"event": "done", "seconds": 28.0, "tokens": 180_000}]


def _of_layers(client: str, rounds: int, layers: int, experts: int, grafted: bool) -> list[Event]:
    """Half of the experts get three times as many tokens as the others before training, all the same after it."""
    half = experts // 2
    common = {"client_id": client, "layers": list(range(layers)), "num_tokens": 1000}
    routed = {"event": "routed", "round": rounds, "entropy": [1.75] * layers, "base_entropy": [1.5] * layers}
    routed |= {"most": [math.log(experts)] * layers, "source": ["softmax"] * layers}
    routed |= {"counts": [[100] * experts] * layers, "base_counts": [[150] * half + [50] * (experts - half)] * layers}
    cost = {
        "event": "cost",
        "round": rounds,
        "repeats": 5,
        "device": "cpu",
        "seconds": {"with": 0.022, "without": 0.02},
    }
    cost |= {"graft_flops": [7000] * layers, "layer_flops": [28_000] * layers}
    added = [
        {"event": "added", "round": at, "added": [0.01 * at] * layers, "opening": [0.02 * at] * layers}
        for at in dict.fromkeys((1, rounds))
    ]
    return [{**event, **common} for event in (routed, *([*added, cost] if grafted else []))]


def _graft(dice: random.Random, method: str, client: str, layer: int, experts: int) -> Event:
    """FLEx takes 96 neurons for the correction, the others one expert for the output."""
    candidates = [max(0.6, dice.gauss(0.9 + 0.3 * (layer > 0), 0.2)) for _ in range(experts)]
    common = {
        "event": "graft",
        "client_id": client,
        "round": 0,
        "layer": layer,
        "module": f"model.layers.{layer}.mlp.experts",
        "candidates": candidates,
        "routed_mass": 0.15 if layer < 2 else 0.006,
        "seconds": 0.1,
        "width": 96,
    }
    if method == "flex":
        owners = [dice.randrange(experts) for _ in range(96)]
        before = dice.uniform(0.9, 0.99)
        left = {
            "before": before - 0.1,
            "after": before - 0.3,
            "held_out_before": before,
            "held_out_after": before - 0.1,
        }
        return common | {
            "criterion": "neurons",
            "target": "correction",
            "chosen": None,
            "residual": None,
            "experts": [],
            "neurons": [owners.count(expert) for expert in range(experts)],
            "unexplained": left,
            "curve": [[0, 1.0], [96, before]],
        }
    chosen = min(range(experts), key=candidates.__getitem__) if method == "flex-paper" else dice.randrange(experts)
    return common | {
        "criterion": "reconstruction" if method == "flex-paper" else "random",
        "target": "output",
        "chosen": chosen,
        "residual": candidates[chosen],
        "experts": [chosen],
        "neurons": [96 * (expert == chosen) for expert in range(experts)],
        "unexplained": {"before": candidates[chosen] ** 2},
    }


def _evaluate(
    dice: random.Random,
    level: tuple[float, ...],
    shift: float,
    round_index: int,
    client: str,
    when: str,
    groups: bool,
    rouge: bool,
) -> list[Event]:
    shared, own = (min(1.0, max(0.0, value + shift + dice.gauss(0, 0.01))) for value in level[:2])
    common = {"event": "evaluate", "round": round_index, "client_id": client, "when": when}
    parts = {
        "shared skill": {"num_examples": 45, "loss": level[3] * 0.5, "exact_match": shared},
        "own conventions": {"num_examples": 105, "loss": level[3] * 1.2, "exact_match": own},
    }
    test = {"num_examples": 150, "loss": level[3] * dice.uniform(0.97, 1.03), "exact_match": 0.3 * shared + 0.7 * own}
    general = {"num_examples": 200, "loss": 2.2 - 2.1 * (level[2] > 0.5), "exact_match": level[2]}
    return [
        {
            **common,
            "split": "test",
            **test,
            "rouge_l": 0.3 + 0.2 * own if rouge else None,
            "groups": parts if groups else {},
        },
        {**common, "split": "general", **general, "rouge_l": None, "groups": {}},
    ]


def typed(events: list[Event]) -> list[log.Event]:
    return [event for line in events if (event := log.from_json(json.loads(json.dumps(line)))) is not None]


def summarised(events: list[Event]) -> list[Row]:
    return summarise(typed(events))


def write_run(folder: Path, events: list[Event]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    return folder


def scored(method: str, exact: list[float], loss: float = 1.0, num_examples: int = 10_000) -> list[Event]:
    """One client, one evaluation a seed."""
    common = {"event": "evaluate", "method": method, "round": 0, "client_id": "a", "when": AFTER, "split": "test"}
    return [
        {**common, "seed": seed, "num_examples": num_examples, "loss": loss, "exact_match": value, "groups": {}}
        for seed, value in enumerate(exact)
    ]
