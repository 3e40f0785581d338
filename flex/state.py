"""Who owns which parameter, and the files it is kept in.

A parameter is *shared* (the server averages it), *personal* (it never leaves its client) or *frozen* (nobody trains
it). The layers declare it (`parameter_roles`); this is the one place that asks. Files are safetensors with a JSON
header, written under a temporary name and then renamed, so a reader sees a whole file or none.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flex.errors import FlexError

SIMPLE_NAME = re.compile(r"(?!\.)[\w .-]+")  # no separator, and no leading dot: neither hidden nor ".."
LONGEST_NAME = 120  # bytes; file systems take 255
ROLES = ("shared", "personal", "frozen")
KEPT_ROUNDS = 2  # of a client's personal files: the last, and the one before it for a run killed between two saves


@dataclass(frozen=True)
class Partition:
    """Every parameter of a model by name, in exactly one of the three."""

    shared: dict[str, nn.Parameter] = field(default_factory=dict)
    personal: dict[str, nn.Parameter] = field(default_factory=dict)
    frozen: dict[str, nn.Parameter] = field(default_factory=dict)

    def trained(self) -> dict[str, nn.Parameter]:
        return {**self.shared, **self.personal}

    def counts(self) -> dict[str, int]:
        return {role: sum(p.numel() for p in getattr(self, role).values()) for role in ROLES}


def partition(model: nn.Module) -> Partition:
    """What each module declares of its own parameters; what nobody declares is frozen. Sets `requires_grad` to it."""
    parts = Partition()
    for name, parameter in model.named_parameters():
        owner, _, own_name = name.rpartition(".")
        role = getattr(model.get_submodule(owner), "parameter_roles", {}).get(own_name, "frozen")
        if role not in ROLES:
            raise FlexError(f"{name} is declared {role!r}; wanted one of {', '.join(ROLES)}")
        getattr(parts, role)[name] = parameter
        parameter.requires_grad_(role != "frozen")
    return parts


@torch.no_grad()
def load_into(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor], what: str) -> None:
    """Copies `values` into `parameters`; both must name the same tensors of the same shapes."""
    if parameters.keys() != values.keys():
        odd = sorted(parameters.keys() ^ values.keys())
        raise FlexError(f"{what} does not fit this model: {odd[0]} and {len(odd) - 1} more are in only one of the two")
    for name, parameter in parameters.items():
        if parameter.shape != values[name].shape:
            raise FlexError(
                f"{what} does not fit this model: {name} is {tuple(values[name].shape)}; "
                f"wanted {tuple(parameter.shape)}"
            )
        parameter.copy_(values[name])


def snapshot(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """A copy of the values, in fp32 on the CPU."""
    return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in parameters.items()}


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """A safetensors file with a JSON header; whole or not at all.

    Raises:
        FlexError: the disk is full, or the folder cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in tensors.items()}, part, metadata={"flex": json.dumps(dict(header))})
        _to_disk(part)
        part.replace(path)
        _to_disk(path.parent)  # the rename too
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise FlexError(f"cannot write {path}: {error}") from None


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, header) of a file that `save_tensors` wrote.

    Raises:
        FlexError: the file is missing, cut short, or not ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("flex", "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise FlexError(f"no state file at {path}") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise FlexError(f"{path} is damaged or no safetensors file: {error}") from None
    if header is None:
        raise FlexError(f"{path} has no FLEx header; wanted a file that a FLEx run wrote")
    return tensors, header


def folder_name(client_id: str) -> str:
    """The folder of a client, whatever its name holds: one level, different for different names.

    Letters, digits, spaces, `_`, `-` and `.` (not in front) stay, bytes of anything else become %XX; what is too long
    is cut and ends in a hash of the whole.
    """
    name = client_id
    if not SIMPLE_NAME.fullmatch(name):
        name = quote(name, safe=" ", errors="surrogatepass").replace("~", "%7E")
        name = f"%2E{name[1:]}" if name.startswith(".") else name
    if len(name.encode()) > LONGEST_NAME:
        # No other name holds a "~", so a cut one never meets it. Twenty letters are at most 80 bytes.
        digest = hashlib.sha256(client_id.encode("utf-8", "surrogatepass")).hexdigest()
        name = f"{name[:20]}~{digest[:32]}"
    return name or "%"


def round_file(folder: Path, round_index: int) -> Path:
    return folder / f"round-{round_index:04d}.safetensors"


def rounds_in(folder: Path) -> list[int]:
    """The rounds a folder holds a file of, ascending."""
    return sorted(int(p.stem.partition("-")[2]) for p in folder.glob("round-*.safetensors"))


@dataclass
class PersonalState:
    """What one client owns, by name: `parameters`, their optimizer's `moments`, SCAFFOLD's `control` variates."""

    parameters: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    control: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class PersonalStore:
    """One client's personal state on disk, a file a round, the last two kept."""

    folder: Path
    header: dict[str, Any]  # what must agree: base, method, seed, client

    def load(self, at_most: int) -> PersonalState | None:
        """The newest state that is not after round `at_most`; None where there is none."""
        rounds = [r for r in rounds_in(self.folder) if r <= at_most]
        if not rounds:
            return None
        path = round_file(self.folder, rounds[-1])
        tensors, header = load_tensors(path)
        check_header(path, header, self.header)
        state = PersonalState()
        for key, tensor in tensors.items():
            kind, _, name = key.partition(":")
            getattr(state, kind)[name] = tensor
        return state

    def save(self, round_index: int, state: PersonalState) -> None:
        tensors = {f"{f.name}:{name}": tensor for f in fields(state) for name, tensor in getattr(state, f.name).items()}
        save_tensors(round_file(self.folder, round_index), tensors, {**self.header, "round": round_index})
        for old in rounds_in(self.folder)[:-KEPT_ROUNDS]:
            round_file(self.folder, old).unlink(missing_ok=True)

    def forget(self, after: int) -> None:
        """Drops the files of rounds after `after`: a run that is resumed does those rounds again."""
        for later in [r for r in rounds_in(self.folder) if r > after]:
            round_file(self.folder, later).unlink(missing_ok=True)


def check_header(path: Path, header: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises FlexError where a file belongs to another base, method, seed or client."""
    for key, value in wanted.items():
        if header.get(key) != value:
            raise FlexError(f"{path} belongs to {key} {header.get(key)!r}; this run has {key} {value!r}")


def optimizer_moments(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state of these parameters as named tensors (`<moment>/<parameter>`)."""
    return {
        f"{key}/{name}": torch.as_tensor(value).detach().cpu().clone()
        for name, p in parameters.items()
        for key, value in optimizer.state.get(p, {}).items()
    }


def load_moments(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], moments: Mapping[str, Tensor]
) -> None:
    """The exact inverse of `optimizer_moments`. `step` stays on the CPU, where AdamW keeps it."""
    for key, value in moments.items():
        moment, _, name = key.partition("/")
        device = "cpu" if moment == "step" else parameters[name].device
        optimizer.state[parameters[name]][moment] = value.to(device, copy=True)
