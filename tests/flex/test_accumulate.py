"""`train.accumulate`: many small batches are one large one."""

import pytest
import torch
from tiny import tiny_config

from flex.federation.client import Held, Told
from flex.model.adapters import recomputed
from flex.runs.world import load_world

NO_DROPOUT = {"rank": 2, "alpha": 4.0, "dropout": 0.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    graft = {"criterion": "reconstruction", "refit": False, "calibration_sequences": 2}
    config = tiny_config(tmp_path_factory.mktemp("accumulate"), graft=graft)
    # Answers of very different lengths: small batches must count by their tokens, not alike.
    world = load_world(config, 0)
    world.clients[0].train[:] = [
        world.encoder.example({"instruction": f"what is {i} plus 4 ?", "response": "7 kg and " * (1 + 2 * (i % 3))})
        for i in range(6)
    ]
    return config, world


def turn(world, method, tmp_path, lora=NO_DROPOUT, strategy="fedavg", **train):
    """The update and the loss of one turn of a client."""
    config, there = world
    config = config.with_values(train=train, lora=lora, strategy={"name": strategy})
    site = next(iter(there.sites(config, method, 0, tmp_path / str(sorted(train.items()))).values()))
    shared = site.model.shared_arrays()
    report = site.train(1, shared)
    moved = {name: torch.from_numpy(report.update[name] - shared[name]) for name in shared}
    own = site.store.load(1)
    return moved | ({} if own is None else own.parameters), report.metrics["loss"]


@pytest.mark.parametrize(("method", "checkpointing"), [("local", False), ("flex", True)])
def test_small_batches_are_as_one_large(world, method, checkpointing, tmp_path):
    options = {"steps": 2, "gradient_checkpointing": checkpointing}
    whole, loss = turn(world, method, tmp_path, batch_size=6, **options)
    parts, same_loss = turn(world, method, tmp_path, batch_size=2, accumulate=3, **options)
    assert any(change.abs().max() > 1e-4 for change in whole.values())
    assert loss == pytest.approx(same_loss, rel=1e-6)
    for name, change in whole.items():
        # AdamW divides by the gradient's size: where that is all but zero, rounding decides a part of the step of 3e-3.
        torch.testing.assert_close(parts[name], change, rtol=1e-3, atol=3e-5)


def test_the_gradients_are_the_same_to_a_millionth(world, tmp_path):
    config, there = world
    site = next(iter(there.sites(config.with_values(lora=NO_DROPOUT), "flex", 0, tmp_path).values()))
    site.attach(0, site.model.shared_arrays())
    trained = site.model.parts.trained()

    def gradients(batch_size, accumulate, checkpointing=False):
        """Of one step, before any optimizer."""
        found = {}

        class Keep(torch.optim.SGD):
            def step(self):
                found.update({name: parameter.grad.clone() for name, parameter in trained.items()})

        site.config = config.with_values(
            train={"batch_size": batch_size, "accumulate": accumulate, "max_grad_norm": 1e9}
        )
        with recomputed(site.model.base.model.train(), checkpointing):
            site.steps(1, [(site.client.train, ())], Keep(trained.values(), 0.0), trained, Held(0.0, {}, {}), Told())
        return found

    whole = gradients(6, 1)
    assert any(gradient.abs().max() > 0.01 for gradient in whole.values())
    for sizes in ((3, 2, True), (4, 2, False), (1, 6, False)):
        parts = gradients(*sizes)
        for name, gradient in whole.items():
            torch.testing.assert_close(parts[name], gradient, rtol=0, atol=1e-6 * max(1.0, float(gradient.abs().max())))


def test_a_step_takes_as_many_examples_as_all_its_batches(world, tmp_path):
    one = turn(world, "fedavg", tmp_path, batch_size=3, steps=2)
    again = turn(world, "fedavg", tmp_path, batch_size=3, steps=2, accumulate=1)
    assert all(torch.equal(one[0][name], again[0][name]) for name in one[0])
    scaffold = turn(world, "scaffold", tmp_path, batch_size=2, steps=2, accumulate=2)
    prox = turn(world, "fedprox", tmp_path, batch_size=2, steps=2, accumulate=2)
    large = turn(world, "fedprox", tmp_path, batch_size=4, steps=2)
    assert scaffold[1] == pytest.approx(large[1], rel=1e-4)
    assert all(torch.allclose(prox[0][name], large[0][name], rtol=1e-3, atol=3e-5) for name in large[0])
