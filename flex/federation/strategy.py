"""Who averages how: the server's side of the federated methods, as Flower strategies.

With `w` the shared state of the round, `w_k` what client k sends back, `n_k` its number of examples,
`d = mean_k (w_k - w)` and all arithmetic elementwise in float32:

    fedavg      w <- sum_k n_k w_k / sum_k n_k
    fedprox     as fedavg; the client adds mu/2 ||w_k - w||² to its loss
    scaffold    as fedavg for w;   c <- c + sum_k dc_k / N              (N: all clients, not only the sampled ones)
    fedavgm     m <- b1 m + (1 - b1) d  (first round: m = d; d weighted by n_k);   w <- w + m
    fedadagrad  v <- v + d²;                              w <- w + eta d / (sqrt(v) + tau)
    fedyogi     m as above, v <- v - (1 - b2) m² sign(v - m²);   w <- w + eta m / (sqrt(v) + tau)
    fedadam     m as above, v <- b2 v + (1 - b2) m²;             w <- w + eta m / (sqrt(v) + tau)
    by_tokens   LoRA of expert e: w <- sum_k t_ke w_ke / sum_k t_ke, t_ke the tokens that client k routed to e; where
                nobody routed any, w stays. All else as fedavg
    flexlora    clients of unequal rank: the mean of the products B_k A_k, see `unequal.py`. All else as fedavg

The last three weigh every client alike and start from v = tau²; there is no bias correction. These are the formulas
behind the paper's table (OpenFedLLM). Flower's classes of the same names differ in each of FedAvgM, FedAdagrad, FedYogi
and FedAdam (weighting, start of v, d² for m², bias correction), and Flower has no SCAFFOLD. FedAvg gives Flower's
numbers bit for bit, and FedProx is Flower's own class.

Whatever the engine: clients are taken in one fixed order, so that a sum of floats has one result; what a client sends
is held against what it was sent, tensor by tensor; nothing is drawn from a global random generator.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from flex.config import PROXIMAL_MU, STRATEGIES, RunConfig, StrategySettings
from flex.errors import FlexError
from flex.federation.flower import (
    Array,
    ArrayRecord,
    ConfigRecord,
    FlowerFedAvg,
    FlowerFedProx,
    Grid,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flex.federation.messages import (
    CLIENT_INDEX,
    CONTROL,
    Arrays,
    check_metrics,
    control_of,
    mean_metrics,
    metrics_of,
    same_tensors,
    shares,
    size_of,
    to_arrays,
    to_control,
    to_record,
    update_of,
    weighted_mean,
)
from flex.federation.robust import FEWEST, TRIM, center, middle
from flex.federation.scaffold import CONTROL_PREFIX
from flex.federation.unequal import averaged_product, cut_to_rank, pairs


def sample_clients(num_clients: int, clients_per_round: int, round_index: int) -> list[int]:
    """The clients of a round (1-based), ascending: the draw of the paper's base; 0 or all of them means all."""
    if clients_per_round in (0, num_clients):
        return list(range(num_clients))
    return sorted(random.Random(round_index - 1).sample(range(num_clients), clients_per_round))


class FedAvg(FlowerFedAvg):
    """The mean of the clients' shared states, weighted by their numbers of examples.

    Attributes:
        clients: node id -> client id, in the order in which clients are numbered, sampled and summed. `run_rounds` sets
            it. While it is empty, nodes stand in the order of their ids, and replies by the `client-index` they report.
        clients_per_round: how many train in a round; 0: all.
        clients_evaluated: how many are evaluated, the same ones every time; 0: all.
        num_clients: how many there are at all.
        aggregate, trim: the middle of the clients' values that it goes by, see `robust.py`.
        moments: the server's own tensors, `<kind>/<name of the shared tensor>`; with the round they are all its state.
        moment_kinds: the kinds that this strategy keeps.
        weigh_by_size: whether clients count by their numbers of examples, or all alike.
    """

    moment_kinds: frozenset[str] = frozenset()
    weigh_by_size = True

    def __init__(self, **flower_settings):
        super().__init__(**flower_settings)
        self.clients: dict[int, str] = {}
        self.clients_per_round = self.num_clients = self.clients_evaluated = 0
        self.aggregate, self.trim = "mean", TRIM
        self.moments: Arrays = {}
        self.sent = ArrayRecord()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """One message with the shared state for every client of this round."""
        self.sent = arrays
        nodes = self._nodes(grid)
        chosen = sample_clients(len(nodes), min(self.clients_per_round, len(nodes)), server_round)
        return self._messages(MessageType.TRAIN, server_round, arrays, config, [nodes[i] for i in chosen])

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """One message with the shared state for every client there is, or for those that are always evaluated."""
        nodes = self._nodes(grid)
        if 0 < self.clients_evaluated < len(nodes):
            nodes = [
                nodes[i] for i in sorted(random.Random("evaluated").sample(range(len(nodes)), self.clients_evaluated))
            ]
        return self._messages(MessageType.EVALUATE, server_round, arrays, config, nodes)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next shared state, and the weighted mean of what all clients measured; None where nobody replied.

        Raises:
            FlexError: a client sent other tensors than it was sent, or one that is not finite; it and the tensor are
                named.
        """
        replies = self._in_order(replies)
        if not replies:
            return None, None
        updates = [self._update(reply) for reply in replies]
        self._check_metrics(replies)
        sizes = [size_of(reply, self._name(reply)) for reply in replies]
        arrays = self.combine(updates, sizes)
        for name, array in {**arrays, **self.moments}.items():
            if not np.isfinite(array).all():
                raise FlexError(self._blame(name, updates, replies, server_round))
        return to_record(arrays), mean_metrics([metrics_of(reply) for reply in replies], sizes)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The mean of what all clients measured, weighted by their numbers of examples."""
        replies = self._in_order(replies)
        if not replies:
            return None
        self._check_metrics(replies)
        return mean_metrics([metrics_of(r) for r in replies], [size_of(r, self._name(r)) for r in replies])

    def combine(self, updates: Sequence[Mapping[str, Array]], sizes: Sequence[float]) -> Arrays:
        """The next shared state; the one method in which the strategies differ."""
        return center(updates, sizes, self.aggregate, self.trim)

    def _update(self, reply: Message) -> dict[str, Array]:
        return update_of(reply, self.sent, self._name(reply), self.arrayrecord_key)

    def _nodes(self, grid: Grid) -> list[int]:
        return list(self.clients) or sorted(grid.get_node_ids())

    def _messages(
        self, kind: str, server_round: int, arrays: ArrayRecord, config: ConfigRecord, nodes: list[int]
    ) -> list[Message]:
        config["server-round"] = server_round
        content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        return [Message(content, node, kind) for node in nodes]

    def _in_order(self, replies: Iterable[Message]) -> list[Message]:
        """The replies that are no errors, in client order: node ids are random, and replies come as they come."""
        place = {node: index for index, node in enumerate(self.clients)}

        def key(reply: Message) -> tuple[int, int]:
            node = reply.metadata.src_node_id
            return place.get(node, int(metrics_of(reply, self._name(reply)).get(CLIENT_INDEX, 0))), node

        return sorted((reply for reply in replies if not reply.has_error()), key=key)

    def _name(self, reply: Message) -> str:
        node = reply.metadata.src_node_id
        return f"client {self.clients[node]!r}" if node in self.clients else f"node {node}"

    def _check_metrics(self, replies: Sequence[Message]) -> None:
        check_metrics({self._name(reply): metrics_of(reply, self._name(reply)) for reply in replies})

    def _blame(self, key: str, updates: list[dict[str, Array]], replies: list[Message], server_round: int) -> str:
        for update, reply in zip(updates, replies, strict=True):
            if key in update and not np.isfinite(update[key].numpy()).all():
                return f"{self._name(reply)} sent {key!r} with NaN or infinite values in round {server_round}"
        return f"the server's step made {key!r} NaN or infinite in round {server_round}; a smaller eta may help"


class FedProx(FlowerFedProx, FedAvg):
    """Flower's own: `config["proximal-mu"]` goes out with every message, and the client adds mu/2 ||w_k - w||²."""

    def __init__(self, proximal_mu: float = PROXIMAL_MU):
        super().__init__(proximal_mu=proximal_mu)


class Scaffold(FedAvg):
    """SCAFFOLD, the server's half: `c` goes out beside `w`, and the clients' changes of their c_k come back.

    The client's half, and what to think of it beside AdamW: `scaffold.py`.
    """

    moment_kinds = frozenset({"c"})

    def __init__(self, **flower_settings):
        super().__init__(**flower_settings)
        self.control = ArrayRecord()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        for name, array in arrays.items():
            self.moments.setdefault(CONTROL_PREFIX + name, np.zeros(array.shape, np.float32))
        control = {CONTROL_PREFIX + name: self.moments[CONTROL_PREFIX + name] for name in arrays}
        self.control, record = to_record(control), to_control(control)
        messages = super().configure_train(server_round, arrays, config, grid)
        for message in messages:
            message.content[CONTROL] = record
        return messages

    def _update(self, reply: Message) -> dict[str, Array]:
        sender = self._name(reply)
        return {**super()._update(reply), **same_tensors(control_of(reply.content, sender), self.control, sender)}

    def combine(self, updates: Sequence[Mapping[str, Array]], sizes: Sequence[float]) -> Arrays:
        for name in self.control:
            changes = [update[name].numpy() for update in updates]
            if self.aggregate == "mean":
                change = sum(changes)
            else:
                change = len(changes) * middle(np.stack(changes), self.aggregate, self.trim)
            self.moments[name] = np.asarray(self.moments[name] + change / self.num_clients, dtype=np.float32)
        return super().combine([{name: update[name] for name in self.sent} for update in updates], sizes)


class ServerOptimizer(FedAvg):
    """Takes the clients' mean change for a gradient: `w <- w + step(d)`, tensor by tensor."""

    weigh_by_size = False
    beta_1 = 0.0

    def combine(self, updates: Sequence[Mapping[str, Array]], sizes: Sequence[float]) -> Arrays:
        weights = shares(sizes if self.weigh_by_size else [1] * len(sizes))
        arrays = {}
        for name, array in self.sent.items():
            w = array.numpy()
            changes = [update[name].numpy() - w for update in updates]
            if self.aggregate == "mean":
                d = sum(weight * change for change, weight in zip(changes, weights, strict=True))
            else:
                d = middle(np.stack(changes), self.aggregate, self.trim)
            arrays[name] = w + self.step(name, d)
        return arrays

    def step(self, name: str, d: np.ndarray) -> np.ndarray:
        """The change of the shared tensor `name` for the clients' mean change `d`."""
        raise NotImplementedError

    def keep(self, key: str, value: np.ndarray) -> np.ndarray:
        self.moments[key] = np.asarray(value, dtype=np.float32)
        return self.moments[key]

    def momentum(self, name: str, d: np.ndarray) -> np.ndarray:
        m = self.moments.get(f"m/{name}")
        return self.keep(f"m/{name}", d if m is None else self.beta_1 * m + (1 - self.beta_1) * d)


class FedAvgM(ServerOptimizer):
    """FedAvg with momentum on the server."""

    moment_kinds = frozenset({"m"})
    weigh_by_size = True

    def __init__(self, beta_1: float = 0.9):
        super().__init__()
        self.beta_1 = beta_1

    def step(self, name: str, d: np.ndarray) -> np.ndarray:
        return self.momentum(name, d)


class _Adaptive(ServerOptimizer):
    """The common form of the adaptive three: `eta m / (sqrt(v) + tau)`, with v starting at tau²."""

    moment_kinds = frozenset({"m", "v"})

    def __init__(self, eta: float = 1e-3, tau: float = 1e-3, beta_1: float = 0.9, beta_2: float = 0.99):
        super().__init__()
        self.eta, self.tau, self.beta_1, self.beta_2 = eta, tau, beta_1, beta_2

    def step(self, name: str, d: np.ndarray) -> np.ndarray:
        m = self.momentum(name, d)
        v = self.moments.get(f"v/{name}", np.full_like(d, self.tau**2))
        v = self.keep(f"v/{name}", self.second_moment(v, m))
        return self.eta * m / (np.sqrt(v) + self.tau)

    def second_moment(self, v: np.ndarray, m: np.ndarray) -> np.ndarray:
        """The next v."""
        raise NotImplementedError


class FedAdagrad(_Adaptive):
    """Adagrad on the server: v only grows, and d stands where the others have m."""

    moment_kinds = frozenset({"v"})

    def __init__(self, eta: float = 1e-3, tau: float = 1e-3):
        super().__init__(eta, tau)

    def momentum(self, name: str, d: np.ndarray) -> np.ndarray:
        return d

    def second_moment(self, v: np.ndarray, m: np.ndarray) -> np.ndarray:
        return v + m**2


class FedYogi(_Adaptive):
    """Yogi on the server: v moves towards m² by a step that does not depend on how far it is."""

    def second_moment(self, v: np.ndarray, m: np.ndarray) -> np.ndarray:
        return v - (1 - self.beta_2) * m**2 * np.sign(v - m**2)


class FedAdam(_Adaptive):
    """Adam on the server, without bias correction."""

    def second_moment(self, v: np.ndarray, m: np.ndarray) -> np.ndarray:
        return self.beta_2 * v + (1 - self.beta_2) * m**2


class ByTokens(FedAvg):
    """FedAvg, but the LoRA of each expert is weighed by the tokens that were routed to that expert.

    A layer's LoRAs have the expert in front and travel with `tokens` [E] beside them (`model/expert_loras.py`).
    """

    def combine(self, updates: Sequence[Mapping[str, Array]], sizes: Sequence[float]) -> Arrays:
        arrays = weighted_mean(updates, sizes)
        for counted in [name for name in arrays if name.endswith(".tokens")]:
            tokens = np.stack([update[counted].numpy() for update in updates])  # [K, E]
            whole = tokens.sum(0)
            weights = tokens / np.maximum(whole, 1)
            for name in [n for n in arrays if n.startswith(counted.removesuffix("tokens")) and n != counted]:
                each = np.stack([update[name].numpy() for update in updates])
                mean = np.einsum("ke,ke...->e...", weights, each)
                used = (whole > 0).reshape(-1, *[1] * (mean.ndim - 1))
                arrays[name] = np.where(used, mean, self.sent[name].numpy()).astype(np.float32)
            arrays[counted] = np.zeros_like(whole)  # each turn counts its own
        return arrays


class FlexLora(FedAvg):
    """FlexLoRA: client k has a LoRA of rank `ranks[k % len(ranks)]`; none given: the server's rank for all."""

    def __init__(self, ranks: Sequence[int] | None = None):
        super().__init__()
        self.ranks = tuple(ranks or ())

    def rank_of(self, node: int) -> int | None:
        return self.ranks[list(self.clients).index(node) % len(self.ranks)] if self.ranks and self.clients else None

    def _cut_for(self, node: int, arrays: ArrayRecord) -> ArrayRecord:
        rank = self.rank_of(node)
        return arrays if rank is None else to_record(cut_to_rank(to_arrays(arrays), rank))

    def _messages(
        self, kind: str, server_round: int, arrays: ArrayRecord, config: ConfigRecord, nodes: list[int]
    ) -> list[Message]:
        return [
            message
            for node in nodes
            for message in super(FlexLora, self)._messages(
                kind, server_round, self._cut_for(node, arrays), config, [node]
            )
        ]

    def _update(self, reply: Message) -> dict[str, Array]:
        sent = self._cut_for(reply.metadata.src_node_id, self.sent)
        return update_of(reply, sent, self._name(reply), self.arrayrecord_key)

    def combine(self, updates: Sequence[Mapping[str, Array]], sizes: Sequence[float]) -> Arrays:
        products = pairs(list(self.sent))
        paired = {name for pair in products for name in pair}
        arrays = weighted_mean([{n: t for n, t in update.items() if n not in paired} for update in updates], sizes)
        for a, b in products:
            factors = [(update[a].numpy(), update[b].numpy()) for update in updates]
            arrays[a], arrays[b] = averaged_product(factors, shares(sizes), self.sent[a].shape[0])
        return {name: arrays[name] for name in self.sent}


# Which settings each of them takes is declared in `config.STRATEGIES`; their defaults are those of the paper's base.
SETTINGS = {key for keys in STRATEGIES.values() for key in keys}
CLASSES: dict[str, type[FedAvg]] = {
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "scaffold": Scaffold,
    "fedavgm": FedAvgM,
    "fedadagrad": FedAdagrad,
    "fedyogi": FedYogi,
    "fedadam": FedAdam,
    "by_tokens": ByTokens,
    "flexlora": FlexLora,
}


def make_strategy(
    name: str,
    num_clients: int,
    *,
    clients_per_round: int = 0,
    aggregate: str = "mean",
    trim: float | None = None,
    **settings: Any,
) -> FedAvg:
    """The strategy `name`, a Flower `Strategy` for `run_rounds`.

    Args:
        name: one of `config.STRATEGIES`.
        num_clients: all clients of the run (SCAFFOLD's N).
        clients_per_round: how many of them train in a round; 0: all.
        aggregate, trim: the middle of the clients' values that it goes by, see `robust.py`.
        settings: of this strategy, see `config.STRATEGIES`.

    Raises:
        FlexError: no such strategy or setting, or a value outside its range.
    """
    known = {key: value for key, value in settings.items() if key in SETTINGS}
    StrategySettings(name=name, aggregate=aggregate, trim=trim, **known)
    for key in settings:
        if key not in STRATEGIES[name]:
            raise FlexError(f"{name} has no setting {key!r}; expected {', '.join(STRATEGIES[name]) or 'none'}")
    if num_clients < 1:
        raise FlexError(f"num_clients is {num_clients}; expected 1 or more")
    if not 0 <= clients_per_round <= num_clients:
        raise FlexError(
            f"clients_per_round is {clients_per_round}; expected 0 (all) to {num_clients}, the clients there are"
        )
    sampled = clients_per_round or num_clients
    if aggregate != "mean" and sampled < FEWEST:
        raise FlexError(
            f"strategy.aggregate is {aggregate!r} with {sampled} clients a round; expected {FEWEST} or more, so that "
            "one can be outvoted, or 'mean'"
        )
    strategy = CLASSES[name](**settings)
    strategy.num_clients, strategy.clients_per_round = num_clients, clients_per_round
    strategy.aggregate, strategy.trim = aggregate, trim or TRIM
    return strategy


def configured_strategy(config: RunConfig, method: str, num_clients: int) -> FedAvg:
    """The strategy that averages for `method` in a run of `num_clients`; raises as `make_strategy`."""
    name, settings = config.strategy.of(method)
    sampled = config.train.clients_per_round or num_clients
    if config.strategy.secure and sampled < FEWEST:
        raise FlexError(
            f"strategy.secure hides one client among {sampled} a round; expected {FEWEST} or more: with two, each "
            "knows the other's update from the sum and its own"
        )
    return make_strategy(
        name,
        num_clients,
        clients_per_round=config.train.clients_per_round,
        aggregate=config.strategy.aggregate,
        trim=config.strategy.trim,
        **settings,
    )


def strategy_state(strategy: FedAvg) -> Arrays:
    """All that a strategy remembers between rounds, by name; a copy."""
    return {name: array.copy() for name, array in strategy.moments.items()}


def load_strategy_state(strategy: FedAvg, arrays: Arrays) -> None:
    """The exact inverse of `strategy_state`.

    Raises:
        FlexError: this is the state of another kind of strategy.
    """
    kinds = {name.partition("/")[0] for name in arrays}
    if kinds and kinds != strategy.moment_kinds:
        raise FlexError(
            f"this strategy state has {sorted(kinds)}; expected {sorted(strategy.moment_kinds)}, "
            f"what {type(strategy).__name__} keeps"
        )
    strategy.moments = {name: array.copy() for name, array in arrays.items()}
