"""What `flex deploy run` shows of a run that another process serves, and how it knows that the run is over; how long
`flex node` tries to be let in."""

import fcntl
import time
from types import SimpleNamespace

import pytest

from flex.commands import deploy, worker
from flex.commands import train as train_command
from flex.config import RunConfig
from flex.deploy import superlink
from flex.deploy.folder import init
from flex.deploy.progress import DONE, ENDED, PROGRESS, Teller
from flex.errors import FlexError
from flex.store.events import Trained
from flex.store.files import LOCK


@pytest.fixture
def deployment(tmp_path, monkeypatch):
    monkeypatch.setattr(deploy, "LOOK_S", 0.01)
    monkeypatch.setattr(deploy, "QUIET_S", 0.02)
    return init(tmp_path / "fed", RunConfig(), "127.0.0.1:8000", ["a"], {}, None)


def test_a_run_is_shown_to_its_end(deployment, capsys):
    Teller(deployment.folder / PROGRESS, 7).tell(**{ENDED: "another run's word"})
    teller = Teller(deployment.folder / PROGRESS, 8)
    teller.tell(what="waiting for a to connect")
    line = teller.line("flex seed 0")
    line(total=4, completed=0, rounds=2)
    line(what="round 1, train: all sites answered")
    line(events=[Trained(1, "a", 10, 2.5)])
    line(ended=True, what="done, exact match 0.5")
    teller.tell(**{ENDED: DONE})
    assert deploy._follow(deployment, 8) == DONE
    said = capsys.readouterr().out
    assert "waiting for a to connect" in said
    assert "flex seed 0: round 1, train: all sites answered" in said
    assert "round 1/2, loss 2.5" in said
    assert "done, exact match 0.5" in said
    assert "another" not in said


def test_a_run_that_ended_without_a_word(deployment, monkeypatch):
    monkeypatch.setattr(superlink, "has_ended", lambda *_: True)
    assert "ended at the server without a word" in deploy._follow(deployment, 8)


def test_a_late_answer_is_no_end_and_a_server_that_is_gone_is(deployment, monkeypatch):
    asked = []

    def answers(*_):
        asked.append(len(asked))
        if len(asked) in (1, 2, 4, 5):
            raise FlexError("no answer within 120 s")
        if len(asked) == 7:
            Teller(deployment.folder / PROGRESS, 8).tell(**{ENDED: "client 'a' failed"})
        return False

    monkeypatch.setattr(superlink, "has_ended", answers)
    assert deploy._follow(deployment, 8) == "client 'a' failed"

    def never(*_):
        raise FlexError("no server")

    monkeypatch.setattr(superlink, "has_ended", never)
    assert "without a word" in deploy._follow(deployment, 9)


@pytest.mark.parametrize(("locked", "last_word"), [(True, True), (True, False), (False, True)])
def test_a_run_that_is_at_work_is_shown_and_not_begun_twice(deployment, monkeypatch, capsys, locked, last_word):
    """A terminal that is closed ends `flex deploy run` and not the run. What turns out to be dead is begun again."""
    begun = []
    monkeypatch.setattr(deploy, "wait_for_server", lambda *_: None)
    monkeypatch.setattr(superlink, "wait_for_nodes", lambda *_: {})
    monkeypatch.setattr(superlink, "flwr", lambda *words, **_: begun.append(words) or {"run-id": "8"})
    monkeypatch.setattr(superlink, "has_ended", lambda _, number: number == 7)
    monkeypatch.setattr(train_command, "report_on", lambda folder: 0 if folder == deployment.run else 1)
    deployment.run.mkdir()
    Teller(deployment.folder / PROGRESS, 8).tell(**{ENDED: DONE})
    teller = Teller(deployment.folder / PROGRESS, 7)
    teller.tell(what="waiting for a to connect")
    if last_word:
        teller.tell(**{ENDED: DONE})
    with (deployment.run / LOCK).open("w") as lock:
        if locked:
            fcntl.flock(lock, fcntl.LOCK_EX)
        assert deploy.run(deployment.folder, 1.0) == 0
    assert len(begun) == (0 if locked and last_word else 1)
    said = capsys.readouterr().out
    assert ("is at work" in said) is locked
    assert ("waiting for a to connect" in said) is locked


@pytest.mark.parametrize(("first", "let_in"), [(worker.BROKEN, True), (worker.REFUSED[0], False)])
def test_after_broken_bytes_a_node_is_waited_for_anew(deployment, monkeypatch, capsys, first, let_in):
    """The server takes the SuperNode before for connected, and lets none in, until that one has been silent."""
    said = iter([first, worker.REFUSED[0], None])

    def until_ended(*_):
        if (words := next(said)) == first:
            time.sleep(0.3)  # longer than the wait
        return None if words is None else SimpleNamespace(said=lambda *ws: words in ws, ended=1)

    monkeypatch.setattr(worker, "AGAIN_S", 0.0)
    monkeypatch.setattr(worker, "_until_ended", until_ended)
    monkeypatch.setattr(worker, "wait_for_server", lambda *_: None)
    monkeypatch.setattr(worker, "connected", lambda _: SimpleNamespace(close=lambda: None))
    package = deployment.folder / "packages" / "a"
    if let_in:
        assert worker.node(package, None, None, None, 0.2) == 0
        assert capsys.readouterr().err.count("the SuperNode starts again") == 2
    else:
        with pytest.raises(FlexError, match="does not know the key"):
            worker.node(package, None, None, None, 0.2)
