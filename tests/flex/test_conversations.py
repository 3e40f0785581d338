"""Conversations: every answer trains, the last is scored, and the template says all turns."""

import dataclasses

import pytest
from tiny import write_records

from flex.config import DataConfig
from flex.data.examples import IGNORED, Encoder, load_clients
from flex.demo.language import build_tokenizer
from flex.errors import FlexError

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] | trim }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def turns(*texts, system=""):
    roles = ("user", "assistant") * len(texts)
    said = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return [*([{"role": "system", "content": system}] if system else []), *said]


LONG = turns("what is 3 plus 4 ?", "7 kg", "and 5 plus 4 ?", "9 kg", "which is larger ?", "9")


@pytest.fixture(params=["alpaca", "chat", "chatml", "slow"])
def encoder(request, monkeypatch):
    tokenizer = build_tokenizer()
    if request.param == "chatml":
        tokenizer.chat_template = CHATML
    if request.param == "slow":  # a tokenizer that does not tell where its tokens stand
        monkeypatch.setattr(type(tokenizer), "is_fast", False)
    return Encoder(tokenizer, "alpaca" if request.param == "alpaca" else "chat", 512)


def labelled(encoder, example, last_alone):
    labels = encoder.batch([example], last_alone=last_alone).labels[0]
    return encoder.tokenizer.decode(labels[labels != IGNORED]).split()


def test_all_answers_train_and_the_last_is_scored(encoder):
    example = encoder.example({"messages": LONG})
    end = encoder.tokenizer.eos_token
    assert labelled(encoder, example, last_alone=True) == ["9", end]
    assert labelled(encoder, example, last_alone=False) == ["7", "kg", end, "9", "kg", end, "9", end]
    assert example.response == "9"
    assert not example.truncated


def test_a_conversation_of_one_exchange_is_a_pair(encoder):
    pair = {"instruction": "what is 3 plus 4 ?", "response": "7 kg"}
    assert encoder.example({"messages": LONG[:2]}) == encoder.example(pair)


def test_the_prompt_of_the_last_answer_is_what_generation_sees(encoder):
    example = encoder.example({"messages": LONG})
    prompt, spans = encoder.conversation_ids(LONG[:-1])
    assert list(example.input_ids[: example.prompt_length]) == prompt
    assert example.earlier == tuple(spans)
    if encoder.template == "chat" and encoder.tokenizer.is_fast:
        whole = encoder.tokenizer.apply_chat_template(LONG[:-1], add_generation_prompt=True, return_dict=False)
        assert prompt == list(whole)


def test_a_system_turn_stands_before_everything(encoder):
    conversation = {"messages": turns("which is larger ?", "9", system="kg")}
    if encoder.template == "chat" and encoder.tokenizer.chat_template != CHATML:
        with pytest.raises(FlexError, match="template refuses it: this template knows the roles user and assistant"):
            encoder.example(conversation)
        return
    said = encoder.example(conversation)
    text = encoder.tokenizer.decode(said.input_ids)
    assert text.index("kg") < text.index("which is larger")
    assert labelled(encoder, said, last_alone=False) == ["9", encoder.tokenizer.eos_token]


def test_a_long_conversation_loses_its_oldest_exchanges(encoder):
    length = len(encoder.example({"messages": LONG[2:]}).input_ids)
    short = Encoder(encoder.tokenizer, encoder.template, length)
    cut = short.example({"messages": LONG})
    assert cut.truncated
    assert cut == dataclasses.replace(short.example({"messages": LONG[2:]}), truncated=True)
    # Where the last exchange alone is too long it is cut as a pair is.
    tiny = Encoder(encoder.tokenizer, encoder.template, 8).example({"messages": LONG})
    assert (len(tiny.input_ids), tiny.earlier, tiny.truncated) == (8, (), True)


def test_a_template_that_cannot_say_a_conversation_is_told_by_its_line(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}"
        "{% for m in messages[-1:] %}{{ m['content'] }}{% endfor %}"
    )
    encoder = Encoder(tokenizer, "chat", 128)
    rows = [{"messages": turns("x", "y", system="s" * n), "client": "a"} for n in range(3)]
    path = write_records(tmp_path / "x.jsonl", rows)
    with pytest.raises(
        FlexError, match=r"x.jsonl, line [23]: the tokenizer's chat template refuses it: no system turn"
    ):
        load_clients(DataConfig(train=str(path)), encoder)
    with pytest.raises(FlexError, match="leaves out or changes an earlier answer"):
        encoder.example({"messages": LONG})


def test_conversations_train_in_clients_and_repeated_ones_are_found(tmp_path):
    rows = [{"messages": turns(f"what is {n} plus 1 ?", str(n + 1), "sure ?", "yes"), "client": "a"} for n in range(8)]
    path = write_records(tmp_path / "x.jsonl", rows)
    encoder = Encoder(build_tokenizer(), "auto", 128)
    (client,) = load_clients(DataConfig(train=str(path)), encoder)
    assert all(len(example.earlier) == 1 for example in [*client.train, *client.test])
    with pytest.raises(FlexError, match=r"all 8 examples of .* are trained on"):
        load_clients(DataConfig(train=str(path), test=str(path)), encoder)


def test_auto_takes_the_chat_template_where_there_is_one():
    tokenizer = build_tokenizer()
    assert Encoder(tokenizer, "auto", 64).template == "chat"
    tokenizer.chat_template = None
    assert Encoder(tokenizer, "auto", 64).template == "alpaca"
