"""Grafts that are saved, come back, resume, and say so when they would be lost or would not train."""

import copy
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import flex_kernels
from flex_kernels.graft_watch import graft_state

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
# peft 0.21 asks transformers 5.23 for a name that is deprecated there; inductor imports what torch deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
]


def tiny(family: str = "olmoe") -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)).eval()
    return OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=4)).eval()


def grafted(model: nn.Module, **options: Any) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for graft in flex_kernels.attach_graft(model, **{"width": 6, "logit_bias": 0.5} | options).values():
        for parameter in graft.parameters():
            nn.init.normal_(parameter, std=0.2, generator=generator)
    return model


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(input_ids=ids).logits


def tensors(model: nn.Module) -> list[dict[str, Tensor]]:
    """The state of every graft, in layer order, whatever its module is called."""
    experts = flex_kernels.moe_layers(model).values()
    return [copy.deepcopy(dict(module.graft.state_dict())) for module in experts if hasattr(module, "graft")]


def assert_same(ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [{}, {"combine": "convex"}, {"rank": 2, "alpha": 3.0}, {"layers": [1]}, {"dtype": torch.float64}],
    ids=["additive", "convex", "lora", "one layer", "fp64"],
)
@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_a_model_without_grafts_gets_what_was_saved(family: str, options: dict, tmp_path: Path) -> None:
    model = grafted(tiny(family), **options)
    flex_kernels.save_grafts(model, tmp_path)
    other = tiny(family)
    other.set_experts_implementation("eager")
    loaded = flex_kernels.load_grafts(other, tmp_path)
    assert list(loaded) == [f"model.layers.{i}.mlp.experts" for i in options.get("layers", [0, 1])]
    assert_same(tensors(other), tensors(model))
    assert torch.equal(logits(other), logits(model))
    assert not torch.equal(logits(model), logits(tiny(family)))
    for ours, theirs in zip(loaded.values(), flex_kernels.train_grafts(model).values(), strict=True):
        assert repr(ours) == repr(theirs)
        assert [p.requires_grad for p in ours.parameters()] == [p.requires_grad for p in theirs.parameters()]


def test_the_folder_has_the_tensors_and_a_description_to_read(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_text("not ours")
    flex_kernels.save_grafts(grafted(tiny(), combine="convex", rank=2, alpha=3.0), tmp_path)
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"adapter_model.safetensors", "grafts.safetensors", "grafts.json"}
    described = json.loads((tmp_path / "grafts.json").read_text())
    assert described["format"] == 1
    assert described["layers"][1] == {
        "name": "model.layers.1.mlp.experts",
        "hidden_size": 16,
        "width": 6,
        "combine": "convex",
        "activation": "silu",
        "training": "lora",
        "rank": 2,
        "alpha": 3.0,
        "dtype": "float32",
        "gate_bias": True,
    }


def test_another_activation_than_the_layers_own_is_kept(tmp_path: Path) -> None:
    model = grafted(tiny())
    for graft in flex_kernels.train_grafts(model).values():
        graft.activation = "gelu"
    flex_kernels.save_grafts(model, tmp_path)
    other = tiny()
    assert {graft.activation for graft in flex_kernels.load_grafts(other, tmp_path).values()} == {"gelu"}
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts: .* has activation 'gelu', expected 'silu'"):
        flex_kernels.load_grafts(grafted(tiny()), tmp_path)


@pytest.mark.parametrize(
    ("saved", "there", "sentence"),
    [
        ({}, {"combine": "convex"}, "has combine 'additive', expected 'convex'"),
        ({}, {"width": 7}, "has width 6, expected 7"),
        ({}, {"rank": 2}, "has training 'full', expected 'lora'"),
        ({"rank": 3}, {"rank": 2, "alpha": 6.0}, "has rank 3, expected 2"),
        ({"rank": 2}, {"rank": 2, "alpha": 6.0}, "has alpha 4.0, expected 6.0"),
        ({"layers": [0]}, {}, r"layers\.1\.mlp\.experts carries a graft, but .*grafts\.safetensors has none for it"),
        ({}, {"layers": [0]}, r"layers\.1\.mlp\.experts carries no graft, but other layers do"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(
    saved: dict, there: dict, sentence: str, tmp_path: Path
) -> None:
    flex_kernels.save_grafts(grafted(tiny(), **saved), tmp_path)
    model = grafted(tiny(), **there)
    for graft in flex_kernels.train_grafts(model).values():
        nn.init.ones_(graft.down_proj)
    before = tensors(model)
    with pytest.raises(ValueError, match=sentence):
        flex_kernels.load_grafts(model, tmp_path)
    assert_same(tensors(model), before)


def test_another_model_is_refused_and_stays_bare(tmp_path: Path) -> None:
    flex_kernels.save_grafts(grafted(tiny()), tmp_path)
    wider = OlmoeForCausalLM(OlmoeConfig(**SIZES | {"hidden_size": 32}, num_experts=4))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts: .* has hidden_size 16, expected 32"):
        flex_kernels.load_grafts(wider, tmp_path)
    assert tensors(wider) == []
    shallow = OlmoeForCausalLM(OlmoeConfig(**SIZES | {"num_hidden_layers": 1}, num_experts=4))
    with pytest.raises(ValueError, match=r"has a graft for model\.layers\.1\.mlp\.experts, but the model's MoE layers"):
        flex_kernels.load_grafts(shallow, tmp_path)
    assert tensors(shallow) == []


def test_files_that_are_not_there_or_not_whole_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no grafts\.safetensors in"):
        flex_kernels.load_grafts(tiny(), tmp_path)
    with pytest.raises(ValueError, match="OlmoeForCausalLM carries no graft"):
        flex_kernels.save_grafts(tiny(), tmp_path)
    flex_kernels.save_grafts(grafted(tiny()), tmp_path)
    file = tmp_path / "grafts.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        flex_kernels.load_grafts(tiny(), tmp_path)
    file.write_bytes(whole.replace(rb"\"format\": 1", rb"\"format\": 9"))
    with pytest.raises(ValueError, match="has format 9, expected 1"):
        flex_kernels.load_grafts(tiny(), tmp_path)
    file.write_bytes(whole.replace(rb"\"width\": 6", rb"\"width\": 5"))
    with pytest.raises(ValueError, match=re.escape("[12, 16] for model.layers.0.mlp.experts.graft.gate_up_proj")):
        flex_kernels.load_grafts(tiny(), tmp_path)


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = grafted(tiny())
    flex_kernels.save_grafts(model, tmp_path)
    before = tensors(model)
    with torch.no_grad():
        flex_kernels.train_grafts(model)["model.layers.0.mlp.experts"].down_proj.add_(1)

    def full(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        flex_kernels.save_grafts(model, tmp_path)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grafts.json", "grafts.safetensors"]
    other = tiny()
    flex_kernels.load_grafts(other, tmp_path)
    assert_same(tensors(other), before)


@pytest.mark.parametrize("rank", [None, 2])
def test_another_dtype_and_frozen_flags_of_the_model_stay(rank: int | None, tmp_path: Path) -> None:
    model = grafted(tiny(), rank=rank)
    flex_kernels.save_grafts(model, tmp_path)
    other = tiny().to(torch.bfloat16)
    for graft in grafted(other, rank=rank).model.layers[0].mlp.experts.graft.parameters():
        graft.requires_grad_(False)
    flex_kernels.load_grafts(other, tmp_path)
    want = [{key: tensor.bfloat16() for key, tensor in state.items()} for state in tensors(model)]
    assert_same(tensors(other), want)
    assert not any(p.requires_grad for p in other.model.layers[0].mlp.experts.graft.parameters())
    bare = tiny().to(torch.bfloat16)
    loaded = flex_kernels.load_grafts(bare, tmp_path)  # what trains stays in the dtype it was saved in
    assert {graft.logit_weight.dtype for graft in loaded.values()} == {torch.float32}
    assert {graft.down_proj.dtype for graft in loaded.values()} == {torch.bfloat16 if rank else torch.float32}


def test_a_merged_lora_graft_is_saved_and_loaded_unmerged(tmp_path: Path) -> None:
    model = grafted(tiny(), rank=2)
    before = tensors(model)
    for graft in flex_kernels.train_grafts(model).values():
        graft.merge()
    flex_kernels.save_grafts(model, tmp_path)
    assert all(graft.merged for graft in flex_kernels.train_grafts(model).values())
    flex_kernels.load_grafts(model, tmp_path)
    assert not any(graft.merged for graft in flex_kernels.train_grafts(model).values())
    torch.testing.assert_close(tensors(model), before)


@pytest.mark.parametrize("graft_first", [True, False], ids=["graft, peft", "peft, graft"])
@pytest.mark.parametrize("rank", [None, 2], ids=["full", "lora"])
def test_peft_in_both_orders_and_back(graft_first: bool, rank: int | None, tmp_path: Path) -> None:
    model = tiny().requires_grad_(False)
    if graft_first:
        grafted(model, rank=rank)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    if not graft_first:
        grafted(wrapped, rank=rank)
    state = "frozen" if graft_first else "trained"
    assert {graft_state(layer.mlp.experts.graft) for layer in model.model.layers} == {state}
    grafts = flex_kernels.train_grafts(wrapped)
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    copies = {"gate_up_proj", "down_proj"} if rank else set()
    expected = {f"{name}.graft.{key}" for name, g in grafts.items() for key, _ in g.named_parameters()}
    expected = {name for name in expected if name.rpartition(".")[2] not in copies}
    assert {name for name in trained if ".graft." in name} == expected
    assert all(".graft." in name or ".lora_" in name for name in trained)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    want = logits(wrapped)
    flex_kernels.save_grafts(wrapped, tmp_path)
    wrapped.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "grafts.json").read_text())
    assert [entry["name"] for entry in described["layers"]] == [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
    bare = tiny()
    if graft_first:  # back in either order as well
        flex_kernels.load_grafts(bare, tmp_path)
    back = peft.PeftModel.from_pretrained(bare, tmp_path)
    if not graft_first:
        flex_kernels.load_grafts(back, tmp_path)
    assert torch.equal(logits(back), want)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(logits(merged), want)
    flex_kernels.save_grafts(merged, tmp_path / "merged")
    merged.save_pretrained(tmp_path / "merged")
    again = OlmoeForCausalLM.from_pretrained(tmp_path / "merged").eval()
    flex_kernels.load_grafts(again, tmp_path / "merged")
    torch.testing.assert_close(logits(again), want)


def test_lora_on_the_experts_themselves_keeps_the_names(tmp_path: Path) -> None:
    targets = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    model = tiny()
    model.set_experts_implementation(flex_kernels.register() or "flex")
    wrapped = grafted(peft.get_peft_model(model, peft.LoraConfig(**LORA | targets)))
    flex_kernels.save_grafts(wrapped, tmp_path)
    other = tiny()
    flex_kernels.load_grafts(other, tmp_path)
    assert_same(tensors(other), tensors(wrapped))
    assert torch.equal(logits(other), logits(wrapped))


def test_other_names_for_the_same_layers_are_found(tmp_path: Path) -> None:
    class Outer(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.language_model = model
            self.set_experts_implementation = model.set_experts_implementation

    model = grafted(tiny())
    flex_kernels.save_grafts(Outer(model), tmp_path)
    other = tiny()
    flex_kernels.load_grafts(other, tmp_path)
    assert_same(tensors(other), tensors(model))
    compiled = torch.compile(tiny())
    assert list(flex_kernels.load_grafts(compiled, tmp_path)) == [
        f"_orig_mod.model.layers.{i}.mlp.experts" for i in (0, 1)
    ]


def test_sharded_grafts_are_gathered_and_filled(tmp_path: Path) -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model, want = grafted(tiny()), tensors(grafted(tiny()))
        for graft in flex_kernels.train_grafts(model).values():
            for name, parameter in list(graft.named_parameters()):
                setattr(graft, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
        flex_kernels.save_grafts(model, tmp_path / "not", write=False)
        assert not (tmp_path / "not").exists()
        flex_kernels.save_grafts(model, tmp_path)
        with torch.no_grad():
            for graft in flex_kernels.train_grafts(model).values():
                graft.down_proj.zero_()
        for graft in flex_kernels.load_grafts(model, tmp_path).values():
            assert all(isinstance(parameter, DTensor) for parameter in graft.parameters())
        back = tiny()
        flex_kernels.load_grafts(back, tmp_path)
        assert_same(tensors(back), want)
        whole = [{key: tensor.full_tensor() for key, tensor in state.items()} for state in tensors(model)]
        assert_same(whole, want)
    finally:
        distributed.destroy_process_group()


# The Trainer


def trainer(
    folder: Path, adapted: bool = True, resume_from: Path | None = None, called_back: bool = True, **settings: Any
) -> Trainer:
    model = tiny().requires_grad_(False)
    if adapted:
        torch.manual_seed(3)
        model = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    grafted(model)
    ids = torch.randint(3, 64, (32, 8), generator=torch.Generator().manual_seed(4))
    data = [{"input_ids": row, "labels": row} for row in ids]
    options = {"max_steps": 6, "save_steps": 3, "learning_rate": 0.02, "per_device_train_batch_size": 4}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no"}
    arguments = TrainingArguments(str(folder), **options | quiet | settings)
    callbacks = [flex_kernels.graft_callback(resume_from)] if called_back else []
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data[:4], callbacks=callbacks)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


@pytest.mark.parametrize("adapted", [True, False], ids=["attention lora", "graft alone"])
def test_a_resumed_run_is_the_unbroken_one(adapted: bool, tmp_path: Path) -> None:
    whole = trainer(tmp_path, adapted)
    start = parameters(whole.model)
    whole.train()
    want = parameters(whole.model)
    moved = {name for name in want if not torch.equal(want[name], start[name])}
    assert any(".graft." in name for name in moved)
    assert any(".lora_" in name for name in moved) == adapted
    resumed = trainer(tmp_path, adapted)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert difference(parameters(resumed.model), want) == 0.0
    other = tiny()  # what the end left in the folder
    flex_kernels.load_grafts(other, tmp_path)
    assert_same(tensors(other), tensors(whole.model))
    at_3 = tiny()
    flex_kernels.load_grafts(at_3, tmp_path / "checkpoint-3")
    assert not torch.equal(tensors(at_3)[0]["down_proj"], tensors(other)[0]["down_proj"])


def test_without_restored_grafts_the_resumed_run_would_differ(tmp_path: Path) -> None:
    whole = trainer(tmp_path)
    whole.train()
    resumed = trainer(tmp_path, called_back=False)
    with pytest.warns(UserWarning, match="carries grafts"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert difference(parameters(resumed.model), parameters(whole.model)) > 1e-3


def test_a_checkpoint_elsewhere_is_found_or_asked_for(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "one")
    whole.train()
    want = parameters(whole.model)
    trainer(tmp_path / "two").train()  # its checkpoint-3 belongs to another run
    resumed = trainer(tmp_path / "two")
    resumed.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-3"))
    assert difference(parameters(resumed.model), want) == 0.0
    shutil.move(tmp_path / "one", tmp_path / "moved")
    checkpoint = tmp_path / "moved" / "checkpoint-3"
    with pytest.raises(ValueError, match=r"the grafts of this checkpoint are not in .*two.*one"):
        trainer(tmp_path / "two").train(resume_from_checkpoint=str(checkpoint))
    resumed = trainer(tmp_path / "three", resume_from=checkpoint)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert difference(parameters(resumed.model), want) == 0.0


def test_a_checkpoint_without_grafts_and_a_model_without_are_refused(tmp_path: Path) -> None:
    first = trainer(tmp_path, called_back=False)
    with pytest.warns(UserWarning, match="carries grafts"):
        first.train()
    with pytest.raises(ValueError, match=r"written without graft_callback\(\)"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    bare = trainer(tmp_path)
    flex_kernels.detach_graft(bare.model)
    with pytest.raises(ValueError, match=r"PeftModel\w* carries no graft"):
        bare.train()


def test_the_best_checkpoints_grafts_come_back_at_the_end(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    run = trainer(tmp_path, **options, learning_rate=5.0)  # so that the first checkpoint is the best one
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        other = tiny()
        flex_kernels.load_grafts(other, folder)
        assert_same(tensors(other), tensors(run.model))


# What is said once


def test_a_save_without_the_grafts_is_said_once(tmp_path: Path) -> None:
    for adapted in (False, True):
        model = tiny()
        if adapted:
            model = peft.get_peft_model(model, peft.LoraConfig(**LORA))
        grafted(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.state_dict()  # nobody saves here
        with pytest.warns(UserWarning, match=r"carries grafts.*save_grafts\(model, folder\)"):
            model.save_pretrained(tmp_path / "a")
        model.save_pretrained(tmp_path / "b")  # warnings are errors here
    saved = grafted(tiny())
    flex_kernels.save_grafts(saved, tmp_path)
    saved.save_pretrained(tmp_path / "c")
    detached = grafted(tiny())
    flex_kernels.detach_graft(detached)
    detached.save_pretrained(tmp_path / "d")


def test_a_trainer_without_the_callback_warns(tmp_path: Path) -> None:
    model = grafted(tiny().requires_grad_(False))
    data = [{"input_ids": torch.arange(3, 9), "labels": torch.arange(3, 9)}] * 4
    settings = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], disable_tqdm=True, use_cpu=True)
    with pytest.warns(UserWarning, match="callbacks="):
        Trainer(model, settings, train_dataset=data).train()


def step(model: nn.Module) -> None:
    ids = torch.arange(3, 12)[None]
    model.train()(input_ids=ids, labels=ids)


def test_a_frozen_or_unstarted_graft_is_said_once_when_training_begins(capsys: pytest.CaptureFixture[str]) -> None:
    model = grafted(tiny())
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    wrapped.eval()(input_ids=torch.arange(3, 12)[None])  # nothing to say to one who does not train
    with pytest.warns(UserWarning, match=r"2 of 2 grafts will not train; .*layers\.0\.mlp\.experts is frozen") as said:
        step(wrapped)
    assert len([warning for warning in said if "will not train" in str(warning.message)]) == 1
    step(wrapped)
    assert {path.why.rpartition(": ")[2] for path in flex_kernels.explain(wrapped)} == {"frozen"}
    flex_kernels.train_grafts(wrapped)
    assert {path.why.rpartition(": ")[2] for path in flex_kernels.explain(wrapped)} == {"trained"}
    assert "with a graft: trained" in capsys.readouterr().out
    fresh = tiny()
    grafts = list(flex_kernels.attach_graft(fresh).values())
    grafts[0].reset_parameters()
    with pytest.warns(UserWarning, match=r"1 of 2 grafts will not train; that of model\.layers\.1\..* is not started"):
        step(fresh)
    fresh = tiny()
    for layer in (0, 1):  # one warning for the model, however its grafts were attached
        flex_kernels.attach_graft(fresh, layers=[layer])
    with pytest.warns(UserWarning, match="2 of 2 grafts will not train") as said:
        step(fresh)
    assert len(said) == 1
    started = tiny()
    for graft in flex_kernels.attach_graft(started).values():
        graft.reset_parameters()
    step(started)
    peft.get_peft_model(started, peft.LoraConfig(**LORA))  # frozen after a first step is seen too
    with pytest.warns(UserWarning, match="is frozen"):
        step(started)


@pytest.mark.parametrize("zero", [("gate",), ("up",), ("down",), ("gate", "up"), ("up", "down"), ("gate", "down"), ()])
@pytest.mark.parametrize("rank", [None, 2])
def test_not_started_means_that_no_gradient_reaches_the_expert(zero: tuple[str, ...], rank: int | None) -> None:
    graft = flex_kernels.Graft(6, 4) if rank is None else flex_kernels.LoraGraft(6, 4, rank)
    for parameter in graft.parameters():
        nn.init.normal_(parameter)
    for name in ("gate_up_proj", "gate_up_lora_b") if rank else ("gate_up_proj",):
        with torch.no_grad():
            rows = getattr(graft, name)
            rows[:4] *= "gate" not in zero
            rows[4:] *= "up" not in zero
    for name in ("down_proj", "down_lora_b") if rank else ("down_proj",):
        with torch.no_grad():
            getattr(graft, name).mul_("down" not in zero)
    out = graft(torch.randn(5, 6))
    out.backward(torch.randn_like(out))
    own = [p for name, p in graft.named_parameters() if "logit" not in name and p.requires_grad]
    dead = not any(p.grad is not None and bool(p.grad.any()) for p in own)
    assert graft_state(graft) == ("not started" if dead else "trained")
    assert dead == (len(zero) > 1)


# DeepSpeed ZeRO-3


def partition(module: nn.Module) -> None:
    """As deepspeed.zero.Init leaves a module: every parameter is [0] and carries what it was."""
    for number, parameter in enumerate(module.parameters()):
        parameter.ds_id, parameter.ds_shape = number, parameter.shape
        parameter.data = torch.empty(0)


def test_zero_3_is_refused_in_words(tmp_path: Path) -> None:
    model = tiny()
    partition(model)
    sentence = r"DeepSpeed ZeRO-3 keeps the weights of model\.layers\.0\.mlp\.experts.*; ZeRO-2, DDP and FSDP2 work"
    with pytest.raises(ValueError, match=sentence):
        flex_kernels.attach_graft(model)
    assert tensors(model) == []
    model.set_experts_implementation("flex")
    assert all("DeepSpeed ZeRO-3 keeps gate_up_proj in parts" in path.why for path in flex_kernels.explain(model))
    with pytest.raises(ValueError, match="DeepSpeed ZeRO-3"):
        flex_kernels.expert_weights(model.model.layers[0].mlp.experts)
    late = grafted(tiny())
    flex_kernels.save_grafts(late, tmp_path)
    with pytest.raises(ValueError, match="ZeRO-3"):
        flex_kernels.load_grafts(model, tmp_path)
    partition(late.model.layers[1].mlp.experts.graft)
    for use in (flex_kernels.save_grafts, flex_kernels.load_grafts):
        with pytest.raises(ValueError, match=r"weights of model\.layers\.1\.mlp\.experts in parts"):
            use(late, tmp_path)
    with pytest.raises(ValueError, match="ZeRO-3 keeps the weights of the graft"):
        logits(late)
