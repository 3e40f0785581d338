"""What all jobs of one seed have in common on one machine: the base, the encoder, the clients' examples."""

import hashlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from flex.config import RunConfig
from flex.data.anchors import load_anchors
from flex.data.clients import Tally, read_clients, read_general, tally
from flex.data.examples import ClientData, Encoder, Example, encode, encode_clients
from flex.evaluation.tasks import read_tasks
from flex.federation.anchor import Anchor, data_fingerprint
from flex.federation.client import JobModel, Listener, Site
from flex.model.adapters import unwrap
from flex.model.base import Base, load_base, load_tokenizer


@dataclass(frozen=True)
class World:
    """The base and the data of a seed.

    notes: what a person should know of the files, in sentences.
    tally: which client got how many records of what.
    tasks: the questions of further tasks.
    anchor: what holds every client's model to the base; one for all sites on this machine, None without.
    """

    base: Base
    encoder: Encoder
    clients: list[ClientData]
    general: list[Example]
    notes: list[str] = field(default_factory=list)
    tally: list[Tally] = field(default_factory=list)
    tasks: dict[str, Any] = field(default_factory=dict)
    anchor: Anchor | None = None

    @property
    def data_fingerprint(self) -> str:
        """A name for the examples, in their order: whoever resumes on others would train on what was held out."""
        return self._fingerprints[0]

    @property
    def client_fingerprints(self) -> dict[str, str]:
        """The same by client: a client that joins, or leaves, changes nobody else's."""
        return self._fingerprints[1]

    @cached_property
    def _fingerprints(self) -> tuple[str, dict[str, str]]:
        """Both, client by client: the examples of one of many are encoded once for all that is asked of them here."""
        digest, own = hashlib.sha256(), {}
        for client in self.clients:
            own[client.client_id] = data_fingerprint(client, self.anchor)
            for part in [client.train, client.test, *([client.validation] if client.validation else [])]:
                digest.update(f"{client.client_id}/{len(part)}".encode())
                for example in part:
                    digest.update(f"{example.input_ids}{example.prompt_length}{example.response}".encode())
                    digest.update(str(example.earlier or "").encode())
        if self.anchor:
            digest.update(self.anchor.fingerprint.encode())
        return digest.hexdigest()[:16], own

    @property
    def identity(self) -> dict[str, str]:
        """What a run that is resumed must agree in."""
        return {"base": self.base.fingerprint, "data": self.data_fingerprint}

    def sites(
        self, config: RunConfig, method: str, seed: int, folder: Path, listen: Listener | None = None
    ) -> dict[str, Site]:
        """Every client as a site of its own, on one model."""
        model = JobModel(self.base, self.encoder, config, method, seed, self.anchor)
        return {c.client_id: Site(model, c, self.general, folder, listen, self.tasks) for c in self.clients}


def load_world(config: RunConfig, seed: int, base: Base | None = None) -> World:
    """The data of a seed, then the tokenizer, then the base (unless it is there): what is wrong is said at the first
    moment at which it can be known, and the base is what takes minutes to load."""
    notes: list[str] = []
    data = config.data.for_seed(seed)
    records, general = read_clients(data, notes, seed), read_general(data)
    tasks = read_tasks(config.evaluate)
    tokenizer = load_tokenizer(config.model) if base is None else base.tokenizer
    encoder = Encoder(tokenizer, data.template, data.max_length)
    if data.template != encoder.template:
        has = "a" if encoder.template == "chat" else "no"
        notes.append(f'data.template = "auto" stands for "{encoder.template}": the tokenizer has {has} chat template')
    clients, encoded = encode_clients(records, data, encoder), encode(general, data, encoder)
    settings = config.anchors
    if settings is not None:
        settings = replace(settings, text=settings.text.replace("{seed}", str(seed)))
        anchors = load_anchors(settings, encoder)
        tested = {example.input_ids for example in encoded}
        if seen := sum(example.input_ids in tested for example in anchors):
            notes.append(f"{seen} of {len(anchors)} anchors are in data.general: what is kept shows too well there")
    base = base or load_base(config.model, tokenizer)
    unwrap(base)
    encoder.fit(rows_of(base))
    positions = getattr(base.model.config, "max_position_embeddings", None)
    if positions and encoder.longest > positions:
        notes.append(
            f"the longest example has {encoder.longest} tokens, but the base was made for {positions}; "
            f"data.max_length = {positions} would cut it"
        )
    anchor = Anchor(base, encoder, anchors, settings) if settings is not None else None
    return World(base, encoder, clients, encoded, notes, tally(records, data), tasks, anchor)


def load_bare_world(config: RunConfig, client_ids: list[str]) -> World:
    """The base alone, and clients without examples: what their saved files can do without any data."""
    base = load_base(config.model)
    clients = [ClientData(name, [], []) for name in client_ids]
    return World(base, make_encoder(config, base), clients, [])


def make_encoder(config: RunConfig, base: Base) -> Encoder:
    return Encoder(base.tokenizer, config.data.template, config.data.max_length, rows_of(base))


def rows_of(base: Base) -> int:
    """Of the base's embedding."""
    return base.model.get_input_embeddings().weight.shape[0]


class Worlds:
    """The world of one seed at a time, on one base: that of another seed takes its place."""

    def __init__(self, config: RunConfig, world: World | None = None, seed: int | None = None):
        self.config, self.world, self.seed = config, world, seed

    def of(self, seed: int) -> World:
        if seed != self.seed:
            base = None if self.world is None else self.world.base
            self.world, self.seed = load_world(self.config, seed, base), seed
        return self.world
