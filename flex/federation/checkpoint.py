"""The server's checkpoint: shared state and strategy moments of a round in one safetensors file."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flex.errors import FlexError
from flex.federation.messages import Arrays
from flex.federation.strategy import FedAvg, strategy_state
from flex.store.files import load_tensors, save_tensors


def save_server(
    path: Path, round_index: int, shared: Arrays, strategy: FedAvg, header: Mapping[str, Any] | None = None
) -> None:
    """All that the server needs to go on after round `round_index`, in one safetensors file; whole or not at all.

    Args:
        header: what the caller wants to find again (base, method, seed); JSON values.

    Raises:
        FlexError: the file cannot be written (disk full, no such folder).
    """
    tensors = {f"shared:{name}": array for name, array in shared.items()}
    tensors |= {f"strategy:{name}": array for name, array in strategy_state(strategy).items()}
    tensors = {name: torch.from_numpy(np.array(array, dtype=np.float32)) for name, array in tensors.items()}
    kept = {"kind": "server", "round": round_index, "sha256": _digest(tensors), "header": dict(header or {})}
    kept["order"] = list(shared)  # a safetensors file has its own; sums over tensors and seals go by that of the run
    save_tensors(path, tensors, kept)


def load_server(path: Path) -> tuple[int, Arrays, Arrays, dict[str, Any]]:
    """(round_index, shared, strategy_arrays, header) of a file that `save_server` wrote.

    Raises:
        FlexError: the file is missing, cut short, changed, or something else than a server's state.
    """
    tensors, kept = load_tensors(path)
    if not isinstance(kept, dict) or kept.get("kind") != "server":
        raise FlexError(f"{path} is no server state; expected a file that `save_server` wrote")
    if kept.get("sha256") != _digest(tensors):
        raise FlexError(f"{path} is damaged: its tensors are not those that were written")
    parts: dict[str, Arrays] = {"shared": {}, "strategy": {}}
    for key, tensor in tensors.items():
        part, _, name = key.partition(":")
        parts[part][name] = tensor.numpy().copy()  # the tensor is a map of the file
    shared = {name: parts["shared"][name] for name in kept.get("order", parts["shared"])}
    return kept["round"], shared, parts["strategy"], kept["header"]


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name].numpy()
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()
