"""The words that ROUGE compares, in any script.

rouge-score's own tokenizer keeps a-z and 0-9 alone: an answer in another script has no words there, and "Größe" equals
"Gräße". For text in ASCII the words here are the same as its.
"""

import re
import unicodedata
from functools import cache
from typing import Any

WORDS = re.compile(r"[a-z0-9]+")
STEMMED_FROM = 4  # letters, as in rouge-score
# Scripts that write no spaces between words: each character is a word of its own.
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


class Words:
    """A tokenizer for `RougeScorer`: lower-cased runs of letters, digits and their marks; English words are stemmed."""

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer  # comes with rouge-score; training needs none of it

        self.stem = PorterStemmer().stem

    def tokenize(self, text: str) -> list[str]:
        words = split_words(text)
        return [self.stem(word) if len(word) >= STEMMED_FROM and word.isascii() else word for word in words]


def split_words(text: str) -> list[str]:
    """The words of a text; of one that has none (signs alone), its signs."""
    text = unicodedata.normalize("NFC", text.lower())
    if text.isascii():
        words = WORDS.findall(text)
    else:
        words, alone = [], True  # alone: the next character begins a word
        for character in text:
            kind = unicodedata.category(character)[0]
            if kind == "M" and words and not alone:
                words[-1] += character  # a mark belongs to the letter before it
            elif kind not in "LNM":
                alone = True
            elif _is_unspaced(character) or alone or _is_unspaced(words[-1][0]):
                words.append(character)
                alone = False
            else:
                words[-1] += character
    return words or [character for character in text if not character.isspace()]


@cache
def _is_unspaced(character: str) -> bool:
    return unicodedata.name(character, "").startswith(UNSPACED)


def rouge_scorer(*kinds: str) -> Any:
    """`rouge_score`'s scorer of these kinds ("rougeL", "rouge1") on these words."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(kinds), tokenizer=Words())
