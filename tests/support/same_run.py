"""Whether two runs came to the same, and a run that is cut off in the middle of a round."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import read_log

from flex.federation import client

TIMES = ("seconds", "turn_seconds", "started", "tokens", "peak_bytes")  # of one process; a resumed job had two


def without_times(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in e.items() if k not in TIMES} for e in events]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every file of a run, by file and name."""
    return {
        f"{path.relative_to(folder)}:{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_same_run(one: Path, other: Path) -> None:
    """The same tensors bit for bit, and the same log but for times and title; of runs, or of jobs."""
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    events = [without_times(read_log(f / "metrics.jsonl")) for f in (one, other)]
    for stream in events:
        for event in stream:
            event.pop("title", None)
    assert events[0] == events[1]


@contextmanager
def plug_pulled(round_index: int, client_id: str = "b") -> Iterator[None]:
    """What runs inside ends, with an error, when this client's turn in this round comes; as after a crash."""
    original = client.Site.train

    def train(self: client.Site, at: int, *rest: Any, **more: Any) -> Any:
        if (self.client_id, at) == (client_id, round_index):
            raise RuntimeError("pulled the plug")
        return original(self, at, *rest, **more)

    client.Site.train = train
    try:
        with pytest.raises(RuntimeError, match="pulled the plug"):
            yield
    finally:
        client.Site.train = original
