"""Records, splits and encoding: what a client trains on, and what a broken file is told."""

import dataclasses
import gzip
import json

import pytest
from tiny import records, save_data, write_records

from flex.config import DataConfig
from flex.data.examples import IGNORED, Encoder, load_clients, training_batches
from flex.data.records import read_records, texts_of
from flex.data.splits import split_held_out, split_validation
from flex.demo.language import build_tokenizer
from flex.errors import FlexError


@pytest.fixture(scope="module")
def encoder():
    return Encoder(build_tokenizer(), "chat", 64)


def test_gzip_and_plain_files_give_the_same_records(tmp_path):
    plain = write_records(tmp_path / "a.jsonl", records("a", 3))
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_records(packed) == read_records(plain) == records("a", 3)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "holds no records"),
        ("{not json\n", "line 1 is not JSON: Expecting property name enclosed in double quotes at column 2"),
        ("[" * 100_000, "line 1 is not JSON that can be read"),
        ('{"instruction": "x", "response": 5}\n', "line 1 has 5 as 'response'; expected a string"),
        (r'{"instruction": "x\uD83D", "response": "x"}', "line 1 holds half of a character"),
        ('{"instruction": null, "response": "x"}\n', "line 1 has null as 'instruction'; expected a string"),
        ('{"instruction": "x", "response": "x", "context": [1]}\n', "line 1 has [1] as 'context'; expected a string"),
        ('{"instruction": "x"}\n', "line 1 has no column 'response'; it has 'instruction'"),
        ("[1]\n", "line 1 is a list; expected a JSON object"),
    ],
)
def test_a_broken_file_gets_one_sentence(tmp_path, content, sentence):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(FlexError) as caught:
        read_records(tmp_path / "x.jsonl")
    assert sentence in str(caught.value)


def test_a_missing_or_cut_gzip_file_gets_one_sentence(tmp_path):
    with pytest.raises(FlexError, match="no data file at"):
        read_records(tmp_path / "none.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"instruction": "a", "response": "b"}\n')[:-6])
    with pytest.raises(FlexError, match="cannot be read as JSON lines"):
        read_records(tmp_path / "cut.jsonl.gz")


@pytest.mark.parametrize("damage", ["byte", "header", "cut"])
def test_a_damaged_gzip_file_gets_one_sentence(tmp_path, damage):
    packed = bytearray(gzip.compress(b"".join(json.dumps(r).encode() + b"\n" for r in records("a", 50))))
    if damage == "byte":
        packed[20:60] = b"\xff" * 40
    elif damage == "header":
        packed[0] = 0
    else:
        del packed[len(packed) // 2 :]
    (tmp_path / "x.jsonl.gz").write_bytes(packed)
    with pytest.raises(FlexError, match="cannot be read as JSON lines"):
        read_records(tmp_path / "x.jsonl.gz")


def test_a_byte_order_mark_and_an_absent_context_are_no_fault(tmp_path):
    plain = r'{"instruction": "\ud83d\ude00", "response": "y", "context": null}'
    (tmp_path / "x.jsonl").write_text(plain, encoding="utf-8-sig")
    assert read_records(tmp_path / "x.jsonl") == [json.loads(plain)]


@pytest.mark.parametrize("name", [None, "", "  ", [], {"a": 1}])
@pytest.mark.parametrize("file", ["train", "test"])
def test_a_record_that_names_no_client_is_refused_by_its_line(tmp_path, encoder, file, name):
    save_data(tmp_path)
    files = {part: str(tmp_path / f"{part}.jsonl") for part in ("train", "test")}
    with open(files[file], "a") as lines:
        lines.write(json.dumps({**records("a", 1)[0], "client": name}) + "\n")
    with pytest.raises(FlexError) as caught:
        load_clients(DataConfig(**files), encoder)
    line = {"train": 21, "test": 13}[file]
    sentence = f"{file}.jsonl, line {line} has {json.dumps(name)} as 'client'; expected the name of a client"
    assert str(caught.value).endswith(sentence)


def test_labels_cover_the_response_and_the_end_token(encoder):
    record = {"instruction": "what is 3 plus 4 ?", "context": "", "response": "7 kg"}
    example = encoder.example(record)
    batch = encoder.batch([example, encoder.example({**record, "response": "7"})])
    trained = batch.labels[0][batch.labels[0] != IGNORED].tolist()
    assert encoder.tokenizer.decode(trained[:-1]) == "7 kg"
    assert trained[-1] == encoder.tokenizer.eos_token_id
    # The shorter row is padded: no loss there, and no attention.
    assert batch.labels[1, -1] == IGNORED
    assert batch.attention_mask[1, -1] == 0


def test_training_and_generation_see_the_same_prompt(encoder):
    record = {"instruction": "which is larger , 3 or 4 ?", "context": "", "response": "4"}
    example = encoder.example(record)
    assert list(example.input_ids[: example.prompt_length]) == encoder.prompt_ids(record["instruction"], "")


def test_end_token_is_trained_even_where_it_is_the_padding_too():
    tokenizer = build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    encoder = Encoder(tokenizer, "chat", 64)
    batch = encoder.batch([encoder.example(r) for r in records("a", 1)])
    assert batch.labels[0].tolist().count(tokenizer.eos_token_id) == 1


def test_a_long_example_is_cut_to_the_limit_and_counted():
    encoder = Encoder(build_tokenizer(), "alpaca", 40)
    words = " ".join(["cat dog hen"] * 40)
    cut = encoder.example({"instruction": words, "context": "", "response": words})
    assert len(cut.input_ids) == 40
    assert cut.truncated
    assert cut.input_ids[-1] != encoder.tokenizer.eos_token_id  # stopping there would be the wrong lesson
    whole_response = encoder.example({"instruction": words, "context": "", "response": "cat"})
    assert whole_response.truncated
    assert whole_response.input_ids[-1] == encoder.tokenizer.eos_token_id
    # The call for a response, at the very end of the prompt, survives the cut.
    prompt = encoder.prompt_ids(words, "")
    assert list(whole_response.input_ids[: whole_response.prompt_length])[-8:] == prompt[-8:]


def test_clients_come_in_the_chosen_order_with_their_own_examples(tmp_path, encoder):
    save_data(tmp_path, "abc")
    config = DataConfig(train=str(tmp_path / "train.jsonl"), test=str(tmp_path / "test.jsonl"), clients=("c", "a"))
    clients = load_clients(config, encoder)
    assert [c.client_id for c in clients] == ["c", "a"]
    assert [(len(c.train), len(c.test)) for c in clients] == [(10, 6), (10, 6)]


def test_a_held_out_share_is_disjoint_and_depends_on_the_name_alone():
    items = [{"id": i} for i in range(50)]
    train, test = split_held_out(items, 0.2, "ward")
    assert len(test) == 10
    assert sorted(json.dumps(r) for r in train + test) == sorted(json.dumps(r) for r in items)
    assert split_held_out(items, 0.2, "ward") == (train, test)
    assert split_held_out(items, 0.2, "harbour") != (train, test)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"clients": ("a", "nobody")}, "no record has client = 'nobody'; the values are a, b"),
        ({"clients_by": "ward"}, "has no column 'ward'"),
        ({"test": "only_a"}, "client 'b' has no test examples"),
    ],
)
def test_a_client_without_examples_is_named(tmp_path, encoder, changes, sentence):
    save_data(tmp_path)
    write_records(tmp_path / "only_a.jsonl", records("a", 2))
    files = {"train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.jsonl")}
    if changes.get("test"):
        changes = {"test": str(tmp_path / "only_a.jsonl")}
    with pytest.raises(FlexError) as caught:
        load_clients(DataConfig(**{**files, **changes}), encoder)
    assert sentence in str(caught.value)


def test_a_tokenizer_that_cannot_stop_or_talk_is_refused():
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(FlexError, match="no end-of-sequence token"):
        Encoder(tokenizer, "alpaca", 64)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(FlexError, match="no chat template"):
        Encoder(tokenizer, "chat", 64)


def test_batches_depend_on_the_seed_and_use_everyone_before_anyone_twice(encoder):
    examples = [encoder.example(r) for r in records("a", 7)]
    drawn = [e for batch in training_batches(examples, 3, 7, "s") for e in batch]
    assert len(drawn) == 21
    assert {drawn.count(e) for e in examples} == {3}
    assert drawn == [e for batch in training_batches(examples, 3, 7, "s") for e in batch]
    assert drawn != [e for batch in training_batches(examples, 3, 7, "t") for e in batch]


@pytest.mark.parametrize("name", [float("nan"), float("inf"), True, None, [], ""])
def test_a_row_of_nobody_is_refused_by_its_line(tmp_path, name):
    rows = records("a", 3)
    rows[1]["client"] = name
    with pytest.raises(FlexError, match=r"x.jsonl, line 2 has .* as 'client'; expected the name of a client"):
        read_records(write_records(tmp_path / "x.jsonl", rows), clients_by="client")


def test_alpacas_columns_are_read_and_what_nobody_reads_is_named_once(tmp_path, encoder):
    rows = [
        {"instruction": "add", "input": f"{i} and 3", "output": str(i + 3), "client": "a", "id": i} for i in range(8)
    ]
    path = write_records(tmp_path / "x.jsonl", rows)
    notes: list[str] = []
    (client,) = load_clients(DataConfig(train=str(path), template="chat"), encoder, notes)
    prompts = {e.input_ids[: e.prompt_length] for e in [*client.train, *client.test]}
    assert len(prompts) == 8
    assert {e.response for e in [*client.train, *client.test]} == {str(i + 3) for i in range(8)}
    assert notes == [f"{path} has columns that nobody reads: 'id'"]
    plain = [{"instruction": "add", "context": f"{i} and 3", "response": str(i + 3)} for i in range(8)]
    assert [{k: v for k, v in r.items() if k not in ("client", "id")} for r in read_records(path)] == plain


def test_a_missing_group_is_no_group(tmp_path, encoder):
    rows = records("a", 6)
    for row, group in zip(rows, (None, float("nan"), "x", 3, "", "y"), strict=True):
        row["group"] = group
    path = write_records(tmp_path / "x.jsonl", rows)
    config = DataConfig(train=str(path), template="chat", group_by="group", test_fraction=0.2)
    (client,) = load_clients(config, encoder)
    assert {e.group for e in [*client.train, *client.test]} == {"", "x", "3", "y"}


def test_one_array_of_objects_is_read_like_lines(tmp_path):
    rows = records("a", 3)
    path = tmp_path / "x.json"
    for indent in (None, 2):
        path.write_text(json.dumps(rows, indent=indent))
        assert read_records(path) == rows
    rows[1]["response"] = 5
    path.write_text(json.dumps(rows))
    with pytest.raises(FlexError, match=r"x.json, entry 2 has 5 as 'response'"):
        read_records(path)
    path.write_text(json.dumps(rows)[:-5])
    with pytest.raises(FlexError, match=r"x.json is not JSON"):
        read_records(path)


def test_the_ending_may_be_in_capitals(tmp_path):
    packed = tmp_path / "A.JSONL.GZ"
    packed.write_bytes(gzip.compress(write_records(tmp_path / "a.jsonl", records("a", 3)).read_bytes()))
    assert read_records(packed) == records("a", 3)


def test_a_test_file_that_is_trained_on_is_refused_and_a_part_of_it_named(tmp_path, encoder):
    path = write_records(tmp_path / "x.jsonl", records("a", 6))
    config = DataConfig(train=str(path), test=str(path), template="chat")
    with pytest.raises(FlexError, match=r"all 6 examples of .*x.jsonl are trained on; expected others in data.test"):
        load_clients(config, encoder)
    other = write_records(tmp_path / "y.jsonl", records("a", 8, start=4))
    notes: list[str] = []
    load_clients(dataclasses.replace(config, test=str(other)), encoder, notes)
    assert "2 of 8 test examples of client 'a' are among its training examples" in notes


def test_the_validation_part_is_drawn_by_seed_and_never_trained_on(tmp_path, encoder):
    save_data(tmp_path)
    files = {"train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.jsonl")}
    plain = load_clients(DataConfig(**files), encoder)
    with_part = DataConfig(**files, validation_fraction=0.3)
    draws = [load_clients(with_part, encoder, seed=seed) for seed in (0, 0, 1)]
    for client, again, other, before in zip(*draws, plain, strict=True):
        assert client == again
        assert len(client.validation) == 3
        assert not {e.input_ids for e in client.train} & {e.input_ids for e in client.validation}
        assert sorted(e.input_ids for e in client.train + client.validation) == sorted(
            e.input_ids for e in before.train
        )
        assert client.test == before.test
        assert before.validation == []
        assert {e.input_ids for e in client.validation} != {e.input_ids for e in other.validation}
    assert {e.prompt_length for c in draws[0] for e in c.validation}
    short = load_clients(dataclasses.replace(with_part, max_train=5), encoder)
    assert [(len(c.train), len(c.validation)) for c in short] == [(3, 2), (3, 2)]


def test_records_of_the_same_texts_stay_on_one_side_of_the_validation_split():
    doubled = records("a", 6) + [{**r, "group": "again"} for r in records("a", 6)]
    for seed in range(20):
        train, validation = split_validation(doubled, 0.25, "a", seed)
        assert len(train) + len(validation) == 12
        assert len(validation) == 4
        assert not {texts_of(r) for r in train} & {texts_of(r) for r in validation}
    assert split_validation(doubled, 0.0, "a", 0) == (doubled, [])


@pytest.mark.parametrize("count", [1, 3])
def test_too_few_examples_for_a_validation_part_are_refused_by_name(count):
    with pytest.raises(FlexError, match=rf"client 'a' has too few training examples \({count}, 1 of them different\)"):
        split_validation(records("a", 1) * count, 0.5, "a", 0)


def test_a_template_that_leaves_out_earlier_answers_can_be_asked_though_not_trained_on():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<user> {{ m['content'] }} {% endif %}{% endfor %}"
    )
    own = Encoder(tokenizer, "chat", 64)
    turns = [{"role": role, "content": "3 kg"} for role in ("user", "assistant", "user")]
    assert own.next_ids(turns) == tokenizer("<user> 3 kg <user> 3 kg ", add_special_tokens=False)["input_ids"]
    with pytest.raises(FlexError, match="leaves out or changes an earlier answer"):
        own.conversation_ids(turns)
