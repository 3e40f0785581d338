"""Flower's own strategies, wrappers and mods around ours: what fits through `run_rounds` and `make_client_app`."""

import importlib

import numpy as np
import pytest
from toy import CLIENTS, DIMENSIONS, START, TARGET, make_toy_app, strategy_of

from flex.federation.checkpoint import load_server, save_server
from flex.federation.client import TurnReport
from flex.federation.client_app import make_client_app
from flex.federation.local import InProcessGrid
from flex.federation.rounds import ask_clients, inner, run_rounds

# After flex.federation.flower, which keeps the warnings of Flower's import to itself.
flowers = importlib.import_module("flwr.serverapp.strategy")
mods = importlib.import_module("flwr.clientapp.mod")

OWN = {
    "FedMedian": flowers.FedMedian,
    "FedTrimmedAvg": flowers.FedTrimmedAvg,
    "Krum": lambda: flowers.Krum(num_malicious_nodes=1),
    "MultiKrum": lambda: flowers.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=2),
}
CLIP, CLIENT_CLIP = 0.5, 0.25
FLAT = {"w": np.zeros(DIMENSIONS, np.float32), "scale": np.zeros(1, np.float32)}  # Flower clips no tensor of shape ()
WRAPPERS = {
    "server": flowers.DifferentialPrivacyServerSideFixedClipping,
    "server, adaptive": lambda s, noise, _, count: flowers.DifferentialPrivacyServerSideAdaptiveClipping(
        s, noise, count
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_flowers_own_strategies_learn_on_our_rounds(name, tmp_path):
    came = run_rounds(OWN[name](), InProcessGrid(make_toy_app(tmp_path), CLIENTS), START, 20)
    assert np.abs(came["w"] - TARGET).max() < 0.5  # from 1.3


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "fedadam"])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapper_for_differential_privacy_runs_resumes_and_clips(kind, name, tmp_path):
    def wrapped():
        return WRAPPERS[kind](strategy_of(name), 0.0, CLIP, len(CLIENTS))

    def rounds(folder, strategy, shared=FLAT, **options):
        folder.mkdir(exist_ok=True)
        return run_rounds(strategy, InProcessGrid(make_toy_app(folder), CLIENTS), shared, 4, **options)

    kept = {}

    def keep(index, shared, report):
        save_server(tmp_path / f"{index}.safetensors", index, shared, inner(strategy))
        kept[index] = shared

    whole = rounds(tmp_path / "a", strategy := wrapped(), on_round=keep)
    assert inner(strategy).clients == dict(zip(range(1000, 1004), CLIENTS, strict=True))
    if name == "fedavg" and kind == "server":  # the mean of clipped updates is no longer than the clip
        before = FLAT
        for shared in kept.values():
            assert np.sqrt(sum(((shared[n] - before[n]) ** 2).sum() for n in shared)) <= CLIP * 1.0001
            before = shared
    _, shared, moments, _ = load_server(tmp_path / "2.safetensors")
    again = wrapped()
    inner(again).moments = moments
    came = rounds(tmp_path / "a", again, shared, start_round=3)
    if kind == "server":  # the adaptive one draws its noise from numpy's global generator
        for tensor in whole:
            np.testing.assert_array_equal(came[tensor], whole[tensor])


def test_clipping_leaves_control_variates_alone(tmp_path):
    """With a clip that nothing reaches, SCAFFOLD gives the bits that it gives alone."""

    def rounds(folder, strategy):
        folder.mkdir()
        return run_rounds(strategy, InProcessGrid(make_toy_app(folder), CLIENTS), START, 3)

    wrapped = flowers.DifferentialPrivacyServerSideFixedClipping(strategy_of("scaffold"), 0.0, 1e6, len(CLIENTS))
    came, alone = rounds(tmp_path / "a", wrapped), rounds(tmp_path / "b", strategy_of("scaffold"))
    for name in alone:
        np.testing.assert_array_equal(came[name], alone[name])


class OneStep:
    """A site whose turn adds one to everything, and to a control variate where it was sent one."""

    client_id = "anna"

    def hides(self, round_index):
        return False

    def train(self, round_index, shared, kept=None):
        numbers = {"num_examples": 3, "loss": 1.0, "seconds": 0.1, "tokens": 5, "opening": None}
        return TurnReport({name: array + 1 for name, array in shared.items()}, numbers)


def test_mods_stand_around_training_alone():
    np.random.seed(0)
    shared = {"w": np.zeros(16, np.float32)}
    app = make_client_app(
        lambda *_: OneStep(), mods=[mods.LocalDpMod(CLIENT_CLIP, sensitivity=0.0, epsilon=1, delta=1e-5)]
    )
    grid = InProcessGrid(app, CLIENTS)
    assert list(ask_clients(grid).values()) == CLIENTS
    came = run_rounds(strategy_of("fedavg"), grid, shared, 1, evaluate_every=None)
    assert np.linalg.norm(came["w"]) == pytest.approx(CLIENT_CLIP, rel=1e-5)
    came = run_rounds(strategy_of("scaffold"), grid, shared, 1, evaluate_every=None)
    assert np.linalg.norm(came["w"]) == pytest.approx(CLIENT_CLIP, rel=1e-5)


def test_client_side_clipping_takes_its_bound_from_the_wrapper():
    shared = {"w": np.zeros(16, np.float32)}
    app = make_client_app(lambda *_: OneStep(), mods=[mods.fixedclipping_mod])
    wrapped = flowers.DifferentialPrivacyClientSideFixedClipping(strategy_of("fedavg"), 0.0, CLIP, len(CLIENTS))
    came = run_rounds(wrapped, InProcessGrid(app, CLIENTS), shared, 1, evaluate_every=None)
    assert np.linalg.norm(came["w"]) == pytest.approx(CLIP, rel=1e-5)
