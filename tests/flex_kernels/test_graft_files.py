"""Grafts as files: what is saved comes back to the bit, through peft and Trainer, and only where it fits."""

import json

import peft
import pytest
import torch
from tiny import save_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import flex_kernels
from flex_kernels.graft_files import DESCRIPTION, TENSORS
from flex_kernels.layer import FROZEN, NOT_STARTED, TRAINED

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft 0.21 asks transformers 5.23 for an old name


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("base") / "model")


def model_of(base, lora=False, **graft):
    """A fresh model; with LoRA, and with a started graft where `graft` says anything of one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).requires_grad_(False)
    if lora:
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    if graft:
        fill(flex_kernels.attach_graft(model, **graft))
    return model


def fill(grafts):
    torch.manual_seed(1)
    for graft in grafts.values():
        for name, parameter in graft.named_parameters():
            torch.nn.init.normal_(parameter, std=0.1 if "bias" not in name else 1.0)


def logits(model):
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize(
    "graft",
    [
        {"width": None},
        {"width": 5, "combine": "convex"},
        {"width": 7, "rank": 2, "alpha": 3.0},
        {"width": 6, "layers": [1]},
        {"width": [3, 9], "dtype": torch.bfloat16},
    ],
    ids=["full", "convex", "lora", "one layer", "two widths"],
)
def test_grafts_come_back_to_the_bit(base, tmp_path, graft):
    model = model_of(base, **graft)
    assert flex_kernels.save_grafts(model, tmp_path / "a" / "b") == tmp_path / "a" / "b"
    bare = model_of(base)
    found = flex_kernels.load_grafts(bare, tmp_path / "a" / "b")
    assert len(found) == len(graft.get("layers", (0, 1)))
    assert torch.equal(logits(bare), logits(model))
    carrying = model_of(base, **graft)
    for own in (m.graft for m in flex_kernels.moe_layers(carrying).values() if getattr(m, "graft", None) is not None):
        torch.nn.init.zeros_(own.down_proj)
    flex_kernels.load_grafts(carrying, tmp_path / "a" / "b")
    assert torch.equal(logits(carrying), logits(model))
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == sorted([TENSORS, DESCRIPTION])


def test_grafts_come_back_through_peft_and_beside_its_adapter(base, tmp_path):
    model = model_of(base, lora=True, width=5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    flex_kernels.save_grafts(model, tmp_path)
    again = peft.PeftModel.from_pretrained(model_of(base), tmp_path)
    flex_kernels.load_grafts(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    merged = peft.PeftModel.from_pretrained(model_of(base), tmp_path).merge_and_unload()
    flex_kernels.load_grafts(merged, tmp_path)
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"width": 5, "combine": "convex"}, "has combine 'additive' in the file, expected 'convex'"),
        ({"width": 6}, "has width 5 in the file, expected 6"),
        ({"width": 5, "rank": 2}, "has training 'full' in the file, expected 'lora'"),
    ],
)
def test_a_graft_of_another_kind_is_refused_and_nothing_is_loaded(base, tmp_path, other, sentence):
    flex_kernels.save_grafts(model_of(base, width=5), tmp_path)
    carrying = model_of(base, **other)
    before = logits(carrying)
    with pytest.raises(ValueError, match=sentence):
        flex_kernels.load_grafts(carrying, tmp_path)
    assert torch.equal(logits(carrying), before)


def test_another_model_and_broken_files_are_named(base, tmp_path):
    with pytest.raises(ValueError, match="carries no graft, expected attach_graft before"):
        flex_kernels.save_grafts(model_of(base), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no grafts.json in"):
        flex_kernels.load_grafts(model_of(base), tmp_path)
    flex_kernels.save_grafts(model_of(base, width=5), tmp_path / "g")
    for changes, sentence in (
        ({"hidden_size": 16}, "has hidden_size 32 in the file, expected 16"),
        ({"num_hidden_layers": 3}, "is of a model with 2 MoE layers, this one has 3"),
        ({"hidden_act": "gelu"}, "has activation 'silu' in the file, expected 'gelu'"),
    ):
        other = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "other", **changes))
        with pytest.raises(ValueError, match=sentence):
            flex_kernels.load_grafts(other, tmp_path / "g")
    description = tmp_path / "g" / DESCRIPTION
    whole = json.loads(description.read_text())
    for content, sentence in (
        ("{", "holds no grafts that can be read"),
        (json.dumps({**whole, "format": 2}), "it has format 2, this version reads 1"),
        (json.dumps({**whole, "grafts": [{"layer": 0}]}), "it lacks 'hidden_size'"),
    ):
        description.write_text(content)
        with pytest.raises(ValueError, match=sentence):
            flex_kernels.load_grafts(model_of(base), tmp_path / "g")
    description.write_text(json.dumps(whole))
    (tmp_path / "g" / TENSORS).write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match="holds no grafts that can be read"):
        flex_kernels.load_grafts(model_of(base), tmp_path / "g")


def test_a_graft_that_peft_froze_trains_again(base):
    grafts = flex_kernels.attach_graft(model := model_of(base), 5, rank=None)
    first = next(iter(grafts.values()))
    assert first.status == NOT_STARTED
    fill(grafts)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert first.status == FROZEN
    assert flex_kernels.train_grafts(model) == sum(p.numel() for graft in grafts.values() for p in graft.parameters())
    assert first.status == TRAINED
    low_rank = model_of(base, width=5, rank=2)
    low_rank.requires_grad_(False)
    flex_kernels.train_grafts(low_rank)
    trained = {name.rpartition(".")[2] for name, p in low_rank.named_parameters() if p.requires_grad}
    assert "gate_up_proj" not in trained
    assert {"gate_up_lora_a", "logit_weight", "logit_bias"} <= trained


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, index):
        ids = (torch.arange(10) * (index + 3)) % 50
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def trainer_of(base, folder, steps):
    model = model_of(base, lora=True, width=5)
    settings = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, save_steps=3, learning_rate=1e-2, report_to=[],
        use_cpu=True, disable_tqdm=True, logging_strategy="no", lr_scheduler_type="constant", seed=3,
    )  # fmt: skip
    trainer = Trainer(model=model, args=settings, train_dataset=Rows())
    trainer.add_callback(flex_kernels.graft_callback())
    return trainer


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "graft" in name or "lora_" in name}


@pytest.mark.filterwarnings("ignore")  # Trainer's own, of every version
def test_a_resumed_training_is_the_unbroken_one(base, tmp_path):
    whole = trainer_of(base, tmp_path / "whole", 6)
    before = trained(whole.model)
    whole.train()
    first = trainer_of(base, tmp_path / "broken", 3)
    first.train()
    resumed = trainer_of(base, tmp_path / "broken", 6)
    resumed.train(resume_from_checkpoint=True)
    ours, theirs = trained(resumed.model), trained(whole.model)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    changed = [name for name in before if "graft" in name and not torch.equal(before[name], theirs[name])]
    assert len(changed) == 8  # four parameters in each of two layers
    for folder in ("checkpoint-3", "checkpoint-6", "."):
        assert (tmp_path / "broken" / folder / TENSORS).exists()
    (tmp_path / "broken" / "checkpoint-6" / DESCRIPTION).unlink()
    with pytest.raises(FileNotFoundError, match=r"no grafts in the checkpoint .*checkpoint-6"):
        trainer_of(base, tmp_path / "broken", 9).train(resume_from_checkpoint=True)


def test_weights_that_zero_3_keeps_in_parts_are_refused(base):
    model = model_of(base)
    for experts in flex_kernels.moe_layers(model).values():
        experts.down_proj = torch.nn.Parameter(torch.empty(0), requires_grad=False)
        experts.down_proj.ds_id = 1
    with pytest.raises(ValueError, match=r"ZeRO-3 keeps these weights in parts.*expected ZeRO-2, DDP or FSDP2"):
        flex_kernels.attach_graft(model)
