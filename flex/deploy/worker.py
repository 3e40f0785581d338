"""The resident worker of a site: it owns the base, the data and the personal state, and takes turns when it is asked.

It is the wall between the code that others submit to a site's SuperNode and what must not leave: it runs as a user of
its own, reads its own configuration, and answers four questions (who, about, start, and a turn) and no other. What it
is asked and what leaves stands in its own record (`record.py`).
"""

import dataclasses
import fcntl
import json
import queue
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from flex.config import AT_SITES, TASKS, RunConfig, config_text, parse_config
from flex.data.examples import ClientData
from flex.deploy.door import LOOK_S, Question
from flex.deploy.job import JOB, JobName, job_of
from flex.deploy.package import Package
from flex.deploy.record import Entry, Record, left
from flex.errors import FlexError, require
from flex.federation.agreement import SITE_OWN, flat
from flex.federation.client import Site
from flex.federation.client_app import make_client_app
from flex.federation.flower import Message, MessageType, RecordDict
from flex.federation.local import FIRST_NODE_ID, InProcessGrid
from flex.federation.masked_site import NEXT
from flex.federation.messages import ASK, CONFIG, EVENTS, SCORES, SPLITS
from flex.federation.seal import digest, round_of
from flex.federation.strategy import sample_clients
from flex.runs.workers import job_folder
from flex.runs.world import Worlds
from flex.store.files import LOCK

ACCEPTED, RECORD = "accepted.json", "record.jsonl"
QUERIES = ("who", "about", "start", *NEXT)  # the last ones of secure aggregation, whose order the site itself holds
MOST_SCORED = 3  # different shared states that a site scores in one round: a run that is resumed may ask again


class Worker:
    """One site's worker.

    Args:
        package: what the coordinator sent.
        overrides: the site's own settings (`agreement.SITE_OWN`), as `section.key=value`; `data.train` and `data.test`
            are this site's files, every line of them.
        state: its folder, for nobody else.

    Raises:
        FlexError: base or data cannot be loaded, or a setting is not the site's own.
    """

    def __init__(self, package: Package, overrides: Sequence[str], state: Path):
        self.package, self.state = package, state
        self.config = with_own(package, overrides)
        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        self.record = Record(state / RECORD)
        self.worlds = Worlds(_at_home(self.config, package.name))
        self.world = self.worlds.of(package.config.train.seeds[0])  # what is wrong is said now, not in the first turn
        self._job: JobName | None = None
        self._grid: InProcessGrid | None = None

    @property
    def client(self) -> ClientData:
        """The site's examples, of the first seed."""
        return self.world.clients[0]

    def serve(self, questions: "queue.Queue[Question]", stopped: Callable[[], bool]) -> None:
        """Answers questions, one after another, until it is stopped."""
        while not stopped():
            try:
                question = questions.get(timeout=LOOK_S)
            except queue.Empty:
                continue
            if question.gone:
                continue
            try:
                question.records = self.answer(question.kind, question.content, question.peer)
            except FlexError as error:
                question.error = str(error)
            except Exception as error:  # a fault of this program ends one question, not the worker
                question.error = self._unexpected(error)
            finally:
                question.answered.set()

    def answer(self, kind: str, content: RecordDict, peer: int) -> RecordDict:
        """What a message gets in reply; recorded before it leaves, or when it is refused.

        Raises:
            FlexError: the question is not one for this site, now; or the turn failed.
        """
        asked = str(content.config_records.get(CONFIG, {}).get(ASK, "who")) if kind == MessageType.QUERY else kind
        entry = Entry(asked, peer)
        try:
            entry = dataclasses.replace(entry, round=_round_in(content), start=digest(content))
            if kind == MessageType.TRAIN and SPLITS in content.config_records.get(CONFIG, {}):
                entry = dataclasses.replace(entry, scored=entry.round - 1)
            name = job_of(content, self.package, self.world.base.fingerprint)
            entry = dataclasses.replace(entry, run=self.package.run, method=name.method, seed=name.seed)
            self._check(name, kind, asked, entry)
            reply = self._turn(name, kind, content)
            said = (reply.config_records.get(name, {}).get("json", "[]") for name in (EVENTS, SCORES))
            told = {"events": sum(len(json.loads(str(events))) for events in said), **left(content, reply)}
            self.record.write(dataclasses.replace(entry, **told))
            return reply
        except FlexError as error:
            self.record.write(dataclasses.replace(entry, refused=str(error)))
            raise

    def _check(self, name: JobName, kind: str, asked: str, entry: Entry) -> None:
        """Refuses a question out of its turn; a site, too, counts rounds."""
        if kind == MessageType.QUERY:
            require(asked in QUERIES, f"the question is {asked!r}; expected one of {', '.join(QUERIES)}")
            return
        last, at = self.record.last.get(self._job_in_record(name), 0), entry.round
        has = f"{self._who(name, at)} has trained up to round {last}"
        if asked == "train":
            allowed = self._next_rounds(last)
            require(at in allowed, f"{has}; expected round {_either(allowed)}")
            if entry.scored is not None:
                self._check_scores(name, entry.scored, entry.start)
            return
        self._check_scores(name, at, entry.start)
        missed = [index for index in self._drawn(last) if index <= at] if name.trains else []
        require(not missed or self._may_miss, f"{has}; expected round {_either(missed)}")

    def _check_scores(self, name: JobName, at: int, start: str) -> None:
        """Refuses scores of a round that this site's configuration does not score, or of one shared state too many."""
        who, job = self._who(name, at), self._job_in_record(name)
        # Who keeps the best round scores every round, and at the end the one that was kept.
        every = self.config.train.keep == "best"
        scores = at == 0 if not name.trains else every or self.config.scores_after(at)
        require(scores, f"{who} does not score itself then; its configuration says when")
        known = self.record.starts.get((*job, at), set())
        require(
            start in known or len(known) < MOST_SCORED,
            f"{who} has scored {len(known)} different shared states in this round; expected no more",
        )

    def _who(self, name: JobName, at: int) -> str:
        return f"{name.method} seed {name.seed}, round {at}: site {self.package.name!r}"

    def _job_in_record(self, name: JobName) -> tuple[str, str, int]:
        return self.package.run, name.method, name.seed

    def _next_rounds(self, last: int) -> list[int]:
        """The rounds that may be trained now: the last one again, the next one in which this site is drawn, and where
        the run goes on without a site that failed, or this one joins a run that is at work, those after it."""
        drawn, joins = self._drawn(last), self.package.joins and not last
        return [*([last] if last else []), *(drawn if self._may_miss or joins else drawn[:1])]

    def _drawn(self, after: int) -> list[int]:
        """The rounds after `after` in which this site trains."""
        train, count = self.config.train, len(self.config.data.clients)
        rounds = range(after + 1, train.rounds + 1)
        return [at for at in rounds if self.package.index in sample_clients(count, train.clients_per_round, at)]

    @property
    def _may_miss(self) -> bool:
        """Whether the run goes on without a site that failed."""
        return self.config.train.skip_failed

    def _turn(self, name: JobName, kind: str, content: RecordDict) -> RecordDict:
        """The same ClientApp as on one machine answers, on this site's own model, data and files."""
        grid = self._grid_of(name)
        content = RecordDict({key: record for key, record in content.items() if key != JOB})
        reply = next(iter(grid.send_and_receive([Message(content, FIRST_NODE_ID, kind)])))
        if reply.has_content():
            return reply.content
        error = grid.raised.get(FIRST_NODE_ID)
        if isinstance(error, FlexError):
            raise error
        raise FlexError(self._unexpected(error))

    def _unexpected(self, error: Exception | None) -> str:
        """A sentence for the server; what the error says may name files or examples, and stays here."""
        traceback.print_exception(error, file=sys.stderr)
        return f"site {self.package.name!r} failed ({type(error).__name__}); its worker's log says how"

    def _grid_of(self, name: JobName) -> InProcessGrid:
        if name != self._job:
            self._job = None
            self.world = self.worlds.of(name.seed)
            folder = job_folder(self.state / self.package.run, (name.seed, name.method))
            site: Site = self.world.sites(self.config, name.method, name.seed, folder)[self.package.name]
            self._grid = InProcessGrid(make_client_app(lambda *_: site), [self.package.name])
            self._job = name
        return self._grid


def _round_in(content: RecordDict) -> int:
    try:
        return round_of(content)
    except (TypeError, ValueError):
        raise FlexError("the question names no round; expected a number") from None


def _either(rounds: list[int]) -> str:
    return " or ".join(map(str, rounds[:2])) if rounds else "none: the run is over"


def with_own(package: Package, overrides: Sequence[str]) -> RunConfig:
    """The package's configuration with the site's own settings.

    Raises:
        FlexError: a setting is not the site's own.
    """
    config = parse_config(config_text(package.config), overrides)
    before, now = flat(package.config), flat(config)
    foreign = [key for key in now if now[key] != before[key] and key not in SITE_OWN]
    require(
        not foreign,
        f"{foreign[0] if foreign else ''} is not a site's own setting; expected one of {', '.join(sorted(SITE_OWN))}",
    )
    require(bool(config.model.path), "no model is named; expected --model FOLDER")
    require(bool(config.data.train), "no data is named; expected --data FILE")
    anchored, named = package.config.anchors is not None, config.anchor.text not in ("", AT_SITES)
    require(
        named or not anchored,
        "no anchors are named, but this run holds its sites to the base on general text ([anchor]); expected "
        "--anchors FILE",
    )
    require(anchored or not named, "--anchors names a text, but this run has no anchor; expected none")
    for task in config.evaluate.tasks:
        need = TASKS[task]
        require(
            not need or getattr(config.evaluate, need) != AT_SITES,
            f"this run scores {task}, but no file of it is named; expected --set evaluate.{need}=PATH",
        )
    return config


def _at_home(config: RunConfig, name: str) -> RunConfig:
    """The configuration with which this site's files are read: each of them is all its own."""
    data = config.data
    files = {"files": {name: data.train}, "test_files": {name: data.test} if data.test else {}}
    return config.with_values(data={"clients": (name,), "train": "", "test": "", **files})


@contextmanager
def state_of(package: Package, state: Path, accept: bool) -> Iterator[Path]:
    """The state folder, for this worker alone, with a configuration that the site has accepted.

    Raises:
        FlexError: another worker has it, it cannot be written, or the configuration is not the accepted one.
    """
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (state / LOCK).open("w")
    except OSError as error:
        raise FlexError(
            f"the state folder {state} cannot be written ({error.strerror}); expected one (--state)"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FlexError(
                f"another worker has the state folder {state}; expected it to end first, or another --state"
            ) from None
        _check_accepted(package, state / ACCEPTED, accept)
        yield state


def _check_accepted(package: Package, path: Path, accept: bool) -> None:
    now = {"run": package.run, "settings": json.loads(json.dumps(flat(package.config)))}
    try:
        before = json.loads(path.read_text()) if path.exists() else None
    except (OSError, ValueError) as error:
        raise FlexError(f"{path} cannot be read: {error}") from None
    if before is not None and before != now and not accept:
        old, new = before.get("settings", {}), now["settings"]
        keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        changes = "; ".join(f"{key}: {old.get(key)!r} before, {new.get(key)!r} now" for key in keys)
        raise FlexError(
            f"the configuration in {package.folder} is not the one that this site has accepted "
            f"({changes or 'the same settings, but another run'}); expected `flex worker {package.folder} --accept`"
        )
    if before != now:
        try:
            path.write_text(json.dumps(now, indent=1) + "\n")
        except OSError as error:
            raise FlexError(f"cannot write {path}: {error}") from None
