"""Every strategy against a few lines of numpy, and what all of them promise: order, checks, float32, no global RNG."""

import random

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from flex.errors import FlexError
from flex.federation.flower import (
    Array,
    ArrayRecord,
    ConfigRecord,
    FlowerFedAvg,
    FlowerFedProx,
    Message,
    MetricRecord,
    RecordDict,
    become_server,
)
from flex.federation.messages import (
    NUM_EXAMPLES,
    carried_arrays,
    control_of,
    mean_metrics,
    to_arrays,
    to_control,
    to_record,
)
from flex.federation.scaffold import control_update, split_control
from flex.federation.strategy import STRATEGIES, load_strategy_state, make_strategy, sample_clients, strategy_state

SIZES = [3, 10, 6]  # unequal: a mean that forgets the weights shows
ROUNDS = 3
SHAPES = {"w": (4, 3), "scale": ()}  # a tensor without dimensions is a tensor too


@pytest.fixture(autouse=True)
def _server():
    become_server(1)


def draw(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.normal(size=shape), np.float32) for name, shape in SHAPES.items()}


def enrolled(name: str, **settings):
    strategy = make_strategy(name, len(SIZES), **settings)
    strategy.clients = {70: "anna", 50: "ben", 60: "cleo"}  # client order is not the order of the node ids
    return strategy


def reply(message: Message, arrays: dict, size: float = 1, **metrics) -> Message:
    shared, control = split_control(arrays)
    content = {"arrays": ArrayRecord({k: Array(np.asarray(v)) for k, v in shared.items()})}
    if control:
        content["control"] = to_control({f"c/{k}": v for k, v in control.items()})
    return Message(
        RecordDict({**content, "metrics": MetricRecord({"num-examples": size, **metrics})}), reply_to=message
    )


def change(client: int, round_index: int) -> dict[str, np.ndarray]:
    return {name: 0.1 * value for name, value in draw(100 * round_index + client).items()}


def play(strategy, first_round: int, last_round: int, w: dict, shuffle: random.Random | None = None) -> dict:
    """Rounds in which client k answers `w + change(k, round)`, whatever else it was sent."""
    for r in range(first_round, last_round + 1):
        messages = strategy.configure_train(r, to_record(w), ConfigRecord(), None)
        replies = []
        for message in messages:
            k = list(strategy.clients).index(message.metadata.dst_node_id)
            came = carried_arrays(message.content)
            update = {n: a + change(k, r)[n.removeprefix("c/")] for n, a in came.items() if not n.startswith("c/")}
            update |= {n: change(k, r)[n.removeprefix("c/")] for n in came if n.startswith("c/")}
            replies.append(reply(message, update, SIZES[k]))
        if shuffle:
            shuffle.shuffle(replies)
        record, _ = strategy.aggregate_train(r, replies)
        w = to_arrays(record)
    return w


MEANS = ("fedavg", "fedprox", "scaffold", "by_tokens", "flexlora")  # of tensors that are no LoRA: the mean


def paper(name: str, w: np.ndarray, changes: list[list[np.ndarray]]) -> np.ndarray:
    """The formulas of the paper's base in float64, one tensor; changes[round][client] = w_k - w."""
    m, v = 0.0, 1e-3**2
    for r, dk in enumerate(changes):
        weighted = sum(n * d for n, d in zip(SIZES, dk, strict=True)) / sum(SIZES)
        d = weighted if name in (*MEANS, "fedavgm") else sum(dk) / len(dk)
        m = d if r == 0 or name == "fedadagrad" else 0.9 * m + 0.1 * d
        if name in MEANS:
            w = w + d
        elif name == "fedavgm":
            w = w + m
        else:
            v = {
                "fedadagrad": v + m**2,
                "fedyogi": v - 0.01 * m**2 * np.sign(v - m**2),
                "fedadam": 0.99 * v + 0.01 * m**2,
            }[name]
            w = w + 1e-3 * m / (np.sqrt(v) + 1e-3)
    return w


@pytest.mark.parametrize("name", STRATEGIES)
def test_formula(name):
    start = draw(0)
    came = play(enrolled(name), 1, ROUNDS, start)
    for tensor in SHAPES:
        changes = [[change(k, r)[tensor].astype(np.float64) for k in range(len(SIZES))] for r in range(1, ROUNDS + 1)]
        wanted = paper(name, start[tensor].astype(np.float64), changes)
        assert_allclose(came[tensor], wanted, rtol=2e-6, atol=2e-6)
        moved = came[tensor] - start[tensor]
        assert_allclose(moved, wanted - start[tensor], rtol=1e-4, atol=1e-6)  # what the rounds did, not what was there


@pytest.mark.parametrize("name", STRATEGIES)
def test_everything_is_float32(name):
    strategy = enrolled(name)
    came = play(strategy, 1, 2, draw(0))
    assert {a.dtype for a in [*came.values(), *strategy_state(strategy).values()]} == {np.dtype(np.float32)}
    assert {k: a.shape for k, a in came.items()} == SHAPES


def test_what_travels_is_float32():
    record = to_record({"w": np.arange(3.0), "scale": np.float64(1)})
    assert {array.dtype for array in record.values()} == {"float32"}
    assert_array_equal(to_arrays(record)["w"], [0, 1, 2])


@pytest.mark.parametrize(("name", "flower"), [("fedavg", FlowerFedAvg()), ("fedprox", FlowerFedProx(proximal_mu=0.01))])
def test_same_bits_as_flower(name, flower):
    strategy, config = enrolled(name), ConfigRecord({"proximal-mu": 0.01} if name == "fedprox" else {})
    messages = strategy.configure_train(1, to_record(draw(0)), ConfigRecord(), None)
    assert dict(messages[0].content["config"]) == {**config, "server-round": 1}
    replies = [reply(m, draw(k), SIZES[k], loss=0.3 * k) for k, m in enumerate(messages)]
    (ours, our_metrics), (theirs, their_metrics) = (s.aggregate_train(1, replies) for s in (strategy, flower))
    assert {k: a.data for k, a in ours.items()} == {k: a.data for k, a in theirs.items()}
    assert dict(our_metrics) == pytest.approx(dict(their_metrics))


@pytest.mark.parametrize("name", STRATEGIES)
def test_order_of_the_replies_changes_no_bit(name):
    came = [play(enrolled(name), 1, ROUNDS, draw(0), shuffle) for shuffle in (None, random.Random(1), random.Random(2))]
    for other in came[1:]:
        for tensor in SHAPES:
            assert_array_equal(came[0][tensor], other[tensor])


def test_order_by_reported_index_where_nobody_named_the_clients():
    strategy = enrolled("fedavg")
    messages = strategy.configure_train(1, to_record(draw(0)), ConfigRecord(), None)
    strategy.clients = {}
    replies = [reply(m, draw(k), **{"client-index": 2 - k}) for k, m in enumerate(messages)]
    came, _ = strategy.aggregate_train(1, replies)
    strategy.clients = {60: "", 50: "", 70: ""}
    assert_array_equal(came["w"].numpy(), strategy.aggregate_train(1, replies)[0]["w"].numpy())


def test_sampling_is_the_papers_and_leaves_the_global_generator_alone():
    before = random.getstate()
    came = [sample_clients(10, 3, r) for r in range(1, 6)]
    assert random.getstate() == before
    for r, picked in enumerate(came):
        random.seed(r)  # the paper's base counts rounds from 0
        assert picked == sorted(random.sample(range(10), 3))
    random.setstate(before)
    assert sample_clients(4, 0, 1) == sample_clients(4, 4, 1) == [0, 1, 2, 3]


def test_sampled_clients_get_the_messages_and_all_are_evaluated():
    strategy = enrolled("fedavg", clients_per_round=2)
    record = to_record(draw(0))
    for r in range(1, 5):
        nodes = [m.metadata.dst_node_id for m in strategy.configure_train(r, record, ConfigRecord(), None)]
        assert nodes == [[70, 50, 60][i] for i in sample_clients(3, 2, r)]
    assert len(strategy.configure_evaluate(1, record, ConfigRecord(), None)) == 3


def test_scaffold_control_of_the_server():
    strategy = enrolled("scaffold", clients_per_round=2)
    first = strategy.configure_train(1, to_record(draw(0)), ConfigRecord(), None)[0].content
    assert list(first.array_records) == ["arrays"]  # Flower's wrappers and mods clip whatever array record they find
    assert list(control_of(first)) == ["c/w", "c/scale"]
    assert not control_of(first)["c/w"].numpy().any()
    play(strategy, 1, ROUNDS, draw(0))
    for tensor in SHAPES:  # c += sum over the sampled / N of all
        wanted = sum(change(k, r)[tensor] for r in range(1, ROUNDS + 1) for k in sample_clients(3, 2, r)) / 3
        assert_allclose(strategy_state(strategy)[f"c/{tensor}"], wanted, rtol=1e-5, atol=1e-7)


def test_scaffold_control_of_the_client():
    w, trained, c, own = (draw(seed) for seed in range(4))
    shared, control = split_control({**w, **{f"c/{k}": v for k, v in c.items()}})
    assert shared == w
    assert control == c
    assert split_control(w) == (w, {})
    for before in (own, {}):
        new, sent = control_update(shared, trained, control, before, num_steps=5, learning_rate=0.1)
        for name in SHAPES:
            c_k = before.get(name, 0)
            wanted = (w[name].astype(np.float64) - trained[name]) / (5 * 0.1) - c[name] + c_k
            assert_allclose(new[name], wanted, rtol=1e-5, atol=1e-6)
            assert_allclose(sent[f"c/{name}"], wanted - c_k, rtol=1e-4, atol=1e-6)
            assert new[name].dtype == sent[f"c/{name}"].dtype == np.float32


NAN = {"w": np.full((4, 3), np.nan, np.float32)}
BAD_UPDATES = [  # (what ben sends instead, what the sentence must say)
    (
        lambda w: {**w, "w": np.zeros((2, 3), np.float32)},
        r"client 'ben' sent 'w' with shape \(2, 3\); expected \(4, 3\)",
    ),
    (lambda w: {"w": w["w"]}, "client 'ben' did not send 'scale'"),
    (lambda w: {**w, "gate": w["w"]}, "client 'ben' sent 'gate', which the server did not send out"),
    (lambda w: {**w, "w": w["w"].astype(np.float16)}, "client 'ben' sent 'w' as float16; expected float32"),
    (lambda w: {**w, **NAN}, "client 'ben' sent 'w' with NaN or infinite values in round 1"),
]


@pytest.mark.parametrize(("spoil", "sentence"), BAD_UPDATES)
def test_a_bad_update_is_named(spoil, sentence):
    strategy = enrolled("fedavg")
    messages = strategy.configure_train(1, to_record(draw(0)), ConfigRecord(), None)
    replies = [reply(m, spoil(draw(k)) if k == 1 else draw(k)) for k, m in enumerate(messages)]
    with pytest.raises(FlexError, match=sentence):
        strategy.aggregate_train(1, replies)


@pytest.mark.parametrize("size", [0, -1, float("nan"), float("inf")])
def test_a_bad_size_is_named(size):
    strategy = enrolled("fedavg")
    message = strategy.configure_train(1, to_record(draw(0)), ConfigRecord(), None)[0]
    with pytest.raises(FlexError, match="client 'anna' reported num-examples"):
        strategy.aggregate_train(1, [reply(message, draw(0), size)])


def test_a_control_that_is_not_finite_is_named():
    strategy = enrolled("scaffold")
    message = strategy.configure_train(1, to_record(draw(0)), ConfigRecord(), None)[0]
    arrays = carried_arrays(message.content)
    with pytest.raises(FlexError, match="client 'anna' sent 'c/w' with NaN"):
        strategy.aggregate_train(1, [reply(message, {**arrays, "c/w": NAN["w"]})])


def test_metrics_that_not_all_reported_are_left_out():
    metrics = [
        {"num-examples": 1, "client-index": 0, "loss": 1.0, "opening": [0.0, 1.0], "em/own": 1.0},
        {"num-examples": 3, "client-index": 1, "loss": 2.0, "opening": [1.0, 0.0]},
    ]
    assert dict(mean_metrics(metrics, [1, 3])) == {"loss": 1.75, "opening": [0.75, 0.25]}


@pytest.mark.parametrize("name", STRATEGIES)
def test_state_goes_round(name):
    unbroken, first = enrolled(name), enrolled(name)
    wanted = play(unbroken, 1, 4, draw(0))
    middle = play(first, 1, 2, draw(0))
    second = enrolled(name)
    load_strategy_state(second, strategy_state(first))
    came = play(second, 3, 4, middle)
    for tensor in SHAPES:
        assert_array_equal(came[tensor], wanted[tensor])


def test_state_of_another_strategy_is_refused():
    strategy = enrolled("fedavgm")
    play(strategy, 1, 1, draw(0))
    with pytest.raises(FlexError, match=r"has \['m'\]; expected \['m', 'v'\], what FedAdam keeps"):
        load_strategy_state(make_strategy("fedadam", 3), strategy_state(strategy))


@pytest.mark.parametrize(
    ("arguments", "settings", "sentence"),
    [
        (("fedsgd", 3), {}, "strategy.name is 'fedsgd'; expected one of fedavg, fedprox"),
        (("fedavg", 0), {}, "num_clients is 0"),
        (("fedavg", 3), {"clients_per_round": 4}, r"clients_per_round is 4; expected 0 \(all\) to 3"),
        (("fedavg", 3), {"eta": 1.0}, "fedavg has no setting 'eta'; expected none"),
        (("fedadam", 3), {"eta": 0.0}, "strategy.eta is 0.0"),
        (("fedadam", 3), {"beta_1": 1.0}, "strategy.beta_1 is 1.0"),
        (("fedprox", 3), {"proximal_mu": -1.0}, "strategy.proximal_mu is -1.0"),
    ],
)
def test_bad_settings_are_named(arguments, settings, sentence):
    with pytest.raises(FlexError, match=sentence):
        make_strategy(*arguments, **settings)


def malformed(change):
    """Two clients' replies, of which `change` spoils the second."""
    strategy = make_strategy("fedavg", 2)
    strategy.clients = {1: "anna", 2: "ben"}
    strategy.sent = to_record({"w": np.zeros(2)})
    contents = [
        RecordDict({"arrays": to_record({"w": np.ones(2)}), "metrics": MetricRecord({NUM_EXAMPLES: 3})}) for _ in "ab"
    ]
    change(contents[1])
    messages = [Message(RecordDict({}), node, "train") for node in (1, 2)]
    return strategy, [Message(c, reply_to=m) for c, m in zip(contents, messages, strict=True)]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c.__setitem__("more", MetricRecord({NUM_EXAMPLES: 7})), "client 'ben' sent 2 MetricRecords"),
        (
            lambda c: c.__setitem__("model", c.pop("arrays")),
            r"client 'ben' sent 1 ArrayRecords \('model'\); expected exactly",
        ),
        (
            lambda c: c["metrics"].__setitem__("extra", 1.0),
            "client 'ben' sent the metric 'extra', which client 'anna' did not",
        ),
        (
            lambda c: c["metrics"].pop(NUM_EXAMPLES),
            "client 'anna' sent the metric 'num-examples', which client 'ben' did",
        ),
    ],
)
def test_a_malformed_reply_is_refused_and_its_sender_named(change, sentence):
    become_server(1)
    strategy, replies = malformed(change)
    with pytest.raises(FlexError, match=sentence):
        strategy.aggregate_train(1, replies)
