"""Tensors in safetensors files: name -> file, dtype, shape, byte range, from the headers alone.

In: a folder with `model.safetensors`, or shards and `model.safetensors.index.json`. Out: a `Checkpoint`. No tensor is read.
Format: 8 bytes little-endian header length, JSON header, data (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.job.errors import JobError
from pipeline.weights.hub import INDEX_NAME, SINGLE_NAME
from pipeline.weights.parse import parse_json, plain_name, read_json
from pipeline.weights.unfinished import refuse_unfinished

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

HEADER_BYTES = 100_000_000
"""At most, as the safetensors library has it."""


@dataclass(frozen=True)
class Entry:
    """One tensor: elements start at byte `start` of `file` and are contiguous, row by row."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    bytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    files: tuple[Path, ...]
    entries: dict[str, Entry]

    @property
    def bytes(self) -> int:
        """Of all tensors, headers not counted."""
        return sum(entry.bytes for entry in self.entries.values())


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads the headers of a folder's safetensors files.

    Raises:
        JobError: no such files, a file that is truncated or corrupt, an index that names what is not there,
            a folder in the middle of a switch.
    """
    refuse_unfinished(folder)
    index = folder / INDEX_NAME
    if index.is_file():
        try:
            weight_map = read_json(index)["weight_map"]
            names = sorted(set(weight_map.values()))
            if outside := [name for name in names if not plain_name(name)]:
                raise ValueError(f"{outside[0]!r} is no file of this folder")
            files = tuple(folder / name for name in names)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise JobError(f"{index}: not a valid safetensors index ({error!r}). Fetch the file again.") from None
    elif (folder / SINGLE_NAME).is_file():
        weight_map = None
        files = (folder / SINGLE_NAME,)
    else:
        old = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        found = f" It has {old[0]}: convert it to safetensors first." if old else ""
        raise JobError(f"{folder}: neither {SINGLE_NAME} nor {INDEX_NAME} is here.{found}")
    entries = {entry.name: entry for file in files for entry in read_header(file)}
    for name, file_name in (weight_map or {}).items():
        if name not in entries or entries[name].file.name != file_name:
            raise JobError(f'{index}: names tensor "{name}" in {file_name}, which does not hold it. Fetch the base again.')
    return Checkpoint(folder, files, entries)


def read_header(file: Path) -> list[Entry]:
    """The entries of one safetensors file, in the order of their data.

    Raises:
        JobError: missing, truncated or corrupt file.
    """
    entries = []
    header, data_start = header_of(file)
    size = file.stat().st_size
    for name, info in header.items():
        if name == "__metadata__":
            continue
        if isinstance(info, dict) and str(info.get("dtype")) not in DTYPES:
            raise JobError(
                f'{file}: tensor "{name}" is stored as {info.get("dtype")}, which is not read here. Known: {", ".join(DTYPES)}. '
                "Convert the base, or fetch another copy."
            )
        try:
            dtype, shape, (start, end) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
            if any(type(number) is not int or number < 0 for number in (*shape, start, end)):
                raise ValueError("sizes and offsets are whole numbers from 0 on")
            entry = Entry(name, file, DTYPES[dtype], shape, data_start + start, end - start)
            sound = entry.numel * entry.dtype.itemsize == entry.bytes
        except (KeyError, TypeError, ValueError) as error:
            raise JobError(f'{file}: tensor "{name}" has a header that cannot be read ({error!r}). Fetch the file again.') from None
        if not sound:
            raise JobError(f'{file}: tensor "{name}" {dtype}{list(shape)} does not fit its {end - start} bytes. Fetch the file again.')
        if data_start + end > size:
            raise JobError(f"{file}: truncated: {size} bytes here, at least {data_start + end} by its header. Fetch the file again.")
        entries.append(entry)
    entries.sort(key=lambda entry: entry.start)
    _refuse_gaps(file, entries, data_start, size)
    return entries


def _refuse_gaps(file: Path, entries: list[Entry], data_start: int, size: int) -> None:
    """The format has the tensors lie end to end and fill the file."""
    expected = data_start
    for entry in entries:
        if entry.start != expected:
            raise JobError(f'{file}: corrupt: tensor "{entry.name}" does not begin where the one before it ends. Fetch the file again.')
        expected += entry.bytes
    if expected != size:
        raise JobError(f"{file}: corrupt: {size} bytes here, {expected} by its header. Fetch the file again.")


def header_of(file: Path) -> tuple[dict[str, Any], int]:
    """The parsed header and the byte at which the data starts."""
    try:
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > file.stat().st_size - 8:
                raise JobError(f"{file}: truncated: only {file.stat().st_size} bytes, its header alone is longer. Fetch the file again.")
            if length > HEADER_BYTES:
                raise JobError(
                    f"{file}: its header is said to have {length:,} bytes, and none has more than {HEADER_BYTES:,}. It is corrupt."
                )
            header = parse_json(stream.read(length))
    except FileNotFoundError:
        raise JobError(f"{file}: named by the index but not here. Fetch the base again.") from None
    except ValueError:
        raise JobError(f"{file}: not a safetensors file, or corrupt: its header is not JSON. Fetch the file again.") from None
    if not isinstance(header, dict):
        raise JobError(f"{file}: not a safetensors file: its header is not an object. Fetch the file again.")
    return header, 8 + length
