"""MMLU (Hendrycks et al. 2021) from its folder of CSV files, by the likeliest of four answers.

    FOLDER/dev/<subject>_dev.csv     the examples of the prompt: question, four choices, the letter of the answer
    FOLDER/test/<subject>_test.csv   the questions
    FOLDER/subjects.json             the category of each subject; without it a subject is its own category

The prompt is the published one: a line that names the subject, up to five examples, the question, "Answer:". The
answer is whichever of " A" to " D" has the highest log-likelihood after it; nothing is decoded. Where not all examples
fit `evaluate.prompt_length`, the first ones that do are used; a question is never cut. One that alone is longer than
the model's context counts as wrong. Both are reported.
"""

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flex.config import EvaluateSettings
from flex.errors import FlexError, require
from flex.evaluation.likelihood import choice_likelihood, standard_error
from flex.evaluation.scored import Scored

LETTERS = "ABCD"
HEAD = "The following are multiple choice questions (with answers) about {}.\n\n"


@dataclass(frozen=True)
class Question:
    """One row. `answer`: the index of the right choice."""

    text: str
    choices: tuple[str, ...]
    answer: int

    def asked(self) -> str:
        options = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=True))
        return f"{self.text}{options}\nAnswer:"

    def answered(self) -> str:
        return f"{self.asked()} {LETTERS[self.answer]}\n\n"


@dataclass(frozen=True)
class Subject:
    name: str
    category: str
    examples: list[Question]
    questions: list[Question]

    @property
    def words(self) -> str:
        return self.name.replace("_", " ")


def read_mmlu(folder: str, examples: bool = True, limit: int = 0) -> list[Subject]:
    """The subjects of a folder, by name; `limit`: so many questions of each, 0: all.

    Raises:
        FlexError: the folder, a part or a subject's file is missing, or a line is not a question, four choices and one
            of A to D.
    """
    root = Path(folder).expanduser()
    require(root.is_dir(), f"no folder at evaluate.mmlu = {folder!r}; expected MMLU's folder with dev and test")
    for part in ("dev", "test") if examples else ("test",):
        require((root / part).is_dir(), f"evaluate.mmlu = {folder!r} has no folder {part!r}; expected dev and test")
    files = sorted((root / "test").glob("*_test.csv"))
    require(bool(files), f"{root / 'test'} has no <subject>_test.csv; expected one for each subject")
    categories = _categories(root / "subjects.json")
    subjects = []
    for path in files:
        name = path.name.removesuffix("_test.csv")
        shown = _read(root / "dev" / f"{name}_dev.csv") if examples else []
        questions = _read(path)
        subjects.append(Subject(name, categories.get(name, name), shown, questions[:limit] if limit else questions))
    return subjects


def _read(path: Path) -> list[Question]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file, strict=True))
    except FileNotFoundError:
        raise FlexError(f"no file at {path}; expected one for every subject of the test folder") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FlexError(f"{path} cannot be read as CSV: {error}") from None
    questions = []
    for number, row in enumerate((row for row in rows if row), 1):
        require(
            len(row) == 6,
            f"{path}, row {number} has {len(row)} fields; expected a question, four choices and a letter",
        )
        letter = row[5].strip().upper()
        require(letter in tuple(LETTERS), f"{path}, row {number} has the answer {row[5]!r}; expected one of A to D")
        questions.append(Question(row[0].strip(), tuple(row[1:5]), LETTERS.index(letter)))
    require(bool(questions), f"{path} has no questions; expected one a row")
    return questions


def _categories(path: Path) -> dict[str, str]:
    """From subjects.json: the category of each subject, as a text or in an object with a `category`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise FlexError(f"{path} cannot be read as JSON: {error}") from None
    require(isinstance(values, dict), f"{path} holds a {type(values).__name__}; expected an object by subject")
    found = {name: own.get("category") if isinstance(own, dict) else own for name, own in values.items()}
    wrong = [name for name, category in found.items() if not isinstance(category, str)]
    require(not wrong, f"{path} has no category for {wrong[0] if wrong else ''!r}; expected a text")
    return found


@dataclass(frozen=True)
class Asked:
    """One question as tokens. `shots`: how many examples its prompt has; `ids` is empty where it does not fit."""

    ids: list[int]
    shots: int
    answer: int
    category: str


class Prompts:
    """The prompts of all subjects as tokens, and the tokens of the four answers."""

    def __init__(self, encoder: Any, positions: int, limit: int):
        self.encode = lambda text: encoder.tokenizer(text, verbose=False)["input_ids"]
        self.limit, self.positions, self.encoder = min(limit, positions), positions, encoder

    @cached_property
    def letters(self) -> tuple[list[int], list[list[int]]]:
        """(what all answers have in common before they differ, the rest of each)."""
        before = self.encode("Answer:")
        whole = [self.encode(f"Answer: {letter}") for letter in LETTERS]
        ended = [ids[:-1] if ids[-1:] == [self.encoder.tokenizer.eos_token_id] else ids for ids in whole]
        start = min(_common(before, ids) for ids in ended)
        rest = [ids[start:] for ids in ended]
        together = 0
        while all(len(ids) > together + 1 for ids in rest) and len({ids[together] for ids in rest}) == 1:
            together += 1
        own = [ids[together:] for ids in rest]
        require(
            len({tuple(ids) for ids in own}) == len(LETTERS) and all(own),
            "the tokenizer does not tell the answers A, B, C and D apart; expected one that knows these letters",
        )
        return rest[0][:together], own

    def ask(self, subject: Subject, question: Question, shots: int) -> Asked:
        common, own = self.letters
        room = max(len(ids) for ids in own)
        shown = subject.examples[:shots]
        for count in range(len(shown), -1, -1):
            head = HEAD.format(subject.words) + "".join(example.answered() for example in shown[:count])
            ids = [*self._open(self.encode(head + question.asked())), *common]
            if len(ids) + room <= (self.limit if count else self.positions):
                return Asked(ids, count, question.answer, subject.category)
        return Asked([], 0, question.answer, subject.category)

    def _open(self, ids: list[int]) -> list[int]:
        """A prompt that goes on: without the end token that some tokenizers add."""
        return ids[:-1] if ids[-1:] == [self.encoder.tokenizer.eos_token_id] else ids


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return count


def score_mmlu(scored: Scored, subjects: Sequence[Subject], shots: int) -> dict[str, Any]:
    """`num_examples`, `accuracy` and the same by category; in `details` the standard error of each accuracy, how many
    examples the prompts had, how many questions had fewer than asked for, and how many did not fit at all."""
    prompts = Prompts(scored.encoder, scored.positions, scored.settings.prompt_length)
    asked = [prompts.ask(subject, q, shots) for subject in subjects for q in subject.questions]
    wanted = {id(subject): min(shots, len(subject.examples)) for subject in subjects}
    fewer = sum(a.shots < wanted[id(s)] for s, a in zip((s for s in subjects for _ in s.questions), asked, strict=True))
    right = _right(scored, asked, prompts.letters[1])
    counts = Counter(a.category for a in asked)
    hits = Counter(a.category for a, hit in zip(asked, right, strict=True) if hit)
    errors = {name: standard_error(hits[name], count) for name, count in counts.items()}
    details = {
        "standard_error": standard_error(sum(right), len(right)),
        "standard_error_by_group": errors,
        "shots": shots,
        "mean_shots": sum(a.shots for a in asked) / len(asked),
        "fewer_shots": fewer,
        "too_long": sum(not a.ids for a in asked),
    }
    groups = {name: {"num_examples": count, "accuracy": hits[name] / count} for name, count in sorted(counts.items())}
    own = {"num_examples": len(asked), "accuracy": sum(right) / len(asked), "groups": groups, "details": details}
    return own


def _right(scored: Scored, asked: Sequence[Asked], choices: list[list[int]]) -> list[bool]:
    """Whether the likeliest choice is the answer, for each question; in batches of like length."""
    order = sorted((i for i, a in enumerate(asked) if a.ids), key=lambda i: len(asked[i].ids))
    right, size = [False] * len(asked), scored.settings.batch_size
    for start in range(0, len(order), size):
        indices = order[start : start + size]
        likelihood = choice_likelihood(scored, [asked[i].ids for i in indices], choices)
        for i, best in zip(indices, likelihood.argmax(1).tolist(), strict=True):
            right[i] = best == asked[i].answer
        scored.say("mmlu", start + len(indices), len(order))
    return right


def read(settings: EvaluateSettings) -> list[Subject]:
    return read_mmlu(settings.mmlu, limit=settings.questions)


def read_bare(settings: EvaluateSettings) -> list[Subject]:
    return read_mmlu(settings.mmlu, examples=False, limit=settings.questions)
