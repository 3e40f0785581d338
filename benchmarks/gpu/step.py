"""FLEx training steps and rounds on a whole model of Qwen1.5-MoE-A2.7B's dimensions with random weights.

flex's own code does both. `JobModel` puts peft's LoRA and the grafts on; a `Site` trains, with its way to batch, its
loss on the response (half of each sequence), clipping, AdamW and schedule. A step is `Site.steps` with one batch. A
round is `Site.train` of each client in turn: the shared state goes in, the client's personal file of the round before
is read, a few steps, its new file (graft and moments) is written to the disk (where TMPDIR is), the shared state comes
out; then `weighted_mean` takes the mean weighted by examples, which is FedAvg. As in every run of flex on a GPU the
frozen model is bf16, while LoRA (peft's choice) and grafts are fp32 with fp32 moments; a graft is cast to bf16 in each
forward. Its 208 M numbers make a client's file 2.5 GB: what a round takes beyond its ten steps is mostly these files,
whoever computes the layer.

Not flex's own: weights and tokens are random, no text is encoded; every graft starts as expert 0 and lies in a file
before the first round, since choosing it happens once in a run (see the part `scoring`); nothing is evaluated; and the
shared arrays are handed over as they are, not in Flower's messages, so that Flower need not be installed.

The peers run the same steps and rounds and train the same parameters, with the graft as a user writes it and
transformers' own experts. They do not note how far the gates stand open, as flex does in every step.
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

import flex_kernels
from benchmarks.gpu.device import summary
from benchmarks.gpu.record import OURS, Key
from benchmarks.gpu.session import LEAST_SECONDS, Session
from benchmarks.layers import PROVIDERS, TOLERANCE, GraftedByHand
from flex.config import RunConfig
from flex.data.examples import ClientData, Encoder, Example
from flex.evaluation.score import response_logits
from flex.federation.client import Held, JobModel, Site, Told
from flex.federation.messages import Arrays, weighted_mean
from flex.methods import MAIN
from flex.model.adapters import unwrap
from flex.model.base import Base, fingerprint
from flex.model.partition import snapshot
from flex.store.personal import PersonalState

MODEL = "Qwen1.5-MoE-A2.7B"
Sites = list[Site]
# Its published config.json.
SIZES = {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
    "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 8192,
    "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632, "norm_topk_prob": False, "decoder_sparse_step": 1,
    "tie_word_embeddings": False,
}  # fmt: skip
TINY_SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 48,
}  # fmt: skip
LENGTH, TINY_LENGTH = 512, 8
BYTES_FOR_8192_TOKENS = 90e9
# Of a round: few clients, and how often it is measured. The steps of a client, and LoRA, are flex's defaults.
NUM_CLIENTS, ROUNDS = 2, 2
DEFAULTS = RunConfig()
SEED = 0
# Over a whole model the roundings of all layers add up, and a rounded router logit may choose another expert.
DEPTH_FACTOR = 4


class ByHand(GraftedByHand):
    """On the very parameters of flex's graft, so that flex's client trains them; cast in each forward, as flex does."""

    def __init__(self, experts: nn.Module, graft: flex_kernels.Graft) -> None:
        super().__init__(experts, graft)
        for name, parameter in graft.named_parameters():
            setattr(self, name, parameter)

    @property
    def graft(self) -> nn.Module:
        return self

    def mean_opening(self, tokens: int | None = None) -> Tensor:
        """What flex's client asks of every graft; here nobody notes it."""
        return torch.zeros((), device=self.logit_bias.device)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        cast = {name: p.to(hidden_states.dtype) for name, p in self.named_parameters(recurse=False)}
        layer = SimpleNamespace(experts=self.experts, **cast)
        return GraftedByHand.forward(layer, hidden_states, top_k_index, top_k_weights)


def make_base(session: Session) -> Base:
    """As `load_base` leaves it, but with random weights, made on the device."""
    flex_kernels.register()
    torch.manual_seed(SEED)
    with session.on_device():
        config = Qwen2MoeConfig(**(TINY_SIZES if session.tiny else SIZES))
        model = AutoModelForCausalLM.from_config(config, dtype=session.dtype).requires_grad_(False)
    return Base(model, None, flex_kernels.moe_layers(model), fingerprint(model))


def make_clients(num_sequences: int, length: int, vocab_size: int) -> list[ClientData]:
    """Every sequence has the same length, and its second half is the response."""
    tokens = torch.randint(0, vocab_size, (NUM_CLIENTS, num_sequences, length)).tolist()
    examples = [[Example(tuple(ids), length // 2, "") for ids in sequences] for sequences in tokens]
    return [ClientData(f"client-{index}", train, []) for index, train in enumerate(examples)]


@contextmanager
def runtime(
    base: Base, clients: list[ClientData], provider: str, batch_size: int, steps: int = DEFAULTS.train.steps
) -> Iterator[Sites]:
    """flex's clients on this provider, always with the same start; everything is taken off the base afterwards."""
    config = DEFAULTS.with_values(train={"batch_size": batch_size, "steps": steps})
    encoder = Encoder(SimpleNamespace(eos_token_id=0, pad_token_id=None), "alpaca", LENGTH)
    with tempfile.TemporaryDirectory() as folder:
        model = JobModel(base, encoder, config, MAIN, SEED)
        made = [Site(model, client, [], Path(folder)) for client in clients]
        fill(model)
        try:
            if provider != OURS:
                write_by_hand(base, provider)
            yield made
        finally:
            for name, layer in base.layers.items():
                put(base, name, getattr(layer, "experts", layer))
            unwrap(base)


@torch.no_grad()
def fill(made: JobModel) -> None:
    """Grafts are expert 0 behind a gate that tells tokens apart; LoRA's second matrices are no longer zero."""
    torch.manual_seed(SEED)
    for experts in made.base.layers.values():
        experts.graft.gate_up_proj.copy_(experts.gate_up_proj[0])
        experts.graft.down_proj.copy_(experts.down_proj[0])
        experts.graft.logit_weight.normal_(std=experts.graft.logit_weight.numel() ** -0.5)
    for name, parameter in made.parts.shared.items():
        if "lora_B" in name:
            parameter.normal_(std=1e-3)


def write_by_hand(base: Base, provider: str) -> None:
    grafts = {name: experts.graft for name, experts in base.layers.items()}
    flex_kernels.detach_graft(base.model)
    base.model.set_experts_implementation(provider)
    for name, graft in grafts.items():
        put(base, name, ByHand(base.layers[name], graft))


def put(base: Base, name: str, layer: nn.Module) -> None:
    block, _, attribute = name.rpartition(".")
    setattr(base.model.get_submodule(block), attribute, layer)
    base.layers[name] = layer


def measure(session: Session) -> None:
    length = sequence_length(session)
    sizes = [max(tokens // length, 1) for tokens in step_tokens(session)]
    keys = {Key("step", MODEL, length * size, "step", OURS): size for size in sizes}
    measure_each(session, keys, measure_step, steps=1)


def measure_rounds(session: Session) -> None:
    """Mostly the clients' files: what a disk takes for them, beside ten steps."""
    length, steps = sequence_length(session), DEFAULTS.train.steps
    size = max(min(step_tokens(session)) // length, 1)
    key = Key("round", MODEL, NUM_CLIENTS * steps * size * length, "round", OURS)
    measure_each(session, {key: size}, measure_round, steps)


def sequence_length(session: Session) -> int:
    return TINY_LENGTH if session.tiny else LENGTH


def step_tokens(session: Session) -> list[int]:
    """What fits the device beside 33 GB of weights, gradients and moments: `eager` keeps 40 GB at 8,192 tokens."""
    memory = session.device.memory_bytes
    most = 4096 if memory is not None and memory < BYTES_FOR_8192_TOKENS else max(session.tokens)
    return sorted({min(tokens, most) for tokens in session.tokens[:2]}, reverse=True)


def measure_each(
    session: Session,
    keys: dict[Key, int],
    measure_one: Callable[[Session, Sites, Key], None],
    steps: int,
) -> None:
    """`measure_one` at every key (with its batch size) on every provider, ours first; all are checked before."""
    names = [name for name in PROVIDERS if name not in session.without]
    wanted = [(key._replace(provider=name), size) for key, size in keys.items() for name in names]
    record = session.record
    missing = [(k, size) for k, size in wanted if session.again or not (k in record.figures or k in record.skipped)]
    if missing:
        session.require_seconds()
        session.device.release()
        base = make_base(session)
        clients = make_clients(max(keys.values()), sequence_length(session), base.model.config.vocab_size)
        check_all(session, base, clients, min(keys.values()))
    for key, size in missing:
        session.require_seconds()
        session.device.release()
        with runtime(base, clients, key.provider, size, steps) as made:
            measure_one(session, made, key)


def check_all(session: Session, base: Base, clients: list[ClientData], batch_size: int) -> None:
    """Before any step is measured: all give the loss and the gradients of `eager`."""
    truth = None
    for provider in reversed(PROVIDERS):
        with runtime(base, clients, provider, batch_size) as made:
            found = gradients(made[0].model, clients[0].train[:batch_size])
        truth = truth or found
        check(found, truth, session.dtype, provider)


def gradients(made: JobModel, examples: list[Example]) -> list[Tensor]:
    """The loss, and the norms of the gradients of what is shared and of what is personal, tensor by tensor."""
    torch.manual_seed(SEED)  # the same dropout for all
    made.base.model.train()
    logits, targets, _ = response_logits(made.base.model, made.encoder.batch(examples, made.base.device))
    loss = F.cross_entropy(logits.float(), targets)
    norms = [grad.float().norm() for grad in torch.autograd.grad(loss, list(made.parts.trained().values()))]
    num_shared = len(made.parts.shared)
    return [loss.detach(), torch.stack(norms[:num_shared]), torch.stack(norms[num_shared:])]


def check(ours: Iterable[Tensor], theirs: Iterable[Tensor], dtype: torch.dtype, name: str) -> None:
    for a, b in zip(ours, theirs, strict=True):
        error, limit = float((a - b).float().norm() / b.float().norm()), DEPTH_FACTOR * TOLERANCE[dtype]
        assert error < limit, f"{name}: loss or gradients differ by {error:.3g} from eager's, limit {limit:.3g}"


def step_of(made: Sites) -> Callable[[], None]:
    """One step of the first client, on the same batch each time it is called."""
    site = made[0]
    batch = site.client.train[: site.config.train.batch_size]
    return partial(site.steps, 1, [(batch, ())], site.optimizer(1), site.model.parts.trained(), Held(), Told())


def measure_step(session: Session, made: Sites, key: Key) -> None:
    run = step_of(made)

    def measured() -> dict[str, float | int | None]:
        values = session.measure({key.provider: run})[key.provider]
        return {**values, "peak_bytes": session.device.peak_bytes(run), "launches": session.device.launches(run)}

    values = session.attempt(key, measured)
    if values is not None:
        session.record.add(key, **values, tokens_per_s=key.tokens / values["ms"] * 1e3)


def measure_round(session: Session, made: Sites, key: Key) -> None:
    values = session.attempt(key, lambda: round_times(session, partial(next, federated_rounds(made))))
    if values is not None:
        session.record.add(key, **values, tokens_per_s=key.tokens / values["ms"] * 1e3)


def federated_rounds(made: Sites) -> Iterator[Arrays]:
    """One round after another, for ever; yields the shared state after each. All begin with the same personal file."""
    model = made[0].model
    for site in made:
        site.store.save(1, PersonalState(snapshot(model.own)))
    shared = model.shared_arrays()
    for round_index in itertools.count(2):  # before its first round a site forgets what lies in its folder
        turns = [site.train(round_index, shared) for site in made]
        updates = [{name: torch.from_numpy(array) for name, array in turn.update.items()} for turn in turns]
        shared = weighted_mean(updates, [turn.metrics["num_examples"] for turn in turns])
        yield shared


def round_times(session: Session, run: Callable[[], object]) -> dict[str, float | int]:
    """By the clock on the wall, since host and disk take part; fewer of them where the minutes end, but one."""
    run()
    times: list[float] = []
    while len(times) < ROUNDS and (not times or session.seconds_left() > LEAST_SECONDS + times[-1] / 1e3):
        session.device.synchronize()
        start = time.perf_counter()
        run()
        session.device.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return summary(times)
