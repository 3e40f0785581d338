"""Files of tensors: safetensors with a JSON header, written under a temporary name and then renamed, so that a reader
sees a whole file or none; and how folders and rounds are named."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flex.errors import FlexError

FORMAT = 2  # of the files; one without a number is of format 1, which has the same tensors
SIMPLE_NAME = re.compile(r"(?!\.)[\w .-]+")  # no separator, and no leading dot: neither hidden nor ".."
HEADER = "flex"  # under which a file's metadata hold ours
# As safetensors names them.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
LOCK = ".lock"  # of a folder that one process at a time writes
LONGEST_NAME = 120  # bytes; file systems take 255


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """A safetensors file with a JSON header; whole or not at all.

    Raises:
        FlexError: the disk is full, or the folder cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format": FORMAT, **header})
        _stream(part, tensors, {HEADER: text})
        _to_disk(part)
        part.replace(path)
        _to_disk(path.parent)  # the rename too
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise FlexError(f"cannot write {path}: {error}") from None


def _stream(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, tensor by tensor: the library's own `save_file` first makes bytes of all of them.

    Raises:
        OSError: the disk is full.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # so that each is aligned
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy() if flat.numel() else b"")


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, header) of a file that `save_tensors` wrote.

    Raises:
        FlexError: the file is missing, cut short, not ours, or of a later format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(HEADER, "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise FlexError(f"no state file at {path}") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise FlexError(f"{path} is damaged or no safetensors file: {error}") from None
    if not isinstance(header, dict):
        raise FlexError(f"{path} has no FLEx header; expected a file that a FLEx run wrote")
    if (number := header.pop("format", 1)) not in range(1, FORMAT + 1):
        raise FlexError(f"{path} has format {number}; this version reads formats 1 to {FORMAT}")
    return tensors, header


def is_locked(folder: Path) -> bool:
    """Whether a process holds the lock of `folder`; False where there is none, or the file system has none."""
    try:
        with (folder / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


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


def check_header(path: Path, header: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises FlexError where a file belongs to another base, method, seed or client."""
    for key, value in wanted.items():
        if header.get(key) != value:
            raise FlexError(f"{path} belongs to {key} {header.get(key)!r}; this run has {key} {value!r}")
