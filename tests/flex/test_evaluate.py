"""Scores: teacher forcing agrees with real decoding, and a trained model stops by itself."""

import pytest
import torch
import torch.nn.functional as F
from tiny import records, tiny_config
from transformers import GenerationConfig

from flex.config import EvaluateSettings
from flex.data.examples import IGNORED, Encoder
from flex.demo.language import build_tokenizer
from flex.evaluation.score import generate, response_logits, score
from flex.runs.world import load_world


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A tiny model fitted to its client's ten examples by LoRA and graft, through the client's own turn."""
    folder = tmp_path_factory.mktemp("learnt")
    config = tiny_config(folder, train={"rounds": 2, "steps": 150, "batch_size": 10, "schedule": "constant"})
    config = config.with_values(train={"learning_rate": 1e-2, "graft_learning_rate": 1e-2}, lora={"rank": 8})
    world = load_world(config, 0)
    sites = world.sites(config, "flex", 0, folder / "job")
    turn = sites["a"].train(1, sites["a"].model.shared_arrays())
    assert turn.metrics["loss"] < 4
    sites["a"].train(2, turn.update)
    return world, sites


def test_end_of_sequence_is_learnt(learnt):
    world, sites = learnt
    example = sites["a"].client.train[0]
    ids = torch.tensor([example.input_ids[: example.prompt_length]])
    eos = world.encoder.tokenizer.eos_token_id
    out = world.base.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False, eos_token_id=eos
    )[0, ids.shape[1] :]
    assert out[-1] == eos
    assert len(out) == len(example.input_ids) - example.prompt_length
    texts = generate(world.base.model, world.encoder, [ids[0].tolist()], 30)
    assert texts == [example.response]


def test_exact_match_by_teacher_forcing_is_that_of_decoding(learnt):
    world, sites = learnt
    examples = sites["a"].client.train + sites["a"].client.test + sites["b"].client.test
    settings = EvaluateSettings(batch_size=5, rouge=True, max_new_tokens=16)
    scores = score(world.base.model, world.encoder, examples, settings)
    prompts = [e.input_ids[: e.prompt_length] for e in examples]
    texts = generate(world.base.model, world.encoder, prompts, 16)
    exact = sum(text == e.response for text, e in zip(texts, examples, strict=True)) / len(examples)
    assert scores["exact_match"] == pytest.approx(exact)
    assert 0.2 < exact < 1  # some right, some wrong: the comparison can fail
    assert scores["rouge_l"] >= exact


def test_loss_is_the_mean_over_response_tokens_whatever_the_batches(learnt):
    world, sites = learnt
    examples = sites["b"].client.train
    one, all_ = (
        score(world.base.model, world.encoder, examples, EvaluateSettings(batch_size=size, rouge=False))
        for size in (1, 10)
    )
    assert one["loss"] == pytest.approx(all_["loss"], rel=1e-5)
    assert one["rouge_l"] is None
    parts = [g["loss"] * g["num_examples"] for g in one["groups"].values()]
    assert min(g["loss"] for g in one["groups"].values()) <= one["loss"] <= max(parts)


def test_groups_add_up(learnt):
    world, sites = learnt
    examples = sites["a"].client.test
    scores = score(world.base.model, world.encoder, examples, EvaluateSettings(rouge=False))
    groups = scores["groups"].values()
    assert sum(g["num_examples"] for g in groups) == scores["num_examples"] == len(records("a", 6))
    mean = sum(g["exact_match"] * g["num_examples"] for g in groups) / scores["num_examples"]
    assert mean == pytest.approx(scores["exact_match"])


@pytest.mark.parametrize(
    "change",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"num_beams": 4},
        {"forced_eos_token_id": 2},
        {"max_time": 1e-3},
        {"return_dict_in_generate": True},
        {"stop_strings": ["a"]},
        {"temperature": 0.6, "do_sample": True},
        {"bad_words_ids": [[5], [6], [7]]},
        {"min_new_tokens": 9},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_checkpoints_own_generation_settings_change_no_answer(learnt, change):
    world, sites = learnt
    model = world.base.model
    example = sites["a"].client.train[0]
    prompts = [example.input_ids[: example.prompt_length], example.input_ids[:3]]
    plain = generate(model, world.encoder, prompts, 12)
    kept = model.generation_config
    model.generation_config = GenerationConfig.from_dict({**kept.to_dict(), **change})
    try:
        assert generate(model, world.encoder, prompts, 12) == plain
        assert model.generation_config.to_dict()[next(iter(change))] == next(iter(change.values()))
    finally:
        model.generation_config = kept


def test_an_answer_ends_at_the_tokenizers_and_at_the_templates_end_token():
    tokenizer = build_tokenizer()
    assert Encoder(tokenizer, "alpaca", 64).end_ids() == [tokenizer.eos_token_id]
    assert Encoder(tokenizer, "chat", 64).end_ids() == [tokenizer.eos_token_id]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn_end>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<user> {{ m['content'] }}<turn_end>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<turn_end>")]
    assert Encoder(tokenizer, "chat", 64).end_ids() == ends
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    assert Encoder(tokenizer, "chat", 64).end_ids() == ends[:1]


def test_the_head_sees_response_tokens_alone_and_gradients_are_those_of_all_logits(tmp_path):
    config = tiny_config(tmp_path)
    world = load_world(config, 0)
    model, head = world.base.model, world.base.model.get_output_embeddings()
    batch = world.encoder.batch(world.clients[0].train[:4])
    seen, weight = [], model.get_submodule("model.layers.0.self_attn.q_proj").weight
    hook = head.register_forward_hook(lambda _, inputs, output: seen.append(output.shape))
    weight.requires_grad_(True)
    logits, targets, row = response_logits(model, batch)
    hook.remove()
    count = int((batch.labels[:, 1:] != IGNORED).sum())
    assert seen == [(1, count, head.out_features)]
    assert row.bincount(minlength=4).tolist() == (batch.labels[:, 1:] != IGNORED).sum(1).tolist()
    (grad,) = torch.autograd.grad(F.cross_entropy(logits, targets), weight)
    everything = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].flatten(0, 1)
    loss = F.cross_entropy(everything, batch.labels[:, 1:].flatten(), ignore_index=IGNORED)
    (want,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-7)
    assert not head._forward_pre_hooks
