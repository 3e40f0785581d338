"""What a client's update knows alone, as a run measures it, against the same question asked from its files."""

import dataclasses

import pytest
import torch
from rich.console import Console
from tiny import read_log, save_data, save_model, tiny_config

from flex.evaluation.score import score
from flex.federation.checkpoint import load_server
from flex.methods import METHODS
from flex.model.adapters import pretrained_only, unwrap, wrap
from flex.model.partition import load_into, partition
from flex.report import write_report
from flex.runs.run import run
from flex.runs.world import load_world

# What these share is one LoRA, whole.
SHARING = [
    name
    for name, method in METHODS.items()
    if (method.lora, method.keeps, method.module_role, method.strategy) == ("shared", "", "personal", "")
    and method.trains
    and not method.last_phases
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given-away")
    save_model(folder / "model")
    save_data(folder / "data", "a")
    methods = ("base", "local", *SHARING, "shared-graft", "fedsa")
    config = tiny_config(folder, train={"methods": methods}, evaluate={"rouge": False, "every": 1})
    run(config, Console(quiet=True))
    return folder, config


def scored(folder, method, when):
    events = read_log(folder / "run" / "metrics.jsonl")
    return [e for e in events if e["event"] == "evaluate" and e["method"] == method and e["when"] == when]


@pytest.mark.parametrize("method", SHARING)
def test_it_is_the_base_with_the_shared_lora_alone(method, finished):
    """With one client the aggregated state is its update."""
    folder, config = finished
    world = load_world(config, 0)
    (client,) = world.clients
    with pretrained_only(world.base):
        base = score(world.base.model, world.encoder, client.test, config.evaluate)
    wrap(world.base, METHODS["fedavg"], config.lora, config.graft, 0)
    _, shared, _, _ = load_server(folder / "run" / f"{method}-seed0" / "server" / "round-0002.safetensors")
    load_into(partition(world.base.model).shared, {n: torch.from_numpy(a) for n, a in shared.items()}, "the update")
    alone = score(world.base.model, world.encoder, client.test, config.evaluate)
    unwrap(world.base)
    for when, wanted in (("update_alone", alone), ("base_alone", base)):
        (event,) = scored(folder, method, when)  # of the last round alone
        assert (event["round"], event["split"], event["rouge_l"]) == (2, "test", None)
        assert event["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
        assert event["groups"].keys() == wanted["groups"].keys()
    assert alone["loss"] != pytest.approx(base["loss"], rel=1e-3)


def test_a_shared_module_is_part_of_the_update_and_a_kept_matrix_is_not(finished):
    def losses(method):
        return [scored(finished[0], method, when)[0]["loss"] for when in ("update_alone", "base_alone")]

    alone, base = losses("shared-graft")
    (with_lora,) = scored(finished[0], "fedavg", "update_alone")
    assert alone != pytest.approx(base, rel=1e-4)
    assert alone != pytest.approx(with_lora["loss"], rel=1e-4)
    alone, base = losses("fedsa")  # A leaves, B stays: without B nothing is added
    assert alone == pytest.approx(base, rel=1e-6)


def test_nothing_is_asked_where_nothing_is_sent(finished):
    for method in ("base", "local"):
        assert scored(finished[0], method, "update_alone") == []


def test_asking_changes_no_number_of_the_run(finished, tmp_path, monkeypatch):
    folder, config = finished
    monkeypatch.setattr("flex.federation.client.Site.given_away", lambda site, round_index: [])
    other = dataclasses.replace(config, output=str(tmp_path / "run"))
    run(other.with_values(train={"methods": ("flex-private-lora",)}), Console(quiet=True))
    for when in ("before_aggregation", "after_aggregation"):
        losses = [[e["loss"] for e in scored(f, "flex-private-lora", when)] for f in (folder, tmp_path)]
        assert losses[0] == losses[1] != []


def test_the_report_shows_it(finished):
    text = write_report(finished[0] / "run").read_text()
    section = text[text.index("What an update alone knows") :].partition("</section>")[0]
    assert section.count("update alone</td>") == len(SHARING) + 2
    assert section.count("the base as it came") == 1
    assert "test EM" in section
    assert "ROUGE" not in section
