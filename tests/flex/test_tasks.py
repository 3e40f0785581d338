"""The tasks: MMLU by planted likelihoods and on a base that learnt a folder of its form, GSM8K, perplexity, cloze."""

import csv
import json
import math
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from tiny import read_log, save_model, tiny_config, write_records
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from flex import config as flex_config
from flex.cli import main
from flex.config import EvaluateSettings, RunConfig
from flex.data.examples import Encoder
from flex.errors import FlexError
from flex.evaluation import gsm8k, perplexity
from flex.evaluation.cloze import score_cloze
from flex.evaluation.likelihood import choice_likelihood
from flex.evaluation.mmlu import LETTERS, Prompts, read_mmlu, score_mmlu
from flex.evaluation.scored import Scored
from flex.evaluation.tasks import TASKS, read_tasks
from flex.runs.run import run


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, but " A" to " D" are tokens of their own, as in the vocabularies of large models."""
    characters = sorted({*map(chr, range(32, 127)), "\n"})
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", " A", " B", " C", " D", *characters])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Split(__import__("tokenizers").Regex(" [ABCD](?=\n|$)|[\\s\\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


def text_of(encoder: Encoder, ids: list[int]) -> str:
    return "".join(encoder.tokenizer.convert_ids_to_tokens(ids))


def plain_encoder(max_length: int = 256) -> Encoder:
    return Encoder(letters_tokenizer(), "alpaca", max_length)


def write_folder(root: Path, subjects: dict[str, list[list[str]]], categories: dict | None = None) -> str:
    for subject, rows in subjects.items():
        for part, own in (("dev", rows[:5]), ("test", rows[5:])):
            (root / part).mkdir(parents=True, exist_ok=True)
            with (root / part / f"{subject}_{part}.csv").open("w", newline="") as file:
                csv.writer(file).writerows(own)
    if categories:
        (root / "subjects.json").write_text(json.dumps(categories))
    return str(root)


def rows(count: int, length: int = 6) -> list[list[str]]:
    return [[f"{'q' * length} {i} ?", f"w{i}", f"x{i}", f"y{i}", f"z{i}", LETTERS[(3 * i) % 4]] for i in range(count)]


class Planted(torch.nn.Module):
    """A model whose likeliest next token is planned: by the last number that stands in the text before."""

    def __init__(self, encoder: Encoder, plan: dict[int, str]):
        super().__init__()
        self.anchor, self.encoder, self.plan, self.shapes = torch.nn.Parameter(torch.zeros(1)), encoder, plan, []

    def forward(self, input_ids, attention_mask, use_cache=False):
        tokenizer = self.encoder.tokenizer
        self.shapes.append(tuple(input_ids.shape))
        logits = torch.zeros(*input_ids.shape, len(tokenizer))
        for row, mask in enumerate(attention_mask):
            n = int(mask.sum())
            text = text_of(self.encoder, input_ids[row, :n].tolist()).rpartition("q ")[2]
            number = int(text.split(" ?")[0])
            logits[row, n - 1, tokenizer.convert_tokens_to_ids(f" {self.plan[number]}")] = 3.0
        return SimpleNamespace(logits=logits)


def test_the_table_has_a_row_for_every_task():
    assert TASKS.keys() == flex_config.TASKS.keys()


@pytest.mark.parametrize("shots", [5, 0])
def test_planted_answers_are_counted_by_category(tmp_path, shots):
    subjects = {"animals": rows(5 + 9), "colours": rows(5 + 6)}
    folder = write_folder(tmp_path, subjects, {"animals": {"category": "life"}, "colours": "light"})
    encoder, said = plain_encoder(), []
    # The questions are 5, 6, ...; the plan has the right letter for all but 7 and 8, which either subject has.
    plan = {i: (LETTERS[(3 * i) % 4] if i not in (7, 8) else LETTERS[(3 * i + 1) % 4]) for i in range(14)}
    model = Planted(encoder, plan)
    settings = EvaluateSettings(batch_size=4)
    scored = Scored(model, encoder, settings, say=lambda *what: said.append(what))
    found = score_mmlu(scored, read_mmlu(folder, examples=shots > 0), shots)
    assert (found["num_examples"], found["accuracy"]) == (15, 11 / 15)
    assert found["groups"] == {
        "life": {"num_examples": 9, "accuracy": 7 / 9},
        "light": {"num_examples": 6, "accuracy": 4 / 6},
    }
    assert found["details"]["standard_error"] == pytest.approx(math.sqrt(11 / 15 * 4 / 15 / 15))
    assert found["details"]["standard_error_by_group"]["light"] == pytest.approx(math.sqrt(4 / 6 * 2 / 6 / 6))
    assert (found["details"]["mean_shots"], found["details"]["fewer_shots"]) == (shots, 0)
    assert said[-1] == ("mmlu", 15, 15)
    assert len(model.shapes) == 4  # batches of four
    assert model.shapes == sorted(model.shapes, key=lambda shape: shape[1])


def test_the_prompt_is_the_published_one(tmp_path):
    folder = write_folder(tmp_path, {"high_school_art": rows(7)})
    (subject,) = read_mmlu(folder)
    encoder = plain_encoder()
    asked = Prompts(encoder, 4096, 4096).ask(subject, subject.questions[0], 2)
    assert text_of(encoder, asked.ids) == (
        "The following are multiple choice questions (with answers) about high school art.\n\n"
        "qqqqqq 0 ?\nA. w0\nB. x0\nC. y0\nD. z0\nAnswer: A\n\n"
        "qqqqqq 1 ?\nA. w1\nB. x1\nC. y1\nD. z1\nAnswer: D\n\n"
        "qqqqqq 5 ?\nA. w5\nB. x5\nC. y5\nD. z5\nAnswer:"
    )
    assert asked.shots == 2
    assert LETTERS[asked.answer] == "D"


def test_as_many_examples_as_fit_and_no_question_cut(tmp_path):
    folder = write_folder(tmp_path, {"art": [*rows(6), *rows(1, length=400)[:1]]})
    encoder = plain_encoder()
    (subject,) = read_mmlu(folder)
    one = len(encoder.tokenizer(subject.examples[0].answered())["input_ids"])
    none = len(Prompts(encoder, 4096, 4096).ask(subject, subject.questions[0], 0).ids)
    for room, wanted in ((none + 2 * one + 5, 2), (none + 5, 0), (16, 0)):
        asked = Prompts(encoder, 4096, room).ask(subject, subject.questions[0], 5)
        assert (asked.shots, len(asked.ids)) == (
            wanted,
            none + sum(len(encoder.tokenizer(e.answered())["input_ids"]) for e in subject.examples[:wanted]),
        )
    model = Planted(encoder, dict.fromkeys(range(9), "A"))
    model.config = SimpleNamespace(max_position_embeddings=none + 40)
    found = score_mmlu(Scored(model, encoder, EvaluateSettings()), [subject], 5)
    assert found["details"]["too_long"] == 1  # the question of 400 letters, which counts as wrong
    assert found["details"]["fewer_shots"] == 2
    assert found["accuracy"] == 0


def test_answers_of_several_tokens_go_by_their_whole_likelihood(tmp_path):
    torch.manual_seed(0)
    encoder = Encoder(letters_tokenizer(), "alpaca", 64)
    model = AutoModelForCausalLM.from_pretrained(
        save_model(tmp_path / "model", vocab_size=len(encoder.tokenizer)), dtype=torch.float32
    )
    prompts, choices = [[10, 20, 30], [11, 12, 13, 14, 15]], [[40, 41], [42], [43, 44, 45]]
    came = choice_likelihood(Scored(model.eval(), encoder, EvaluateSettings()), prompts, choices)
    for i, prompt in enumerate(prompts):
        for j, choice in enumerate(choices):
            ids = torch.tensor([[*prompt, *choice]])
            with torch.no_grad():
                of_tokens = model(ids).logits[0].log_softmax(-1)
            wanted = sum(of_tokens[len(prompt) - 1 + k, token] for k, token in enumerate(choice))
            assert float(came[i, j]) == pytest.approx(float(wanted), abs=1e-4)
    single = choice_likelihood(Scored(model, encoder, EvaluateSettings()), prompts, [[40], [41]])
    both = choice_likelihood(Scored(model, encoder, EvaluateSettings()), prompts, [[40], [41], [1, 2]])
    torch.testing.assert_close(single, both[:, :2], rtol=1e-4, atol=1e-5)


def test_a_tokenizer_that_does_not_know_the_letters_is_refused(tmp_path):
    tokenizer = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1, "q": 2}, unk_token="<pad>"))
    blind = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")
    (subject,) = read_mmlu(write_folder(tmp_path, {"art": rows(7)}))
    prompts = Prompts(Encoder(blind, "alpaca", 64), 512, 512)
    with pytest.raises(FlexError, match="does not tell the answers A, B, C and D apart"):
        prompts.ask(subject, subject.questions[0], 0)


def test_a_base_that_learnt_a_folder_answers_it(tmp_path):
    """Chance is a quarter; trained on these questions, the answer is the letter that the question ends in."""

    def question(i: int) -> list[str]:
        return [f"take {LETTERS[(7 * i) % 4]} {i % 10}", "u", "v", "w", "x", LETTERS[(7 * i) % 4]]

    folder = write_folder(tmp_path / "mmlu", {"art": [question(i) for i in range(45)]})
    encoder = plain_encoder()
    path = save_model(tmp_path / "model", vocab_size=len(encoder.tokenizer), max_position_embeddings=512)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    scored = Scored(model, encoder, EvaluateSettings(batch_size=16))
    before = score_mmlu(scored, read_mmlu(folder), 0)["accuracy"]
    (subject,) = read_mmlu(folder)
    prompts = Prompts(encoder, 512, 512)
    letters = [own[0] for own in prompts.letters[1]]
    asked = [prompts.ask(subject, q, 0) for q in subject.questions]
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    model.train()
    length = max(len(a.ids) for a in asked)
    ids = torch.tensor([[0] * (length - len(a.ids)) + a.ids for a in asked])
    mask = torch.tensor([[0] * (length - len(a.ids)) + [1] * len(a.ids) for a in asked])
    answers = torch.tensor([letters[a.answer] for a in asked])
    for _ in range(120):
        loss = F.cross_entropy(model(ids, attention_mask=mask).logits[:, -1], answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = score_mmlu(scored, read_mmlu(folder), 0)["accuracy"]
    assert before < 0.6
    assert after > 0.9


def broken(part: str, content: bytes):
    def change(root: Path) -> str:
        (root / part).write_bytes(content)
        return str(root)

    return change


def moved(part: str):
    def change(root: Path) -> str:
        (root / part).rename(root / "elsewhere")
        return str(root)

    return change


BROKEN = {
    "no folder": (lambda root: str(root / "nowhere"), "no folder at evaluate.mmlu"),
    "no dev": (moved("dev"), "has no folder 'dev'"),
    "no test": (moved("test"), "has no folder 'test'"),
    "a subject without examples": (moved("dev/art_dev.csv"), "no file at .*art_dev"),
    "a line of five fields": (lambda root: add(root, "q,a,b,c,d"), "row 3 has 5 fields; expected a question"),
    "an answer E": (lambda root: add(root, "q,a,b,c,d,E"), "row 3 has the answer 'E'; expected one of A to D"),
    "no questions": (broken("test/art_test.csv", b""), "has no questions"),
    "no text": (broken("test/art_test.csv", b"\xff\xfe\xff"), "cannot be read as CSV"),
    "categories that are no object": (broken("subjects.json", b"[1]"), "expected an object"),
    "a category that is no text": (broken("subjects.json", b'{"art": 3}'), "no category for 'art'"),
}


def add(root: Path, line: str) -> str:
    with (root / "test" / "art_test.csv").open("a") as file:
        file.write(line + "\n")
    return str(root)


@pytest.mark.parametrize("case", BROKEN)
def test_a_folder_of_another_form_is_refused_in_a_sentence(tmp_path, case):
    write_folder(tmp_path, {"art": rows(7)})
    make, said = BROKEN[case]
    with pytest.raises(FlexError, match=said) as caught:
        read_mmlu(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_numbers_of_solutions():
    for text, number in (
        ("She has 3 + 4 = <<3+4=7>>7 apples.\n#### 7", 7),
        ("#### 1,234", 1234),
        ("so it is $12.50 in all", Decimal("12.5")),
        ("from 3 to -8", -8),
        ("#### -3.0 degrees, not 5", -3),
        ("nothing at all", None),
        ("the answer is 42.", 42),
    ):
        assert gsm8k.number_of(text) == number


def test_gsm8k_counts_exact_numbers(tmp_path, monkeypatch):
    problems = [{"question": f"how many {i}?", "answer": f"It is {i}.\n#### {i}"} for i in range(6)]
    path = write_records(tmp_path / "gsm.jsonl", problems)
    found = gsm8k.read(EvaluateSettings(gsm8k=str(path), tasks=("test", "gsm8k"), questions=5))
    assert [p.answer for p in found] == [0, 1, 2, 3, 4]
    encoder = plain_encoder()

    def answers(model, encoder, prompts, max_new_tokens, prepare):
        texts = [text_of(encoder, prompt) for prompt in prompts]
        said = [int(text.split("how many ")[1].split("?")[0]) for text in texts]
        return [f"that makes {number}.0" if number < 3 else "who knows" if number == 3 else "7" for number in said]

    monkeypatch.setattr(gsm8k, "generate", answers)
    scores = gsm8k.score_gsm8k(Scored(None, encoder, EvaluateSettings(batch_size=2)), found)
    assert (scores["num_examples"], scores["accuracy"], scores["details"]) == (5, 0.6, {"without_number": 1})
    write_records(path, [{"question": "x", "answer": "none"}])
    with pytest.raises(FlexError, match="line 1 has a solution without a number"):
        gsm8k.read(EvaluateSettings(gsm8k=str(path)))


def test_perplexity_is_of_every_token_once(tmp_path):
    encoder = plain_encoder(max_length=16)
    path = save_model(tmp_path / "model", vocab_size=len(encoder.tokenizer))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    text = "one two three four five six seven eight"
    ids = encoder.tokenizer(text)["input_ids"]
    total, start = 0.0, 0
    while start < len(ids) - 1:
        window = ids[start : start + 16]
        with torch.no_grad():
            logits = model(torch.tensor([window])).logits[0, :-1]
        total += float(F.cross_entropy(logits, torch.tensor(window[1:]), reduction="sum"))
        start += 15
    for size in (1, 8):
        scores = perplexity.score_perplexity(Scored(model, encoder, EvaluateSettings(batch_size=size)), text)
        assert scores["perplexity"] == pytest.approx(math.exp(total / (len(ids) - 1)), rel=1e-4)
        assert scores["details"] == {"tokens": len(ids) - 1}


class Successor(torch.nn.Module):
    """Holds the next token to be the last one and `step`; with `sure` 0 it holds all to be equally likely."""

    def __init__(self, vocabulary: int, step: int, sure: float):
        super().__init__()
        self.anchor, self.vocabulary, self.step, self.sure = torch.nn.Parameter(torch.zeros(1)), vocabulary, step, sure

    def forward(self, input_ids, attention_mask, use_cache=False):
        return SimpleNamespace(logits=self.sure * F.one_hot((input_ids + self.step) % self.vocabulary, self.vocabulary))


def test_cloze_takes_the_likeliest_continuation():
    encoder = plain_encoder(max_length=40)
    size, start = len(encoder.tokenizer), encoder.tokenizer.convert_tokens_to_ids("!")
    # Passages of 40 tokens, each a run of its own through the vocabulary: one knows what follows, another knows wrong.
    text = "".join(text_of(encoder, [start + p + i for i in range(40)]) for p in range(30)) + "rest"
    for batch_size in (1, 16):
        settings = EvaluateSettings(batch_size=batch_size)
        knows, wrong, guesses = (
            score_cloze(Scored(Successor(size, step, sure), encoder, settings), text)
            for step, sure in ((1, 5.0), (-1, 5.0), (1, 0.0))
        )
        assert (knows["num_examples"], knows["accuracy"]) == (30, 1.0)
        assert knows["details"] == {"standard_error": 0.0, "prompt": 24, "continuation": 16}
        assert wrong["accuracy"] < 1
        assert 0.05 < guesses["accuracy"] < 0.5  # who does not know takes the first of four
    few = Scored(Successor(size, 1, 5.0), encoder, EvaluateSettings(questions=7))
    assert score_cloze(few, text)["num_examples"] == 7
    with pytest.raises(FlexError, match="has 2 passages of 40 tokens; expected at least 4"):
        score_cloze(few, text[:100])


def test_tasks_need_their_files(tmp_path):
    for settings, said in (
        ({"tasks": ("mmlu",)}, "expected test among them"),
        ({"tasks": ("test", "mmlu")}, r"evaluate\.mmlu is empty"),
        ({"tasks": ("test", "trivia")}, "names \\['trivia'\\]"),
    ):
        with pytest.raises(FlexError, match=said):
            EvaluateSettings(**settings)
    with pytest.raises(FlexError, match="cannot be read"):
        read_tasks(EvaluateSettings(tasks=("test", "perplexity"), text=str(tmp_path / "nothing.txt")))
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(FlexError, match="is empty; expected a text"):
        read_tasks(EvaluateSettings(tasks=("test", "perplexity"), text=str(tmp_path / "empty.txt")))


def test_a_run_scores_tasks_once_where_clients_share_everything(tmp_path, capsys, monkeypatch):
    (tmp_path / "text.txt").write_text("which is larger , 3 or 14 ? " * 20)
    config = tiny_config(tmp_path, train={"methods": ("fedavg", "flex"), "rounds": 1, "steps": 1})
    config = config.with_values(
        evaluate={"rouge": False, "tasks": ("test", "perplexity"), "text": str(tmp_path / "text.txt")}
    )
    calls = []
    plain = perplexity.score_perplexity
    monkeypatch.setitem(
        TASKS,
        "perplexity",
        TASKS["perplexity"].__class__("counted", perplexity.read, lambda *a: calls.append(1) or plain(*a)),
    )
    folder = run(RunConfig(**vars(config)), Console(quiet=True))
    assert len(calls) == 1 + 2  # FedAvg has one model, FLEx one a client
    events = [e for e in read_log(folder / "metrics.jsonl") if e["event"] == "evaluate"]
    assert {e["split"] for e in events} == {"test", "perplexity"}  # the general set was not asked for
    found = {e["client_id"]: e["perplexity"] for e in events if e["split"] == "perplexity" and e["method"] == "fedavg"}
    assert found["a"] == found["b"] > 1
    words = [
        "eval",
        "--run",
        str(folder),
        "--method",
        "fedavg",
        "--client",
        "a",
        "--set",
        'evaluate.tasks=["test", "perplexity"]',
    ]
    assert main(words) == 0
    assert f"{found['a']:.2f}" in capsys.readouterr().out
    assert main([*words[:-1], "train.rounds=3"]) == 2
    assert "expected a setting of [evaluate]" in capsys.readouterr().err
