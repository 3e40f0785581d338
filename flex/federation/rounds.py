"""The rounds of a federated run: the algorithm, on any engine.

`run_rounds` drives Flower's Strategy, Message and ArrayRecord through any Flower Grid: the `InProcessGrid` of
`local.py`, or the one that Flower hands to a ServerApp. What a message holds is said in `messages.py`. What the log and
the report need of a round comes back in its replies (`RoundReport`).

A client's own state is kept in its personal file, not in Flower's `Context.state`, which does not survive the process.
"""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from flex.errors import FlexError
from flex.federation.exchange import ClientFailed as ClientFailed
from flex.federation.exchange import Exchange, Turn
from flex.federation.flower import ConfigRecord, Context, Grid, Message, MessageType, RecordDict, Strategy
from flex.federation.guard import Guard
from flex.federation.messages import (
    ASK,
    CLIENT_INDEX,
    CONFIG,
    SCORED,
    SPLITS,
    Arrays,
    SiteAbout,
    about_of,
    sender_of,
    to_arrays,
    to_record,
)
from flex.federation.scoring import Scoring
from flex.federation.secure import SecureRound
from flex.federation.usage import exchanged
from flex.store.events import VALIDATION, Exchanged, LeftOut, Secured

Config = Mapping[str, bool | int | float | str]


@dataclass(frozen=True)
class RoundReport:
    """What happened in a round, client by client, in client order."""

    round_index: int
    train: list[Turn]
    evaluate: list[Turn] = field(default_factory=list)  # empty where it has no evaluation, or that is still to come
    left_out: list[LeftOut] = field(default_factory=list)  # only with `skip_failed`
    secured: Secured | None = None  # of a round under masks
    exchanged: Exchanged | None = None
    unscored: bool = False  # its scores come with the turns of the next round

    @property
    def failed(self) -> dict[str, str]:
        """client id -> why it was left out."""
        return {event.client_id: event.reason for event in self.left_out}


def run_rounds(
    strategy: Strategy,
    grid: Grid,
    shared: Arrays,
    num_rounds: int,
    *,
    start_round: int = 1,
    train_config: Config | Callable[[int], Config] | None = None,
    evaluate_config: Config | None = None,
    evaluate_every: int | None = 1,
    validate: bool = False,
    on_round: Callable[[int, Arrays, RoundReport], bool | None] | None = None,
    on_scores: Callable[[RoundReport], None] | None = None,
    unscored: Collection[str] = (),
    skip_failed: bool = False,
    timeout: float | None = None,
    guard: Guard | None = None,
    secure: SecureRound | None = None,
) -> Arrays:
    """Rounds `start_round` to `num_rounds` of federated training.

    A round is one exchange of messages. The scores after it come with the turns of the next one (`scoring.py`): that
    exchange asks for those of whoever trains in it, and a second one for those of all others. The last round, and every
    round with `validate`, is scored in an exchange of its own before it is done.

    Args:
        strategy: who averages how; for a resumed run with its state restored.
        shared: the shared state that round `start_round` begins with.
        train_config, evaluate_config: what goes to the clients with every message, beside what the module names; that
            of training may be a function of the round.
        evaluate_every: rounds from one evaluation to the next; the last round always has one. 0: the last only. None:
            never.
        validate: every round ends with the clients' scores on their validation parts.
        on_round: called with (round, shared state after it, report) when a round is done: the place for a checkpoint.
            If it returns True, that was the last round.
        on_scores: called with a report of scores alone, of a round whose `on_round` was called before with a report
            that says `unscored`; before the next round's.
        unscored: of a resumed run, the clients whose scores of the round before `start_round` are still to come.
        skip_failed: go on without a client that failed, or whose reply is refused, as long as one has trained. By
            default the run stops.
        timeout: seconds to wait for the replies of a round; not for `InProcessGrid`.
        guard: what is required of a reply, whatever the strategy; by default what `guard.py` always requires.
        secure: trains under masks (`masking.py`), with a `MaskedGuard`; the strategy gets one reply, the mean.

    Returns:
        the shared state after the last round.

    Raises:
        ClientFailed, or FlexError where that is what the client raised, or where its reply is refused: names the
            client, round and reason.
    """
    inner(strategy).clients = clients = clients_of(grid, timeout)
    guard = guard or Guard()

    def scoring_of(round_index: int, splits: str | None = None) -> Scoring:
        config = ConfigRecord({**(evaluate_config or {}), **({SPLITS: splits} if splits else {})})
        return Scoring(round_index, strategy.configure_evaluate(round_index, to_record(shared), config, grid))

    def tell(scoring: Scoring, exchange: Exchange) -> None:
        turns, left_out = scoring.collect(exchange)
        if on_scores:
            on_scores(RoundReport(scoring.round_index, [], turns, left_out))

    late: Scoring | None = None
    if unscored:
        late = scoring_of(start_round - 1)
        late.messages = {node: m for node, m in late.messages.items() if clients.get(node) in unscored}
    for round_index in range(start_round, num_rounds + 1):
        started = time.perf_counter()
        exchange = Exchange(grid, clients, round_index, skip_failed, timeout)
        evaluating = _evaluates(round_index, num_rounds, evaluate_every)

        own = train_config(round_index) if callable(train_config) else train_config
        config = ConfigRecord({**(own or {}), "evaluate": evaluating})
        messages = list(strategy.configure_train(round_index, to_record(shared), config, grid))
        messages = late.asked_with(messages) if late else messages
        secured = None
        if secure and round_index < secure.first_alone:
            replies, train, secured = secure(exchange, messages, guard)
        else:
            replies, train = exchange(messages, guard)
        if late:
            tell(late, exchange)

        average, _ = strategy.aggregate_train(round_index, replies)
        shared = shared if average is None else to_arrays(average)
        took = time.perf_counter() - started
        cost = exchanged(round_index, took, [turn.metrics for turn in train], not hasattr(grid, "stream"))

        evaluate: list[Turn] = []
        late = None
        if validate or (evaluating and round_index == num_rounds):
            splits = " ".join([*(SCORED if evaluating else ()), VALIDATION]) if validate else None
            _, evaluate = exchange(scoring_of(round_index, splits).messages.values())
        elif evaluating:
            late = scoring_of(round_index)

        guard.remember({turn.client_id: turn.update for turn in train if turn.update}, round_index)
        report = RoundReport(round_index, train, evaluate, exchange.left_out, secured, cost, unscored=late is not None)
        if on_round and on_round(round_index, shared, report):
            break
    if late:  # no round came after it
        tell(late, Exchange(grid, clients, late.round_index, skip_failed, timeout))
    return shared


def evaluate_all(
    strategy: Strategy,
    grid: Grid,
    shared: Arrays,
    round_index: int,
    skip_failed: bool = False,
    timeout: float | None = None,
) -> RoundReport:
    """Every client's scores with this shared state, outside of any round of training."""
    inner(strategy).clients = clients = clients_of(grid, timeout)
    messages = strategy.configure_evaluate(round_index, to_record(shared), ConfigRecord({}), grid)
    exchange = Exchange(grid, clients, round_index, skip_failed, timeout)
    return RoundReport(round_index, [], exchange(messages)[1], exchange.left_out)


def inner(strategy: Strategy) -> Strategy:
    """The strategy itself, where Flower's wrappers (differential privacy) stand around it."""
    while isinstance(wrapped := getattr(strategy, "strategy", None), Strategy):
        strategy = wrapped
    return strategy


def _evaluates(round_index: int, num_rounds: int, every: int | None) -> bool:
    if every is None:
        return False
    return round_index == num_rounds or (every > 0 and round_index % every == 0)


def clients_of(grid: Grid, timeout: float | None = None) -> dict[int, str]:
    """node id -> client id, in client order: an `InProcessGrid` knows, the nodes of any other one are asked."""
    return getattr(grid, "clients", None) or ask_clients(grid, timeout)


def ask_clients(grid: Grid, timeout: float | None = None) -> dict[int, str]:
    """node id -> client id of the nodes of any Grid, in client order: each node is asked who it is.

    Raises:
        FlexError: a node does not say, or two nodes are the same client.
    """
    nodes = list(grid.get_node_ids())
    answers: dict[int, tuple[int, str]] = {}
    for node, reply in _ask(grid, nodes, {}, timeout).items():
        answer = reply.content["client"]
        answers[node] = int(answer[CLIENT_INDEX]), str(answer["client-id"])
    if len(answers) < len(nodes) or len(set(answers.values())) < len(answers) or not answers:
        raise FlexError(f"{len(nodes)} nodes, who say they are {sorted(answers.values())}; expected each client once")
    return {node: answers[node][1] for node in sorted(answers, key=answers.__getitem__)}


def ask_about(grid: Grid, timeout: float | None = None) -> list[SiteAbout]:
    """What every site says of itself, in client order; FlexError where one does not say."""
    clients = clients_of(grid, timeout)
    replies = _ask(grid, list(clients), {ASK: "about"}, timeout)
    missing = [clients[node] for node in clients if node not in replies]
    if missing:
        raise FlexError(f"client {missing[0]!r} did not answer within {timeout} s who it is")
    return [about_of(replies[node], client_id) for node, client_id in clients.items()]


def ask_start(grid: Grid, timeout: float | None = None) -> Arrays:
    """The shared state as the method initialises it, from the first client; it depends on the seed alone."""
    node, client_id = next(iter(clients_of(grid, timeout).items()))
    replies = _ask(grid, [node], {ASK: "start"}, timeout)
    if node not in replies or len(replies[node].content.array_records) != 1:
        raise FlexError(f"client {client_id!r} did not say what the shared state starts from")
    return to_arrays(next(iter(replies[node].content.array_records.values())))


def _ask(grid: Grid, nodes: list[int], question: Config, timeout: float | None) -> dict[int, Message]:
    """The answers by node; FlexError where a node reports an error."""
    content = RecordDict({CONFIG: ConfigRecord(dict(question))})
    sent = {node: Message(content, node, MessageType.QUERY) for node in nodes}
    names = getattr(grid, "clients", {})
    replies = {}
    for reply in grid.send_and_receive(list(sent.values()), timeout=timeout):
        node = sender_of(reply, sent)
        if reply.has_error():
            who = f"client {names[node]!r}" if node in names else f"node {node}"
            raise FlexError(f"{who} did not answer the question {question.get(ASK, 'who')!r}: {reply.error.reason}")
        replies[node] = reply
    return replies


def identity(context: Context) -> tuple[str, int]:
    """(client id, index) of a node, as it was started; the index serves as the name of one without a name."""
    index = int(context.node_config["partition-id"])
    return str(context.node_config.get("client-id", index)), index


def answer_identity(message: Message, context: Context) -> Message:
    """The client's half of `ask_clients`, to be registered with the ClientApp: `app.query()(answer_identity)`."""
    client_id, index = identity(context)
    answer = {"client-id": client_id, CLIENT_INDEX: index}
    return Message(RecordDict({"client": ConfigRecord(answer)}), reply_to=message)
