"""The words of ROUGE: any script is itself, and ASCII text has the figures it always had."""

import random

import pytest
from rouge_score.rouge_scorer import RougeScorer

from flex.evaluation.words import rouge_scorer, split_words

SCRIPTS = [
    "add three",
    "北京是首都",
    "Москва — столица",
    "สวัสดีครับ",
    "مرحبا بالعالم",
    "Größe: 3 m",
    "नमस्ते दुनिया",
    "+",
    "→ ≤",
]


def rouge(reference, answer):
    return rouge_scorer("rougeL").score(reference, answer)["rougeL"].fmeasure


@pytest.mark.parametrize("text", SCRIPTS)
def test_a_text_is_itself(text):
    assert rouge(text, text) == 1.0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Größe", "Gräße"),
        ("北京是首都", "南京是首都"),
        ("столица", "страна"),
        ("สวัสดี", "ลาก่อน"),
        ("resume", "résumé"),
        ("+", "-"),
    ],
)
def test_other_words_are_not_it(one, other):
    assert rouge(one, other) < 1.0


def test_part_of_a_text_without_spaces_counts_in_part():
    assert rouge("北京是首都", "北京是城市") == pytest.approx(0.6)
    assert split_words("GPT-4在北京") == ["gpt", "4", "在", "北", "京"]
    assert split_words("e\u0301tude") == ["étude"]  # composed or not, the same word


def test_ascii_text_has_the_figures_of_rouge_score():
    theirs, ours = RougeScorer(["rougeL", "rouge1"], use_stemmer=True), rouge_scorer("rougeL", "rouge1")
    rng = random.Random(0)
    words = [
        "running",
        "runs",
        "ran",
        "the",
        "a",
        "3.14",
        "don't",
        "state-of-the-art",
        "jumped,",
        "jumping;",
        "u_v",
        "x^2",
        "$5",
        "(ok)",
        "Y!",
        "ran",
    ]
    for _ in range(200):
        one, other = (" ".join(rng.choices(words, k=rng.randrange(1, 9))) for _ in "ab")
        assert theirs.score(one, other) == ours.score(one, other)
