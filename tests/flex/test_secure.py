"""Secure aggregation: the mean as without masks but for its rounding, whoever drops out, and no update that is seen."""

import dataclasses
import math
import re
import sys

import numpy as np
import pytest
from rich.console import Console
from sites import at_work, federation, run_sites
from tiny import read_log, save_data, save_model, tiny_config
from toy import CLIENTS

from flex.config import RunConfig, StrategySettings
from flex.errors import FlexError
from flex.federation import flower, masked_site
from flex.federation.checkpoint import load_server
from flex.federation.client import TurnReport
from flex.federation.client_app import make_client_app
from flex.federation.guard import Guard
from flex.federation.local import InProcessGrid
from flex.federation.masked_site import MaskedSite
from flex.federation.masking import decode, encode, error_bound, levels_of, mask_of
from flex.federation.messages import METRICS
from flex.federation.rounds import ClientFailed, identity, inner, run_rounds
from flex.federation.seal import SEAL, digest
from flex.federation.secure import MaskedGuard, SecureRound
from flex.federation.strategy import make_strategy
from flex.report import write_report
from flex.runs.run import run

SIZES = dict(zip(CLIENTS, (20, 30, 40, 50), strict=True))
SHARED = {"w": np.linspace(-1, 1, 300, dtype=np.float32).reshape(30, 10), "scale": np.asarray(0.5, np.float32)}


class DrawnSite:
    """A site whose update is drawn from its name and the round, as long as `size` says."""

    def __init__(self, name, folder, bound=0.0, size=0.01, secure=True):
        self.client_id, self.size = name, size
        self.client = type("Client", (), {"train": [None] * SIZES[name]})
        self.config = RunConfig(strategy=StrategySettings(secure=secure, max_update_norm=bound))
        self.masked = MaskedSite(folder / name, name)

    def hides(self, round_index):
        return self.config.strategy.secure

    def train(self, round_index, shared, kept=None):
        rng = np.random.default_rng([round_index, CLIENTS.index(self.client_id)])
        update = {n: (a + self.size * rng.normal(size=a.shape)).astype(np.float32) for n, a in shared.items()}
        numbers = {"num_examples": SIZES[self.client_id], "loss": 1.0, "seconds": 0.1, "tokens": 5, "opening": None}
        return TurnReport(update, numbers)


def grid_of(folder, spoil=None, listen=None, clients=CLIENTS, **settings):
    """`spoil` gets (client, what it was asked, reply) and may raise."""
    sites = {name: DrawnSite(name, folder, **settings) for name in clients}
    app = make_client_app(lambda _, context: sites[identity(context)[0]])

    def answer(message, context):
        if spoil:
            spoil(identity(context)[0], str(message.content["config"].get("ask", "train")))
        return app(message, context)

    return InProcessGrid(answer, list(clients), on_message=listen), sites


def play(grid, rounds=2, name="fedavg", bound=0.0, secure=True, shared=SHARED, num_clients=4, **options):
    strategy, reports = make_strategy(name, num_clients), []
    guard = (MaskedGuard if secure else Guard)(bound, SIZES)
    came = run_rounds(
        strategy,
        grid,
        shared,
        rounds,
        evaluate_every=None,
        guard=guard,
        secure=SecureRound(inner(strategy).weigh_by_size) if secure else None,
        on_round=lambda *r: reports.append(r[2]),
        **options,
    )
    return came, reports


def distance(a, b):
    return math.sqrt(sum(((a[name].astype(np.float64) - b[name]) ** 2).sum() for name in a))


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedavgm", "fedadagrad", "fedyogi", "fedadam"])
@pytest.mark.parametrize(("bound", "size"), [(0.0, 0.01), (0.1, 0.01), (0.0, 1e-7), (0.0, 1e4)])
def test_it_is_the_mean_without_masks(bound, size, name, tmp_path):
    plain, _ = play(grid_of(tmp_path / "a", secure=False, size=size)[0], 2, name, bound, secure=False)
    came, reports = play(grid_of(tmp_path / "b", bound=bound, size=size)[0], 2, name, bound)
    moved = distance(plain, SHARED)
    assert distance(came, plain) < 5e-4 * moved + 1e-6
    for report in reports:
        said = report.secured
        assert (said.sites, said.dropped) == (4, [])
        assert 0 < said.error < 5e-4  # the promise: under 0.05 % of the update
        norms = [turn.update.norm for turn in report.train]
        assert norms == pytest.approx([size * math.sqrt(301)] * 4, rel=0.2)
        assert all(
            turn.update.scale == pytest.approx(min(1, bound / n) if bound else 1)
            for turn, n in zip(report.train, norms, strict=True)
        )


def test_the_rounding_stays_below_what_is_said(tmp_path):
    """In float64, where nothing else is rounded."""
    rng = np.random.default_rng(3)
    for sites, size in ((3, 1000), (20, 100_000)):
        changes = [rng.normal(size=size).astype(np.float32) for _ in range(sites)]
        limit, levels = float(max(np.abs(c).max() for c in changes)), levels_of(sites)
        total = sum((encode(c, limit, levels) for c in changes[1:]), encode(changes[0], limit, levels))
        error = np.linalg.norm(decode(total, limit, levels) - sum(c.astype(np.float64) for c in changes))
        assert 0 < error < error_bound(sites, size, limit, levels)
    ends = np.array([-1, 1], np.float32)  # all sites at one end of the range: the sum does not go round
    total = sum((encode(ends, 1.0, levels_of(7)) for _ in range(6)), encode(ends, 1.0, levels_of(7)))
    np.testing.assert_allclose(decode(total, 1.0, levels_of(7)), [-7, 7], rtol=1e-6)


def test_it_is_reproducible_though_its_keys_are_not(tmp_path):
    one, other = (play(grid_of(tmp_path / name)[0], 3)[0] for name in "ab")
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_what_the_server_gets_says_nothing_of_an_update(tmp_path):
    """No message holds a float tensor of a site, and the masked numbers are spread over all of uint32."""
    seen = []
    grid, _ = grid_of(tmp_path, listen=lambda m, r, s: seen.append(r.content))
    _, (report,) = play(grid, 1)
    tensors = [(n, a) for content in seen for record in content.array_records.values() for n, a in record.items()]
    assert {array.dtype for _, array in tensors} == {"uint32"}
    values = np.concatenate([array.numpy().ravel() for name, array in tensors if name == "w"])
    assert len(values) == 4 * 300
    counts = np.histogram(values, bins=8, range=(0, 2**32))[0]
    assert (counts > 90).all()  # 150 expected in each, deviation 11.5
    assert (counts < 210).all()
    told = {key for content in seen if METRICS in content for key in content[METRICS]}
    known = {"client-index", "num-examples", "loss", "seconds", "turn-seconds", "peak-bytes", "tokens", "opening"}
    assert told - known == {
        "update-norm",
        "largest-change",
    }
    assert {t["dtype"] for t in report.train[0].up} == {"uint32"}
    assert sum(t["bytes"] for t in report.train[0].up) == 301 * 4 + 2 * 128  # as many bytes as without masks


def test_masks_differ_by_key_and_tensor():
    drawn = [mask_of(key, name, (4,)).tolist() for key in (b"a", b"b") for name in ("x", "y")]
    assert len({tuple(mask) for mask in drawn}) == 4
    assert mask_of(b"a", "x", (2, 2)).ravel().tolist() == drawn[0]


def failing(client, stage):
    def spoil(who, asked):
        if (who, asked) == (client, stage):
            raise OSError("unplugged")

    return spoil


@pytest.mark.parametrize("stage", ["train", "shares", "mask", "unmask"])
def test_a_drop_out_is_survived(stage, tmp_path):
    grid, sites = grid_of(tmp_path / "a", failing("ben", stage))
    came, reports = play(grid, 2, skip_failed=True)
    others = [name for name in CLIENTS if name != "ben"]
    plain_grid, _ = grid_of(tmp_path / "b", secure=False, clients=CLIENTS if stage == "unmask" else others)
    strategy = make_strategy("fedavg", 4)
    plain = run_rounds(strategy, plain_grid, SHARED, 2, evaluate_every=None, guard=Guard(0, SIZES))
    assert distance(came, plain) < 5e-4 * distance(plain, SHARED)
    for report in reports:
        assert [(e.client_id, e.doing, e.reason) for e in report.left_out] == [("ben", stage, "OSError: unplugged")]
        in_it = [turn.client_id for turn in report.train]
        assert in_it == (CLIENTS if stage == "unmask" else others)
        assert report.secured.dropped == (["ben"] if stage in ("shares", "mask") else [])
    assert not any(site.masked.path.exists() for name, site in sites.items() if name != "ben")


def test_a_drop_out_stops_the_run_by_name_where_it_is_told_to(tmp_path):
    with pytest.raises(ClientFailed, match=r"client 'ben' failed in round 1 \(mask\): OSError: unplugged"):
        play(grid_of(tmp_path, failing("ben", "mask"))[0])


def test_too_few_are_left(tmp_path):
    def spoil(who, asked):
        if asked == "mask" and who in ("ben", "cleo"):
            raise OSError("unplugged")

    with pytest.raises(ClientFailed, match=r"2 of 4 clients are left in round 1 \(mask\); expected 3 or more"):
        play(grid_of(tmp_path, spoil)[0], skip_failed=True)
    with pytest.raises(FlexError, match=r"strategy.secure hides one site among 2; expected 3 or more"):
        play(grid_of(tmp_path, clients=CLIENTS[:2])[0])


def test_a_site_keeps_what_it_knows_in_its_folder_between_messages(tmp_path):
    """Every message finds a new process, as under Flower's engine."""

    def app(message, context):
        name = identity(context)[0]
        return make_client_app(lambda *_: DrawnSite(name, tmp_path / "a"))(message, context)

    came, _ = play(InProcessGrid(app, CLIENTS))
    again, _ = play(grid_of(tmp_path / "b")[0])
    for name in came:
        np.testing.assert_array_equal(came[name], again[name])


class Asker:
    """A server that asks one site, for its own ends."""

    def __init__(self, folder, count=3, threshold=2):
        self.key = flower.secagg().Key
        self.sites = {number: MaskedSite(folder / str(number), str(number)) for number in range(1, count + 1)}
        change = {"w": np.ones(5, np.float32)}
        told = {"sites": count, "threshold": threshold}
        records = {n: site.begin(1, {"number": n, **told}, change) for n, site in self.sites.items()}
        self.keys = {str(n): [r[self.key.PUBLIC_KEY_1], r[self.key.PUBLIC_KEY_2]] for n, r in records.items()}
        self.count = count

    def shares(self):
        return {n: site.answer(1, "shares", self.keys)[0] for n, site in self.sites.items()}

    def question(self, to, shares, limit=1.0, levels=None):
        made = {
            n: dict(zip(r[self.key.DESTINATION_LIST], r[self.key.CIPHERTEXT_LIST], strict=True))
            for n, r in shares.items()
        }
        texts = {n: own[to] for n, own in made.items() if to in own}
        lists = {self.key.SOURCE_LIST: list(texts), self.key.CIPHERTEXT_LIST: list(texts.values())}
        return {**lists, "range": limit, "levels": levels or levels_of(self.count)}

    def unmask(self, active, dead):
        return {self.key.ACTIVE_NODE_ID_LIST: active, self.key.DEAD_NODE_ID_LIST: dead}


def test_a_site_answers_each_question_once_and_in_order(tmp_path):
    server = Asker(tmp_path)
    site = server.sites[1]
    with pytest.raises(FlexError, match="client '1' was asked 'mask' in round 1; expected 'shares' in round 1"):
        site.answer(1, "mask", {})
    with pytest.raises(FlexError, match="client '1' was asked 'shares' in round 2; expected 'shares' in round 1"):
        site.answer(2, "shares", server.keys)
    shares = server.shares()
    site.answer(1, "mask", server.question(1, shares))
    with pytest.raises(FlexError, match="client '1' was asked 'mask' in round 1; expected 'unmask'"):
        site.answer(1, "mask", server.question(1, shares))  # the difference of two answers would show the change
    site.answer(1, "unmask", server.unmask([1, 2, 3], []))
    with pytest.raises(FlexError, match="client '1' was asked 'unmask' in round 1; expected a masked turn first"):
        site.answer(1, "unmask", server.unmask([1], [2, 3]))


@pytest.mark.parametrize(("active", "dead"), [([1, 2, 3], [2]), ([2, 3], [1]), ([1], [2]), ([1, 2, 3, 4], [])])
def test_a_site_does_not_open_both_secrets_of_another(active, dead, tmp_path):
    server = Asker(tmp_path)
    server.sites[1].answer(1, "mask", server.question(1, server.shares()))
    with pytest.raises(FlexError, match=r"client '1' was asked to unmask .* expected every site that it shares with"):
        server.sites[1].answer(1, "unmask", server.unmask(active, dead))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"limit": 0.5}, "the range of the masked numbers is 0.5; expected at least 1"),
        ({"limit": float("nan")}, "the range of the masked numbers is nan"),
        ({"levels": 2**31}, "the masked numbers have 2147483648 levels; expected 1 to"),
    ],
)
def test_numbers_that_do_not_fit_are_not_masked(change, sentence, tmp_path):
    server = Asker(tmp_path)
    question = server.question(1, server.shares(), **change)
    with pytest.raises(FlexError, match=sentence):
        server.sites[1].answer(1, "mask", question)


@pytest.mark.parametrize(("count", "threshold"), [(2, 2), (3, 1), (4, 2), (3, 4)])
def test_a_site_hides_among_three_and_shares_among_more_than_half(count, threshold, tmp_path):
    with pytest.raises(FlexError, match=r"expected 3 or more|expected over half"):
        Asker(tmp_path, count, threshold)


def test_a_site_that_hides_gives_no_open_update(tmp_path):
    with pytest.raises(FlexError, match="client 'anna' was asked for its update without a mask"):
        play(grid_of(tmp_path)[0], secure=False)


def test_an_update_that_is_not_finite_never_gets_under_a_mask(tmp_path):
    grid, sites = grid_of(tmp_path / "a")
    sites["ben"].size = np.nan
    with pytest.raises(FlexError, match="client 'ben' has NaN or infinite values in its update of 'w'"):
        play(grid)
    _, reports = play(grid, skip_failed=True)
    assert [list(report.failed) for report in reports] == [["ben"]] * 2


def test_an_update_far_longer_than_the_others_is_left_out_before_the_masks(tmp_path):
    grid, sites = grid_of(tmp_path / "a")
    sites["ben"].size = 1e5
    _, (report,) = play(grid, 1, skip_failed=True)
    assert "over 100 times the median" in report.failed["ben"]
    assert report.secured.range < 1


def test_wrong_shares_are_noticed(tmp_path, monkeypatch):
    unmask = MaskedSite._unmask

    def lie(site, state, change, asked):
        record, numbers = unmask(site, state, change, asked)
        key = flower.secagg().Key
        if "ben" in site.sender:
            record[key.SHARE_LIST] = [share[:4] + bytes(len(share) - 4) for share in record[key.SHARE_LIST]]
        return record, numbers

    monkeypatch.setattr(MaskedSite, "_unmask", lie)
    with pytest.raises(FlexError, match=r"do not open its masks|a share or a mask was wrong"):
        play(grid_of(tmp_path)[0])


def test_a_flower_that_moved_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr.client.mod.secure_aggregation.secaggplus_mod", None)
    with pytest.raises(RuntimeError, match=r"flwr \S+ has moved SecAgg\+"):
        flower.secagg()


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"strategy": {"secure": True, "aggregate": "median"}}, "strategy.secure shows the server a sum alone"),
        ({"strategy": {"secure": True, "aggregate": "trimmed-mean"}}, "of which it can take no trimmed-mean"),
        ({"strategy": {"secure": True, "name": "scaffold"}}, "strategy.secure is True, which does not hold for what"),
        ({"strategy": {"secure": True, "name": "flexlora"}}, "the clients of flexlora send"),
        ({"strategy": {"secure": True}, "train": {"methods": ("scaffold",)}}, "the clients of scaffold send"),
    ],
)
def test_what_cannot_be_hidden_is_refused_early(sections, sentence):
    with pytest.raises(FlexError, match=sentence):
        RunConfig().with_values(**sections)


def test_a_run_under_masks(tmp_path):
    save_model(tmp_path / "model")
    save_data(tmp_path / "data", "abc")
    plain = tiny_config(tmp_path, train={"methods": ("local", "flex")}, evaluate={"rouge": False})
    secure = plain.with_values(strategy={"secure": True, "max_update_norm": 0.5})
    for config, folder in ((plain, "plain"), (secure, "secure")):
        run(dataclasses.replace(config, output=str(tmp_path / folder)), Console(quiet=True))
    files = [tmp_path / f / "flex-seed0" / "server" / "round-0002.safetensors" for f in ("plain", "secure")]
    (_, one, _, _), (_, other, _, _) = (load_server(path) for path in files)
    assert distance(one, other) < 5e-4 * math.sqrt(sum((a.astype(np.float64) ** 2).sum() for a in one.values()))
    events = read_log(tmp_path / "secure" / "metrics.jsonl")
    secured = [event for event in events if event["event"] == "secured"]
    assert [(e["method"], e["round"], e["sites"]) for e in secured] == [("flex", 1, 3), ("flex", 2, 3)]
    assert all(0 < e["error"] < 5e-4 for e in secured)
    text = write_report(tmp_path / "secure").read_text()
    assert "Summed under masks" in text
    assert "uint32" in text
    assert not list((tmp_path / "secure").rglob(masked_site.FILE))


def test_two_clients_are_refused_before_any_method_trains(tmp_path):
    config = tiny_config(tmp_path, strategy={"secure": True})
    with pytest.raises(FlexError, match=r"strategy.secure hides one client among 2 a round; expected 3 or more"):
        run(config, Console(quiet=True))
    assert not list((tmp_path / "run").rglob("*.safetensors"))


SPOILT = {
    "another dtype": (
        "mask",
        lambda c: c.__setitem__(
            "masked",
            flower.ArrayRecord({n: flower.Array(a.numpy().astype(np.float32)) for n, a in c["masked"].items()}),
        ),
        "sent 'w' as float32; expected uint32",
    ),
    "another shape": (
        "mask",
        lambda c: c["masked"].__setitem__("w", flower.Array(np.zeros((2, 2), np.uint32))),
        r"sent 'w' with shape \(2, 2\)",
    ),
    "no numbers": ("mask", lambda c: c.pop("masked"), r"sent the ArrayRecords \[\]; expected 'masked' alone"),
    "no shares": ("shares", lambda c: c["mask"].clear(), "sent no '.*' for the masks; expected int"),
    "no keys": ("train", lambda c: c["mask"].clear(), "sent no '.*' for the masks; expected bytes"),
    "no norm": ("train", lambda c: c["metrics"].pop("update-norm"), "reported update-norm None"),
    "an open update": (
        "train",
        lambda c: c.__setitem__("arrays", flower.ArrayRecord({"w": flower.Array(np.zeros(2))})),
        "sent its update without a mask",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_site_that_spoils_the_protocol_is_left_out(case, tmp_path):
    stage, spoil, sentence = SPOILT[case]
    grid, _ = grid_of(tmp_path / "a")
    app = grid.client_app

    def spoilt(message, context):
        reply = app(message, context)
        if (identity(context)[0], str(message.content["config"].get("ask", "train"))) == ("ben", stage):
            spoil(reply.content)
            reply.content[SEAL]["sha256"] = digest(reply.content)
        return reply

    grid.client_app = spoilt
    came, (report,) = play(grid, 1, skip_failed=True)
    (event,) = report.left_out
    assert (event.client_id, event.doing) == ("ben", stage)
    assert re.search(sentence, event.reason)
    others = [name for name in CLIENTS if name != "ben"]
    plain, _ = play(grid_of(tmp_path / "b", secure=False, clients=others)[0], 1, secure=False)
    assert distance(came, plain) < 5e-4 * distance(plain, SHARED)
    with pytest.raises(FlexError, match=f"client 'ben' {sentence}"):
        play(grid, 1)


def test_sites_with_workers_of_their_own_give_the_same_bits(tmp_path):
    save_model(tmp_path / "model")
    save_data(tmp_path / "data", "abc")
    strategy = {"secure": True, "max_update_norm": 0.5}
    deployment, config = federation(
        tmp_path, "abc", train={"methods": ("fedavg",)}, strategy=strategy, evaluate={"rouge": False}
    )
    run(config, Console(quiet=True))
    with at_work(tmp_path, deployment, "abc") as loop:
        run_sites(tmp_path, deployment, loop)
    for index in (1, 2):
        files = [
            folder / "fedavg-seed0" / "server" / f"round-000{index}.safetensors"
            for folder in (tmp_path / "run", deployment.run)
        ]
        (_, alone, _, _), (_, apart, _, _) = (load_server(path) for path in files)
        for name in alone:
            np.testing.assert_array_equal(alone[name], apart[name])
    left = [line for path in tmp_path.rglob("record.jsonl") for line in read_log(path)]
    assert {line["norm"] for line in left if line["asked"] == "train"} == {None}  # no update left in the open
    assert not list(tmp_path.rglob(masked_site.FILE))
