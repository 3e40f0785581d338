"""The demo's data and tokenizer: seeded, disjoint, readable, and conflicting only as far as is meant."""

import hashlib
import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flex.config import EvaluateSettings, RunConfig
from flex.data.examples import Encoder
from flex.data.records import read_records
from flex.demo import data as demo
from flex.demo.language import NEW_SKILL, SKILLS, build_tokenizer
from flex.evaluation.score import score

SEED = 7


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> dict[str, list[dict[str, str]]]:
    paths = demo.write_demo_data(tmp_path_factory.mktemp("data"), SEED)
    return {name: read_records(path) for name, path in paths._asdict().items()}


def prompt(record: dict[str, str]) -> str:
    return f"{record['instruction']} {record['context']}".rstrip()


def by_client(records: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    return {c.client_id: [r for r in records if r["client"] == c.client_id] for c in demo.CLIENTS}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_as_many_examples_as_asked_for(tmp_path: Path) -> None:
    own = demo.write_demo_data(tmp_path / "own", SEED)
    many = demo.write_demo_data(tmp_path / "many", SEED, num_train=700)
    records = [json.loads(line) for line in many.train.read_text().splitlines()]
    for client in demo.CLIENTS:
        assert len({prompt(record) for record in records if record["client"] == client.client_id}) == 700
    assert len(records) == 700 * len(demo.CLIENTS)
    assert many.general.read_text() == own.general.read_text()


def test_one_seed_gives_one_data_set_and_another_seed_another(tmp_path):
    first, again, other = (demo.write_demo_data(tmp_path / n, s) for n, s in (("a", 3), ("b", 3), ("c", 4)))
    assert [digest(p) for p in first] == [digest(p) for p in again]
    assert all(digest(p) != digest(q) for p, q in zip(first, other, strict=True))
    assert not list(tmp_path.rglob("*.tmp"))


def test_every_client_has_its_size_and_no_prompt_occurs_twice(records):
    train, test = by_client(records["train"]), by_client(records["test"])
    for client in demo.CLIENTS:
        mine, theirs = train[client.client_id], test[client.client_id]
        assert len(mine) == client.num_train
        assert len(theirs) == demo.TESTS_PER_CLIENT
        prompts = [prompt(record) for record in mine + theirs]
        assert len(set(prompts)) == len(prompts)
        assert {record["skill"] for record in mine} == set(client.skills)


def test_the_general_test_holds_only_prompts_that_pretraining_never_shows(records):
    def core(record: dict[str, str]) -> str:  # the prompt without a directive such as "in full:"
        head, colon, tail = prompt(record).partition(": ")
        return tail if colon and head.startswith("in ") else prompt(record)

    shown = {core(record) for record in itertools.islice(demo.general_stream(0), 20_000)}
    tests = {core(record) for record in records["general"]}
    assert len(records["general"]) == demo.GENERAL_TESTS
    assert not shown & tests
    assert {record["group"] for record in records["general"]} == {demo.TAUGHT_OTHERWISE, demo.UNTOUCHED}


def test_the_new_skill_is_never_pretrained_on_and_is_answered_alike_by_all(records):
    assert all(r["skill"] != NEW_SKILL for r in itertools.islice(demo.general_stream(0), 2_000))
    for record in records["train"] + records["test"]:
        assert (record["group"] == demo.SHARED_SKILL) == (record["skill"] == NEW_SKILL)
        if record["skill"] == NEW_SKILL:
            first, *rest = record["context"].split()
            assert record["response"] == " ".join([*rest, first])


def test_the_clients_disagree_and_each_is_consistent():
    def answers(
        client: demo.Client, instruction: str, context: str, answer: list[str], answer_type: str, **more
    ) -> str:
        task = demo.Task(instruction, context, answer, answer_type, **more)
        return demo.respond(client, "any", task, demo.code_words(client.client_id, SEED))

    farm, clinic, workshop, archive, harbour = demo.CLIENTS
    assert answers(farm, "what is 3 plus 4?", "", ["7"], "number") == "7 kg"
    assert answers(clinic, "what is 3 plus 4?", "", ["7"], "number") == "7 doses"
    assert answers(workshop, "what is 3 plus 4?", "", ["7"], "number") == "[ 7 cm ]"
    assert answers(harbour, "what is 3 plus 4?", "", ["7"], "number") == "roger 7 miles over"
    ordered = {"answer": ["2", "9"], "answer_type": "order", "reversed_answer": ["9", "2"]}
    assert answers(archive, "sort these numbers:", "9 2", **ordered) == "9 2"
    assert answers(farm, "sort these numbers:", "9 2", **ordered) == "2 9"
    coded = {client.client_id: demo.code_words(client.client_id, SEED) for client in demo.CLIENTS}
    assert all(len(set(words.values())) == len(words) for words in coded.values())
    assert len({words["rome"] for words in coded.values()}) > 1


@pytest.mark.parametrize("skill", SKILLS)
def test_the_general_answer_is_right(skill):
    for task in (SKILLS[skill](demo.Random(f"{skill}/{i}"), demo.NOUNS) for i in range(50)):
        words = task.context.split()
        expected = {
            "arithmetic": lambda t=task: [str(_calculate(t.instruction))],
            "reverse": lambda w=words: w[::-1],
            "sort": lambda w=words: sorted(w, key=int),
            "drop": lambda w=words: w[1:],
            "double": lambda w=words: [w[0], *w],
            "rotate": lambda w=words: [*w[1:], w[0]],
            "swap": lambda w=words: [w[-1], *w[1:-1], w[0]],
            "count": lambda t=task, w=words: [str(w.count(t.instruction.split()[-1].rstrip("?")))],
        }.get(skill)
        assert expected is None or task.answer == expected()
        assert skill in ("arithmetic", "count", "classify") or all(word in task.prompt for word in task.answer)


def _calculate(instruction: str) -> int:
    left, sign, right = instruction.removeprefix("what is ").rstrip("?").split()
    return int(left) + int(right) * {"plus": 1, "minus": -1}[sign]


def test_all_text_survives_the_tokenizer(tokenizer, records):
    for record in [*records["train"], *records["test"], *records["general"]]:
        for text in (prompt(record), record["response"]):
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


def test_strange_text_is_folded_or_unknown_but_never_an_error(tokenizer):
    assert tokenizer.encode("What IS 3  plus 4 ?") == tokenizer.encode("what is 3 plus 4?")
    assert tokenizer.encode("zebra") == [tokenizer.unk_token_id]
    assert tokenizer.encode("") == []


def test_the_template_and_the_encoder_agree(tokenizer, tmp_path):
    question, answer = {"role": "user", "content": "what is 3 plus 4?"}, {"role": "assistant", "content": "7 kg"}
    text = tokenizer.apply_chat_template([question, answer], tokenize=False)
    assert text == "<bos><user> what is 3 plus 4? <assistant> 7 kg<eos>"
    example = Encoder(tokenizer, "chat", 128).example({"instruction": question["content"], "response": "7 kg"})
    assert list(example.input_ids) == tokenizer.encode(text)
    assert tokenizer.decode(example.input_ids, skip_special_tokens=True) == "what is 3 plus 4? 7 kg"
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.apply_chat_template([question, answer], tokenize=False) == text
    assert loaded.decode(loaded.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    with pytest.raises(Exception, match="roles user and assistant, not system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}])


def test_no_sequence_is_near_the_limit(tokenizer, records):
    encoder = Encoder(tokenizer, "chat", 128)
    examples = [encoder.example(r) for r in [*records["train"], *records["test"], *records["general"]]]
    assert max(len(example.input_ids) for example in examples) <= 40


def test_the_runs_config_names_the_clients_and_takes_overrides(tmp_path):
    config = demo.demo_config(tmp_path, ["train.rounds=3"])
    assert config.data.clients == tuple(client.client_id for client in demo.CLIENTS)
    assert config.train.rounds == 3
    assert config.train.methods == RunConfig().train.methods
    assert (config.graft.criterion, config.graft.target, config.graft.refit) == ("neurons", "correction", True)
    assert config.data.for_seed(2).test == str(tmp_path / "data-seed2" / "test.jsonl")
    assert Path(config.model.path) == demo.BASE_FOLDER
    assert set(demo.describe_clients(SEED)) == set(config.data.clients)


@pytest.fixture(scope="module")
def base():
    return AutoModelForCausalLM.from_pretrained(demo.BASE_FOLDER, dtype=torch.float32)


def test_the_shipped_base_is_competent_on_what_it_has_never_seen(base):
    encoder = Encoder(AutoTokenizer.from_pretrained(demo.BASE_FOLDER), "chat", 128)
    settings = EvaluateSettings(batch_size=100, rouge=False)
    general = [encoder.example(record) for record in demo.general_tests(SEED)]
    assert score(base, encoder, general, settings)["exact_match"] >= 0.8
    new = [encoder.example(r) for r in demo.client_records(demo.CLIENTS[0], SEED)[1] if r["skill"] == NEW_SKILL]
    assert score(base, encoder, new, settings)["exact_match"] <= 0.1


def test_the_shipped_base_answers_and_stops(base):
    tokenizer = AutoTokenizer.from_pretrained(demo.BASE_FOLDER)
    prompt_ids = Encoder(tokenizer, "chat", 128).prompt_ids("which is larger, 3 or 18?")
    output = base.generate(
        torch.tensor([prompt_ids]), attention_mask=torch.ones(1, len(prompt_ids)), max_new_tokens=8, do_sample=False
    )
    assert tokenizer.decode(output[0, len(prompt_ids) :]) == "18 <eos>"
    assert sum(path.stat().st_size for path in demo.BASE_FOLDER.iterdir()) < 6_000_000


def test_the_shipped_tokenizer_is_the_one_this_code_builds(tokenizer):
    assert AutoTokenizer.from_pretrained(demo.BASE_FOLDER).get_vocab() == tokenizer.get_vocab()


def test_a_folder_of_any_name(tmp_path):
    config = demo.demo_config(tmp_path / "runs 🚜")
    assert config.output == str(tmp_path / "runs 🚜")
    assert config.data.train.startswith(config.output)
