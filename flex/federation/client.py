"""One client's turn: (shared state, personal file, config) -> (update, metrics).

The model is built once per job. A turn copies the shared values and this client's personal values into it, trains a
few steps on the response tokens, writes the personal file, and hands back the shared values alone.
"""

import hashlib
import math
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flex.config import METHODS, RunConfig
from flex.data.examples import ClientData, Encoder, Example, training_batches
from flex.errors import FlexError
from flex.evaluation.score import response_logits, score
from flex.federation.messages import Arrays
from flex.federation.scaffold import control_update, split_control
from flex.graft import choose as grafting
from flex.model import rivals
from flex.model.adapters import wrap
from flex.model.base import Base
from flex.model.partition import Partition, load_into, load_moments, optimizer_moments, partition, snapshot
from flex.store.files import folder_name
from flex.store.personal import PersonalState, PersonalStore


def derived_seed(*parts: object) -> int:
    """A seed that depends on all of `parts` and on nothing else."""
    return random.Random("/".join(map(str, parts))).getrandbits(63)


def rate(first: float, config: RunConfig, round_index: int) -> float:
    """The learning rate of a round (1-based): cosine from `first` to the same share of the final rate, or constant."""
    if config.train.schedule == "constant":
        return first
    last = first * config.train.final_learning_rate / config.train.learning_rate
    progress = (round_index - 1) / config.train.rounds
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * progress))


class ClientRuntime:
    """All clients of one job on one model; each call works on one of them.

    Args:
        folder: of the job; personal files go to `folder/clients/<folder_name(client_id)>/`.
        on_event: takes what is worth keeping (see `events.py`).
        on_step: called after each training step, for a progress bar.
        on_calibration: called after each batch of a calibration, likewise.
    """

    def __init__(
        self,
        base: Base,
        encoder: Encoder,
        clients: list[ClientData],
        general: list[Example],
        config: RunConfig,
        method: str,
        seed: int,
        folder: Path,
        on_event: Callable[[dict[str, Any]], None] = lambda event: None,
        on_step: Callable[[], None] = lambda: None,
        on_calibration: grafting.Progress = lambda what, done, total: None,
    ):
        self.base, self.encoder, self.config, self.seed = base, encoder, config, seed
        self.clients = {client.client_id: client for client in clients}
        self.general, self.on_event, self.on_step = general, on_event, on_step
        self.on_calibration = on_calibration
        self.current = ""  # the client at work
        self.tokens = 0  # trained on by this process
        self.method = METHODS[method]
        self.graft_settings = config.graft.of(self.method)
        wrap(base, self.method, config.lora, config.graft, seed)
        self.parts: Partition = partition(base.model)
        # What a client owns: all that it trains alone, and what of its grafts is frozen (a low-rank graft's copy).
        copies = _graft_names(base) & self.parts.frozen.keys()
        self.own = {**self.parts.personal, **{name: self.parts.frozen[name] for name in sorted(copies)}}
        self.start = snapshot(self.own)  # what a client that never trained owns
        self.stores = {
            name: PersonalStore(
                folder / "clients" / folder_name(name),
                {"base": base.fingerprint, "method": method, "seed": seed, "client": name},
            )
            for name in self.clients
        }

    def shared_arrays(self) -> Arrays:
        """The shared values that stand in the model, by name."""
        return {name: tensor.numpy() for name, tensor in snapshot(self.parts.shared).items()}

    def train(self, client_id: str, round_index: int, shared: Arrays, proximal_mu: float = 0.0) -> tuple[Arrays, dict]:
        """Local steps from the shared state of the round's start.

        Returns:
            the shared values after the steps, and the numbers of the turn (`num_examples`, `loss`, `opening`, ...).
        """
        started = time.perf_counter()
        client = self.clients[client_id]
        shared, control = split_control(shared)
        own = self.attach(client_id, round_index - 1, shared)
        if self.method.graft and round_index > self.graft_settings.after_rounds and not self._grafted():
            own = PersonalState(self._graft(client_id, round_index), control=own.control)
        optimizer = self.optimizer(round_index)
        load_moments(optimizer, self.parts.personal, own.moments)
        drift = {name: torch.from_numpy(c) - own.control.get(name, 0) for name, c in control.items()}
        loss, openings = self.steps(client, round_index, optimizer, proximal_mu, drift)
        update = self.shared_arrays()
        if control:
            c_own = {name: tensor.numpy() for name, tensor in own.control.items()}
            step = rate(self.config.train.learning_rate, self.config, round_index)
            c_own, change = control_update(shared, update, control, c_own, self.config.train.steps, step)
            own.control = {name: torch.from_numpy(c) for name, c in c_own.items()}
            update |= change
        if self.own or control:
            own.parameters = snapshot(self.own)
            own.moments = optimizer_moments(optimizer, self.parts.personal)
            self.stores[client_id].save(round_index, own)
        metrics = {
            "num_examples": len(client.train),
            "loss": loss,
            "opening": openings,
            "seconds": time.perf_counter() - started,
        }
        return update, metrics

    def evaluate(self, client_id: str, round_index: int, shared: Arrays | None, when: str) -> dict[str, dict]:
        """Scores on the client's test part and on the general set, each also sent to `on_event`.

        Args:
            shared: the aggregated values; None scores the model as it stands (the client's own, before aggregation).
        """
        if shared is not None:
            self.attach(client_id, round_index, shared)
        scores = {}
        for split, examples in (("test", self.clients[client_id].test), ("general", self.general)):
            if examples:
                # Decoding is the dearest part of scoring; forgetting shows in loss and exact match already.
                settings = replace(self.config.evaluate, rouge=self.config.evaluate.rouge and split == "test")
                scores[split] = score(self.base.model, self.encoder, examples, settings)
                self.on_event(
                    {
                        "event": "evaluate",
                        "round": round_index,
                        "client_id": client_id,
                        "when": when,
                        "split": split,
                        **scores[split],
                    }
                )
        return scores

    def attach(self, client_id: str, round_index: int, shared: Arrays) -> PersonalState:
        """Shared and personal values, as after `round_index`, into the model; returns what the client owns."""
        self.current = client_id
        load_into(self.parts.shared, {k: torch.from_numpy(v) for k, v in shared.items()}, "the shared state")
        store = self.stores[client_id]
        own = store.load(round_index)
        if own is None:
            own = PersonalState(self._first_personal(client_id, round_index))
            if own.parameters:
                store.save(round_index, own)
        load_into(self.own, own.parameters, f"the personal file of client {client_id!r}")
        return own

    def _first_personal(self, client_id: str, round_index: int) -> dict[str, Tensor]:
        """What the client owns before its first step: grafts chosen on its own training data, LoRA as initialised."""
        load_into(self.own, self.start, "the start")
        if self.method.rival == "expert" or (self.method.graft and not self.graft_settings.after_rounds):
            return self._graft(client_id, round_index)
        return snapshot(self.own)

    def _grafted(self) -> bool:
        """Whether the client at work has its graft already: until then all of it is zero, and stays so."""
        return all(layer.graft.gate_up_proj.any() for layer in self.base.layers.values())

    def _graft(self, client_id: str, round_index: int) -> dict[str, Tensor]:
        """Chooses and builds what the client starts from; with shared rounds before it, on top of what they gave."""
        seed = derived_seed("graft", self.seed, client_id)
        choices = grafting.choose_grafts(
            self.base,
            self.encoder,
            self.clients[client_id].train[: self.config.graft.calibration_sequences],
            self.graft_settings,
            self.config.evaluate.batch_size,
            str(seed),
            self.stores[client_id].folder,
            self.on_calibration,
            self._lora_name() if self.graft_settings.after_rounds and self.method.graft else "",
        )
        if self.method.graft:
            grafting.build(self.base, choices, self.graft_settings, seed)
        else:
            rivals.adapt(self.base.layers, choices)
        for choice in choices:
            self.on_event({"client_id": client_id, "round": round_index, **choice.event()})
        return snapshot(self.own)

    def _lora_name(self) -> str:
        """A name for the shared values that stand in the model."""
        digest = hashlib.sha256()
        for name, array in self.shared_arrays().items():
            digest.update(name.encode() + array.tobytes())
        return digest.hexdigest()

    def optimizer(self, round_index: int) -> torch.optim.Optimizer:
        """AdamW: fresh moments for what is shared (it moved on the server), kept ones for what is personal."""
        train = self.config.train
        private = self.method.graft or self.method.rival
        own = {id(p) for p in self.parts.personal.values()} if private else set()
        trained = self.parts.trained().values()
        groups = [
            ([p for p in trained if id(p) not in own], train.learning_rate),
            ([p for p in trained if id(p) in own], train.graft_learning_rate),
        ]
        return torch.optim.AdamW(
            [{"params": ps, "lr": rate(lr, self.config, round_index)} for ps, lr in groups if ps],
            weight_decay=train.weight_decay,
        )

    def steps(
        self,
        client: ClientData,
        round_index: int,
        optimizer: torch.optim.Optimizer,
        proximal_mu: float,
        drift: dict[str, Tensor],
    ) -> tuple[float, list[float] | None]:
        """The local steps of a turn on what stands in the model: their mean loss and each layer's mean opening."""
        train = self.config.train
        model, trained = self.base.model, list(self.parts.trained().values())
        anchors = [(p, p.detach().clone()) for p in self.parts.shared.values()] if proximal_mu else []
        # Dropout draws from torch's global generator: the turn, not the process, decides what it gives.
        seed = derived_seed(self.seed, round_index, client.client_id)
        torch.manual_seed(seed)
        model.train()
        losses, openings = [], []
        for examples in training_batches(client.train, train.batch_size, train.steps, f"batches {seed}"):
            logits, targets, _ = response_logits(model, self.encoder.batch(examples, self.base.device))
            loss = F.cross_entropy(logits.float(), targets)
            if not torch.isfinite(loss):
                raise FlexError(
                    f"the loss of client {client.client_id!r} is {loss.item()} in round {round_index}; "
                    "wanted a finite number (a lower learning rate may help)"
                )
            for parameter, anchor in anchors:
                loss = loss + 0.5 * proximal_mu * ((parameter - anchor) ** 2).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for name, correction in drift.items():  # SCAFFOLD: c - c_k
                self.parts.shared[name].grad += correction.to(self.base.device)
            nn.utils.clip_grad_norm_(trained, train.max_grad_norm)
            optimizer.step()
            losses.append(loss.detach())
            self.tokens += sum(len(example.input_ids) for example in examples)
            if self.method.graft:
                openings.append(torch.stack([layer.graft.last_opening for layer in self.base.layers.values()]))
            self.on_step()
        optimizer.zero_grad(set_to_none=True)
        mean_openings = torch.stack(openings).mean(0).tolist() if openings else None
        return float(torch.stack(losses).mean()), mean_openings


def _graft_parameters(layer: nn.Module) -> list[nn.Parameter]:
    added = [getattr(layer, name, None) for name in ("graft", "adapted")]
    return [p for module in added if module is not None for p in module.parameters()]


def _graft_names(base: Base) -> set[str]:
    """Every parameter of every graft or adapted expert, as the model names it."""
    names = {id(p) for layer in base.layers.values() for p in _graft_parameters(layer)}
    return {name for name, p in base.model.named_parameters() if id(p) in names}
