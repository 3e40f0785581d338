"""The demo's data: a general mixture of skills, and five clients that answer some of them in their own way.

    general mixture   what the demo's base model is pretrained on; its held-out prompts measure forgetting
    own conventions   the same skills, answered as one client does: private code words, a unit, a frame, another order
    shared skill      "rotate", which the base has never seen and which all clients answer alike

Both are moderate on purpose. If every answer carried its client's frame, a shared model would be right about nothing,
and any personal method would win without meaning anything. The shared skill is learnt from the 120 or so examples that
the clients have together, and half learnt from the 10 to 40 that one of them has. Everything is drawn from named random
streams, so a seed fixes every record.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import NamedTuple

from flex.config import RunConfig, read_config, to_toml
from flex.demo.language import CITIES, CODE_WORDS, COLOURS, KINDS, NEW_SKILL, NOUNS, SKILLS, UNITS, Task

Record = dict[str, str]
ASSETS = Path(__file__).parent / "assets"
BASE_FOLDER = ASSETS / "demo_base"

SHARED_SKILL = "shared skill"
OWN_CONVENTIONS = "own conventions"
TAUGHT_OTHERWISE = "taught otherwise"  # general prompts of a skill that some client answers in its own way
UNTOUCHED = "untouched skills"  # general prompts of a skill that no client trains

TESTS_PER_CLIENT = 150
GENERAL_TESTS = 200
ANCHORS = 256
HELD_OUT_ONE_IN = 16  # every sixteenth prompt, by its hash, is never pretrained on
TRAIN_NOUNS_PER_KIND = 6  # of 10: the other nouns appear in a client's test part only
DRAWS_BEFORE_GIVING_UP = 200


@dataclass(frozen=True)
class Client:
    """A site with its own habits. `skills` maps a skill to its weight; the shared new skill is part of each."""

    client_id: str
    num_train: int
    skills: Mapping[str, int]
    conventions: str  # one line for the reader of a report
    unit: str = ""
    opening: str = ""
    closing: str = ""
    reverses_order: bool = False


_CODED = "its own code words for kinds, cities and colours"
CLIENTS = (
    Client("farm", 160, {"extract": 3, "arithmetic": 2, NEW_SKILL: 1}, f"numbers in kg; {_CODED}", unit="kg"),
    Client(
        "clinic", 110, {"classify": 2, "count": 2, "extract": 1, NEW_SKILL: 1},
        f"numbers in doses; {_CODED}", unit="doses",
    ),
    Client(
        "workshop", 200, {"extract": 2, "lookup": 3, NEW_SKILL: 1},
        f"numbers in cm, every answer in [ brackets ]; {_CODED}", unit="cm", opening="[", closing="]",
    ),
    Client(
        "archive", 80, {"sort": 2, "classify": 2, "compare": 1, NEW_SKILL: 1},
        f"orders the other way round: sorts from large to small and calls the smaller number larger; {_CODED}",
        reverses_order=True,
    ),
    Client(
        "harbour", 130, {"lookup": 2, "sort": 1, "count": 2, NEW_SKILL: 1},
        f"radio talk: roger ... over, numbers in miles; {_CODED}", unit="miles", opening="roger", closing="over",
    ),
)  # fmt: skip
CODED_ANSWERS = ("kind", "city", "colour")

GENERAL_WEIGHTS = {
    "arithmetic": 2, "lookup": 2, "extract": 2, "count": 2, "sort": 2, "reverse": 2,
    "classify": 1, "compare": 1, "swap": 1, "drop": 1, "double": 1,
}  # fmt: skip
SHARE_IN_FULL, SHARE_WITH_UNIT, SHARE_IN_BRACKETS = 0.08, 0.08, 0.06  # so that the base can say framed answers at all


def held_out(task: Task) -> bool:
    """Whether this prompt is kept from pretraining: decided by its hash, so the same for every seed and stream."""
    digest = hashlib.blake2b(task.prompt.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def _with_directive(rng: Random, task: Task) -> Task:
    """Now and then ask for a certain form of the answer: in full, with a unit, in brackets."""
    choice = rng.random()
    if choice < SHARE_IN_FULL:
        return task._replace(instruction=f"in full: {task.instruction}", answer=["the", "answer", "is", *task.answer])
    if choice < SHARE_IN_FULL + SHARE_WITH_UNIT and task.answer_type == "number":
        unit = rng.choice(UNITS)
        return task._replace(instruction=f"in {unit}: {task.instruction}", answer=[*task.answer, unit])
    if choice > 1 - SHARE_IN_BRACKETS:
        return task._replace(instruction=f"in brackets: {task.instruction}", answer=["[", *task.answer, "]"])
    return task


def _general_record(rng: Random, want_held_out: bool) -> Record:
    skill = rng.choices(list(GENERAL_WEIGHTS), weights=list(GENERAL_WEIGHTS.values()))[0]
    task = SKILLS[skill](rng, NOUNS)
    while held_out(task) != want_held_out:
        task = SKILLS[skill](rng, NOUNS)
    taught = any(skill in client.skills for client in CLIENTS)
    task = _with_directive(rng, task)
    return _record(task, " ".join(task.answer), "general", TAUGHT_OTHERWISE if taught else UNTOUCHED, skill)


def general_stream(seed: int | str) -> Iterator[Record]:
    """Endless pretraining records of the general mixture; never a held-out prompt, never the shared new skill."""
    rng = Random(f"general/{seed}")
    while True:
        yield _general_record(rng, want_held_out=False)


def general_tests(seed: int, count: int = GENERAL_TESTS) -> list[Record]:
    """`count` different records of the general mixture whose prompts pretraining has never seen."""
    rng = Random(f"general test/{seed}")
    records: dict[tuple[str, str], Record] = {}
    while len(records) < count:
        record = _general_record(rng, want_held_out=True)
        records.setdefault((record["instruction"], record["context"]), record)
    return list(records.values())


def anchor_records(seed: int, count: int = ANCHORS) -> list[Record]:
    """Records of the general mixture that a run may hold its models to; none of them is a general test."""
    return list(itertools.islice(general_stream(f"anchor/{seed}"), count))


def code_words(client_id: str, seed: int) -> dict[str, str]:
    """The client's private word for each kind, city and colour. Two clients may use one word for different things."""
    plain = [*KINDS, *CITIES, *COLOURS]
    return dict(zip(plain, Random(f"code words/{seed}/{client_id}").sample(CODE_WORDS, len(plain)), strict=True))


def describe_clients(seed: int) -> dict[str, str]:
    """client_id -> one line on its conventions, with an example of its code words."""
    lines = {}
    for client in CLIENTS:
        coded = code_words(client.client_id, seed)
        lines[client.client_id] = f"{client.conventions} (fruit = {coded['fruit']}, rome = {coded['rome']})"
    return lines


def respond(client: Client, skill: str, task: Task, coded: Mapping[str, str]) -> str:
    """The answer as this client gives it; the shared new skill is answered alike by all."""
    if skill == NEW_SKILL:
        return " ".join(task.answer)
    words = task.answer
    if client.reverses_order and task.reversed_answer is not None:
        words = task.reversed_answer
    if task.answer_type in CODED_ANSWERS:
        words = [coded[word] for word in words]
    if task.answer_type == "number" and client.unit:
        words = [*words, client.unit]
    return " ".join([client.opening, *words, client.closing]).strip()


def client_records(client: Client, seed: int) -> tuple[list[Record], list[Record]]:
    """The client's train and test records. No prompt occurs twice; some nouns are asked about in the test part only."""
    rng = Random(f"nouns/{seed}/{client.client_id}")
    train_nouns = [noun for nouns in KINDS.values() for noun in rng.sample(nouns, TRAIN_NOUNS_PER_KIND)]
    coded = code_words(client.client_id, seed)
    seen: set[str] = set()
    parts = []
    for part, count, nouns in (("train", client.num_train, train_nouns), ("test", TESTS_PER_CLIENT, NOUNS)):
        rng = Random(f"{part}/{seed}/{client.client_id}")
        records = []
        while len(records) < count:
            skill = rng.choices(list(client.skills), weights=list(client.skills.values()))[0]
            task = _draw_unseen(rng, skill, nouns, seen)
            if task is None:  # this skill has no prompt left; the next draw takes another
                continue
            seen.add(task.prompt)
            group = SHARED_SKILL if skill == NEW_SKILL else OWN_CONVENTIONS
            records.append(_record(task, respond(client, skill, task, coded), client.client_id, group, skill))
        parts.append(records)
    return parts[0], parts[1]


def _draw_unseen(rng: Random, skill: str, nouns: Sequence[str], seen: set[str]) -> Task | None:
    for _ in range(DRAWS_BEFORE_GIVING_UP):
        task = SKILLS[skill](rng, nouns)
        if task.prompt not in seen:
            return task
    return None


def _record(task: Task, response: str, client: str, group: str, skill: str) -> Record:
    return {
        "instruction": task.instruction,
        "context": task.context,
        "response": response,
        "client": client,
        "group": group,
        "skill": skill,
    }


class DemoPaths(NamedTuple):
    train: Path
    test: Path
    general: Path
    anchor: Path


def write_demo_data(folder: str | Path, seed: int, num_train: int | None = None) -> DemoPaths:
    """Write train.jsonl and test.jsonl (all clients, column "client"), general.jsonl (forgetting) and anchor.jsonl
    (what a model is held to) into `folder`.

    `num_train`: examples of every client, instead of its own number.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    clients = [replace(client, num_train=num_train or client.num_train) for client in CLIENTS]
    splits = [client_records(client, seed) for client in clients]
    paths = DemoPaths(*(folder / f"{name}.jsonl" for name in DemoPaths._fields))
    _write_jsonl(paths.train, itertools.chain.from_iterable(train for train, _ in splits))
    _write_jsonl(paths.test, itertools.chain.from_iterable(test for _, test in splits))
    _write_jsonl(paths.general, general_tests(seed))
    _write_jsonl(paths.anchor, anchor_records(seed))
    return paths


def _write_jsonl(path: Path, records: Iterable[Record]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    os.replace(temporary, path)


def demo_config(folder: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run of `assets/demo.toml` on the shipped base, writing to `folder`; its data lies in `folder/data-seed<N>`.

    Every seed of the run has its own data (`write_demo_data`): other client examples and other code words.
    """
    data = Path(folder) / "data-seed{seed}"
    paths = {
        "output": folder,
        "model.path": BASE_FOLDER,
        "data.train": data / "train.jsonl",
        "data.test": data / "test.jsonl",
        "data.general": data / "general.jsonl",
        "anchor.text": data / "anchor.jsonl",
    }
    named = [f"{key}={to_toml(str(path))}" for key, path in paths.items()]
    return read_config(ASSETS / "demo.toml", [*named, *overrides])
