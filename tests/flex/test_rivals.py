"""The rivals, two clients each, against their formulas written out: what is averaged, what stays, in which order it
trains, and what answers. Steps are plain SGD on all of a client's examples, so that each can be done again here."""

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import read_log, tiny_config
from toy import CLIENTS

from flex.config import RunConfig
from flex.errors import FlexError
from flex.evaluation.score import response_logits
from flex.federation.agreement import first_round_alone
from flex.federation.client import JobModel, Site
from flex.federation.local import InProcessGrid
from flex.federation.messages import to_record
from flex.federation.rounds import run_rounds
from flex.federation.strategy import make_strategy
from flex.federation.unequal import averaged_product
from flex.federation.weighing import Weighing
from flex.methods import METHODS
from flex.model.adapters import copies, unwrap, weigh, work_with
from flex.runs.workers import make_job
from flex.runs.world import Worlds

RATE = 0.5
OWN, SHARED = ("private",), ("default",)
Values = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> Worlds:
    worlds = Worlds(configured(tmp_path_factory.mktemp("rivals")))
    worlds.of(0)
    return worlds


def configured(folder: Path, **train: object) -> RunConfig:
    config = tiny_config(folder, train={"methods": ("fedavg",), "rounds": 3, "steps": 2, "batch_size": 10, **train})
    common = {"learning_rate": RATE, "graft_learning_rate": RATE, "schedule": "constant", "max_grad_norm": 1e9}
    return config.with_values(train=common, lora={"dropout": 0.0}, evaluate={"rouge": False}, data={"general": ""})


@pytest.fixture(autouse=True)
def plain_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def sgd(site: Site, round_index: int) -> torch.optim.Optimizer:
        return torch.optim.SGD(site.model.parts.trained().values(), RATE)

    monkeypatch.setattr(Site, "optimizer", sgd)


def trained(worlds: Worlds, folder: Path, method: str, **train: object) -> tuple[Values, dict[str, Values], list[dict]]:
    """(shared state, each client's own, log) of a whole job."""
    config = worlds.config.with_values(train={"methods": (method,), **train})
    config = RunConfig(**{**vars(config), "output": str(folder)})
    make_job(config, (0, method), worlds, lambda **_: None).run()
    job = folder / f"{method}-seed0"
    shared = load_file(max(job.glob("server/*.safetensors")))
    own = {}
    for client in "ab":
        files = sorted((job / "clients" / client).glob("*.safetensors"))
        tensors = load_file(files[-1]) if files else {}
        own[client] = {n.partition(":")[2]: t for n, t in tensors.items() if n.startswith("parameters:")}
    return {n.partition(":")[2]: t for n, t in shared.items()}, own, read_log(job / "metrics.jsonl")


class ByHand:
    """The job's model, and one client's SGD step on it."""

    def __init__(self, worlds: Worlds, method: str):
        self.world = worlds.of(0)
        self.model = JobModel(self.world.base, self.world.encoder, worlds.config, method, 0)
        self.data = {client.client_id: client.train for client in self.world.clients}
        self.w0 = {name: p.detach().clone() for name, p in self.model.parts.shared.items()}
        self.v0 = {name: p.detach().clone() for name, p in self.model.own.items()}

    def step(
        self, client: str, values: Values, moves: Mapping[str, object], loras: tuple[str, ...] = (), pull: float = 0.0
    ) -> Values:
        """`values` after one step of the parameters `moves`; `pull` holds the second LoRA to the shared one."""
        parameters = {**self.model.parts.shared, **self.model.own}
        with torch.no_grad():
            for name, value in values.items():
                parameters[name].copy_(value)
        work_with(self.world.base, loras)
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in moves)
        self.world.base.model.train()
        batch = self.world.encoder.batch(self.data[client])
        logits, targets, _ = response_logits(self.world.base.model, batch)
        loss = F.cross_entropy(logits.float(), targets)
        gradients = dict(zip(moves, torch.autograd.grad(loss, [parameters[n] for n in moves]), strict=True))
        anchors = {name: shared for name, (_, shared) in copies(self.world.base).items()}
        new = dict(values)
        for name, gradient in gradients.items():
            held = pull * (values[name] - anchors[name].detach()) if pull else 0
            new[name] = values[name] - RATE * (gradient + held)
        return new


def averaged(per_client: Mapping[str, Values], names: Mapping[str, object]) -> Values:
    return {name: sum(values[name] for values in per_client.values()) / len(per_client) for name in names}


def assert_close(came: Values, wanted: Values) -> None:
    assert came.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(came[name], wanted[name], rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def compare(came: tuple, shared: Values, own: dict[str, Values], names: Mapping[str, object]) -> None:
    assert_close(came[0], shared)
    for client, values in own.items():
        assert_close(came[1][client], {name: values[name] for name in names})


@pytest.mark.parametrize(("method", "mark"), [("fedsa", "lora_B"), ("fedper", "layers.1.")])
def test_a_part_of_the_lora_is_averaged_and_the_rest_stays(worlds, tmp_path, method, mark):
    came = trained(worlds, tmp_path, method)
    hand = ByHand(worlds, method)
    assert all(mark in name for name in hand.v0)
    assert not any(mark in name for name in hand.w0)
    w, own = hand.w0, dict.fromkeys("ab", hand.v0)
    for _ in range(3):
        turns = {}
        for client in "ab":
            values = {**w, **own[client]}
            for _ in range(2):
                values = hand.step(client, values, {**w, **hand.v0})
            turns[client] = own[client] = values
        w, own = averaged(turns, w), {c: {n: v[n] for n in hand.v0} for c, v in own.items()}
    compare(came, w, own, hand.v0)


def test_scaffold_takes_the_drift_off_after_every_step(worlds, tmp_path):
    came = trained(worlds, tmp_path, "scaffold")
    hand = ByHand(worlds, "scaffold")
    w, zero = hand.w0, {name: torch.zeros_like(value) for name, value in hand.w0.items()}
    c, c_k = zero, dict.fromkeys("ab", zero)
    for _ in range(3):
        turns, new = {}, {}
        for client in "ab":
            values = w
            for _ in range(2):
                values = hand.step(client, values, w)
                values = {name: values[name] - RATE * (c[name] - c_k[client][name]) for name in w}
            turns[client] = values
            new[client] = {n: (w[n] - values[n]) / (2 * RATE) - (c[n] - c_k[client][n]) for n in w}
        c = {n: c[n] + sum(new[client][n] - c_k[client][n] for client in "ab") / 2 for n in w}
        w, c_k = averaged(turns, w), new
    assert_close({name: came[0][name] for name in w}, w)
    assert any(difference.abs().max() > 1e-3 for difference in (c_k["a"][n] - c_k["b"][n] for n in w))


def test_control_variates_do_not_pass_through_the_optimizer(worlds, tmp_path, monkeypatch):
    """Beside AdamW they are of the size of its steps, not of the gradients, which they would drown."""
    adamw = lambda site, _round: torch.optim.AdamW(site.model.parts.trained().values(), RATE)  # noqa: E731
    monkeypatch.setattr(Site, "optimizer", adamw)
    config = worlds.config.with_values(train={"steps": 1})
    world = worlds.of(0)
    model = JobModel(world.base, world.encoder, config, "scaffold", 0)
    shared = model.shared_arrays()
    control = {name: np.full_like(array, 0.25) for name, array in shared.items()}
    updates = []
    for name, sent in (("plain", shared), ("corrected", {**shared, **{f"c/{n}": c for n, c in control.items()}})):
        site = Site(model, world.clients[0], [], tmp_path / name)
        updates.append(site.train(1, sent).update)
    for name in shared:
        np.testing.assert_allclose(updates[1][name], updates[0][name] - RATE * control[name], rtol=1e-5, atol=1e-6)


def test_fedrep_trains_what_is_private_first_and_what_is_shared_after_it(worlds, tmp_path):
    came = trained(worlds, tmp_path, "fedrep")
    hand = ByHand(worlds, "fedrep")
    first = {}  # the chosen start: what a run that trains nothing private has
    for client in "ab":
        site = Site(hand.model, next(c for c in hand.world.clients if c.client_id == client), [], tmp_path / "start")
        site.attach(0, hand.model.shared_arrays())
        first[client] = {name: p.detach().clone() for name, p in hand.model.own.items()}
    assert not torch.equal(*(first[c][next(iter(hand.v0))] for c in "ab"))
    w, own = hand.w0, first
    for _ in range(3):
        turns = {}
        for client in "ab":
            values = hand.step(client, {**w, **own[client]}, hand.v0)
            turns[client] = hand.step(client, values, w)
            own[client] = {name: turns[client][name] for name in hand.v0}
        w = averaged(turns, w)
    compare(came, w, own, hand.v0)


def test_ditto_holds_a_clients_own_lora_to_the_shared_one_as_it_came(worlds, tmp_path):
    came = trained(worlds, tmp_path, "ditto")
    hand = ByHand(worlds, "ditto")
    pairs = {name: name.replace(".private.", ".default.") for name in hand.v0}
    w, own = hand.w0, {client: {name: hand.w0[pairs[name]] for name in hand.v0} for client in "ab"}
    for _ in range(3):
        turns = {}
        for client in "ab":
            values = hand.step(client, {**w, **own[client]}, hand.v0, OWN, pull=worlds.config.train.copy_mu)
            turns[client] = hand.step(client, values, w, SHARED)
            own[client] = {name: turns[client][name] for name in hand.v0}
        w = averaged(turns, w)
    compare(came, w, own, hand.v0)


def test_ditto_without_a_hold_is_another_run(worlds, tmp_path):
    held = trained(worlds, tmp_path / "held", "ditto", copy_mu=0.5)
    free = trained(worlds, tmp_path / "free", "ditto", copy_mu=0.0)
    assert_close(held[0], free[0])  # the shared half does not know of it
    name = next(n for n in held[1]["a"] if "lora_B" in n)
    assert not torch.allclose(held[1]["a"][name], free[1]["a"][name], rtol=1e-3)


def test_fine_tuning_starts_at_the_average_and_sends_nothing(worlds, tmp_path):
    came = trained(worlds, tmp_path, "fedavg-finetune", rounds=4, finetune_rounds=2)
    hand = ByHand(worlds, "fedavg-finetune")
    w = hand.w0
    for _ in range(2):
        turns = {}
        for client in "ab":
            turns[client] = hand.step(client, hand.step(client, {**w, **hand.v0}, w, SHARED), w, SHARED)
        w = averaged(turns, w)
    pairs = {name: name.replace(".private.", ".default.") for name in hand.v0}
    own = {}
    for client in "ab":
        own[client] = {**w, **{name: w[pairs[name]] for name in hand.v0}}
        for _ in range(4):  # two rounds of two steps
            own[client] = hand.step(client, own[client], hand.v0, OWN)
    compare(came, w, own, hand.v0)
    up = {e["round"]: e["bytes_up"] for e in came[2] if e["event"] == "train" and e["client_id"] == "a"}
    assert up[1] == up[2] > 0 == up[3] == up[4]


def test_feddpa_trains_one_lora_after_the_other_at_half_weights(worlds, tmp_path):
    came = trained(worlds, tmp_path, "feddpa")
    hand = ByHand(worlds, "feddpa")
    w, own = hand.w0, dict.fromkeys("ab", hand.v0)
    for _ in range(3):
        turns = {}
        for client in "ab":
            values = hand.step(client, {**w, **own[client]}, w)
            turns[client] = hand.step(client, values, hand.v0)
            own[client] = {name: turns[client][name] for name in hand.v0}
        w = averaged(turns, w)
    compare(came, w, own, hand.v0)


def test_feddpa_weighs_each_input_by_its_likeness_to_the_clients_data(worlds):
    """The weight of each row alone, and the output of a batch beside that of its rows with their weights set."""
    hand = ByHand(worlds, "feddpa")
    base, encoder = hand.world.base, hand.world.encoder
    with torch.no_grad():
        for parameter in (*hand.model.parts.shared.values(), *hand.model.own.values()):
            parameter.normal_(std=0.3)
    base.model.eval()
    prompts = [e.input_ids[: e.prompt_length] for e in hand.data["a"]]
    weighing = Weighing(base, prompts[:2], encoder.pad_id)
    weigh(base, 1.0)
    work_with(base, OWN)
    with torch.no_grad():
        h = [base.model.model(torch.tensor([p])).last_hidden_state[0, -1] for p in prompts[:5]]
    work_with(base, ())
    wanted = [sum(0.5 * F.cosine_similarity(one, anchor, dim=0) for anchor in h[:2]) / 2 for one in h[2:]]
    wanted = [min(1.0, max(0.0, float(a))) for a in wanted]
    examples = hand.data["a"][2:5]
    batch = encoder.batch(examples)
    with torch.no_grad():
        weighing([e.input_ids[: e.prompt_length] for e in examples])
        logits = base.model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        for row, (example, a) in enumerate(zip(examples, wanted, strict=True)):
            weigh(base, a)
            n = len(example.input_ids)
            alone = base.model(batch.input_ids[row : row + 1, :n], use_cache=False).logits[0]
            torch.testing.assert_close(logits[row, :n], alone, rtol=1e-4, atol=1e-4)
    assert len({round(a, 4) for a in wanted}) > 1
    unwrap(base)


def test_a_shared_expert_is_one_module_for_all_and_is_averaged(worlds, tmp_path):
    came = trained(worlds, tmp_path, "shared-graft")
    hand = ByHand(worlds, "shared-graft")
    assert not hand.v0
    modules = [name for name in hand.w0 if ".graft." in name]
    assert len(modules) == 2 * 4  # layers; two matrices, the gate's vector and number
    assert all(hand.w0[name].any() for name in modules if name.endswith("_proj"))
    w = hand.w0
    for _ in range(3):
        turns = {c: hand.step(c, hand.step(c, w, w), w) for c in "ab"}
        w = averaged(turns, w)
    compare(came, w, {}, {})


def test_loras_on_experts_compute_the_layer_with_merged_weights(worlds):
    """Output and gradients, beside the layer's own code with W + s B A in place of W; and the tokens it counts."""
    hand = ByHand(worlds, "fedavg-experts")
    layer = next(iter(hand.world.base.layers.values()))
    own = layer.expert_loras.train()
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.normal_(std=0.2)
        own.tokens.zero_()
    x, weights = torch.randn(40, 32), torch.rand(40, 2)
    indices = torch.stack([torch.randperm(3)[:2] for _ in range(40)])  # nobody goes to expert 3
    output = layer(x, indices, weights)
    factors = [own.gate_up_lora_a, own.gate_up_lora_b, own.down_lora_a, own.down_lora_b]
    came = torch.autograd.grad(output.square().sum(), factors)
    merged = [
        layer.gate_up_proj + own.scale * own.gate_up_lora_b @ own.gate_up_lora_a,
        layer.down_proj + own.scale * own.down_lora_b @ own.down_lora_a,
    ]
    wanted = torch.zeros(40, 32)
    for t, k in itertools.product(range(40), range(2)):
        gate, up = (merged[0][indices[t, k]] @ x[t]).chunk(2)
        wanted[t] = wanted[t] + weights[t, k] * (merged[1][indices[t, k]] @ (F.silu(gate) * up))
    torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-4)
    for gradient, truth in zip(came, torch.autograd.grad(wanted.square().sum(), factors), strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-3, atol=1e-3)
        assert not gradient[3].any()
    assert own.tokens.tolist() == torch.bincount(indices.flatten(), minlength=4).tolist()
    unwrap(hand.world.base)
    assert type(layer).forward.__get__(layer) == layer.forward


def test_an_experts_lora_is_averaged_by_the_tokens_routed_to_it():
    """Two clients, three experts: the first sees 30 and 10 tokens, the second 90 of one client, the third none."""
    strategy = make_strategy("by_tokens", 2)
    sent = {
        "x.tokens": np.zeros(3),
        "x.down_lora_a": np.full((3, 1, 2), 7.0),
        "q.lora_A.default.weight": np.zeros((1, 2)),
    }
    strategy.sent = to_record(sent)
    updates = [
        {"x.tokens": [30, 0, 0], "x.down_lora_a": [[[1, 2]], [[3, 4]], [[5, 6]]], "q.lora_A.default.weight": [[4, 0]]},
        {"x.tokens": [10, 90, 0], "x.down_lora_a": [[[5, 6]], [[8, 9]], [[1, 1]]], "q.lora_A.default.weight": [[0, 8]]},
    ]
    records = [to_record({n: np.array(v, np.float32) for n, v in update.items()}) for update in updates]
    came = strategy.combine(records, [1, 3])
    assert came["x.down_lora_a"].tolist() == [[[2, 3]], [[8, 9]], [[7, 7]]]
    assert came["q.lora_A.default.weight"].tolist() == [[1, 6]]  # as FedAvg: 1/4 and 3/4
    assert not came["x.tokens"].any()


def test_products_of_unequal_rank_are_averaged_and_cut_by_hand():
    """3/4 of 4 at (0, 0), 1/4 of (8 at (1, 1), 2 at (0, 2)): D = diag-like with values 3, 2 and a half beside the 3."""
    one = (np.array([[1.0, 0, 0]]), np.array([[4.0], [0]]))
    two = (np.array([[0, 1.0, 0], [0, 0, 1.0]]), np.array([[0, 2.0], [8.0, 0]]))
    d = np.array([[3, 0, 0.5], [0, 2, 0]])
    a, b = averaged_product([one, two], [0.75, 0.25], 2)
    np.testing.assert_allclose(b @ a, d, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(b, axis=0), [9.25**0.5, 2], rtol=1e-6)  # U S, descending
    np.testing.assert_allclose(a @ a.T, np.eye(2), atol=1e-6)
    np.testing.assert_allclose(b[:, :1] @ a[:1], [[3, 0, 0.5], [0, 0, 0]], atol=1e-6)  # the best of rank 1
    a, b = averaged_product([one], [1.0], 3)  # a sum of lower rank: what it does not reach can still be learnt
    np.testing.assert_allclose(b @ a, [[4, 0, 0], [0, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(a @ a.T, np.eye(3), atol=1e-6)
    assert not b[:, 1:].any()


def test_clients_of_unequal_rank_get_and_send_their_own(worlds, tmp_path):
    config = worlds.config.with_values(train={"methods": ("flexlora",)}, strategy={"ranks": (1, 2)})
    worlds = Worlds(config, worlds.world, 0)
    shared, _, log = trained(worlds, tmp_path, "flexlora", rounds=1)
    sizes = {e["client_id"]: (e["bytes_down"], e["bytes_up"]) for e in log if e["event"] == "train"}
    assert sizes["a"][0] == sizes["a"][1] < sizes["b"][0] == sizes["b"][1]
    hand = ByHand(worlds, "flexlora")
    turns = {}
    for client, rank in (("a", 1), ("b", 2)):
        values = {n: p.clone() for n, p in hand.w0.items()}
        for name, value in values.items():
            (value[rank:] if "lora_A" in name else value[:, rank:]).zero_()
        turns[client] = hand.step(client, hand.step(client, values, values), values)
    for name in [n for n in hand.w0 if "lora_A" in n]:
        other = name.replace("lora_A", "lora_B")
        d = sum(turns[c][other] @ turns[c][name] for c in "ab") / 2
        u, s, v = torch.linalg.svd(d)
        torch.testing.assert_close(shared[other] @ shared[name], (u[:, :2] * s[:2]) @ v[:2], rtol=1e-4, atol=1e-6)


def test_ranks_that_nothing_can_have_are_refused(worlds, tmp_path):
    for ranks, said in (((4,), "at most lora.rank, 2"), ((0,), r"names \[0\]"), ((), "strategy.ranks is empty")):
        with pytest.raises(FlexError, match=said):
            worlds.config.with_values(train={"methods": ("flexlora",)}, strategy={"ranks": ranks})
    with pytest.raises(FlexError, match="fedavg has no use for"):
        worlds.config.with_values(strategy={"ranks": (1,)})


def test_rounds_alone_need_rounds():
    with pytest.raises(FlexError, match=r"finetune_rounds is 4; expected at most train\.rounds, 3"):
        RunConfig().with_values(train={"methods": ("fedavg-finetune",), "rounds": 3, "finetune_rounds": 4})
    train = RunConfig().with_values(train={"methods": ("fedavg-finetune",), "rounds": 25}).train
    assert first_round_alone(METHODS["fedavg-finetune"], train) == 24
    assert first_round_alone(METHODS["fedavg"], train) is None


@pytest.mark.parametrize("method", [m for m, row in METHODS.items() if row.loras or row.weighed or row.keeps])
def test_every_method_leaves_the_base_as_it_was(worlds, method):
    world = worlds.of(0)
    unwrap(world.base)
    names = [name for name, _ in world.base.model.named_parameters()]
    JobModel(world.base, world.encoder, worlds.config, method, 0)
    unwrap(world.base)
    assert [name for name, _ in world.base.model.named_parameters()] == names


def test_strategies_of_their_own_work_over_any_shared_tensors(tmp_path):
    """by_tokens and flexlora on tensors that are no LoRA: FedAvg's mean."""
    from toy import START, make_toy_app

    came = {}
    for name in ("fedavg", "by_tokens", "flexlora"):
        (tmp_path / name).mkdir()
        grid = InProcessGrid(make_toy_app(tmp_path / name), CLIENTS)
        came[name] = run_rounds(make_strategy(name, len(CLIENTS)), grid, START, 2)
    for name in ("by_tokens", "flexlora"):
        assert all(np.array_equal(came[name][key], value) for key, value in came["fedavg"].items())
