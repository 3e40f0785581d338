"""How good a model is: loss, exact match and ROUGE-L on a set of examples, and greedy decoding."""

__all__ = ["measures", "score", "words"]
