"""Every preset runs on a small base: the model is another one, the data are small, the rounds few; all else stays."""

from pathlib import Path

import pytest
from tiny import read_log, save_model, write_records

from flex.cli import main
from flex.config import read_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PRESETS = sorted(path.name for path in CONFIGS.glob("paper*.toml"))
CATEGORIES = ("closed_qa", "information_extraction", "classification", "summarization")
SHORT = ["--rounds", "1", "--set", "train.steps=1", "--set", "evaluate.rouge=false", "--set", "threads=1"]
SHORT += ["--set", "graft.calibration_sequences=4"]


def records(first: int, count: int) -> list[dict]:
    """So many of each category, in the words of the demo's language."""
    texts = [(f"which is larger , {i} or {i + 3} ?", f"{i + 3} kg") for i in range(first, first + count)]
    return [{"category": c, "instruction": f"{c} : {q}", "response": a} for c in CATEGORIES for q, a in texts]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"), max_position_embeddings=512)


def test_there_is_a_preset_for_each_setting_and_model():
    named = {
        f"paper-{setting}-{model}.toml"
        for setting in ("pathological", "dirichlet", "domains")
        for model in ("qwen", "deepseek")
    }
    assert {*named, "paper.toml"} == set(PRESETS)
    for name in PRESETS:
        train = read_config(CONFIGS / name, []).train if "domains" not in name else None
        if train:
            assert (train.rounds, train.steps, train.batch_size, train.learning_rate) == (100, 5, 4, 4e-5)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_runs_on_another_model(name, base, tmp_path, capsys):
    train = write_records(tmp_path / "train.jsonl", records(0, 30))
    test = write_records(tmp_path / "test.jsonl", records(40, 20))
    data = ["--data", str(train), "--test", str(test)]
    if "domains" in name:
        data = ["--data", f"law={train}", f"medicine={test}"]
    words = ["train", str(CONFIGS / name), "--model", str(base), *data, "--output", str(tmp_path / "run"), *SHORT]
    assert main([*words, "--methods", "fedavg", "flex"]) == 0, capsys.readouterr().err
    trained = {e["client_id"] for e in read_log(tmp_path / "run" / "metrics.jsonl") if e["event"] == "train"}
    assert len(trained) == (10 if "dirichlet" in name else 2 if "domains" in name else 4)
