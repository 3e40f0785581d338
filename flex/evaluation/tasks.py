"""What a client's model is scored on: one row a task, which configuration, sites and commands read."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from flex.config import EvaluateSettings
from flex.evaluation import cloze, gsm8k, mmlu, perplexity
from flex.evaluation.scored import Scored


@dataclass(frozen=True)
class Task:
    """One task.

    about: what it is in one line.
    read: its questions, from what the settings name; None where they are a site's own examples.
    score: of the questions: the fields of an `Evaluated` event.
    """

    about: str
    read: Callable[[EvaluateSettings], Any] | None = None
    score: Callable[[Scored, Any], dict[str, Any]] | None = None


TASKS = {
    "test": Task("the client's own test part"),
    "general": Task("the held-out set that belongs to nobody (data.general)"),
    "mmlu": Task("MMLU, five examples in the prompt", mmlu.read, partial(mmlu.score_mmlu, shots=5)),
    "mmlu_0": Task("MMLU without examples", mmlu.read_bare, partial(mmlu.score_mmlu, shots=0)),
    "gsm8k": Task("GSM8K by the exact number", gsm8k.read, gsm8k.score_gsm8k),
    "perplexity": Task("the perplexity of plain text", perplexity.read, perplexity.score_perplexity),
    "cloze": Task("a text's own continuation among four", perplexity.read, cloze.score_cloze),
}


def read_tasks(settings: EvaluateSettings) -> dict[str, Any]:
    """The questions of every task that is asked for and is not a site's own examples.

    Raises:
        FlexError: a file is missing or not what it should be.
    """
    return {name: TASKS[name].read(settings) for name in settings.tasks if TASKS[name].read is not None}
