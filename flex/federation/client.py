"""One client's turn: (shared state, personal file, config) -> (update, numbers, events).

The model is built once per job (`JobModel`). A turn copies the shared values and this client's personal values into it,
trains a few steps on the response tokens, writes the personal file, and hands back the shared values alone, with what
the log is to say of it.
"""

import hashlib
import itertools
import math
import random
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flex.config import STRATEGIES, RunConfig
from flex.data.examples import IGNORED, Batch, ClientData, Encoder, Example, training_batches
from flex.errors import FlexError
from flex.evaluation.score import Prepare, response_logits, score
from flex.evaluation.scored import Scored
from flex.evaluation.tasks import TASKS
from flex.federation.agreement import first_round_alone, settings_digest, versions
from flex.federation.anchor import Anchor, data_fingerprint
from flex.federation.layers import ClientLayers
from flex.federation.messages import SCORED, Arrays, SiteAbout
from flex.federation.scaffold import control_update, split_control
from flex.federation.unequal import cut_to, padded_to
from flex.federation.weighing import ANCHORS, Weighing
from flex.graft.calibrate import Calibration
from flex.graft.choose import choose_grafts, new_modules
from flex.methods import METHODS, SHARED_LORA, Phase
from flex.model.adapters import PRIVATE, copies, pretrained_only, recomputed, weigh, work_with, wrap
from flex.model.base import Base
from flex.model.compiled import check_compiler, compiled, forget_compiled
from flex.model.partition import (
    Partition,
    load_into,
    load_moments,
    optimizer_moments,
    partition,
    snapshot,
)
from flex.store.events import AFTER, BASE_ALONE, BEFORE, UPDATE_ALONE, VALIDATION, Evaluated, Event
from flex.store.files import folder_name
from flex.store.personal import PersonalState, PersonalStore

if TYPE_CHECKING:
    from flex.federation.masked_site import MaskedSite


def derived_seed(*parts: object) -> int:
    """A seed that depends on all of `parts` and on nothing else."""
    return random.Random("/".join(map(str, parts))).getrandbits(63)


def rate(first: float, config: RunConfig, round_index: int, method: str = "") -> float:
    """The learning rate of a round (1-based): cosine from `first` to the same share of the final rate, or constant; all
    of it times the method's own factor, if it has one."""
    first = first * config.train.rates.get(method, 1.0)
    if config.train.schedule == "constant":
        return first
    last = first * config.train.final_learning_rate / config.train.learning_rate
    progress = (round_index - 1) / config.train.rounds
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * progress))


def about(base: Base, client: ClientData, config: RunConfig, anchor: Anchor | None = None) -> SiteAbout:
    """What a client is, whatever the method."""
    return SiteAbout(
        client.client_id,
        base.fingerprint,
        num_train=len(client.train),
        num_test=len(client.test),
        truncated=client.truncated(),
        settings=settings_digest(config),
        data=data_fingerprint(client, anchor),
        versions=versions(),
    )


class Listener(Protocol):
    """Whom a site tells how far it is, for a progress bar; nothing else goes this way."""

    def step(self, steps: int = 1) -> None: ...
    def say(self, what: str) -> None: ...


class Silence:
    """A listener that nobody hears."""

    def step(self, steps: int = 1) -> None:
        pass

    def say(self, what: str) -> None:
        pass


class JobModel:
    """The base as one method wears it: what all sites of a job on this machine have in common.

    Attributes:
        parts: every parameter by its role.
        own: what a client owns by name: all that it trains alone, and what of its private modules is frozen (the copy
            beneath a low-rank graft).
        start: the values of `own` of a client that never trained.
        own_rate: the identities of the parameters that train with `train.graft_learning_rate`.
        anchor: what holds the local steps to the base, if anything does.
    """

    def __init__(
        self, base: Base, encoder: Encoder, config: RunConfig, method: str, seed: int, anchor: Anchor | None = None
    ):
        self.base, self.encoder, self.config, self.seed = base, encoder, config, seed
        self.method_name, self.method, self.anchor = method, METHODS[method], anchor
        self.graft = config.graft.of(self.method)
        self.private = PRIVATE[self.method.private]
        self.unequal = "ranks" in STRATEGIES[config.strategy.of(method)[0]]
        if config.train.compile:
            check_compiler(str(base.device))
            forget_compiled()
        wrap(base, self.method, config.lora, config.graft, seed)
        self.parts: Partition = partition(base.model)
        added = {id(p) for module in self.private.modules(base) for p in module.parameters()}
        beneath = [name for name, p in base.model.named_parameters() if id(p) in added and name in self.parts.frozen]
        self.own = {**self.parts.personal, **{name: self.parts.frozen[name] for name in sorted(beneath)}}
        own_rate = self.private.own_rate and self.method.private is not None
        self.own_rate = added | ({id(p) for p in self.parts.personal.values()} if own_rate else set())
        if self.method.start and not self.method.chooses:  # all clients start from one module, drawn from the seed
            modules = new_modules(base, self.graft)
            self.private.start(base, modules, self.graft, derived_seed("graft", seed))
        self.start = snapshot(self.own)
        self.scored: dict[str, dict[str, Any]] = {}  # what a task gave for shared values, by both their names

    @property
    def header(self) -> dict[str, Any]:
        """What every file of this job must agree in."""
        return {"base": self.base.fingerprint, "method": self.method_name, "seed": self.seed}

    def shared_arrays(self) -> Arrays:
        """The shared values that stand in the model, by name."""
        return {name: tensor.numpy() for name, tensor in snapshot(self.parts.shared).items()}

    def shared_name(self) -> str:
        """A name for the shared values that stand in the model."""
        digest = hashlib.sha256()
        for name, array in self.shared_arrays().items():
            digest.update(name.encode() + array.tobytes())
        return digest.hexdigest()


@dataclass
class TurnReport:
    """What a client's turn gives: the shared values, the numbers of the turn, what the log is to say of it."""

    update: Arrays
    metrics: dict[str, Any]
    events: list[Event] = field(default_factory=list)


@dataclass(frozen=True)
class Held:
    """What holds the local steps of a phase back: `mu / 2 ||p - anchor||²` for each tensor that has an anchor (FedProx:
    the shared ones; Ditto: the client's copy of them), and SCAFFOLD's `lr (c - c_k)`, taken off a shared tensor after
    each step; both by the tensor's name."""

    mu: float = 0.0
    anchors: Mapping[str, Tensor] = field(default_factory=dict)
    drift: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class Told:
    """What the steps of a turn tell: each step's loss and each layer's mean opening, and the tokens trained on."""

    losses: list[Tensor] = field(default_factory=list)
    openings: list[Tensor] = field(default_factory=list)
    tokens: int = 0


class Site:
    """One client: its examples, its personal files, and its turns on the job's model.

    Args:
        model: of the job; a run on one machine hands one model to all its sites.
        general: the held-out examples that belong to nobody.
        tasks: the questions of further tasks by name (`evaluation/tasks.py`).
        folder: of the job; personal files go to `folder/clients/<folder_name(client_id)>/`.
    """

    def __init__(
        self,
        model: JobModel,
        client: ClientData,
        general: list[Example],
        folder: Path,
        listen: Listener | None = None,
        tasks: Mapping[str, Any] | None = None,
    ):
        self.model, self.client, self.general, self.tasks = model, client, general, tasks or {}
        self.client_id, self.listen = client.client_id, listen or Silence()
        self.config = model.config
        self.layers = ClientLayers(model.base, model.encoder, client, self.config.evaluate.batch_size)
        own_folder = folder / "clients" / folder_name(client.client_id)
        self.store = PersonalStore(own_folder, {**model.header, "client": client.client_id})

    @cached_property
    def masked(self) -> "MaskedSite":
        """Its part in secure aggregation."""
        from flex.federation.masked_site import MaskedSite  # not above: a client trains where Flower is not installed

        return MaskedSite(self.store.folder, self.client_id)

    def about(self) -> SiteAbout:
        """What the server is told before the first round."""
        counts = self.model.parts.counts()
        trained = {role: counts[role] for role in ("shared", "personal")}
        return replace(about(self.model.base, self.client, self.config, self.model.anchor), trained_parameters=trained)

    def hides(self, round_index: int) -> bool:
        """Whether its update of this round leaves under a mask alone."""
        first_alone = first_round_alone(self.model.method, self.config.train)
        return self.config.strategy.secure and (first_alone is None or round_index < first_alone)

    def train(self, round_index: int, shared: Arrays, kept: int | None = None) -> TurnReport:
        """Local steps from the shared state of the round's start.

        How to train, and whether to score its own model before the server averages it, a client reads in its own
        configuration: whoever asks for a turn has no say in it.

        Args:
            kept: a round whose personal state must not be lost.
        """
        started = time.perf_counter()
        model, train = self.model, self.config.train
        # What is left of a later round is of a run that was stopped: its rounds are done again.
        self.store.forget(after=round_index - 1 if round_index > 1 else -1)
        shared, control = split_control(shared)
        own = self.attach(round_index - 1, shared)
        if model.method.chooses and round_index > model.graft.after_rounds and not model.private.started(model.base):
            own = PersonalState(control=own.control)
            own.parameters = self._choose(round_index, own)
        optimizer = self.optimizer(round_index)
        load_moments(optimizer, model.parts.personal, own.moments)
        mu = self.config.strategy.mu(model.method_name)
        step = rate(train.learning_rate, self.config, round_index, model.method_name)
        held = Held(
            mu,
            {name: p.detach().clone() for name, p in model.parts.shared.items()} if mu else {},
            {
                name: (step * (torch.from_numpy(c) - own.control.get(name, 0))).to(model.base.device)
                for name, c in control.items()
            },
        )
        first_alone = first_round_alone(model.method, train)
        alone = first_alone is not None and round_index >= first_alone
        phases = model.method.last_phases if alone else model.method.phases
        held_copy = Held(train.copy_mu, {n: shared.detach().clone() for n, (_, shared) in copies(model.base).items()})
        # Dropout draws from torch's global generator: the turn, not the process, decides what it gives.
        seed = derived_seed(model.seed, round_index, self.client_id)
        torch.manual_seed(seed)
        per_step = train.batch_size * train.accumulate
        batches = training_batches(self.client.train, per_step, train.steps, f"batches {seed}")
        anchors = model.anchor.batches(train.steps, seed) if model.anchor else itertools.repeat(())
        model.base.model.train()
        told = Told()
        with recomputed(model.base.model, train.gradient_checkpointing), compiled(model.base.model, train.compile):
            for phase, count in _share_out(train.steps, phases):
                trained = {name: p for role in phase.trains for name, p in getattr(model.parts, role).items()}
                work_with(model.base, phase.loras)
                back = held_copy if phase.held else held if "shared" in phase.trains else Held()
                pairs = zip(itertools.islice(batches, count), anchors, strict=False)
                self.steps(round_index, pairs, optimizer, trained, back, told)
        work_with(model.base, model.method.loras)
        update = {} if alone else model.shared_arrays()
        if model.unequal and update:
            update = cut_to(update, shared)
        if control and update:
            c_own = {name: tensor.numpy() for name, tensor in own.control.items()}
            c_own, change = control_update(shared, update, control, c_own, train.steps, step)
            own.control = {name: torch.from_numpy(c) for name, c in c_own.items()}
            update |= change
        trains_own = any("personal" in phase.trains for phase in phases)
        if (model.own and trains_own) or control:
            if trains_own:
                own.parameters = snapshot(model.own)
                own.moments = optimizer_moments(optimizer, model.parts.personal)
            own.choices = [choice for choice in own.choices if choice.round >= round_index - 1]
            self.store.save(round_index, own, kept)
        metrics = {
            "num_examples": len(self.client.train),
            "loss": float(torch.stack(told.losses).mean()),
            "opening": torch.stack(told.openings).mean(0).tolist() if told.openings else None,
            "tokens": told.tokens,
            "seconds": time.perf_counter() - started,
        }
        # Grafts are chosen in this round, or in a turn before it that a kill cut off.
        events: list[Event] = [choice for choice in own.choices if choice.round >= round_index - 1]
        if self.config.scores_after(round_index):
            events += self.evaluate(round_index, None, BEFORE)
        if round_index == train.rounds and model.method.averages and update and "test" in self.config.evaluate.tasks:
            events += self.given_away(round_index)
        return TurnReport(update, metrics, events)

    def given_away(self, round_index: int) -> list[Event]:
        """What the update that stands in the model knows alone: the base with it, and the base without it, asked the
        client's own held-out prompts. Nothing private takes part."""
        model, settings = self.model, replace(self.config.evaluate, rouge=False)
        kept, sent = snapshot(model.own), {id(p) for p in model.parts.shared.values()}
        modules = [module for private in PRIVATE.values() for module in private.modules(model.base)]
        shared = [module for module in modules if any(id(p) in sent for p in module.parameters())]
        load_into(model.own, model.start, "the start")  # what cannot be taken out adds nothing
        work_with(model.base, (SHARED_LORA,) if model.method.lora else ())
        if model.method.weighed:
            weigh(model.base, 0.0)
        found: list[Event] = []
        for when, with_update in ((BASE_ALONE, False), (UPDATE_ALONE, True)):
            with pretrained_only(model.base, with_update, shared if with_update else ()) as asked:
                scores = score(asked, model.encoder, self.client.test, settings)
            found.append(Evaluated(round_index, self.client_id, when, "test", **scores))
        load_into(model.own, kept, "what was there")
        work_with(model.base, model.method.loras)
        if model.method.weighed:
            weigh(model.base, 0.5)
        return found

    def evaluate(
        self, round_index: int, shared: Arrays | None, when: str = AFTER, splits: Collection[str] = SCORED
    ) -> list[Event]:
        """Scores on the client's own parts and on the general set; before them the grafts, if they are chosen here,
        after them what the layers do with the client's own prompts.

        Args:
            shared: the aggregated values; None scores the model as it stands (the client's own, before aggregation).
            splits: which of "test", "general" and "validation".
        """
        found: list[Event] = []
        if shared is not None:
            own = self.attach(round_index, shared)
            found += [choice for choice in own.choices if choice.round >= round_index]
        prepare = self.prepare()
        there = {"test": self.client.test, "general": self.general, VALIDATION: self.client.validation}
        for split, examples in there.items():
            asked = split == VALIDATION or split in self.config.evaluate.tasks
            if examples and split in splits and asked:
                # Decoding is the dearest part of scoring; forgetting shows in loss and exact match already.
                settings = replace(self.config.evaluate, rouge=self.config.evaluate.rouge and split == "test")
                scores = score(self.model.base.model, self.model.encoder, examples, settings, prepare)
                if not math.isfinite(scores["loss"]):
                    raise FlexError(
                        f"the {split} loss of client {self.client_id!r} is {scores['loss']} after round {round_index}; "
                        f"expected a finite number (a lower learning rate may help)"
                    )
                found.append(Evaluated(round_index, self.client_id, when, split, **scores))
        if shared is not None and "test" in splits:
            found += [self._score_task(name, round_index, prepare) for name in self.tasks]
            ends = self.config.may_keep(round_index) or not self.model.method.trains
            found += self.layers.events(round_index, ends, prepare)
        return found

    def _score_task(self, name: str, round_index: int, prepare: Prepare | None) -> Evaluated:
        """A task that is the same for everyone; of a method that keeps nothing, once for all clients."""
        model = self.model
        key = "" if model.own else f"{name} {model.shared_name()}"
        if key not in model.scored or not key:

            def say(what: str, done: int, total: int) -> None:
                self.listen.say(f"{self.client_id}: {what}, {done}/{total}")

            scored = Scored(model.base.model, model.encoder, self.config.evaluate, prepare, say)
            scores = TASKS[name].score(scored, self.tasks[name])
            if not key:
                return Evaluated(round_index, self.client_id, AFTER, name, **scores)
            model.scored = {**model.scored, key: scores}
        return Evaluated(round_index, self.client_id, AFTER, name, **model.scored[key])

    def prepare(self) -> Prepare | None:
        """What looks at each batch of prompts before the model answers it; None for a method that needs no look."""
        model = self.model
        if not model.method.weighed:
            return None
        drawn = random.Random(derived_seed("anchors", model.seed, self.client_id))
        own = drawn.sample(self.client.train, min(ANCHORS, len(self.client.train)))
        return Weighing(model.base, [e.input_ids[: e.prompt_length] for e in own], model.encoder.pad_id)

    def attach(self, round_index: int, shared: Arrays) -> PersonalState:
        """Shared and personal values, as after `round_index`, into the model; returns what the client owns."""
        model = self.model
        if model.unequal:
            shared = padded_to(shared, {name: tuple(p.shape) for name, p in model.parts.shared.items()})
        load_into(model.parts.shared, {k: torch.from_numpy(v) for k, v in shared.items()}, "the shared state")
        own = self.store.load(round_index)
        if own is None:
            load_into(model.own, model.start, "the start")
            own = PersonalState()
            if model.method.chooses and not model.graft.after_rounds:
                own.parameters = self._choose(round_index, own)
            else:
                own.parameters = snapshot(model.own)
            if own.parameters:
                self.store.save(round_index, own)
        load_into(model.own, own.parameters, f"the personal file of client {self.client_id!r}")
        if not model.private.started(model.base):
            model.private.begin(model.base)
        if model.method.weighed:
            weigh(model.base, 0.5)
        return own

    def _choose(self, round_index: int, own: PersonalState) -> dict[str, Tensor]:
        """Chooses and builds what the client starts from; with shared rounds before it, on top of what they gave."""
        model = self.model
        seed = derived_seed("graft", model.seed, self.client_id)
        calibration = Calibration(
            model.base,
            model.encoder,
            self.client.train[: model.graft.calibration_sequences],
            self.config.evaluate.batch_size,
            self.store.folder,
            lambda what, done, total: self.listen.say(f"{self.client_id}: {what}, {done}/{total}"),
            model.shared_name() if model.graft.after_rounds else "",
        )
        choices = choose_grafts(calibration, model.graft, str(seed))
        model.private.start(model.base, choices, model.graft, seed)
        own.choices = [choice.event(self.client_id, round_index) for choice in choices]
        return snapshot(model.own)

    def optimizer(self, round_index: int) -> torch.optim.Optimizer:
        """AdamW: fresh moments for what is shared (it moved on the server), kept ones for what is personal."""
        train, parts, own = self.config.train, self.model.parts, self.model.own_rate
        trained = parts.trained().values()
        groups = [
            ([p for p in trained if id(p) not in own], train.learning_rate),
            ([p for p in trained if id(p) in own], train.graft_learning_rate),
        ]
        return torch.optim.AdamW(
            [
                {"params": ps, "lr": rate(lr, self.config, round_index, self.model.method_name)}
                for ps, lr in groups
                if ps
            ],
            weight_decay=train.weight_decay,
        )

    def steps(
        self,
        round_index: int,
        batches: Iterable[tuple[list[Example], Sequence[int]]],
        optimizer: torch.optim.Optimizer,
        trained: Mapping[str, nn.Parameter],
        held: Held,
        told: Told,
    ) -> None:
        """One step per batch, of the parameters in `trained` alone, on what stands in the model. Of `train.accumulate`
        small batches each counts by its tokens, so that the step is that of all of them at once. Beside each batch of
        the client's stand the anchors of its step, none where there is no anchor."""
        model, base = self.model, self.model.base
        for name, parameter in model.parts.trained().items():
            parameter.requires_grad_(name in trained)
        size = self.config.train.batch_size
        for examples, anchors in batches:
            parts = [model.encoder.batch(examples[i : i + size], base.device) for i in range(0, len(examples), size)]
            counts = [int((part.labels[:, 1:] != IGNORED).sum()) for part in parts]
            optimizer.zero_grad(set_to_none=True)
            told.losses.append(self._gradients(round_index, parts, counts, anchors, trained, held, told))
            nn.utils.clip_grad_norm_(list(trained.values()), self.config.train.max_grad_norm)
            optimizer.step()
            with torch.no_grad():
                for name, drift in held.drift.items():
                    model.parts.shared[name] -= drift
            told.tokens += sum(len(example.input_ids) for example in examples)
            self.listen.step()
        optimizer.zero_grad(set_to_none=True)

    def _gradients(
        self,
        round_index: int,
        parts: Sequence[Batch],
        counts: Sequence[int],
        anchors: Sequence[int],
        trained: Mapping[str, nn.Parameter],
        held: Held,
        told: Told,
    ) -> Tensor:
        """The gradients of a step, one part after another, the anchors beside the first; returns the loss on the
        client's own examples (nats a response token)."""
        model, whole = self.model, sum(counts)
        losses = []
        for number, (part, count) in enumerate(zip(parts, counts, strict=True)):
            beside = model.anchor.beside(part, anchors, trained, model.private) if anchors and number == 0 else None
            if beside is not None:
                logits, targets = beside.logits, beside.targets
            else:
                logits, targets, _ = response_logits(model.base.model, part)
            loss = F.cross_entropy(logits.float(), targets) * (count / whole)
            if not torch.isfinite(loss):
                raise FlexError(
                    f"the loss of client {self.client_id!r} is {loss.item()} in round {round_index}; "
                    "expected a finite number (a lower learning rate may help)"
                )
            for name, anchor in held.anchors.items() if number == 0 else ():
                loss = loss + 0.5 * held.mu * ((trained[name] - anchor) ** 2).sum()
            (loss if beside is None else loss + beside.term).backward()
            losses.append(loss.detach())
            opening = model.private.opening(model.base) if beside is None else beside.opening
            if opening is not None:
                told.openings.append(opening)
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0]


def _share_out(steps: int, phases: tuple[Phase, ...]) -> Iterator[tuple[Phase, int]]:
    """How many of the steps of a turn each phase gets: all alike, what is left over goes to the first."""
    for index, phase in enumerate(phases):
        yield phase, steps // len(phases) + (index < steps % len(phases))
