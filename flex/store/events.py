"""The log of a run, `metrics.jsonl`: what happened, one JSON object a line. Its schema is the dataclasses below.

A run that is resumed drops the events of the rounds that it will do again. Keys that a class does not know are left
aside when a file is read, and keys that a file lacks take their defaults, so that earlier logs stay readable.
"""

import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from flex.errors import FlexError

METRICS = "metrics.jsonl"
FORMAT = 2  # of the log; a log without a number is of format 1, which has the same events
AFTER, BEFORE = "after_aggregation", "before_aggregation"
VALIDATION = "validation"  # the split that the kept round is chosen by
UPDATE_ALONE, BASE_ALONE = "update_alone", "base_alone"  # on the client's own prompts, nothing private in the model


@dataclass(frozen=True)
class Event:
    """What all events may say: of which job they are. Events of the run as a whole leave both out."""

    event: ClassVar[str]
    method: str | None = field(default=None, kw_only=True)
    seed: int | None = field(default=None, kw_only=True)

    def to_json(self) -> dict[str, Any]:
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        job = {name: value for name in ("method", "seed") if (value := own.pop(name)) is not None}
        return {**job, "event": self.event, **own}

    @property
    def at_round(self) -> int:
        """The round it belongs to; 0 where it has none."""
        return getattr(self, "round", 0)


@dataclass(frozen=True)
class RunStarted(Event):
    """What the whole run has in common. `clients`: `client_id`, `num_train`, `num_test`, `description` of each; `data`:
    the data's fingerprint by seed; `client_data`: that of each client that ever took part, by seed."""

    event: ClassVar[str] = "run"
    title: str = ""
    base_model: str = ""
    fingerprint: str = ""
    template: str = ""
    clients: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    threads: int | None = None
    data: dict[str, str] = field(default_factory=dict)
    client_data: dict[str, dict[str, str]] = field(default_factory=dict)
    format: int = 1


@dataclass(frozen=True)
class Truncated(Event):
    """How many examples of a client's `part` ("train" or "test") are longer than `max_length` tokens, and were cut."""

    event: ClassVar[str] = "truncated"
    client_id: str
    part: str
    count: int
    max_length: int | None = None


@dataclass(frozen=True)
class JobStarted(Event):
    """A job begins, with `clients`. `trained_parameters`: how many are shared, and personal; `started`: UTC, ISO
    8601; `learning_rates`: by the names of their settings."""

    event: ClassVar[str] = "job"
    num_rounds: int | None = None
    num_clients: int | None = None
    trained_parameters: dict[str, int] | None = None
    started: str | None = None
    clients: list[str] = field(default_factory=list)
    learning_rates: dict[str, float] = field(default_factory=dict)
    format: int = 1


@dataclass(frozen=True)
class Extended(Event):
    """After `round` a job goes on otherwise than it was planned: for `num_rounds` rounds in all, with the clients that
    `joined`, without those that `left`, `num_clients` then. `started`: UTC, ISO 8601."""

    event: ClassVar[str] = "extended"
    round: int
    num_rounds: int | None = None
    num_clients: int | None = None
    joined: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    started: str | None = None


@dataclass(frozen=True)
class Sent(Event):
    """The tensors of one message "down" or "up": `name`, `shape`, `dtype`, `bytes` of each."""

    event: ClassVar[str] = "sent"
    direction: str
    tensors: list[dict[str, Any]]


@dataclass(frozen=True)
class Grafted(Event):
    """What one layer's graft of one client is made of, and why; the fields are those of `graft/choice.py`."""

    event: ClassVar[str] = "graft"
    client_id: str
    round: int
    layer: int
    module: str = ""
    criterion: str = ""
    target: str = "output"
    candidates: list[float] = field(default_factory=list)
    routed_mass: float | None = None
    seconds: float | None = None
    neurons: list[int] = field(default_factory=list)
    width: int | None = None
    curve: list[list[float]] = field(default_factory=list)
    peak_bytes: int = 0
    chosen: int | None = None
    residual: float | None = None
    experts: list[int] = field(default_factory=list)
    unexplained: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained(Event):
    """A client's turn: `loss` is the mean over its local steps, `opening` the mean of each layer's gate or None.

    update_norm, update_cosine: the length of what it sent less what it was sent, before any bound, and its cosine with
    the sum of the other clients'. sha256: of the tensors that it sent, the first 16 hexadecimal digits. seconds: of the
    local steps and what belongs to them. peak_bytes: the largest resident set of the client's process so far.
    """

    event: ClassVar[str] = "train"
    round: int
    client_id: str
    num_examples: int | None = None
    loss: float | None = None
    opening: list[float] | None = None
    seconds: float | None = None
    bytes_down: int | None = None
    bytes_up: int | None = None
    update_norm: float | None = None
    update_cosine: float | None = None
    sha256: str | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Exchanged(Event):
    """A round of training as the server saw it: `seconds` from its first message to the averaged state, checkpoint and
    a scoring of its own left out.

    turn_seconds: what of it the clients worked, scoring and choice of grafts with it; of clients side by side the
    longest turn, otherwise all of them. peak_bytes: the largest resident set of the server's process so far.
    """

    event: ClassVar[str] = "exchange"
    round: int
    seconds: float
    turn_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class LeftOut(Event):
    """A client had no part in a round's `doing` ("train" or "evaluate"): it failed, or what it sent was refused."""

    event: ClassVar[str] = "left_out"
    round: int
    client_id: str
    doing: str
    reason: str


@dataclass(frozen=True)
class Limited(Event):
    """Of what a client sent less was taken: its `what` ("update norm" or "examples") `came`, and was cut to `kept`."""

    event: ClassVar[str] = "limited"
    round: int
    client_id: str
    what: str
    came: float
    kept: float


@dataclass(frozen=True)
class Secured(Event):
    """A round whose updates were summed under masks: of how many sites, and who dropped out after its turn.

    range: the largest number under the masks. error: what rounding to levels can have done to the mean change at most,
    in shares of its length. seconds: of the whole exchange, the turns with it.
    """

    event: ClassVar[str] = "secured"
    round: int
    sites: int
    dropped: list[str] = field(default_factory=list)
    range: float | None = None
    error: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Evaluated(Event):
    """A client's scores on a `split` (a task of `evaluation/tasks.py`); `groups`: what of them was scored by group;
    `details`: what a reader must know of the task, by name.

    when: before or after aggregation; or, of the last round, what whoever holds base and update can ask of them: the
    base with this client's update and nothing private (`UPDATE_ALONE`), and the base as it came (`BASE_ALONE`).
    """

    event: ClassVar[str] = "evaluate"
    round: int
    client_id: str
    when: str
    split: str
    num_examples: int | None = None
    loss: float | None = None
    exact_match: float | None = None
    groups: dict[str, dict[str, float]] = field(default_factory=dict)
    rouge_l: float | None = None
    rouge_1: float | None = None
    accuracy: float | None = None
    perplexity: float | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Routed(Event):
    """How a client's held-out prompts are routed: by the untouched base, and by its own model after `round`.

    layers: their numbers; every list that follows has one entry a layer. entropy, base_entropy: of the router's
    distribution over the experts, mean over the tokens, in nats; most: the largest that it can be. source: what that
    distribution is (`evaluation/layers.py`). counts, base_counts: how often each expert is chosen.
    """

    event: ClassVar[str] = "routed"
    round: int
    client_id: str
    num_tokens: int
    layers: list[int]
    entropy: list[float]
    base_entropy: list[float]
    most: list[float]
    source: list[str]
    counts: list[list[int]]
    base_counts: list[list[int]]


@dataclass(frozen=True)
class Added(Event):
    """What a client's grafts add to their layers on its held-out prompts: `added`, the mean over the tokens of the norm
    of what a graft adds over that of the layer's output; `opening`, of its gate on these tokens."""

    event: ClassVar[str] = "added"
    round: int
    client_id: str
    num_tokens: int
    layers: list[int]
    added: list[float]
    opening: list[float]


@dataclass(frozen=True)
class Cost(Event):
    """What a client's grafts cost a token: `graft_flops`, beside `layer_flops` of the experts that it is routed to and
    of the shared one; and `seconds` of a forward over `num_tokens` tokens "with" them and "without", each the median of
    `repeats` on this `device`."""

    event: ClassVar[str] = "cost"
    round: int
    client_id: str
    num_tokens: int
    repeats: int
    device: str
    layers: list[int]
    graft_flops: list[int]
    layer_flops: list[int]
    seconds: dict[str, float] = field(default_factory=dict)


# What an evaluation of a client tells beside its scores; a list has one entry for each of `layers`.
OF_LAYERS = (Routed, Added, Cost)


@dataclass(frozen=True)
class Done(Event):
    """A job is finished: seconds and trained tokens of the process that finished it.

    kept: the round whose state is the result, where that is not the last. stopped: before all rounds, for want of
    improvement.
    """

    event: ClassVar[str] = "done"
    round: int = 0
    seconds: float | None = None
    tokens: int | None = None
    kept: int | None = None
    stopped: bool = False


KINDS: dict[str, type[Event]] = {
    kind.event: kind
    for kind in (
        RunStarted,
        Truncated,
        JobStarted,
        Extended,
        Sent,
        Grafted,
        Trained,
        Exchanged,
        LeftOut,
        Limited,
        Secured,
        Evaluated,
        *OF_LAYERS,
        Done,
    )
}


def from_json(values: Mapping[str, Any]) -> Event | None:
    """The event that a JSON object says; None for a kind that this version does not know.

    Raises:
        FlexError: it lacks what an event of its kind must say, or is of a later format.
    """
    kind = KINDS.get(str(values.get("event")))
    if kind is None:
        return None
    known = {f.name for f in dataclasses.fields(kind)}
    try:
        event = kind(**{name: value for name, value in values.items() if name in known})
    except TypeError as error:
        raise FlexError(f"an event {kind.event!r} is incomplete: {error}") from None
    if getattr(event, "format", FORMAT) > FORMAT:
        raise FlexError(f"this log has format {event.format}; this version reads formats 1 to {FORMAT}")
    return event


def check_types(event: Event, sender: str) -> None:
    """Raises FlexError where a value is of another type than its field, a score is not finite, or a list has not one
    entry a layer: what a client tells is read by the report, which counts on all three."""
    for name, kind in typing.get_type_hints(type(event)).items():
        value = getattr(event, name)
        if typing.get_origin(kind) is not ClassVar and not _is(value, kind):
            raise FlexError(f"{sender} sent an event {event.event!r} whose {name} is {value!r:.80}; expected {kind}")
        bounded = isinstance(event, (Evaluated, *OF_LAYERS)) and name != "perplexity"
        if bounded and not all(math.isfinite(one) for one in _numbers(value)):
            raise FlexError(f"{sender} sent an event {event.event!r} whose {name} is {value}; expected a finite number")
        if isinstance(event, OF_LAYERS) and isinstance(value, list) and len(value) != len(event.layers):
            raise FlexError(
                f"{sender} sent an event {event.event!r} with {len(value)} entries in {name}; expected one for each of "
                f"{len(event.layers)} layers"
            )


def _numbers(value: Any) -> Iterator[float]:
    """The floats of a value, or of a list or object of them."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, list):
        yield from (one for one in value if isinstance(one, float))
    elif isinstance(value, dict):
        yield from (one for one in value.values() if isinstance(one, float))


def _is(value: Any, kind: Any) -> bool:
    """Whether a value, as JSON gives it, is of an annotated type; an int is a float too."""
    if isinstance(kind, types.UnionType):
        return any(_is(value, one) for one in typing.get_args(kind))
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin is list:
        return isinstance(value, list) and all(_is(v, inner[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is(k, inner[0]) and _is(v, inner[1]) for k, v in value.items())
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind


class EventLog:
    """Appends events to a file and flushes each; every event is written as one of this method and seed."""

    def __init__(self, path: Path, method: str, seed: int):
        self.path, self.method, self.seed = path, method, seed

    def write(self, event: Event) -> None:
        event = dataclasses.replace(event, method=self.method, seed=self.seed)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(event.to_json()) + "\n")
        except OSError as error:
            raise FlexError(f"cannot write {self.path}: {error}") from None

    def rewind(self, round_index: int) -> list[Event]:
        """Keeps, and returns, the events of rounds up to `round_index`; one without a round belongs to round 0."""
        kept = [event for event in read_events(self.path) if event.at_round <= round_index]
        write_events(self.path, kept)
        return kept


def read_events(path: Path) -> list[Event]:
    """The events of a file; a last line cut short by a kill is left out. No file: no events.

    Raises:
        FlexError: the file cannot be read, or a line that was written to its end is no event.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise FlexError(f"cannot read {path}: {error}") from None
    return list(_parsed(path, lines))


def _parsed(path: Path, lines: list[bytes]) -> Iterator[Event]:
    for number, line in enumerate(lines, 1):
        values = _object(line)
        if values is None:
            if line.strip() and number < len(lines):
                start = line[:40].decode("utf-8", errors="replace")
                raise FlexError(f"{path}, line {number} is damaged: it begins with {start!r}; expected a JSON object")
            continue
        try:
            event = from_json(values)
        except FlexError as error:
            raise FlexError(f"{path}, line {number}: {error}") from None
        if event is not None:
            yield event


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line.decode("utf-8"))
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def write_events(path: Path, events: Iterable[Event]) -> None:
    """The file as a whole, or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text("".join(json.dumps(event.to_json()) + "\n" for event in events), encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise FlexError(f"cannot write {path}: {error}") from None
