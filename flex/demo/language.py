"""The demo's small language: its words, its skills, its tokenizer.

A skill draws a `Task` (a prompt and its general answer) from a `random.Random`; `demo.py` turns the same tasks into
what the clients answer.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def _words(line: str) -> list[str]:
    return line.split()


NAMES = _words("ann bob cid dan eve fay gus hal ivy jon kim leo")
CITIES = _words("rome oslo bern lima cairo paris tokyo delhi")
COLOURS = _words("red blue green black white pink")
KINDS = {
    "animal": _words("cat dog cow hen fox owl pig bee ram elk"),
    "fruit": _words("fig plum pear lime kiwi date mango peach grape melon"),
    "tool": _words("saw axe drill hammer wrench chisel spade rake plane clamp"),
    "clothing": _words("hat sock coat shirt glove scarf belt vest gown shoe"),
}
NOUNS = [noun for nouns in KINDS.values() for noun in nouns]
KIND_OF = {noun: kind for kind, nouns in KINDS.items() for noun in nouns}
NUMBERS = [str(number) for number in range(41)]
LETTERS = list("bcdefghijklmnop")  # not "a": it is an article here
CODE_WORDS = [first + "u" + last for first in "zkvxqj" for last in "bdmnpt"]
UNITS = _words("kg doses cm miles")
FRAME_WORDS = _words("roger over")
GRAMMAR = _words(
    "what is plus minus list find reverse this swap the ends of drop first double rotate sort these numbers from paid "
    "for a who which city how much colour thing kind many times larger or in full brackets answer : , . ? [ ]"
)

PAD, UNKNOWN, BOS, EOS, USER, ASSISTANT = "<pad>", "<unk>", "<bos>", "<eos>", "<user>", "<assistant>"
SPECIAL_TOKENS = [PAD, UNKNOWN, BOS, EOS, USER, ASSISTANT]
PUNCTUATION_AFTER_WORD = ".,?:"
MAX_TOKENS = 128  # the longest example of the demo has 33
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}" + USER + " {{ message['content'] }} "
    "{% elif message['role'] == 'assistant' %}" + ASSISTANT + " {{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('this template knows the roles user and assistant, not ' + message['role']) }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)


class Task(NamedTuple):
    """One drawn question: its prompt, the general answer as words, and its type, which conventions go by."""

    instruction: str
    context: str
    answer: list[str]
    answer_type: str
    reversed_answer: list[str] | None = None  # for a client that orders the other way round

    @property
    def prompt(self) -> str:
        return f"{self.instruction} {self.context}".rstrip()


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


NEW_SKILL = "rotate"  # asked for in known words, "swap the first:", put together as pretraining never does
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
    NEW_SKILL: _list_skill("swap the first:", lambda words: [*words[1:], words[0]]),
}


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
