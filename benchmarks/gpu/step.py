"""A FLEx training step on a whole model of Qwen1.5-MoE-A2.7B's dimensions with random weights.

Everything is frozen but a LoRA on the attention projections and one graft a layer with its gate; one step is forward,
cross-entropy, backward and AdamW; one round is a few steps of two clients, with the states they load, keep and send.
The peers run the same model with the graft as a user writes it.
"""

import time
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from layers import PROVIDERS, TOLERANCE, GraftedByHand
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

import flex_kernels
from gpu.device import summary
from gpu.record import OURS, Key
from gpu.session import Session

MODEL = "Qwen1.5-MoE-A2.7B"
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
RANK, ALPHA = 32, 64
# Of a round: the paper's steps a client, few clients, and how often it is measured.
LOCAL_STEPS, NUM_CLIENTS, ROUNDS = 5, 2, 3
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
# Over a whole model the roundings of all layers add up, and a rounded router logit may choose another expert.
DEPTH_FACTOR = 4


class Lora(nn.Module):
    """`W x + (alpha / r) B A x`, with W frozen."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        out_size, in_size = base.weight.shape
        self.a = nn.Parameter(torch.randn(RANK, in_size, dtype=base.weight.dtype) * in_size**-0.5)
        self.b = nn.Parameter(torch.randn(out_size, RANK, dtype=base.weight.dtype) * 1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a), self.b) * (ALPHA / RANK)


def make_model(session: Session) -> nn.Module:
    """Frozen, with random weights, made on the device; the projections of the attention carry a LoRA."""
    config = Qwen2MoeConfig(**(TINY_SIZES if session.tiny else SIZES), use_cache=False)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=session.dtype).requires_grad_(False)
    for module in list(model.modules()):
        for name in PROJECTIONS:
            if isinstance(base := getattr(module, name, None), nn.Linear) and hasattr(module, "o_proj"):
                setattr(module, name, Lora(base))
    return model.train()


def with_grafts(model: nn.Module, provider: str) -> Callable[[], None]:
    """Puts a graft on every layer, the same for every provider; returns what takes them off again."""
    torch.manual_seed(1)
    grafts = flex_kernels.attach_graft(model)
    for name, graft in grafts.items():
        experts = model.get_submodule(name)
        with torch.no_grad():
            graft.gate_up_proj.copy_(experts.gate_up_proj[0])
            graft.down_proj.copy_(experts.down_proj[0])
            graft.logit_weight.normal_(std=graft.logit_weight.numel() ** -0.5)
    if provider == OURS:
        return lambda: flex_kernels.detach_graft(model)
    flex_kernels.detach_graft(model)
    model.set_experts_implementation(provider)
    plain = {}
    for name, graft in grafts.items():
        block, _, attribute = name.rpartition(".")
        plain[name] = model.get_submodule(name)
        setattr(model.get_submodule(block), attribute, GraftedByHand(plain[name], graft))

    def take_off() -> None:
        for name, experts in plain.items():
            block, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(block), attribute, experts)

    return take_off


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> Tensor:
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def gradients(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """The loss, and the norm of each LoRA matrix' gradient."""
    loss = model(input_ids=ids, labels=ids).loss
    norms = [grad.float().norm() for grad in torch.autograd.grad(loss, lora_parameters(model))]
    return [loss.detach(), torch.stack(norms)]


def check(ours: Iterable[Tensor], theirs: Iterable[Tensor], dtype: torch.dtype, name: str) -> None:
    for a, b in zip(ours, theirs, strict=True):
        error, limit = float((a - b).float().norm() / b.float().norm()), DEPTH_FACTOR * TOLERANCE[dtype]
        assert error < limit, f"{name}: loss or gradients differ by {error:.3g} from eager's, limit {limit:.3g}"


def measure(session: Session) -> None:
    length = TINY_LENGTH if session.tiny else LENGTH
    sizes = [max(tokens // length, 1) for tokens in session.tokens[:2]]
    round_key = Key("step", MODEL, NUM_CLIENTS * LOCAL_STEPS * min(sizes) * length, "round", OURS)
    places = [("step", MODEL, length * size, "step") for size in sizes] + [round_key[:4]]
    if not any(session.wanted(*place) for place in places):
        return
    session.device.release()
    with session.on_device():
        model = make_model(session)
        batches = {size: torch.randint(0, model.config.vocab_size, (size, length)) for size in sizes}
    check_all(session, model, batches[min(sizes)])
    for provider in reversed(PROVIDERS):  # ours last: then the place is done
        take_off = with_grafts(model, provider)
        for ids in batches.values():
            if session.wanted("step", MODEL, ids.numel(), "step"):
                measure_provider(session, model, ids, Key("step", MODEL, ids.numel(), "step", provider))
        if session.wanted(*round_key[:4]):
            measure_round(session, model, batches[min(sizes)], round_key._replace(provider=provider))
        take_off()
        session.device.release()


def check_all(session: Session, model: nn.Module, ids: Tensor) -> None:
    """Before any step changes the weights: all give the loss and the gradients of `eager`."""
    truth = None
    for provider in reversed(PROVIDERS):
        take_off = with_grafts(model, provider)
        found = gradients(model, ids)
        truth = truth or found
        check(found, truth, session.dtype, provider)
        take_off()


def measure_provider(session: Session, model: nn.Module, ids: Tensor, key: Key) -> None:
    optimizer = torch.optim.AdamW(trained(model), lr=1e-6)
    run = partial(train_step, model, optimizer, ids)
    values = session.attempt(key, lambda: session.measure({key.provider: run})[key.provider])
    if values is None:
        return
    rate = ids.numel() / values["ms"] * 1e3
    peak, launches = session.device.peak_bytes(run), session.device.launches(run)
    session.record.add(key, **values, tokens_per_s=rate, peak_bytes=peak, launches=launches)


class Client:
    """Its personal state on the host, as between two rounds; the shared state comes and goes."""

    def __init__(self, model: nn.Module) -> None:
        shared = {id(parameter) for parameter in lora_parameters(model)}
        self.personal = [p for p in trained(model) if id(p) not in shared]
        self.state = [parameter.detach().to("cpu", copy=True) for parameter in self.personal]

    @torch.no_grad()
    def load(self) -> None:
        for parameter, kept in zip(self.personal, self.state, strict=True):
            parameter.copy_(kept)

    @torch.no_grad()
    def keep(self) -> None:
        for parameter, kept in zip(self.personal, self.state, strict=True):
            kept.copy_(parameter)


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [matrix for module in model.modules() if isinstance(module, Lora) for matrix in (module.a, module.b)]


def federated_round(model: nn.Module, clients: list[Client], shared: list[Tensor], ids: Tensor) -> list[Tensor]:
    """Each client: load, train a few steps, send the LoRA back; the mean of what came, in fp32 on the host."""
    matrices, received = lora_parameters(model), []
    for client in clients:
        client.load()
        with torch.no_grad():
            for parameter, value in zip(matrices, shared, strict=True):
                parameter.copy_(value)
        optimizer = torch.optim.AdamW(trained(model), lr=1e-6)
        for _ in range(LOCAL_STEPS):
            train_step(model, optimizer, ids)
        client.keep()
        received.append([parameter.detach().to("cpu", torch.float32, copy=True) for parameter in matrices])
    return [torch.stack(values).mean(0) for values in zip(*received, strict=True)]


def measure_round(session: Session, model: nn.Module, ids: Tensor, key: Key) -> None:
    clients = [Client(model) for _ in range(NUM_CLIENTS)]
    shared = [parameter.detach().to("cpu", torch.float32, copy=True) for parameter in lora_parameters(model)]
    values = session.attempt(key, lambda: round_times(session, partial(federated_round, model, clients, shared, ids)))
    if values is not None:
        session.record.add(key, **values, tokens_per_s=key.tokens / values["ms"] * 1e3)


def round_times(session: Session, run: Callable[[], object]) -> dict[str, float | int]:
    """By the clock on the wall, since the host takes part; a round is long enough for three of them."""
    run()
    times = []
    for _ in range(ROUNDS):
        session.device.synchronize()
        start = time.perf_counter()
        run()
        session.device.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return summary(times)
