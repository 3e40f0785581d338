"""A learning rate for every method: chosen on training records alone, kept, used, reported."""

import json
from pathlib import Path

import pytest
from rich.console import Console
from tiny import read_log, tiny_config

from flex.commands.train import report_on
from flex.config import RunConfig, read_config
from flex.data.clients import read_clients
from flex.errors import FlexError
from flex.runs.run import run
from flex.runs.tune import tune

QUIET = Console(quiet=True)
METHODS = ("base", "fedavg", "local")


def configured(folder: Path, **train: object) -> RunConfig:
    config = tiny_config(folder, train={"methods": METHODS, "rounds": 2, "steps": 2, **train})
    return config.with_values(evaluate={"rouge": False}, data={"general": "", "validation_fraction": 0.3})


def test_each_method_gets_the_rate_of_the_lowest_validation_loss(tmp_path):
    config = configured(tmp_path, tune_factors=(0.01, 3.0, 1e-4))
    tuned = tune(config, QUIET)
    losses = json.loads((tmp_path / "run" / "tuned.json").read_text())
    assert losses.keys() == {"fedavg", "local"}
    for method, found in losses.items():
        assert found.keys() == {"0.01", "3", "0.0001"}
        assert tuned.train.rates[method] == float(min(found, key=lambda name: found[name]["loss"])) == 3.0
    text = report_on(run(tuned, QUIET)) or (tmp_path / "run" / "report.html").read_text()
    assert "3 times the configured rate, by the validation loss" in text
    started = [
        e for e in read_log(tmp_path / "run" / "metrics.jsonl") if e["event"] == "job" and e["method"] == "fedavg"
    ]
    assert started[0]["learning_rates"]["learning_rate"] == pytest.approx(3 * config.train.learning_rate)
    assert read_config(tmp_path / "run" / "config.toml").train.rates == {"fedavg": 3.0, "local": 3.0}

    again = tune(config.with_values(train={"tune_factors": (7.0,)}), QUIET)  # what is chosen stays
    assert again.train.rates == tuned.train.rates
    other = config.with_values(train={"rates": {"fedavg": 1.0}, "rounds": 3})
    with pytest.raises(FlexError, match=r"belongs to rate 3\.0; this run has rate 1\.0|holds a run"):
        run(other, QUIET)


def test_the_servers_step_is_tried_where_the_strategy_has_one(tmp_path):
    config = configured(tmp_path, methods=("fedavg", "fedadam"), tune_factors=(1.0, 3.0), tune_etas=(1e-3, 1e-2))
    tuned = tune(config, QUIET)
    losses = json.loads((tmp_path / "run" / "tuned.json").read_text())
    assert losses["fedavg"].keys() == {"1", "3"}
    assert losses["fedadam"].keys() == {"1-eta0.001", "1-eta0.01", "3-eta0.001", "3-eta0.01"}
    assert len({score["loss"] for score in losses["fedadam"].values()}) == 4
    rate, _, eta = min(losses["fedadam"], key=lambda name: losses["fedadam"][name]["loss"]).partition("-eta")
    assert (tuned.train.rates["fedadam"], tuned.strategy.etas) == (float(rate), {"fedadam": float(eta)})
    assert tuned.strategy.of("fedadam") == ("fedadam", {"eta": float(eta)})
    assert tuned.strategy.of("fedavg") == ("fedavg", {})
    text = report_on(run(tuned, QUIET)) or (tmp_path / "run" / "report.html").read_text()
    assert f"times the configured rate, a step of {float(eta):.3g} on the server, by the validation loss" in text
    assert read_config(tmp_path / "run" / "config.toml").strategy.etas == tuned.strategy.etas
    other = {"fedadam": 0.5}
    with pytest.raises(FlexError, match=rf"belongs to eta {eta}; this run has eta 0\.5|holds a run"):
        run(tuned.with_values(strategy={"etas": other}, train={"rounds": 3}), QUIET)


def test_the_score_that_chooses_is_the_one_that_was_asked_for(tmp_path):
    config = configured(tmp_path, methods=("fedavg", "local"))
    worse_loss = {"0.3": {"loss": 1.0, "exact_match": 0.25}, "1": {"loss": 2.0, "exact_match": 0.5}}
    alike = {"1": {"loss": 2.0, "exact_match": 0.5}, "3": {"loss": 1.5, "exact_match": 0.5}}
    kept = tmp_path / "run" / "tuned.json"
    kept.parent.mkdir()
    kept.write_text(json.dumps({"fedavg": worse_loss, "local": alike}))
    assert tune(config, QUIET).train.rates == {"fedavg": 0.3, "local": 3.0}
    by_match = config.with_values(train={"tune_by": "exact_match"})
    assert tune(by_match, QUIET).train.rates == {"fedavg": 1.0, "local": 3.0}
    kept.write_text(json.dumps({"fedavg": {"0.3": 1.0, "1": 2.0}, "local": alike}))  # as an earlier version kept it
    again = tune(by_match.with_values(train={"tune_factors": (1.0,), "rounds": 1}), QUIET)
    assert again.train.rates == {"fedavg": 1.0, "local": 3.0}
    assert json.loads(kept.read_text())["fedavg"]["1"].keys() == {"loss", "exact_match"}
    kept.write_text("[1]")
    with pytest.raises(FlexError, match=r"tuned\.json cannot be read"):
        tune(config, QUIET)


def test_no_test_record_is_read(tmp_path):
    config = configured(tmp_path).data
    config = RunConfig(data=config).with_values(data={"scored": "validation"}).data
    trained = {r["instruction"] for r in (json.loads(line) for line in Path(config.train).read_text().splitlines())}
    for client in read_clients(config):
        assert len(client.train) + len(client.test) == 10
        assert {r["instruction"] for r in (*client.train, *client.test)} <= trained
    plain = RunConfig(data=config).with_values(data={"scored": "test"}).data
    validation = {c.client_id: c.validation for c in read_clients(plain)}
    assert {c.client_id: c.test for c in read_clients(config)} == validation


def test_a_rate_that_diverges_is_no_choice(tmp_path):
    config = configured(tmp_path, methods=("fedavg",), tune_factors=(1.0, 1e30))
    config = config.with_values(train={"max_grad_norm": 1e30})
    assert tune(config, QUIET).train.rates == {"fedavg": 1.0}
    other = config.with_values(train={"tune_factors": (1e30,)})
    other = RunConfig(**{**vars(other), "output": str(tmp_path / "other")})
    with pytest.raises(FlexError, match="fedavg has no finite validation loss with any"):
        tune(other, QUIET)


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(FlexError, match=r"train\.rates names 'nobody'"):
        RunConfig().with_values(train={"rates": {"nobody": 1.0}})
    with pytest.raises(FlexError, match=r"train\.rates\.fedavg is -1\.0; expected a number above 0"):
        RunConfig().with_values(train={"rates": {"fedavg": -1.0}})
    with pytest.raises(FlexError, match=r"train.tune_factors names \[0.0\]"):
        RunConfig().with_values(train={"tune_factors": (0.0, 1.0)})
    with pytest.raises(FlexError, match=r"train.tune_etas names \[inf\]"):
        RunConfig().with_values(train={"tune_etas": (0.1, float("inf"))})
    with pytest.raises(FlexError, match=r"strategy\.etas names 'fedavg', which fedavg averages without a step of the"):
        RunConfig().with_values(strategy={"etas": {"fedavg": 0.1}})
    with pytest.raises(FlexError, match=r"strategy\.etas\.fedadam is 0; expected a number above 0"):
        RunConfig().with_values(strategy={"etas": {"fedadam": 0}})
    with pytest.raises(FlexError, match=r"data\.validation_fraction is 0"):
        RunConfig().with_values(data={"scored": "validation"})
