"""What a client tells of its layers at an evaluation: how its held-out prompts are routed, what its grafts add, and
what those cost. `evaluation/layers.py` measures; here it becomes events.
"""

from collections.abc import Iterable, Mapping

from flex.data.examples import ClientData, Encoder
from flex.evaluation.layers import (
    LOOK_TOKENS,
    REPEATS,
    TIMED_TOKENS,
    LayerLook,
    forward_seconds,
    graft_flops,
    layer_flops,
    look,
    prompts_of,
)
from flex.evaluation.score import Prepare
from flex.model.adapters import pretrained_only
from flex.model.base import Base
from flex.store.events import Added, Cost, Event, Routed


class ClientLayers:
    """The layers of the base, whatever is on it, as one client's prompts meet them. What the untouched base does with
    them is measured once."""

    def __init__(self, base: Base, encoder: Encoder, client: ClientData, batch_size: int):
        self.base, self.encoder, self.client, self.batch_size = base, encoder, client, batch_size
        self.untouched: dict[str, LayerLook] | None = None

    def events(self, round_index: int, ends: bool, prepare: Prepare | None = None) -> list[Event]:
        """Of the model as it stands: what its grafts add; and where training `ends`, or may end, with this round also
        how it routes and what its grafts cost."""
        base, prompts = self.base, prompts_of(self.client.test, LOOK_TOKENS)
        grafted = any(getattr(layer, "graft", None) is not None for layer in base.layers.values())
        if not prompts or not (ends or grafted):
            return []
        if ends and self.untouched is None:
            with pretrained_only(base) as model:
                self.untouched = look(model, base.layers, self.encoder, prompts, self.batch_size)
        sources = {name: own.source for name, own in (self.untouched or {}).items()}
        found = look(base.model, base.layers, self.encoder, prompts, self.batch_size, prepare, sources)
        with_grafts = {name: own for name, own in found.items() if own.added is not None}
        told: list[Event] = []
        if ends and found:
            told.append(self._routed(round_index, found))
        if with_grafts:
            told.append(self._added(round_index, with_grafts))
            told += [self._cost(round_index, with_grafts)] if ends else []
        return told

    def _routed(self, round_index: int, found: Mapping[str, LayerLook]) -> Routed:
        now = {name: own for name, own in found.items() if name in self.untouched}
        before = [self.untouched[name] for name in now]
        return Routed(
            round=round_index,
            client_id=self.client.client_id,
            num_tokens=max(own.num_tokens for own in found.values()),
            layers=self._numbers(now),
            entropy=[own.entropy for own in now.values()],
            base_entropy=[own.entropy for own in before],
            most=[own.most for own in now.values()],
            source=[own.source for own in now.values()],
            counts=[own.counts for own in now.values()],
            base_counts=[own.counts for own in before],
        )

    def _added(self, round_index: int, found: Mapping[str, LayerLook]) -> Added:
        return Added(
            round=round_index,
            client_id=self.client.client_id,
            num_tokens=max(own.num_tokens for own in found.values()),
            layers=self._numbers(found),
            added=[own.added for own in found.values()],
            opening=[own.opening for own in found.values()],
        )

    def _cost(self, round_index: int, found: Mapping[str, LayerLook]) -> Cost:
        model, layers = self.base.model, {name: self.base.layers[name] for name in found}
        batch = self.encoder.batch(prompts_of(self.client.test, TIMED_TOKENS), self.base.device)
        return Cost(
            round=round_index,
            client_id=self.client.client_id,
            num_tokens=int(batch.attention_mask.sum()),
            repeats=REPEATS,
            device=self.base.device.type,
            layers=self._numbers(found),
            graft_flops=[graft_flops(layer.graft) for layer in layers.values()],
            layer_flops=[layer_flops(model, name, layer, found[name].top_k) for name, layer in layers.items()],
            seconds=forward_seconds(model, layers, batch),
        )

    def _numbers(self, names: Iterable[str]) -> list[int]:
        """Which of the base's layers these are, from 0 on."""
        place = {name: index for index, name in enumerate(self.base.layers)}
        return [place[name] for name in names]
