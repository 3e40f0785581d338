"""Anchors: what a client's model is held to, on general text, by the base with everything taken off."""

import dataclasses
import gzip
import itertools
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny import read_log, records, tiny_config, write_records

from flex.config import METHODS, AnchorSettings, RunConfig, read_config, write_config
from flex.data.anchors import evenly, load_anchors
from flex.data.examples import Batch
from flex.demo import data as demo
from flex.errors import FlexError
from flex.evaluation.score import response_logits
from flex.federation.anchor import SMALLEST_REST, buckets, divergence
from flex.federation.client import Site
from flex.runs.run import run
from flex.runs.world import load_world, make_encoder

QUIET = Console(quiet=True)
WORDS = "cat dog hen rome 3 plus 4 red blue sort these numbers "


def anchored(folder: Path, sections: dict | None = None, **anchor: object) -> RunConfig:
    """The tiny run with twelve general instructions as its anchors, two a step."""
    config = tiny_config(folder, **{"evaluate": {"rouge": False}, **(sections or {})})
    path = folder / "anchor.jsonl"
    if not path.exists():
        write_records(path, [{k: r[k] for k in ("instruction", "response")} for r in records("n", 12, start=50)])
    return config.with_values(anchor={"text": str(path), "weight": 0.5, "batch_size": 2, **anchor})


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{path.relative_to(folder)}:{name}": t for path in files for name, t in load_file(path).items()}


def same(one: Path, other: Path) -> bool:
    a, b = tensors(one), tensors(other)
    return bool(a) and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def moved(config: RunConfig, folder: Path, **sections: dict) -> RunConfig:
    return dataclasses.replace(config.with_values(**sections), output=str(folder))


def site_of(config: RunConfig, method: str, folder: Path) -> Site:
    return load_world(config, 0).sites(config, method, 0, folder)["a"]


# The term itself.


def test_with_all_tokens_kept_it_is_kl_itself() -> None:
    teacher, student = torch.randn(5, 7), torch.randn(5, 7)
    token_ids = teacher.topk(7).indices
    kept = (token_ids, *buckets(teacher, token_ids))
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    torch.testing.assert_close(divergence(student, *kept), (p.exp() * (p - q)).sum(-1).mean())
    assert kept[2].tolist() == [-torch.inf] * 5


def test_what_is_not_kept_is_one_bucket() -> None:
    teacher = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    student = torch.tensor([[0.2, 0.2, 0.1, 0.5]]).log().requires_grad_()
    token_ids = teacher.topk(2).indices
    kept = (token_ids, *buckets(teacher, token_ids))
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.2, 0.2, 0.6])
    value = divergence(student, *kept)
    torch.testing.assert_close(value, (p * (p / q).log()).sum())
    value.backward()
    # d/dz_j of -sum_b p_b log q_b: q_j - p_j for a kept token, q_j (1 - p_rest / q_rest) for one of the others.
    expected = torch.tensor([[0.2 - 0.5, 0.2 - 0.25, 0.1 * (1 - 0.25 / 0.6), 0.5 * (1 - 0.25 / 0.6)]])
    torch.testing.assert_close(student.grad, expected)


def test_a_certain_answer_leaves_no_nan() -> None:
    logits = torch.tensor([[200.0, 0.0, 0.0, 0.0]], requires_grad=True)
    token_ids = torch.tensor([[0, 1]])
    kept = (token_ids, *buckets(logits.detach(), token_ids))
    value = divergence(logits, *kept)
    value.backward()
    assert abs(value.item()) < 10 * SMALLEST_REST
    assert logits.grad.isfinite().all()


def test_the_teacher_is_the_base_with_everything_taken_off(tmp_path: Path) -> None:
    config = anchored(tmp_path, top_k=5)
    world = load_world(config, 0)
    anchor = world.anchor
    batch = world.encoder.batch(anchor.examples)
    with torch.no_grad():
        expected = response_logits(world.base.model, batch)[0].log_softmax(-1).topk(5)
    model = world.sites(config, "flex", 0, tmp_path / "job")["a"].model
    with torch.no_grad():
        for parameter in model.parts.trained().values():
            parameter.add_(0.1)  # a graft and a LoRA that are at work
        changed = response_logits(world.base.model, batch)[0].log_softmax(-1)
    torch.testing.assert_close(anchor.answers.log_probabilities, expected.values)
    assert torch.equal(anchor.answers.token_ids.long(), expected.indices)
    assert not torch.allclose(changed.topk(5).values, expected.values)
    assert float(divergence(changed, *anchor.answers.of(range(12), torch.device("cpu")))) > 0.01


def test_answers_take_so_many_bytes_and_are_kept_once_for_all_clients(tmp_path: Path) -> None:
    config = anchored(tmp_path, top_k=5)
    sites = load_world(config, 0).sites(config, "flex", 0, tmp_path / "job")
    anchor = sites["a"].model.anchor
    tokens = sum(len(example.input_ids) - example.prompt_length for example in anchor.examples)
    assert anchor.answers.num_bytes == tokens * (8 * 5 + 4)
    assert sites["b"].model.anchor is anchor
    ids, _, _ = anchor.answers.of([3, 1], torch.device("cpu"))
    counts = [len(e.input_ids) - e.prompt_length for e in anchor.examples]
    first = anchor.answers.token_ids[sum(counts[:3]) : sum(counts[:4])]
    assert torch.equal(ids[: counts[3]], first.long())
    assert len(ids) == counts[3] + counts[1]


# In a run.


def kept(config: RunConfig, method: str) -> float:
    """KL(base || model) on the anchors after a run, mean over the clients."""
    world = load_world(config, 0)
    values = []
    job = Path(config.output) / f"{method}-seed0"
    rounds = sorted((job / "server").glob("*.safetensors"))
    shared = {name.partition(":")[2]: t.numpy() for name, t in load_file(rounds[-1]).items() if "shared:" in name}
    for site in world.sites(config, method, 0, job).values():
        answers = world.anchor.answers.of(range(12), torch.device("cpu"))
        site.attach(config.train.rounds, shared)
        world.base.model.eval()
        with torch.no_grad():
            logits = response_logits(world.base.model, world.encoder.batch(world.anchor.examples))[0]
        values.append(divergence(logits, *answers).item())
    return sum(values) / len(values)


@pytest.mark.parametrize("method", ["fedavg", "flex"])
def test_a_model_with_an_anchor_stays_nearer_to_the_base(tmp_path: Path, method: str) -> None:
    train = {"methods": (method,), "rounds": 2, "steps": 6, "learning_rate": 1e-2, "graft_learning_rate": 1e-2}
    config = anchored(tmp_path, {"train": train}, weight=10.0)
    without = moved(config, tmp_path / "without", anchor={"weight": 1e-9})
    for each in (config, without):
        run(each, QUIET)
    assert kept(config, method) < 0.8 * kept(without, method)


def test_no_anchor_and_a_weight_of_zero_are_the_same_bits(tmp_path: Path) -> None:
    config = anchored(tmp_path, {"train": {"methods": ("flex",), "rounds": 1}})
    plain = dataclasses.replace(config, anchor=AnchorSettings(), output=str(tmp_path / "plain"))
    run(plain, QUIET)
    for name, anchor in (("none", {"what": "none"}), ("zero", {"weight": 0.0}), ("held", {})):
        run(moved(config, tmp_path / name, anchor=anchor), QUIET)
        assert same(tmp_path / "plain", tmp_path / name) == (name != "held")


def test_every_method_that_trains_takes_one(tmp_path: Path) -> None:
    methods = tuple(name for name, method in METHODS.items() if method.trains)
    train = {"methods": methods, "rounds": 1, "steps": 2}
    config = anchored(tmp_path, {"train": train, "strategy": {"eta": 0.01}, "data": {"general": ""}}, what="both")
    run(config, QUIET)
    run(moved(config, tmp_path / "plain", anchor={"what": "none"}), QUIET)
    for method in methods:
        assert not same(tmp_path / "run" / f"{method}-seed0", tmp_path / "plain" / f"{method}-seed0"), method


@pytest.mark.parametrize("what", ["gate", "both"])
def test_resumed_after_every_round_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    config = anchored(tmp_path, {"train": {"methods": ("flex",), "rounds": 3}}, what=what)
    run(moved(config, tmp_path / "whole"), QUIET)
    original = Site.train
    for stop_at in (2, 3):

        def fails(self, round_index, *rest, stop_at=stop_at):
            if self.client_id == "b" and round_index == stop_at:
                raise RuntimeError("pulled the plug")
            return original(self, round_index, *rest)

        monkeypatch.setattr(Site, "train", fails)
        with pytest.raises(RuntimeError, match="pulled the plug"):
            run(config, QUIET)
    monkeypatch.setattr(Site, "train", original)
    run(config, QUIET)
    assert same(tmp_path / "run" / "flex-seed0", tmp_path / "whole" / "flex-seed0")


def test_the_gates_term_trains_the_gates_alone_and_closes_them(tmp_path: Path) -> None:
    config = anchored(
        tmp_path,
        {"graft": {"logit_bias": -1.0}, "train": {"methods": ("flex",)}},
        what="gate",
        weight=1.0,
        gate_factor=4.0,
    )
    site = site_of(config, "flex", tmp_path / "job")
    site.attach(0, site.model.shared_arrays())
    model = site.model
    for parameter in model.parts.trained().values():
        parameter.requires_grad_(True)
        parameter.grad = None
    model.anchor.beside(batch_of(site), [0, 1], model.parts.trained(), model.private).term.backward()
    moved = {name for name, p in model.parts.trained().items() if p.grad is not None}
    assert {name.rpartition(".")[2] for name in moved} == {"logit_weight", "logit_bias"}
    # At the start g = 0: every token's gate is sigmoid(-1), and the mean over two layers is taken.
    slope = torch.sigmoid(torch.tensor(-1.0)) * torch.sigmoid(torch.tensor(1.0))
    for name in (name for name in moved if name.endswith("bias")):
        torch.testing.assert_close(model.parts.personal[name].grad, (4.0 * slope / 2).reshape(1))
    assert model.anchor._answers is None  # no teacher


def batch_of(site: Site, count: int = 3) -> Batch:
    return site.model.encoder.batch(site.client.train[:count])


def gradients(site: Site, indices: list[int], own: int = 3) -> dict[str, torch.Tensor]:
    """Of the anchor's term on these anchors, beside so many of the client's own examples."""
    model = site.model
    model.base.model.eval()
    for parameter in model.parts.trained().values():
        parameter.requires_grad_(True)
        parameter.grad = None
    beside = model.anchor.beside(batch_of(site, own), indices, model.parts.trained(), model.private)
    beside.term.backward()
    return {n: p.grad.clone() for n, p in model.parts.trained().items() if p.grad is not None and p.grad.any()}


def at_work(config: RunConfig, folder: Path, method: str = "flex") -> Site:
    """A site whose LoRA, graft and gates have been moved from where they start."""
    site = site_of(config, method, folder)
    site.attach(0, site.model.shared_arrays())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in site.model.parts.trained().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return site


@pytest.mark.parametrize("padding", [0.0, 99.0], ids=["two passes", "one pass"])
def test_neither_padding_nor_own_tokens_count_in_the_gates_term(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, padding: float
) -> None:
    monkeypatch.setattr("flex.federation.anchor.MOST_PADDING", padding)
    config = anchored(tmp_path, {"train": {"methods": ("flex",)}}, what="gate")
    site = at_work(config, tmp_path / "job")
    anchor = site.model.anchor
    short, long = (
        anchor.examples[0],
        dataclasses.replace(anchor.examples[1], input_ids=anchor.examples[1].input_ids * 2),
    )
    anchor.examples = [short, long]
    tokens = [len(short.input_ids), len(long.input_ids)]
    one, other, both = (gradients(site, indices) for indices in ([0], [1], [0, 1]))
    assert both
    for name, whole in both.items():
        expected = (one[name] * tokens[0] + other[name] * tokens[1]) / sum(tokens)
        torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("what", ["distill", "gate", "both"])
def test_one_pass_or_two_is_the_same_term(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    config = anchored(tmp_path, {"train": {"methods": ("flex",)}}, what=what)
    site = at_work(config, tmp_path / "job")
    found = []
    for padding in (0.0, 99.0):
        monkeypatch.setattr("flex.federation.anchor.MOST_PADDING", padding)
        found.append(gradients(site, [3, 1]))
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-6)


def test_what_is_asked_of_a_client_is_its_own_answer(tmp_path: Path) -> None:
    """Its logits beside anchors are those without, whatever stands in the other rows."""
    site = at_work(anchored(tmp_path), tmp_path / "job")
    model, own = site.model, site.client.train[:3]
    model.base.model.eval()
    beside = model.anchor.beside(model.encoder.batch(own), [0, 1], model.parts.trained(), model.private)
    logits, targets, _ = response_logits(model.base.model, model.encoder.batch(own))
    assert torch.equal(beside.targets, targets)
    torch.testing.assert_close(beside.logits, logits)


@pytest.mark.parametrize("padding", [0.0, 99.0], ids=["two passes", "one pass"])
def test_the_opening_that_is_told_is_that_of_the_clients_own_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, padding: float
) -> None:
    monkeypatch.setattr("flex.federation.anchor.MOST_PADDING", padding)
    site = at_work(anchored(tmp_path), tmp_path / "job")
    model = site.model
    model.base.model.eval()
    own = [max(site.client.train, key=lambda e: len(e.input_ids))] * 3  # as long as any anchor: nothing more is padded
    anchors = sorted(range(12), key=lambda i: len(model.anchor.examples[i].input_ids))[:2]
    opening = model.anchor.beside(model.encoder.batch(own), anchors, model.parts.trained(), model.private).opening
    response_logits(model.base.model, model.encoder.batch(own))
    torch.testing.assert_close(opening, model.private.opening(model.base))


def test_gradient_checkpointing_gives_the_same_bits(tmp_path: Path) -> None:
    config = anchored(tmp_path, {"train": {"methods": ("flex",), "rounds": 1}}, what="both")
    run(config, QUIET)
    run(moved(config, tmp_path / "less", train={"gradient_checkpointing": True}), QUIET)
    assert same(tmp_path / "run" / "flex-seed0", tmp_path / "less" / "flex-seed0")


def test_accumulated_batches_take_the_anchors_once(tmp_path: Path) -> None:
    """One step of six examples, at once and in three parts: the same step up to rounding."""
    train = {"methods": ("flex",), "rounds": 1, "steps": 1, "learning_rate": 1e-3, "graft_learning_rate": 1e-3}
    lora = {"lora": {"dropout": 0.0}}
    found = []
    for name, parts in (("whole", {"batch_size": 6}), ("parts", {"batch_size": 2, "accumulate": 3})):
        config = anchored(tmp_path, {"train": {**train, **parts}, **lora}, what="both", weight=5.0)
        run(moved(config, tmp_path / name), QUIET)
        found.append(tensors(tmp_path / name / "flex-seed0"))
    moments = [name for name in found[0] if "exp_avg/" in name]  # the gradients themselves; AdamW hides their size
    assert moments
    for name in moments:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-3, atol=1e-6)


def test_another_file_of_anchors_is_other_data(tmp_path: Path) -> None:
    config = anchored(tmp_path, {"train": {"methods": ("fedavg",), "rounds": 1}})
    run(config, QUIET)
    copy = tmp_path / "elsewhere.jsonl"
    copy.write_text((tmp_path / "anchor.jsonl").read_text())
    run(config.with_values(anchor={"text": str(copy)}), QUIET)  # the same content at another place
    write_records(copy, records("n", 12, start=70))
    with pytest.raises(FlexError, match="on other data"):
        run(config.with_values(anchor={"text": str(copy)}), QUIET)
    with pytest.raises(FlexError, match=r"other settings \(anchor.weight = 0.5 there, 0.25 here\)"):
        run(config.with_values(anchor={"weight": 0.25}), QUIET)
    explicit = config.with_values(anchor={"what": "distill", "examples": 256, "top_k": 64, "gate_factor": 10.0})
    run(explicit, QUIET)  # a default that is spelled out is the same setting


def test_anchors_among_the_general_tests_are_told(tmp_path: Path) -> None:
    config = anchored(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "data" / "general.jsonl").read_text().splitlines()]
    write_records(tmp_path / "anchor.jsonl", [*rows[:3], *records("n", 5, start=60)])
    notes = load_world(config, 0).notes
    assert "3 of 8 anchors are in data.general: what is kept shows too well there" in notes


# The file.


def encoder_of(folder: Path):
    config = tiny_config(folder)
    return make_encoder(config, load_world(config, 0).base)


def load(encoder, path: Path, examples: int = 4, batch_size: int = 1):
    settings = AnchorSettings(str(path), "distill", 0.1, batch_size, examples, 64, 10.0)
    return load_anchors(settings, encoder)


def test_plain_text_is_cut_and_taken_evenly(tmp_path: Path) -> None:
    encoder = encoder_of(tmp_path)
    words = WORDS * 40
    (tmp_path / "a.txt").write_text(words)
    ids = encoder.text_ids(words)
    cut = [tuple(ids[i : i + 64]) for i in range(0, len(ids), 64)]
    assert [e.input_ids for e in load(encoder, tmp_path / "a.txt", 100)] == cut
    assert [e.input_ids for e in load(encoder, tmp_path / "a.txt", 3)] == evenly(cut, 3)
    assert all(e.prompt_length == 0 for e in load(encoder, tmp_path / "a.txt"))
    with gzip.open(tmp_path / "a.txt.gz", "wt") as file:
        file.write(words)
    assert load(encoder, tmp_path / "a.txt.gz") == load(encoder, tmp_path / "a.txt")


def test_of_a_long_text_no_more_is_tokenised_than_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of(tmp_path)
    (tmp_path / "long.txt").write_text("cat " * 50_000 + "dog " * 50_000)
    read, original = [], encoder.text_ids
    monkeypatch.setattr(encoder, "text_ids", lambda text: read.append(len(text)) or original(text))
    found = load(encoder, tmp_path / "long.txt", 4)
    assert len(found) == 4
    assert all(len(e.input_ids) == 64 for e in found)
    assert found[0].input_ids[5] != found[-1].input_ids[5]
    assert sum(read) <= 4 * 64 * 16


def test_records_of_instructions_and_of_text(tmp_path: Path) -> None:
    encoder = encoder_of(tmp_path)
    rows = [*records("n", 2), {"instruction": "sort these numbers:", "input": "3 1", "output": "1 3"}]
    found = load(encoder, write_records(tmp_path / "a.jsonl", rows))
    assert [encoder.tokenizer.decode(e.input_ids[e.prompt_length : -1]) for e in found] == ["3 cm", "10 cm", "1 3"]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert load(encoder, tmp_path / "a.json") == found
    texts = load(
        encoder, write_records(tmp_path / "t.jsonl", [{"text": WORDS}, {"text": f"{WORDS} cat", "title": "x"}])
    )
    assert [e.input_ids for e in texts] == [tuple(encoder.text_ids(text)) for text in (WORDS, f"{WORDS} cat")]
    turns = [{"role": r, "content": c} for r, c in zip(("user", "assistant") * 2, ("3", "4", "5", "6"), strict=True)]
    (said,) = load(encoder, write_records(tmp_path / "m.jsonl", [{"messages": turns}]))
    assert said.earlier  # all answers of a conversation are held


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("none.txt", None, "no file at anchor.text = '.*none.txt'; expected plain text or JSON lines"),
        ("empty.txt", b" \n", "empty.txt' is empty; expected general text"),
        ("binary.txt", b"\xff\xfe\x00\x80", "binary.txt' cannot be read as text"),
        ("short.txt", b"cat dog hen", r"gives 1 examples of up to 64 tokens; expected at least anchor.batch_size, 3"),
        ("word.txt", b"cat", r"gives 0 examples of up to 64 tokens"),
        ("damaged.gz", b"not gzip", "cannot be read as text"),
        ("bad.jsonl", b"{\n", "bad.jsonl, line 1 is not JSON"),
        ("empty.jsonl", b"", "holds no records"),
        ("other.jsonl", b'{"prompt": "x"}\n', "other.jsonl, line 1 has no column 'instruction'"),
        ("half.jsonl", b'{"instruction": "x"}\n', "half.jsonl, line 1 has no column 'response'"),
        ("mixed.jsonl", b'{"text": "x"}\n{"texts": "x"}\n', "mixed.jsonl, line 2 has no text"),
    ],
)
def test_a_file_that_cannot_serve_gets_one_sentence(tmp_path: Path, name: str, content, sentence: str) -> None:
    encoder = encoder_of(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(FlexError, match=sentence) as caught:
        load(encoder, tmp_path / name, batch_size=3)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_serve_is_said_before_anything_trains(tmp_path: Path) -> None:
    config = anchored(tmp_path).with_values(anchor={"text": str(tmp_path / "nowhere.txt")})
    with pytest.raises(FlexError, match=r"no file at anchor\.text"):
        run(config, QUIET)
    assert not (tmp_path / "run").exists()


# The settings.


@pytest.mark.parametrize(
    ("anchor", "sentence"),
    [
        ({"weight": 0.1}, "anchor.weight is 0.1, but anchor.text is empty; expected a file of general text"),
        ({"what": "gate"}, "anchor.what is 'gate', but anchor.text is empty"),
        ({"batch_size": 3}, "anchor.batch_size is 3, but anchor.text is empty"),
        ({"text": "x", "weight": -1.0}, "anchor.weight is -1.0; expected 0 or more"),
        ({"text": "x", "weight": float("nan")}, "anchor.weight is nan; expected a finite number"),
        ({"text": "x", "batch_size": 0}, "anchor.batch_size is 0; expected 1 or more"),
        ({"text": "x", "batch_size": 9, "examples": 8}, "anchor.batch_size is 9; expected at most anchor.examples, 8"),
        ({"text": "x", "what": "kl"}, "anchor.what is 'kl'; expected one of distill, gate, both, none"),
        (
            {"text": "x", "what": "gate"},
            "anchor.what is 'gate', but local, fedavg has no graft whose gate could be held",
        ),
    ],
)
def test_settings_that_fit_nothing_are_refused(anchor: dict, sentence: str) -> None:
    with pytest.raises(FlexError, match=sentence):
        RunConfig().with_values(anchor=anchor)


def test_what_is_left_out_has_its_default_where_there_is_a_text() -> None:
    assert RunConfig().anchors is None
    assert RunConfig().with_values(anchor={"what": "none"}).anchors is None
    given = RunConfig().with_values(anchor={"text": "x"}, train={"batch_size": 16}).anchors
    assert given == AnchorSettings("x", "distill", 0.1, 4, 256, 64, 10.0)
    assert RunConfig().with_values(anchor={"text": "x"}, train={"batch_size": 2}).anchors.batch_size == 1
    only_grafts = {"methods": ("base", "flex", "flex-random")}
    assert RunConfig().with_values(anchor={"text": "x", "what": "gate"}, train=only_grafts).anchors.what == "gate"


def test_the_section_is_written_and_read_again(tmp_path: Path) -> None:
    config = RunConfig().with_values(anchor={"text": "a b.txt", "weight": 0.3})
    write_config(config, tmp_path / "c.toml")
    assert read_config(tmp_path / "c.toml") == config


# The demo's own.


def test_the_demo_brings_anchors_that_no_test_asks(tmp_path: Path) -> None:
    config = demo.demo_config(tmp_path, [])
    paths = demo.write_demo_data(tmp_path / "data-seed3", 3)
    assert config.anchors.text.replace("{seed}", "3") == str(paths.anchor)
    anchors = demo.anchor_records(3)
    assert len(anchors) == demo.ANCHORS
    asked = {(r["instruction"], r["context"]) for r in demo.general_tests(3)}
    assert not asked & {(r["instruction"], r["context"]) for r in anchors}
    assert anchors != demo.anchor_records(4)
    assert anchors[:50] != list(itertools.islice(demo.general_stream(3), 50))


def test_scored_from_its_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from flex.cli import main

    config = anchored(tmp_path, {"train": {"methods": ("flex",), "rounds": 1}})
    run(config, QUIET)
    assert main(["eval", "--run", str(tmp_path / "run")]) == 0
    exact = [e["loss"] for e in read_log(tmp_path / "run" / "metrics.jsonl") if e.get("split") == "test"]
    printed = capsys.readouterr().out
    assert all(f"{loss:.3f}" in printed for loss in exact[-2:])
    (tmp_path / "anchor.jsonl").unlink()
    assert (
        main(["generate", "--run", str(tmp_path / "run"), "--client", "a", "--prompt", "3", "--max-new-tokens", "2"])
        == 0
    )


# Drawn from the base.


def test_drawn_text_serves_as_anchors_and_its_seed_fixes_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from flex.cli import main

    config = anchored(tmp_path, {"train": {"methods": ("fedavg",), "rounds": 1}})
    drawn = [tmp_path / f"{name}.jsonl" for name in "abc"]
    for path, seed in zip(drawn, ("1", "1", "2"), strict=True):
        given = ["--to", str(path), "--count", "6", "--length", "20", "--seed", seed]
        state = torch.get_rng_state()
        assert main(["anchors", "--model", config.model.path, *given]) == 0
        assert torch.equal(torch.get_rng_state(), state)
    one, same_seed, other = (path.read_text() for path in drawn)
    assert one == same_seed != other
    assert len(one.splitlines()) == 6
    run(config.with_values(anchor={"text": str(drawn[0])}), QUIET)
    world = load_world(config.with_values(anchor={"text": str(drawn[0])}), 0)
    begin = world.encoder.prompt_ids("cat")
    for example in world.anchor.examples:
        assert len(example.input_ids) <= 20
        assert example.input_ids[0] == begin[0]
    capsys.readouterr()
    for given, sentence in (
        (["--to", str(drawn[0])], "is there; expected a file that is not there yet"),
        (["--to", str(tmp_path / "n" / "d.jsonl"), "--count", "1", "--length", "3"], "cannot write"),
        (["--to", str(tmp_path / "d.jsonl"), "--count", "0"], "--count is 0; expected 1 or more"),
    ):
        assert main(["anchors", "--model", config.model.path, *given]) == 2
        assert sentence in capsys.readouterr().err
