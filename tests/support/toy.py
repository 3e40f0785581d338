"""A federated problem in numpy: y = x.w + scale + b_k, with w and scale shared and b_k personal. No model, no torch.

Each client writes its personal state to a file of its own, a file a round, as real clients do.
"""

import random
from pathlib import Path

import numpy as np
from numpy.testing import assert_array_equal

from flex.config import STRATEGIES
from flex.federation.flower import ClientApp, Context, Error, Grid, Message, MetricRecord, RecordDict, empty_run
from flex.federation.local import InProcessGrid
from flex.federation.messages import (
    ARRAYS,
    CONFIG,
    CONTROL,
    EVENTS,
    METRICS,
    SCORES,
    SPLITS,
    carried_arrays,
    json_record,
    to_arrays,
    to_control,
    to_record,
)
from flex.federation.rounds import answer_identity
from flex.federation.scaffold import control_update, split_control
from flex.federation.seal import sealed
from flex.federation.strategy import make_strategy
from flex.store.events import AFTER, Evaluated

DIMENSIONS, STEPS, RATE = 8, 5, 0.1
CLIENTS = ["anna", "ben", "cleo", "dora"]
TARGET = np.random.default_rng(0).normal(size=DIMENSIONS).astype(np.float32)
START = {"w": np.zeros(DIMENSIONS, np.float32), "scale": np.asarray(0, np.float32)}


def examples(index: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1000 + index)
    x = rng.normal(size=(20 + 10 * index, DIMENSIONS)).astype(np.float32)
    return x, x @ TARGET + np.float32(index + 1)


def personal(folder: Path, index: int, round_index: int) -> dict[str, np.ndarray]:
    """The client's state after the newest round that is not later than `round_index`."""
    for r in range(round_index, 0, -1):
        if (path := folder / f"{index}-{r}.npz").exists():
            return dict(np.load(path))
    return {"b": np.float32(0)}


def make_toy_app(
    folder: Path,
    fail: str = "",
    error: Exception | None = None,
    fail_from: int = 1,
    greedy: bool = False,
    scores: bool = False,
) -> ClientApp:
    """The clients. `fail` raises `error` when it trains from round `fail_from` on; greedy ones empty their message.
    `scores`: they tell the log of them, and do so in a turn that asks for those of the round before."""
    app = ClientApp(mods=[sealed])
    app.query()(answer_identity)

    def loss_of(index: int, round_index: int, shared: dict[str, np.ndarray]) -> float:
        x, y = examples(index)
        e = x @ shared["w"] + shared["scale"] + personal(folder, index, round_index)["b"] - y
        return float((e**2).mean())

    def scores_of(index: int, round_index: int, shared: dict[str, np.ndarray]):
        loss = loss_of(index, round_index, shared)
        return json_record([Evaluated(round_index, "", AFTER, "test", loss=loss).to_json()])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        index, config = int(context.node_config["partition-id"]), message.content[CONFIG]
        shared, control = split_control(carried_arrays(message.content))
        round_index, mu = int(config["server-round"]), float(config.get("proximal-mu", 0.0))
        if context.node_config["client-id"] == fail and round_index >= fail_from:
            raise error
        asked = scores and SPLITS in config
        told = {SCORES: scores_of(index, round_index - 1, shared)} if asked else {}
        own, (x, y) = personal(folder, index, round_index - 1), examples(index)
        w, scale, b = shared["w"].copy(), shared["scale"].copy(), own["b"]
        for _ in range(STEPS):
            e = x @ w + scale + b - y
            gradients = {
                "w": x.T @ e / len(y) + mu * (w - shared["w"]),
                "scale": e.mean() + mu * (scale - shared["scale"]),
            }
            for name, c in control.items():
                gradients[name] = gradients[name] + c - own.get(f"c/{name}", 0)
            w, scale = w - np.float32(RATE) * gradients["w"], scale - np.float32(RATE) * gradients["scale"]
            b = np.float32(b - RATE * e.mean())
        trained = {"w": w.astype(np.float32), "scale": np.asarray(scale, np.float32)}
        trained = {name: trained[name] for name in shared}  # Flower's wrappers go by the place
        c_own = {name: own[f"c/{name}"] for name in control if f"c/{name}" in own}
        c_own, change = control_update(shared, trained, control, c_own, STEPS, RATE)
        np.savez(folder / f"{index}-{round_index}.npz", b=b, **{f"c/{name}": c for name, c in c_own.items()})
        metrics = {"client-index": index, "num-examples": len(y), "loss": float((e**2).mean())}
        if greedy:
            message.content[ARRAYS].clear()
        arrays = {ARRAYS: to_record(trained)} | ({CONTROL: to_control(change)} if control else {})
        return Message(RecordDict({**arrays, **told, METRICS: MetricRecord(metrics)}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        index, round_index = int(context.node_config["partition-id"]), int(message.content[CONFIG]["server-round"])
        shared, (_, y) = to_arrays(message.content[ARRAYS]), examples(index)
        metrics = {"client-index": index, "num-examples": len(y), "loss": loss_of(index, round_index, shared)}
        told = {EVENTS: scores_of(index, round_index, shared)} if scores else {}
        return Message(RecordDict({METRICS: MetricRecord(metrics), **told}), reply_to=message)

    return app


def strategy_of(name: str, **more):
    """A strategy for the toy's clients; the adaptive ones with a rate that gets somewhere in a few rounds."""
    rate = {"eta": 0.1} if "eta" in STRATEGIES[name] else {}
    return make_strategy(name, len(CLIENTS), **rate, **more)


def assert_same_bits(came: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert came.keys() == wanted.keys()
    for name in wanted:
        assert came[name].dtype == wanted[name].dtype
        assert_array_equal(came[name], wanted[name])


class RelayGrid(Grid):
    """A Grid as a real server has it: random node ids, replies in any order, and the server knows no client's name."""

    def __init__(self, inner: InProcessGrid, seed: int):
        self.inner, self.random, self.run_ = inner, random.Random(seed), empty_run(1)
        ids = self.random.sample(range(10**6, 10**9), len(inner.clients))
        self.inner_node = dict(zip(ids, inner.clients, strict=True))
        self.dead: int | None = None
        self.deaf: int | None = None

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        for number, message in enumerate(messages):
            node = message.metadata.dst_node_id
            message.metadata.__dict__["_message_id"] = f"message-{number}"  # as Flower's own grids do on sending
            inner = Message(message.content, self.inner_node[node], message.metadata.message_type)
            if node == self.dead:  # a node that died is answered for by the server, under the server's own id
                reply = Message(Error(code=4, reason="node unavailable"), reply_to=message)
                reply.metadata.__dict__["_src_node_id"] = 1
                replies.append(reply)
            elif node != self.deaf:
                (came,) = self.inner.send_and_receive([inner])
                kind = {"error": came.error} if came.has_error() else {"content": came.content}
                replies.append(Message(**kind, reply_to=message))
        self.random.shuffle(replies)
        return replies

    def get_node_ids(self):
        return list(self.inner_node)

    def push_messages(self, messages):
        raise NotImplementedError

    def pull_messages(self, message_ids):
        raise NotImplementedError

    def create_message(self, *args, **kwargs):
        raise NotImplementedError

    @property
    def run(self):
        return self.run_

    def set_run(self, run):
        self.run_ = run
