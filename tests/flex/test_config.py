"""Configurations: what a file or `--set` may say, and what a wrong one is told."""

import dataclasses
import math
from pathlib import Path

import pytest

from flex.config import METHODS, RunConfig, read_config, to_toml, write_config
from flex.errors import FlexError
from flex.methods import CRITERIA

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_written_configuration_reads_back_the_same(tmp_path):
    config = RunConfig(output="somewhere").with_values(train={"seeds": (0, 3)}, data={"train": 'a "quoted" name.jsonl'})
    write_config(config, tmp_path / "config.toml")
    assert read_config(tmp_path / "config.toml") == config


@pytest.mark.parametrize(
    "name", ["😀 東京", "a\x7fb\x00\x1f\t\n\r\n", 'back\\slash "quoted"', "\ufeff\u2028\U0010ffff", "[red]"]
)
def test_every_text_reads_back_the_same(tmp_path, name):
    config = RunConfig(output=name).with_values(data={"clients": (name, "b"), "train": name}, model={"path": name})
    write_config(config, tmp_path / "config.toml")
    assert read_config(tmp_path / "config.toml") == config
    assert read_config(None, [f"output={to_toml(name)}"]).output == name


def test_overrides_win_over_the_file_and_widen_numbers(tmp_path):
    (tmp_path / "c.toml").write_text("[train]\nrounds = 5\n[lora]\nalpha = 16\n")
    config = read_config(tmp_path / "c.toml", ["train.rounds=7", "data.clients=['a', 'b']", "model.path=my/model"])
    assert (config.train.rounds, config.lora.alpha) == (7, 16.0)
    assert config.data.clients == ("a", "b")
    assert config.model.path == "my/model"
    assert read_config(None, ["train.seeds=4"]).train.seeds == (4,)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[train]\nround = 5\n", "train.round is no setting of a run; did you mean train.rounds?"),
        ("[train]\nrounds = 'x'\n", "train.rounds is 'x', a str; expected an int"),
        ("output = 2024-11-26\n", "output is datetime.date(2024, 11, 26), a date; expected a str"),
        ("output = 7\n", "output is 7, an int; expected a str"),
        ("output = ''\n", "output is empty; expected the folder of the run"),
        ("[train]\nrounds = 0\n", "train.rounds is 0; expected 1 or more"),
        ("[train]\nweight_decay = -0.1\n", "train.weight_decay is -0.1; expected 0 or more"),
        ("[train]\nfinal_learning_rate = -1e-6\n", "train.final_learning_rate is -1e-06; expected 0 or more"),
        ("[train]\nproximal_mu = -1\n", "strategy.proximal_mu is -1.0; expected 0 or more"),
        ("[train]\nclients_per_round = -1\n", "train.clients_per_round is -1; expected 0 (all) or more"),
        ("[train]\nseeds = [1, 0, 1]\n", "train.seeds names 1 twice; expected each once"),
        ("[train]\nmethods = ['flex', 'flex']\n", "train.methods names 'flex' twice; expected each once"),
        ("[data]\nclients = ['a', 'a']\n", "data.clients names 'a' twice; expected each once"),
        ("[data]\nclients_by = ''\n", "data.clients_by is empty; expected the column"),
        ("[data]\nmax_test = -1\n", "data.max_test is -1; expected 0 (all) or more"),
        ("[lora]\nrank = 0\n", "lora.rank is 0; expected 1 or more"),
        ("[lora]\nalpha = 0\n", "lora.alpha is 0.0; expected a number above 0"),
        ("[evaluate]\nmax_new_tokens = 0\n", "evaluate.max_new_tokens is 0; expected 1 or more"),
        ("[evaluate]\nbatch_size = 0\n", "evaluate.batch_size is 0; expected 1 or more"),
        ("[train]\nmethods = ['flux']\n", "train.methods names ['flux']"),
        ("[graft]\ncombine = 'sum'\n", "graft.combine is 'sum'; expected one of additive, convex"),
        (
            "[graft]\ncriterion = 'best'\n",
            "graft.criterion is 'best'; expected one of reconstruction, scaled",
        ),
        ("[graft]\ntarget = 'F'\n", "graft.target is 'F'; expected one of output, correction"),
        ("[graft]\nexperts = 4\n", "graft.experts is 4; expected 1, 2 or 3"),
        (
            "[graft]\nexperts = 2\n",
            "graft.experts is 2, which the criterion 'neurons' has no use for; expected 1, or graft.criterion = one of "
            "renormalized, scaled_subset, random, fresh, zero",
        ),
        (
            "[graft]\ncriterion = 'scaled'\nwidth = 9\n",
            "graft.width is 9, which the criterion 'scaled' has no use for; expected 0, or graft.criterion = one of "
            "neurons, fresh, zero",
        ),
        (
            "[graft]\ncriterion = 'scaled'\ncandidates = 9\n",
            "graft.candidates is 9, which the criterion 'scaled' has no use for; expected 0, or graft.criterion = one "
            "of neurons",
        ),
        ("[graft]\nwidth = 9\ncandidates = 8\n", "graft.candidates is 8; expected at least the width, 9"),
        ("[graft]\ncriterion = 'neurons'\nwidth = -1\n", "graft.width is -1; expected 0 or more"),
        (
            "[graft]\ncriterion = 'neurons'\nwidth = 9\ncandidates = 8\n",
            "graft.candidates is 8; expected at least the width, 9",
        ),
        (
            "[graft]\ncriterion = 'fresh'\n",
            "graft.refit is true (its default), but 'fresh' starts from nothing that could be fitted; "
            "expected graft.refit = false",
        ),
        (
            "[graft]\ncriterion = 'zero'\nrefit = false\ngate = 'router'\n",
            "graft.gate is 'router', but 'zero' grafts no expert",
        ),
        ("[graft]\nafter_rounds = -1\n", "graft.after_rounds is -1; expected 0 or more"),
        ("[graft]\nridge = 0\n", "graft.ridge is 0.0; expected a number above 0"),
        ("[graft]\ntraining = 'lora'\nrank = 0\n", "graft.rank is 0; expected 1 or more"),
        ("train = 3\n", "train is 3; expected a table [train]"),
        ("[train\n", "is not a TOML file"),
    ],
)
def test_a_wrong_configuration_gets_one_sentence(tmp_path, text, sentence):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(FlexError) as caught:
        read_config(tmp_path / "c.toml")
    assert sentence in str(caught.value)
    assert "\n" not in sentence


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
    "key",
    [
        f"{section.name}.{key.name}"
        for section in dataclasses.fields(RunConfig)
        if dataclasses.is_dataclass(section.type)
        for key in dataclasses.fields(section.type)
        if key.type is float
    ],
)
def test_no_setting_takes_what_is_not_finite(key, value):
    with pytest.raises(FlexError, match=rf"^{key} is -?(inf|nan); expected "):
        read_config(None, [f"{key}={value}"])


def test_bytes_that_are_no_text_are_refused_before_anything_is_written():
    with pytest.raises(FlexError, match=r"output is 'runs/\\udcff', with bytes that are no text; expected UTF-8"):
        read_config(None, ["output=runs/\udcff"])


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FlexError, match=r"no configuration at .*nowhere\.toml"):
        read_config(tmp_path / "nowhere.toml")


def test_methods_share_what_they_say():
    assert METHODS["local"].lora == "personal"
    grafted = [m for m, v in METHODS.items() if v.private == "graft"]
    assert grafted == ["flex", "flex-paper", "flex-random", "flex-fresh", "fedrep", "shared-graft"]
    assert METHODS["flex"].start not in CRITERIA  # flex has no criterion of its own
    assert all(METHODS[m].start in CRITERIA for m in grafted if m not in ("flex", "fedrep"))


def test_what_won_the_study_is_the_default_and_the_papers_rule_stands_beside_it():
    graft = RunConfig().graft
    assert (graft.criterion, graft.target, graft.gate) == ("neurons", "correction", "zeros")
    assert (graft.refit, graft.ridge, graft.refit_scale) == (True, 1.0, 0.1)
    methods = ("base", "local", "fedavg", "flex", "flex-paper", "flex-random", "flex-fresh")
    assert RunConfig().train.methods == methods


def test_in_the_papers_setting_flex_is_the_papers_rule():
    config = read_config(CONFIGS / "paper.toml")
    assert config.graft.of(METHODS["flex"]) == config.graft
    assert config.graft.of(METHODS["flex-paper"]) == config.graft
    assert (config.graft.criterion, config.graft.target, config.graft.refit) == ("reconstruction", "output", False)
    assert config.train.methods == ("base", "local", "fedavg", "flex", "flex-random", "flex-fresh")
