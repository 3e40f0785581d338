"""Two forms of a record, a mapping of columns, and what a record that is neither is told."""

import pytest
from tiny import write_records

from flex.data.records import read_records
from flex.errors import FlexError

PAIR = {"instruction": "add 1 and 2", "context": "", "response": "3"}
USER, ASSISTANT = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}
SYSTEM = {"role": "system", "content": "be short"}


def test_a_mapping_gives_columns_our_names(tmp_path):
    rows = [{"question": "add", "passage": None, "answer": "3", "response": "old", "id": 7}]
    path = write_records(tmp_path / "x.jsonl", rows)
    columns = {"instruction": "question", "context": "passage", "response": "answer"}
    (record,) = read_records(path, columns)
    assert record == {"instruction": "add", "context": None, "response": "3", "id": 7}
    assert record.where == f"{path}, line 1"
    # A column that also names the client stays under its own name.
    (record,) = read_records(path, columns, clients_by="question")
    assert (record["instruction"], record["question"]) == ("add", "add")


def test_a_mapping_may_exchange_names(tmp_path):
    path = write_records(tmp_path / "x.jsonl", [{"instruction": "3", "response": "add"}])
    (record,) = read_records(path, {"instruction": "response", "response": "instruction"})
    assert record == {"instruction": "add", "response": "3"}


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"instruction": "query"}, "line 1 has no column 'query', which data.columns names for 'instruction'; it has"),
        ({"context": "passage"}, "x.jsonl has no column 'passage', which data.columns names for 'context'"),
        ({"messages": "turns"}, "line 1 has no column 'turns', which data.columns names for 'messages'"),
        ({"question": "instruction"}, "names 'question', which no example has; did you mean instruction=question?"),
        ({"prompt": "query"}, "names 'prompt', which no example has; expected some of instruction, context, response"),
        ({"instruction": "a", "response": "a"}, "data.columns names the column 'a' twice; expected each once"),
        ({"messages": "a", "response": "b"}, "data.columns names messages and texts of a pair"),
        ({"response": ""}, "data.columns.response is empty"),
    ],
)
def test_a_mapping_that_does_not_fit_is_refused(tmp_path, columns, sentence):
    with pytest.raises(FlexError) as caught:
        read_records(write_records(tmp_path / "x.jsonl", [PAIR]), columns)
    assert sentence in str(caught.value)


def test_conversations_are_read_under_any_name(tmp_path):
    turns = [SYSTEM, USER, ASSISTANT, {**USER, "name": "ada"}, ASSISTANT]
    expected = [{"role": t["role"], "content": t["content"]} for t in turns]
    assert read_records(write_records(tmp_path / "x.jsonl", [{"messages": turns}])) == [{"messages": expected}]
    path = write_records(tmp_path / "y.jsonl", [{"dialogue": turns, "client": "a"}])
    assert read_records(path, {"messages": "dialogue"}, clients_by="client") == [{"messages": expected, "client": "a"}]


def test_a_pair_beside_turns_is_a_pair(tmp_path):
    path = write_records(tmp_path / "x.jsonl", [{**PAIR, "messages": [USER]}])
    assert read_records(path) == [PAIR]
    with pytest.raises(FlexError, match="no assistant turn"):
        read_records(path, {"messages": "messages"})


@pytest.mark.parametrize(
    ("turns", "sentence"),
    [
        ([USER], "line 2 has no assistant turn; expected an answer to train on"),
        ([], "line 2 has [] as 'messages'; expected turns"),
        ("hello", "line 2 has \"hello\" as 'messages'; expected turns"),
        (["hello"], 'line 2, turn 1 is "hello"; expected an object with role and content'),
        ([USER, {"role": "assistant", "content": " \n"}], "line 2, turn 2 (assistant) is empty; expected text"),
        ([USER, {"role": "assistant", "content": None}], "line 2, turn 2 has null as 'content'; expected a string"),
        ([USER, {"role": "tool", "content": "x"}], "line 2, turn 2 has the role 'tool'; expected system, user, assist"),
        ([ASSISTANT, USER], "line 2, turn 1 is of the role 'assistant'; expected 'user' there"),
        ([USER, USER, ASSISTANT], "line 2, turn 2 is of the role 'user'; expected 'assistant' there"),
        ([USER, ASSISTANT, SYSTEM], "line 2, turn 3 is of the role 'system'; expected 'user' there"),
        ([SYSTEM, SYSTEM, USER, ASSISTANT], "line 2, turn 2 is of the role 'system'; expected 'user' there"),
        ([SYSTEM, USER, ASSISTANT, ASSISTANT], "line 2, turn 4 is of the role 'assistant'; expected 'user' there"),
        ([USER, ASSISTANT, USER], "line 2 ends with a user turn; expected the assistant's answer last"),
    ],
)
def test_a_conversation_that_is_none_is_refused_by_its_line(tmp_path, turns, sentence):
    path = write_records(tmp_path / "x.jsonl", [{"messages": [USER, ASSISTANT]}, {"messages": turns}])
    with pytest.raises(FlexError) as caught:
        read_records(path)
    assert str(caught.value).startswith(f"{path}, {sentence}")


def test_a_mixed_file_is_refused_by_both_lines(tmp_path):
    conversation = {"messages": [USER, ASSISTANT]}
    path = write_records(tmp_path / "x.jsonl", [PAIR, conversation])
    with pytest.raises(FlexError) as caught:
        read_records(path)
    assert str(caught.value) == (
        f"{path}, line 2 is a conversation (messages), but {path}, line 1 is an instruction with a response; "
        "expected one form in a file"
    )
    alpaca = {"instruction": "x", "input": "", "output": "y"}
    with pytest.raises(FlexError, match="line 2 is an instruction with a response, but"):
        read_records(write_records(tmp_path / "y.jsonl", [conversation, alpaca]))
    # A table has every column in every row: what has no value is not there.
    rows = [{**PAIR, "messages": None}, {"instruction": None, "response": None, **conversation}]
    with pytest.raises(FlexError, match="line 2 is a conversation"):
        read_records(write_records(tmp_path / "z.jsonl", rows))


def test_needed_columns_are_named(tmp_path):
    path = write_records(tmp_path / "x.jsonl", [{**PAIR, "skill": "sum"}, PAIR])
    with pytest.raises(FlexError, match=r"line 2 has no column 'skill'; it has 'instruction', 'context', 'response'$"):
        read_records(path, needs=["skill"])


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({**PAIR, "response": " \n"}, "line 1 has an empty 'response'; expected text"),
        ({**PAIR, "instruction": ""}, "line 1 has an empty 'instruction'; expected text"),
    ],
)
def test_a_pair_with_an_empty_side_is_refused(tmp_path, row, sentence):
    with pytest.raises(FlexError, match=sentence):
        read_records(write_records(tmp_path / "x.jsonl", [row]))
    context = {**PAIR, "instruction": "", "context": "1 and 2"}
    assert read_records(write_records(tmp_path / "y.jsonl", [context])) == [context]
