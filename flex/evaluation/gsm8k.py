"""GSM8K (Cobbe et al. 2021): word problems whose answer is a number, from JSON lines.

The question is put in the run's own template and answered by greedy decoding. Right is an answer whose number is
exactly that of the solution: the one after "####" where there is such a mark, else the last number that is said.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from flex.config import EvaluateSettings
from flex.data.records import read_records
from flex.errors import require
from flex.evaluation.score import generate
from flex.evaluation.scored import Scored

NUMBER = re.compile(r"[-−]?\$?\d[\d,]*(?:\.\d+)?|[-−]?\$?\.\d+")
MARK = "####"


@dataclass(frozen=True)
class Problem:
    question: str
    answer: Decimal


def number_of(text: str) -> Decimal | None:
    """The number that a solution comes to, without commas and dollar signs; None where it says none."""
    marked = text.rpartition(MARK)[2] if MARK in text else text
    found = NUMBER.findall(marked)
    if not found:
        return None
    said = found[0] if MARK in text else found[-1]
    try:
        return Decimal(said.replace(",", "").replace("$", "").replace("−", "-"))
    except InvalidOperation:
        return None


def read(settings: EvaluateSettings) -> list[Problem]:
    """The problems of a file: `question` and `answer`, or `instruction` and `response`.

    Raises:
        FlexError: the file cannot be read, or a solution has no number.
    """
    try:
        records = read_records(settings.gsm8k, {"instruction": "question", "response": "answer"})
    except ValueError:
        records = read_records(settings.gsm8k)
    problems = []
    for record in records[: settings.questions or None]:
        answer = number_of(record["response"])
        require(answer is not None, f"{record.where} has a solution without a number; expected one, as after {MARK}")
        problems.append(Problem(record["instruction"], answer))
    return problems


def score_gsm8k(scored: Scored, problems: Sequence[Problem]) -> dict[str, Any]:
    """`num_examples`, `accuracy`; in `details` how many answers said no number."""
    prompts = [scored.encoder.prompt_ids(problem.question) for problem in problems]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    hits = silent = 0
    for start in range(0, len(order), scored.settings.batch_size):
        indices = order[start : start + scored.settings.batch_size]
        chosen = [prompts[i] for i in indices]
        texts = generate(scored.model, scored.encoder, chosen, scored.settings.max_new_tokens, scored.prepare)
        said = [number_of(text) for text in texts]
        hits += sum(number == problems[i].answer for i, number in zip(indices, said, strict=True))
        silent += sum(number is None for number in said)
        scored.say("gsm8k", start + len(indices), len(order))
    return {"num_examples": len(problems), "accuracy": hits / len(problems), "details": {"without_number": silent}}
