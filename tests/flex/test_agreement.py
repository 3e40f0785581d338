"""Who may take part: what must be the same at all sites, what is each one's own, and who is named where it differs."""

import dataclasses

import pytest
from tiny import tiny_config

from flex.config import RunConfig
from flex.errors import FlexError
from flex.federation.agreement import SITE_OWN, check_sites, flat, settings_digest, versions
from flex.federation.messages import SiteAbout

CONFIG = RunConfig()


def site(name: str, **changes: object) -> SiteAbout:
    told = SiteAbout(name, "base-1", 10, 5, {}, settings=settings_digest(CONFIG), versions=versions())
    return dataclasses.replace(told, **changes)


def test_alike_may_take_part():
    check_sites([site("a"), site("b", data="other", num_train=3)], CONFIG)


@pytest.mark.parametrize(
    ("odd", "sentence"),
    [
        ({"fingerprint": "base-2"}, r"differ in base \('a', 'c' has base-1; 'b' has base-2\); expected the same base"),
        ({"versions": {**versions(), "torch": "1.0"}}, r"differ in torch \('a', 'c' has [\d.]+; 'b' has 1.0\)"),
        ({"versions": {}}, r"differ in flex-moe .* 'b' has unknown"),
        ({"settings": "abc"}, r"'b' has other settings \(abc\) than this run \(\w{16}\); expected the configuration"),
        ({"settings": ""}, r"'b' has other settings \(none\)"),
    ],
)
def test_who_differs_is_named(odd, sentence):
    with pytest.raises(FlexError, match=sentence):
        check_sites([site("a"), site("b", **odd), site("c")], CONFIG)


def test_the_digest_is_of_what_all_share():
    own = {"model.path": "there", "model.device": "cpu", "data.train": "x.jsonl", "threads": 7}
    own |= {"train.gradient_checkpointing": True, "evaluate.batch_size": 3, "data.test": "y", "data.general": "z"}
    own |= {"data.columns": {"instruction": "question"}}
    own |= {"evaluate.mmlu": "m", "evaluate.gsm8k": "g", "evaluate.text": "t"}
    # In place of data.train and data.test; and where the anchors lie, see below.
    assert own.keys() == SITE_OWN - {"data.files", "data.test_files", "anchor.text"}
    for key, value in own.items():
        section, _, name = key.rpartition(".")
        values = {section: {name: value}} if section else {}
        other = CONFIG.with_values(**values) if section else dataclasses.replace(CONFIG, threads=value)
        assert flat(other)[key] != flat(CONFIG)[key]
        assert settings_digest(other) == settings_digest(CONFIG), key
    held, moved = (CONFIG.with_values(anchor={"text": text}) for text in ("x.txt", "y.txt"))
    assert settings_digest(held) == settings_digest(moved)
    shared = [
        ("anchor", {"text": "x.txt"}),  # whether there are any is everybody's
        ("lora", {"rank": 3}),
        ("train", {"learning_rate": 1.0}),
        ("train", {"rounds": 3}),
        ("graft", {"gate": "router"}),
    ]
    shared += [("strategy", {"name": "fedprox", "proximal_mu": 0.1}), ("evaluate", {"every": 1})]
    digests = {settings_digest(CONFIG.with_values(**{section: values})) for section, values in shared}
    assert len(digests | {settings_digest(CONFIG)}) == len(shared) + 1


def test_a_default_that_is_written_out_is_no_other_setting():
    prox = CONFIG.with_values(strategy={"name": "fedprox"})
    assert settings_digest(prox) == settings_digest(prox.with_values(strategy={"proximal_mu": 0.01}))


def test_mu_and_scoring_are_read_in_the_own_configuration(tmp_path):
    config = tiny_config(tmp_path, strategy={"name": "fedprox"}, train={"rounds": 5}, evaluate={"every": 2})
    assert config.strategy.mu("fedavg") == 0.01
    assert config.with_values(strategy={"proximal_mu": 0.5}).strategy.mu("fedavg") == 0.5
    assert CONFIG.strategy.mu("fedavg") == 0.0
    assert [index for index in range(1, 6) if config.scores_after(index)] == [2, 4, 5]
    assert [index for index in range(1, 6) if config.with_values(evaluate={"every": 0}).scores_after(index)] == [5]
