"""What every part is given: the device, the record, the sizes, and how much time is left."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch

from benchmarks.gpu.device import Device, Run, summary
from benchmarks.gpu.record import OURS, Key, Record
from benchmarks.layers import Layers
from benchmarks.shapes import MODELS, SMALL_TOKENS, TINY_MODELS, TOKENS, Shape

LEAST_SECONDS = 45.0  # nothing new is begun with less: the largest layer takes 40
Result = TypeVar("Result")


class OutOfTime(Exception):
    """The minutes are spent; what was measured is in the file."""


class DeviceLost(Exception):
    """After an illegal access every call fails, until the process ends: nothing more can be said of anything."""


@dataclass
class Session:
    device: Device
    record: Record
    tiny: bool
    seconds: float  # of the whole call
    again: bool = False  # measure what is in the file once more
    jobs: int | None = None  # compilers at a time; None: as many as processors
    without: frozenset[str] = frozenset()  # peers that are left out
    started: float = field(default_factory=time.monotonic)

    @property
    def models(self) -> tuple[Shape, ...]:
        return TINY_MODELS if self.tiny else MODELS

    @property
    def tokens(self) -> tuple[int, ...]:
        return (40, 24) if self.tiny else TOKENS

    @property
    def small_tokens(self) -> tuple[int, ...]:
        return (1, 3) if self.tiny else SMALL_TOKENS

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.tiny else torch.bfloat16

    @property
    def seconds_a_measurement(self) -> float:
        return 0.01 if self.tiny else 1.5

    def seconds_left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def wanted(self, part: str, shape: str, tokens: int, last: str) -> bool:
        """Whether this place, whose last pass is `last`, is to be measured. Raises OutOfTime where it is too late."""
        if self.record.done(part, shape, tokens, last) and not self.again:
            return False
        self.require_seconds()
        return True

    def require_seconds(self, least: float = LEAST_SECONDS) -> None:
        if self.seconds_left() < least:
            raise OutOfTime

    def each(
        self, part: str, token_counts: Iterable[int], last: str, measure: Callable[["Session", Shape, int], None]
    ) -> None:
        """Measures every model at every number of tokens; what goes wrong at one place is written down there."""
        for tokens in token_counts:
            for model in self.models:
                if self.wanted(part, model.name, tokens, last):
                    key = Key(part, model.name, tokens, last, OURS)
                    self.attempt(key, partial(measure, self, model, tokens))

    def measure(self, runs: dict[str, Run], seconds: float | None = None) -> dict[str, dict[str, float | int]]:
        """`seconds` for each of them; the slow ones take from the share of the fast."""
        times = self.device.time(runs, (seconds or self.seconds_a_measurement) * len(runs))
        return {name: summary(values) for name, values in times.items()}

    def attempt(self, key: Key, function: Callable[[], Result]) -> Result | None:
        """What `function` returns; None, and a line in the record, where something cannot do this here, or wrongly.

        Raises:
            OutOfTime, DeviceLost: the whole call ends. What was lost with the device is tried again by the next one.
        """
        try:
            result = function()
            self.device.synchronize()
            return result
        except (OutOfTime, DeviceLost):
            raise
        except Exception as error:
            try:
                self.device.synchronize()
            except RuntimeError as lost:
                raise DeviceLost(f"the device is lost after {' '.join(map(str, key))}: {error}") from lost
            self.record.skip(key, f"{type(error).__name__}: {error}")
            return None

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device.kind)

    def on_device(self) -> torch.device:
        """`with session.on_device():` new tensors are made there. It slows every call down: nothing is timed inside."""
        return self.torch_device

    def layers(self, model: Shape, num_tokens: int) -> Layers:
        """One layer's weights and inputs in all providers; the memory of the one before is free again."""
        self.device.release()
        with self.on_device():
            return Layers(replace(model, num_tokens=num_tokens), self.dtype)
