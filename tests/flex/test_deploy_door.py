"""The worker's socket: frames without pickle, who may come in, and what a peer hears when something is wrong."""

import os
import pickle
import queue
import socket
import stat
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from flex.deploy import door as doors
from flex.deploy.door import Door, Question
from flex.deploy.frames import HEAD, MAGIC, build, describe, receive_frame, send_frame
from flex.deploy.shim import SOCKET, app, ask
from flex.errors import FlexError
from flex.federation.flower import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
    become_server,
)

ARRAYS = {
    "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a number": np.asarray(2.5, dtype=np.float32),
    "nothing": np.zeros((0, 4), np.float32),
    "long": np.asarray([2**60, -1]),
}


def content() -> RecordDict:
    config = {"flag": True, "count": 3, "rate": 0.5, "text": "ü\n", "raw": b"\x00\xff", "list": [1, 2], "texts": ["a"]}
    config |= {"blobs": [b"a", b"bc"], "empty": []}
    metrics = {"loss": float("nan"), "bound": float("inf"), "n": 3, "opening": [0.5, 1.5], "none": []}
    return RecordDict(
        {
            "arrays": ArrayRecord({name: Array(a) for name, a in ARRAYS.items()}),
            "config": ConfigRecord(config),
            "metrics": MetricRecord(metrics),
        }
    )


def test_every_record_comes_back_as_it_was():
    here, there = socket.socketpair()
    with here, there:
        send_frame(here, {"kind": "train"}, content())
        head, came = receive_frame(there, "the other")
    assert head == {"kind": "train"}
    assert list(came) == ["arrays", "config", "metrics"]
    for name, array in ARRAYS.items():
        again = came["arrays"][name].numpy()
        assert (again.dtype, again.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(again, array)
    assert dict(came["config"]) == dict(content()["config"])
    assert {k: type(v) for k, v in came["config"].items()} == {k: type(v) for k, v in content()["config"].items()}
    assert str(dict(came["metrics"])) == str(dict(content()["metrics"]))


@pytest.mark.parametrize(
    ("sent", "sentence"),
    [
        (pickle.dumps({"kind": "train"}, protocol=4) + b"." * 16, "speaks another language"),
        (HEAD.pack(MAGIC, 2**31, 0), "announces 2147483648 and 0 bytes; expected at most"),
        (HEAD.pack(MAGIC, 2, 2**40) + b"{}", "announces 2 and"),
        (HEAD.pack(MAGIC, 4, 0) + b"nope", "sent no frame that can be read"),
        (HEAD.pack(MAGIC, 2, 0) + b"[]", "sent no frame that can be read"),
        (HEAD.pack(MAGIC, 2, 5) + b"{}xxxxx", "sent no frame that can be read"),
        (HEAD.pack(MAGIC, 27, 0) + b'{"records":[{"name":"a"}]} ', "sent no frame that can be read"),
        (HEAD.pack(MAGIC, 40, 0) + b"{}", "has gone"),
        (b"FL", "has gone"),
    ],
)
def test_what_is_no_frame_is_refused(sent, sentence):
    here, there = socket.socketpair()
    with there:
        with here:
            here.sendall(sent)
        with pytest.raises(FlexError, match=f"the peer {sentence}"):
            receive_frame(there, "the peer")


def test_silence_has_an_end():
    here, there = socket.socketpair()
    with here, there:
        there.settimeout(0.05)
        here.sendall(HEAD.pack(MAGIC, 40, 0))
        with pytest.raises(FlexError, match=r"the peer has been silent for 0.05 s"):
            receive_frame(there, "the peer")


def test_a_record_of_an_unknown_type_is_refused():
    records, tensors = describe(content())
    with pytest.raises(KeyError):
        build([{**records[1], "type": "program"}], tensors)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "room" / "w.sock"


class Answering:
    """A door, and a thread that answers what comes in by a function."""

    def __init__(self, path, answer, peer=None):
        self.refused, self.answer, self.ending = [], answer, threading.Event()
        self.door = Door(path, os.getuid() if peer is None else peer, None, lambda *why: self.refused.append(why))
        self.thread = threading.Thread(target=self._work)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ending.set()
        self.thread.join()
        self.door.close()

    def _work(self):
        while not self.ending.is_set():
            try:
                question: Question = self.door.questions.get(timeout=0.02)
            except queue.Empty:
                continue
            try:
                question.records = self.answer(question)
            except FlexError as error:
                question.error = str(error)
            question.answered.set()


def test_the_socket_is_for_its_group_alone(path):
    with Answering(path, lambda question: question.content):
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o750
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        came = ask(str(path), "train", content())
        assert list(came) == list(content())
    assert not path.exists()


def test_another_user_is_refused(path):
    refused = pytest.raises(FlexError, match=rf"user id {os.getuid()} may not ask this worker; expected user id")
    with Answering(path, lambda question: question.content, peer=os.getuid() + 1) as answering, refused:
        ask(str(path), "query", RecordDict())
    assert answering.refused[0][0] == os.getuid()


@pytest.mark.parametrize("kind", ["read", "state", "", "train.secret"])
def test_a_question_of_another_kind_is_refused(path, kind):
    refused = pytest.raises(FlexError, match=f"the question is '{kind}'; expected one of train, evaluate, query")
    with Answering(path, lambda question: question.content), refused:
        ask(str(path), kind, RecordDict())


def test_a_refusal_and_a_look_around(path):
    def refuses(question):
        raise FlexError("not now")

    with Answering(path, refuses) as answering:
        with socket.socket(socket.AF_UNIX) as looking:
            looking.connect(str(path))
        with pytest.raises(FlexError, match=r"^not now$"):
            ask(str(path), "train", content())
    assert answering.refused == []


def test_a_long_turn_is_waited_for_and_a_dead_worker_is_not(path, monkeypatch):
    monkeypatch.setattr(doors, "ALIVE_S", 0.02)
    monkeypatch.setattr("flex.deploy.shim.SILENCE_S", 0.3)

    def slow(question):
        time.sleep(0.6)
        return question.content

    with Answering(path, slow):
        assert list(ask(str(path), "train", content())) == list(content())
    monkeypatch.setattr(doors, "ALIVE_S", 5)
    with Answering(path, slow), pytest.raises(FlexError, match=r"has been silent for 0.3 s"):
        ask(str(path), "train", content())


def test_no_worker_and_a_socket_of_another_user(path, tmp_path, monkeypatch):
    with pytest.raises(FlexError, match=r"no worker at .*w.sock .*; expected `flex worker` to run"):
        ask(str(path), "query", RecordDict())

    def denied(self, path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", denied)
    with pytest.raises(FlexError, match="belongs to another user and group"):
        ask(str(path), "query", RecordDict())


def test_a_socket_that_was_left_behind_is_taken_and_one_in_use_is_not(path, tmp_path):
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with Answering(path, lambda question: question.content):
        with pytest.raises(FlexError, match="another worker listens at"):
            Door(path, os.getuid(), None, lambda *_: None)
        assert ask(str(path), "query", content())
    path.write_text("something")
    with pytest.raises(FlexError, match="is there and is no socket"):
        Door(path, os.getuid(), None, lambda *_: None)
    with pytest.raises(FlexError, match=r"has \d+ bytes; expected at most 107 \(--socket PATH\)"):
        Door(tmp_path / ("x" * 120), os.getuid(), None, lambda *_: None)


def test_the_shim_turns_a_refusal_into_an_error_reply(path):
    become_server(1)
    context = Context(1, 2, {SOCKET: str(path)}, RecordDict(), {})
    message = Message(content(), 2, "train")
    assert "no worker at" in app(message, context).error.reason
    with Answering(path, lambda question: question.content):
        assert list(app(message, context).content) == list(content())
    nowhere = Context(1, 2, {}, RecordDict(), {})
    assert "started without worker-socket" in app(message, nowhere).error.reason
