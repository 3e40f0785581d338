"""What an evaluation measures of the layers, against numbers by hand, on families, and in a run."""

import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import families
import pytest
import torch
from rich.console import Console
from same_run import assert_same_run, plug_pulled, tensors, without_times
from tiny import read_log, save_model, tiny_config
from torch import Tensor, nn

import flex_kernels
from flex.cli import main
from flex.data.examples import Batch, Example
from flex.errors import FlexError
from flex.evaluation.layers import (
    LayerLook,
    addition,
    forward_seconds,
    graft_flops,
    layer_flops,
    look,
    prompts_of,
    source_of,
)
from flex.federation import layers as client_layers
from flex.model.base import load_base
from flex.report.layers import Use, thinned, use
from flex.runs.history import without_scores
from flex.runs.run import run
from flex.store.events import AFTER, VALIDATION, Added, Cost, Evaluated, Routed, check_types
from flex_kernels import Graft, reference

QUIET = Console(quiet=True)
FAMILIES = families.experts_classes()
EIGHTHS = torch.tensor([[4.0, 2.0, 1.0, 1.0], [1.0, 1.0, 4.0, 2.0]]) / 8  # of the first token, of the second
ENTROPY = 0.5 * math.log(2) + 0.25 * math.log(4) + 0.25 * math.log(8)  # of both


class PlantedRouter(nn.Module):
    """The logits of a token are those of its place in a table, by the one that is hot in its hidden state."""

    def __init__(self, probabilities: Tensor, top_k: int = 1):
        super().__init__()
        self.weight, self.top_k = nn.Parameter(probabilities.log().T.contiguous()), top_k

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden_states @ self.weight.T
        return logits, *reference.route(logits, self.top_k, renormalize=False)


class PlantedExperts(nn.Module):
    """Every expert gives the same vector, whatever comes."""

    has_gate = True

    def __init__(self, hidden_size: int, output: Tensor):
        super().__init__()
        self.down_proj = nn.Parameter(torch.zeros(4, hidden_size, 3))
        self.output, self.graft = output, None

    def forward(self, hidden_states: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        routed = self.output.expand(len(hidden_states), -1)
        if self.graft is None:
            return routed
        logits = reference.graft_logits(hidden_states, self.graft.logit_weight, self.graft.logit_bias)
        ones = torch.ones_like(routed[:, :1])
        return reference.combine(routed[:, None], ones, self.graft(hidden_states), logits, self.graft.combine)


class Planted(nn.Module):
    """One layer; token n has the hidden state in which place n is hot."""

    def __init__(self, top_k: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(torch.eye(2))
        self.mlp = nn.Module()
        self.mlp.gate, self.mlp.experts = PlantedRouter(EIGHTHS, top_k), PlantedExperts(2, torch.tensor([3.0, 4.0]))
        self.mlp.shared_expert = nn.Linear(2, 5, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> SimpleNamespace:
        x = self.embed(input_ids).reshape(-1, 2)
        _, weights, indices = self.mlp.gate(x)
        out = self.mlp.experts(x, indices, weights)
        return SimpleNamespace(logits=out.view(*input_ids.shape, -1))


class PlainEncoder:
    """Puts examples side by side, padded on the right with token 0."""

    def batch(self, examples: list[Example], device: object = "cpu") -> Batch:
        longest = max(len(example.input_ids) for example in examples)
        rows = [[*e.input_ids, *[0] * (longest - len(e.input_ids))] for e in examples]
        mask = [[1] * len(e.input_ids) + [0] * (longest - len(e.input_ids)) for e in examples]
        return Batch(torch.tensor(rows), torch.tensor(mask), torch.tensor(rows))


def prompts(*ids: tuple[int, ...]) -> list[Example]:
    return [Example(own, len(own), "") for own in ids]


def planted_graft(combine: str = "additive", logit: float = 0.0) -> Graft:
    """Its expert gives (6 silu(1), 8 silu(1)) for both tokens; the gate is sigmoid(logit)."""
    graft = Graft(2, 1, combine=combine, logit_bias=logit)
    with torch.no_grad():
        graft.gate_up_proj.copy_(torch.ones(2, 2))
        graft.down_proj.copy_(torch.tensor([[6.0], [8.0]]))
    return graft


def test_routing_by_hand_without_padding() -> None:
    model = Planted()
    # Nine tokens in two batches; the padding is token 0 and would count for expert 0.
    found = look(
        model, {"mlp.experts": model.mlp.experts}, PlainEncoder(), prompts((0, 0, 0), (1,), (1, 1, 0, 0, 1)), 2
    )["mlp.experts"]
    assert found.source == "softmax"
    assert (found.num_tokens, found.top_k) == (9, 1)
    assert found.entropy == pytest.approx(ENTROPY)
    assert found.most == pytest.approx(math.log(4))
    assert found.counts == [5, 0, 4, 0]
    assert (found.added, found.opening) == (None, None)
    assert not model.mlp.gate._forward_hooks
    assert not model.mlp.experts._forward_hooks


def test_expert_use_by_hand() -> None:
    assert use(1.0, [5, 5, 0, 0]) == Use(1.0, pytest.approx(2.0), 0.5)
    assert use(1.0, [8, 8, 8, 8]) == Use(1.0, pytest.approx(4.0), 0.25)
    assert use(1.0, [4, 2, 1, 1]).used == pytest.approx(math.exp(ENTROPY))
    assert use(0.0, [0, 0]) == Use(0.0, 1.0, 0.0)


@pytest.mark.parametrize("combine", ["additive", "convex"])
def test_what_a_graft_adds_by_hand(combine: str) -> None:
    model = Planted()
    model.mlp.experts.graft = planted_graft(combine, logit=math.log(1 / 3))  # the gate stands open by a quarter
    found = look(model, {"mlp.experts": model.mlp.experts}, PlainEncoder(), prompts((0, 1), (1,)), 2)["mlp.experts"]
    own = 10 / (1 + math.exp(-1))  # the length of what the expert gives, in the direction of the others' (3, 4)
    added = 0.25 * own if combine == "additive" else 0.25 * (own - 5)
    assert found.opening == pytest.approx(0.25)
    assert found.added == pytest.approx(added / (5 + added), rel=1e-5)


def test_a_shut_gate_adds_nothing_and_experts_that_give_nothing_leave_all_to_the_graft() -> None:
    model = Planted()
    model.mlp.experts.graft = planted_graft(logit=-200.0)
    measure = lambda: look(model, {"mlp.experts": model.mlp.experts}, PlainEncoder(), prompts((0, 1)), 1)  # noqa: E731
    assert measure()["mlp.experts"].added == 0
    model.mlp.experts.graft = planted_graft()
    model.mlp.experts.output = torch.zeros(2)
    assert measure()["mlp.experts"].added == pytest.approx(1.0)
    with torch.no_grad():
        model.mlp.experts.graft.down_proj.zero_()
    assert measure()["mlp.experts"].added == 0  # nothing of nothing


@pytest.mark.parametrize("combine", ["additive", "convex"])
def test_what_a_graft_adds_is_what_the_layer_loses_without_it(tmp_path: Path, combine: str) -> None:
    save_model(tmp_path / "model")
    base = load_base(tiny_config(tmp_path).model)
    grafts = flex_kernels.attach_graft(base.model, combine=combine, logit_bias=-1.0)
    layer, graft = base.layers[next(iter(grafts))], next(iter(grafts.values()))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.normal_(std=0.3)
        x, weights = torch.randn(7, 32), torch.rand(7, 2)
        indices = torch.randint(4, (7, 2))
        output = layer(x, indices, weights)
        layer.graft = None
        added, opening = addition(graft, x, output)
        torch.testing.assert_close(added, output - layer(x, indices, weights), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(opening, torch.sigmoid(graft.logits(x)))


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("softmax", lambda s: torch.softmax(s, -1)),
        ("sigmoid", torch.sigmoid),
        ("sqrtsoftplus", lambda s: nn.functional.softplus(s).sqrt()),
        ("kept", lambda s: (s - s.min()) ** 3),
    ],
)
def test_the_routing_weights_say_what_the_scores_are(source: str, parts: object, renormalize: bool) -> None:
    scores = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    weights, indices = parts(scores).topk(3)
    weights = weights / weights.sum(-1, keepdim=True) if renormalize else 2.5 * weights
    for dtype in (torch.float32, torch.bfloat16):
        assert source_of(scores, indices, weights.to(dtype)) == source


def test_a_router_that_returns_no_scores_is_known_by_the_weights_it_keeps() -> None:
    found = LayerLook()
    found.add_routing(None, torch.tensor([[0, 2], [2, 1]]), torch.tensor([[0.3, 0.1], [0.2, 0.2]]), 4)
    assert found.source == "kept"
    assert found.most == pytest.approx(math.log(2))
    quarter = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert found.entropy == pytest.approx((quarter + math.log(2)) / 2)
    assert found.counts == [1, 1, 2, 0]


SOURCES = {
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "deepseek_v2", "gpt_oss", "gemma4"), "softmax"),
    **dict.fromkeys(("deepseek_v3", "glm4_moe", "dots1", "minimax_m2"), "sigmoid"),
    "deepseek_v4": "sqrtsoftplus",
    "phimoe": "kept",
}


@pytest.mark.parametrize("family", [family for family in SOURCES if family in FAMILIES])
@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
def test_every_family_says_how_it_routes(family: str) -> None:
    model = families.build(family, FAMILIES[family])
    experts = flex_kernels.moe_layers(model)
    asked = prompts((5, 9, 11, 30, 7, 8, 2, 40), (12, 50, 3, 22, 41))
    with torch.no_grad():
        found = look(model, experts, PlainEncoder(), asked, 2)
    assert list(found) == list(experts)
    for name, own in found.items():
        assert own.source == SOURCES[family]
        assert own.num_tokens == 13
        assert sum(own.counts) == 13 * families.TOP_K
        assert own.most == pytest.approx(math.log(families.TOP_K if own.source == "kept" else families.EXPERTS))
        assert 0 < own.entropy <= own.most + 1e-12
        assert layer_flops(model, name, experts[name], own.top_k) > 0


def test_operations_by_hand(tmp_path: Path) -> None:
    model = Planted()
    assert graft_flops(Graft(2, 7)) == 2 * (2 * 7 * 2 + 2 * 7 + 2)
    assert layer_flops(model, "mlp.experts", model.mlp.experts, 2) == 2 * (2 * 3 * 2 * 3 + 2 * 5)
    base = load_base(tiny_config(tmp_path).model)  # H 32, I 24, two experts a token, a shared one of 16 with a gate
    for name, layer in base.layers.items():
        assert layer_flops(base.model, name, layer, 2) == 2 * (2 * 3 * 32 * 24 + 3 * 32 * 16 + 32)


def test_times_are_medians_of_turns_and_the_grafts_stay() -> None:
    model = Planted()
    model.mlp.experts.graft = graft = planted_graft()
    now, seen = itertools.count(), []
    took = {True: iter([90, 3, 5, 4]), False: iter([90, 2, 1, 3])}  # the first of each does not count
    at = 0.0

    def clock() -> float:
        nonlocal at
        if next(now) % 2:
            seen.append(model.mlp.experts.graft is not None)
            at += next(took[seen[-1]])
        return at

    batch = PlainEncoder().batch(prompts((0, 1)))
    own = {"mlp.experts": model.mlp.experts}
    assert forward_seconds(model, own, batch, repeats=3, clock=clock) == {"with": 4, "without": 2}
    assert seen == [True, False, False, True, True, False, False, True]
    assert model.mlp.experts.graft is graft
    model.mlp.experts.graft = None
    assert forward_seconds(model, own, batch) == {}


def test_prompts_are_bounded_and_always_the_same() -> None:
    examples = [Example((index, *range(100, 109)), 6, "") for index in range(30)]
    found = prompts_of(examples, 50)
    assert found == prompts_of(examples, 50)
    assert [len(own.input_ids) for own in found] == [6] * 8 + [2]
    assert len({own.input_ids[0] for own in found}) == 9
    assert all(own.prompt_length == len(own.input_ids) for own in found)
    assert len(prompts_of(examples, 10_000)) == 30
    assert prompts_of([Example((1, 2), 0, "")], 5) == prompts_of([], 5) == []


SECTIONS = {
    "train": {"methods": ("base", "fedavg", "flex", "shared-graft"), "graft_learning_rate": 0.05},
    "evaluate": {"every": 1, "rouge": False},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layers")
    return run(tiny_config(folder, **SECTIONS), QUIET)


def of(folder: Path, kind: str, **values: object) -> list[dict]:
    events = read_log(folder / "metrics.jsonl")
    return [e for e in events if e["event"] == kind and all(e.get(k) == v for k, v in values.items())]


def test_a_run_measures_each_client_and_layer(trained: Path) -> None:
    methods = ("base", "fedavg", "flex", "shared-graft")
    places = {(e["method"], e["client_id"], e["round"]) for e in of(trained, "routed")}
    assert places == {(m, client, 0 if m == "base" else 2) for m in methods for client in "ab"}
    for event in of(trained, "routed"):
        assert event["layers"] == [0, 1]
        assert [sum(counts) for counts in event["counts"]] == [2 * event["num_tokens"]] * 2
        (first,) = of(trained, "routed", method="base", client_id=event["client_id"])
        assert event["base_entropy"] == first["entropy"]
        assert event["base_counts"] == first["counts"]
        assert (event["entropy"] != first["entropy"]) == (event["method"] != "base")
    places = {(e["method"], e["client_id"], e["round"]) for e in of(trained, "added")}
    assert places == {(m, client, at) for m in ("flex", "shared-graft") for client in "ab" for at in (1, 2)}
    assert all(0 < value < 1 for e in of(trained, "added") for value in (*e["added"], *e["opening"]))
    costs = of(trained, "cost")
    assert {(e["method"], e["client_id"], e["round"]) for e in costs} == {
        (m, client, 2) for m in ("flex", "shared-graft") for client in "ab"
    }
    for event in costs:
        assert event["graft_flops"] == [6 * 32 * 24 + 2 * 32] * 2
        assert event["layer_flops"] == [2 * (2 * 3 * 32 * 24 + 3 * 32 * 16 + 32)] * 2
        assert event["seconds"].keys() == {"with", "without"}
        assert min(event["seconds"].values()) > 0


def test_looking_changes_nothing_else(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_layers, "prompts_of", lambda *_: [])
    other = run(tiny_config(tmp_path, **SECTIONS), QUIET)
    own = read_log(trained / "metrics.jsonl")
    kept = [event for event in own if event["event"] not in ("routed", "added", "cost")]
    told, wanted = without_times(read_log(other / "metrics.jsonl")), without_times(kept)
    assert len(kept) < len(own)
    assert told[1:] == wanted[1:]  # but for the line about the run, which has its title
    a, b = tensors(trained), tensors(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_killed_run_measures_the_same(trained: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, **{**SECTIONS, "train": {**SECTIONS["train"], "methods": ("flex",)}})
    with plug_pulled(2):
        run(config, QUIET)
    assert_same_run(run(config, QUIET) / "flex-seed0", trained / "flex-seed0")


def test_the_round_that_is_kept_is_measured_too(tmp_path: Path) -> None:
    train = {"methods": ("flex",), "rounds": 3, "steps": 1, "keep": "best", "learning_rate": 0.5}
    config = tiny_config(tmp_path, data={"validation_fraction": 0.3}, evaluate={"rouge": False})
    folder = run(config.with_values(train=train), QUIET)
    (done,) = of(folder, "done")
    assert done["kept"] < 3
    for kind in ("routed", "added", "cost"):
        assert {e["client_id"] for e in of(folder, kind, round=done["kept"])} == {"a", "b"}
        assert len(of(folder, kind, round=done["kept"])) == 2


def test_eval_and_report_show_them(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--run", str(trained), "--client", "a"]) == 0
    said = capsys.readouterr().out
    assert "mean over the layers" in said
    assert main(["report", "--run", str(trained), "--details-csv", str(tmp_path / "d.csv")]) == 0
    page = (trained / "report.html").read_text()
    for heading in ("What the grafts add", "How tokens are routed, before and after", "What the extra expert costs"):
        assert f"<h2>{heading}</h2>" in page
    lines = [line.split(",") for line in (tmp_path / "d.csv").read_text().splitlines()]
    head, rows = lines[0], [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
    assert head[-2:] == ["measure", "value"]
    found = next(
        r
        for r in rows
        if (r["method"], r["client"], r["round"], r["layer"], r["measure"]) == ("flex", "b", "1", "1", "added_norm")
    )
    (event,) = of(trained, "added", method="flex", client_id="b", round=1)
    assert float(found["value"]) == event["added"][1]
    assert {r["measure"] for r in rows if r["group"]} == {"bytes_up", "bytes_down"}
    assert {r["method"] for r in rows if r["measure"] == "forward_seconds_with"} == {"flex", "shared-graft"}


def test_scores_that_are_taken_again_take_the_layers_along() -> None:
    kept = Evaluated(2, "a", AFTER, VALIDATION), Added(1, "a", 5, [0], [0.1], [0.2])
    again = (
        Evaluated(2, "a", AFTER, "test"),
        Added(2, "a", 5, [0], [0.1], [0.2]),
        Cost(2, "a", 5, 3, "cpu", [0], [1], [2]),
    )
    assert without_scores([*kept, *again], 2) == list(kept)


@pytest.mark.parametrize(
    ("event", "sentence"),
    [
        (Added(1, "a", 5, [0, 1], [0.1], [0.2, 0.3]), "with 1 entries in added; expected one for each of 2 layers"),
        (Added(1, "a", 5, [0], [math.nan], [0.2]), "whose added is .nan.; expected a finite number"),
        (Cost(1, "a", 5, 3, "cpu", [0], [1], [2], {"with": math.inf}), "whose seconds is .*expected a finite number"),
        (Routed(1, "a", 5, [0], [1.0], [1.0], [1.0], ["x"], [["1"]], [[1]]), "whose counts is .*; expected list"),
    ],
)
def test_what_a_client_tells_of_its_layers_is_checked(event: Added | Cost | Routed, sentence: str) -> None:
    with pytest.raises(FlexError, match=f"a sent an event '{event.event}' {sentence}"):
        check_types(event, "a")


def test_many_rounds_are_thinned_to_the_first_the_last_and_some_between() -> None:
    assert thinned([3, 5]) == [3, 5]
    assert thinned(list(range(1, 101)), 4) == [1, 34, 67, 100]
