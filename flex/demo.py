"""The demo's world: a small generated language, a general mixture of skills, and five clients with conventions of their own.

Everything is drawn from named `random.Random` streams, so a seed fixes every record. Three sources come out of it:

    general mixture   what the demo's base model is pretrained on (`general_stream`); its held-out prompts measure forgetting
    own conventions   the same skills, answered as one client does: private code words, a unit, a frame, another order
    shared skill      "rotate", which the base has never seen and which all clients answer alike

The conflicts are moderate on purpose. If every answer carried its client's frame, a shared model would be right about nothing
and any personal method would win without meaning anything.
"""

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

Record = dict[str, str]

SHARED_SKILL = "shared skill"
OWN_CONVENTIONS = "own conventions"
TAUGHT_OTHERWISE = "taught otherwise"  # general prompts of a skill that some client answers in its own way
UNTOUCHED = "untouched skills"  # general prompts of a skill that no client trains

NAMES = "ann bob cid dan eve fay gus hal ivy jon kim leo".split()
CITIES = "rome oslo bern lima cairo paris tokyo delhi".split()
COLOURS = "red blue green black white pink".split()
KINDS = {
    "animal": "cat dog cow hen fox owl pig bee ram elk".split(),
    "fruit": "fig plum pear lime kiwi date mango peach grape melon".split(),
    "tool": "saw axe drill hammer wrench chisel spade rake plane clamp".split(),
    "clothing": "hat sock coat shirt glove scarf belt vest gown shoe".split(),
}
NOUNS = [noun for nouns in KINDS.values() for noun in nouns]
KIND_OF = {noun: kind for kind, nouns in KINDS.items() for noun in nouns}
NUMBERS = [str(number) for number in range(41)]
LETTERS = list("bcdefghijklmnop")  # not "a": it is an article here
CODE_WORDS = [first + "u" + last for first in "zkvxqj" for last in "bdmnpt"]
UNITS = "kg doses cm miles".split()
FRAME_WORDS = "roger over".split()
GRAMMAR = (
    "what is plus minus list find reverse this swap the ends of drop first double rotate sort these numbers from paid "
    "for a who which city how much colour thing kind many times larger or in full brackets answer : , . ? [ ]"
).split()

PAD, UNKNOWN, BOS, EOS, USER, ASSISTANT = "<pad>", "<unk>", "<bos>", "<eos>", "<user>", "<assistant>"
SPECIAL_TOKENS = [PAD, UNKNOWN, BOS, EOS, USER, ASSISTANT]
PUNCTUATION_AFTER_WORD = ".,?:"
MAX_TOKENS = 128  # the longest example has 35
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}" + USER + " {{ message['content'] }} "
    "{% elif message['role'] == 'assistant' %}" + ASSISTANT + " {{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('this template knows the roles user and assistant, not ' + message['role']) }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)

TESTS_PER_CLIENT = 150
GENERAL_TESTS = 200
HELD_OUT_ONE_IN = 16  # every sixteenth prompt, by its hash, is never pretrained on
TRAIN_NOUNS_PER_KIND = 6  # of 10: the other nouns appear in a client's test part only
DRAWS_BEFORE_GIVING_UP = 200


class Task(NamedTuple):
    """One drawn question: its prompt, the general answer as words, and what the answer is (which conventions touch it)."""

    instruction: str
    context: str
    answer: list[str]
    answer_type: str
    reversed_answer: list[str] | None = None  # for a client that orders the other way round

    @property
    def prompt(self) -> str:
        return f"{self.instruction} {self.context}".rstrip()


# --- Skills -----------------------------------------------------------------------------------------------------------


def _arithmetic(rng: Random, nouns: Sequence[str]) -> Task:
    left, right = rng.randint(0, 20), rng.randint(0, 20)
    if rng.random() < 0.5:
        return Task(f"what is {left} plus {right}?", "", [str(left + right)], "number")
    left, right = max(left, right), min(left, right)
    return Task(f"what is {left} minus {right}?", "", [str(left - right)], "number")


def _lookup(rng: Random, nouns: Sequence[str]) -> Task:
    keys = rng.sample(rng.choice([NAMES, CODE_WORDS, LETTERS, NOUNS]), rng.randint(2, 5))
    answer_type, values = rng.choice([("number", NUMBERS), ("colour", COLOURS), ("city", CITIES)])
    row = {key: rng.choice(values) for key in keys}
    wanted = rng.choice(keys)
    listing = ", ".join(f"{key} {value}" for key, value in row.items())
    return Task(f"list: {listing}. find {wanted}", "", [row[wanted]], answer_type)


def _extract(rng: Random, nouns: Sequence[str]) -> Task:
    name, city, price = rng.choice(NAMES), rng.choice(CITIES), rng.choice(NUMBERS[1:20])
    colour, thing = rng.choice(COLOURS), rng.choice(nouns)
    questions = {
        "who paid?": (name, "name"),
        "which city?": (city, "city"),
        "how much?": (price, "number"),
        "which colour?": (colour, "colour"),
        "which thing?": (thing, "thing"),
    }
    question = rng.choices(list(questions), weights=[1, 2, 1, 2, 1])[0]
    answer, answer_type = questions[question]
    return Task(f"{name} from {city} paid {price} for a {colour} {thing}. {question}", "", [answer], answer_type)


def _classify(rng: Random, nouns: Sequence[str]) -> Task:
    noun = rng.choice(nouns)
    question = rng.choice(["{} is a kind of what?", "what kind of thing is {}?", "which kind is {}?"])
    return Task(question.format(noun), "", [KIND_OF[noun]], "kind")


def _count(rng: Random, nouns: Sequence[str]) -> Task:
    seen = rng.sample(COLOURS, 3)
    shown = [rng.choice(seen) for _ in range(rng.randint(3, 7))]
    return Task(f"how many times {seen[0]}?", " ".join(shown), [str(shown.count(seen[0]))], "number")


def _compare(rng: Random, nouns: Sequence[str]) -> Task:
    left, right = rng.sample(range(len(NUMBERS)), 2)
    larger, smaller = str(max(left, right)), str(min(left, right))
    return Task(f"which is larger, {left} or {right}?", "", [larger], "order", reversed_answer=[smaller])


def _sort(rng: Random, nouns: Sequence[str]) -> Task:
    numbers = rng.sample(range(len(NUMBERS)), rng.randint(2, 4))
    ascending = [str(number) for number in sorted(numbers)]
    shown = " ".join(map(str, numbers))
    return Task("sort these numbers:", shown, ascending, "order", reversed_answer=ascending[::-1])


def _list_skill(instruction: str, change: Callable[[list[str]], list[str]]) -> Callable[[Random, Sequence[str]], Task]:
    """A skill that answers a list of words with another order of it."""

    def draw(rng: Random, nouns: Sequence[str]) -> Task:
        words = rng.sample(rng.choice([LETTERS, CODE_WORDS, NOUNS, NAMES]), rng.randint(3, 5))
        return Task(instruction, " ".join(words), change(words), "list")

    return draw


NEW_SKILL = "rotate"
SKILLS: dict[str, Callable[[Random, Sequence[str]], Task]] = {
    "arithmetic": _arithmetic,
    "lookup": _lookup,
    "extract": _extract,
    "classify": _classify,
    "count": _count,
    "compare": _compare,
    "sort": _sort,
    "reverse": _list_skill("reverse this list:", lambda words: words[::-1]),
    "swap": _list_skill("swap the ends of this list:", lambda words: [words[-1], *words[1:-1], words[0]]),
    "drop": _list_skill("drop the first of this list:", lambda words: words[1:]),
    "double": _list_skill("double the first of this list:", lambda words: [words[0], *words]),
    NEW_SKILL: _list_skill("rotate this list:", lambda words: [*words[1:], words[0]]),
}

# --- General mixture --------------------------------------------------------------------------------------------------

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


def general_stream(seed: int) -> Iterator[Record]:
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


# --- Clients ----------------------------------------------------------------------------------------------------------


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
    Client("farm", 160, {"extract": 3, "arithmetic": 2, NEW_SKILL: 2}, f"numbers in kg; {_CODED}", unit="kg"),
    Client(
        "clinic", 110, {"classify": 2, "count": 2, "extract": 1, NEW_SKILL: 2},
        f"numbers in doses; {_CODED}", unit="doses",
    ),
    Client(
        "workshop", 200, {"extract": 2, "lookup": 3, NEW_SKILL: 2},
        f"numbers in cm, every answer in [ brackets ]; {_CODED}", unit="cm", opening="[", closing="]",
    ),
    Client(
        "archive", 80, {"sort": 2, "classify": 2, "compare": 1, NEW_SKILL: 2},
        f"orders the other way round: sorts from large to small and calls the smaller number larger; {_CODED}",
        reverses_order=True,
    ),
    Client(
        "harbour", 130, {"lookup": 2, "sort": 1, "count": 2, NEW_SKILL: 2},
        f"radio talk: roger ... over, numbers in miles; {_CODED}", unit="miles", opening="roger", closing="over",
    ),
)  # fmt: skip
CODED_ANSWERS = ("kind", "city", "colour")


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


# --- What the rest of the house asks for ------------------------------------------------------------------------------


class DemoPaths(NamedTuple):
    train: Path
    test: Path
    general: Path


def write_demo_data(folder: str | Path, seed: int) -> DemoPaths:
    """Write train.jsonl and test.jsonl (all clients, column "client") and general.jsonl (forgetting) into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    splits = [client_records(client, seed) for client in CLIENTS]
    paths = DemoPaths(folder / "train.jsonl", folder / "test.jsonl", folder / "general.jsonl")
    _write_jsonl(paths.train, itertools.chain.from_iterable(train for train, _ in splits))
    _write_jsonl(paths.test, itertools.chain.from_iterable(test for _, test in splits))
    _write_jsonl(paths.general, general_tests(seed))
    return paths


def _write_jsonl(path: Path, records: Iterator[Record] | list[Record]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    os.replace(temporary, path)


@functools.cache
def vocabulary() -> list[str]:
    """Every token of the demo's language, special tokens first; the index is the token id."""
    words = [NAMES, CITIES, COLOURS, list(KINDS), NOUNS, NUMBERS, LETTERS, CODE_WORDS, UNITS, FRAME_WORDS, GRAMMAR]
    return list(dict.fromkeys([*SPECIAL_TOKENS, *itertools.chain.from_iterable(words)]))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer of the demo's language, with the template `<bos><user> PROMPT <assistant> ANSWER<eos>`.

    Upper case is folded and unknown words become `<unk>`; `decode(encode(text)) == text` for all generated text.
    """
    ids = {word: index for index, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(behavior="isolated")]
    )
    unspace = [decoders.Replace(Regex(rf"^ \{mark}$"), mark) for mark in PUNCTUATION_AFTER_WORD]
    tokenizer.decoder = decoders.Sequence([decoders.WordPiece(prefix="##", cleanup=False), *unspace, decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def demo_settings(seed: int) -> dict[str, int | float | str | bool]:
    """Hyperparameters for this data and base; they were found on data seed 0, so other seeds are the honest ones."""
    return {
        "seed": seed,
        "num_rounds": 12,
        "steps_per_round": 8,
        "batch_size": 16,
        "lora_rank": 8,
        "lora_alpha": 16,
        "lora_learning_rate": 3e-3,
        "graft_learning_rate": 3e-3,
        "graft_combine": "additive",
        "graft_logit_bias": -2.0,
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "template": "chat",
        "clients_by": "client",
    }
