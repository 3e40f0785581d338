"""The measures that a client's answers are scored by: how each is called, printed and compared.

Tables, findings and the page all read these rows; the keys are those of the scores in the log (`store/events.py`).
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One measure.

    key: its name in the log.
    title, in_words: its name in the head of a table, and within a sentence.
    meaning: what a reader must know of it; empty if the name says it.
    higher_is_better: the direction.
    scale, digits: a value is printed as scale * value with so many decimals.
    unit: follows a value within a sentence.
    is_share: a mean over answers in [0, 1], so that the number of answers bounds its sampling error.
    of_groups: whether groups of questions are reported by it.
    """

    key: str
    title: str
    in_words: str
    meaning: str = ""
    higher_is_better: bool = True
    scale: float = 100.0
    digits: int = 1
    unit: str = ""
    is_share: bool = True
    of_groups: bool = False

    def printed(self, value: float) -> float:
        """The number that a reader sees: values that print alike are equal."""
        return round(self.scale * value, self.digits) if math.isfinite(value) else math.nan

    def format(self, value: float | None, spread: float | None = None) -> str:
        """As "57.9 ± 2.5"; a dash for None, "diverged" for a value that is not finite."""
        if value is None:
            return "–"
        if not math.isfinite(value):
            return "diverged"
        text = f"{self.scale * value:.{self.digits}f}"
        return text if spread is None else f"{text} ± {self.scale * spread:.{self.digits}f}"


# The first that a run took is the one that its verdict goes by.
KINDS = {
    kind.key: kind
    for kind in (
        Kind("rouge_l", "ROUGE-L", "ROUGE-L"),
        Kind("rouge_1", "ROUGE-1", "ROUGE-1"),
        Kind(
            "exact_match",
            "EM %",
            "exact match",
            meaning="EM: share of answers that are right to the last token.",
            unit=" %",
            of_groups=True,
        ),
        Kind(
            "accuracy",
            "accuracy %",
            "accuracy",
            meaning="accuracy: share of questions answered rightly.",
            unit=" %",
            of_groups=True,
        ),
        Kind("perplexity", "perplexity", "perplexity", higher_is_better=False, scale=1.0, digits=2, is_share=False),
        Kind("loss", "loss", "loss", higher_is_better=False, scale=1.0, digits=3, is_share=False),
    )
}
