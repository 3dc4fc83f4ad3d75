"""What each weight file of a result holds, byte for byte in order: its header, and one piece for each tensor. No tensor is read.

A file keeps the base's header to the byte where names, shapes and dtypes stay; otherwise it has a header of the same order.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.deltas.changes import Change
from pipeline.deltas.mixture import Mixture
from pipeline.weights.index import DTYPES, Entry, header_of, read_header

_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """One tensor of the result."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Byte in the result's file."""
    entry: Entry | None
    """In the base; None: a head's."""
    change: Change | None
    head: torch.Tensor | None

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    source: Path
    """The base's file of that name."""
    header: bytes
    pieces: tuple[Piece, ...]

    @property
    def name(self) -> str:
        return self.source.name


def layouts_of(mixture: Mixture) -> list[Layout]:
    """Of every file of the result. The last one takes a head in; one that the base has gives way."""
    files = mixture.checkpoint.files
    return [_layout_of(mixture, file, mixture.head_tensors if file == files[-1] else {}) for file in files]


def _layout_of(mixture: Mixture, file: Path, head: dict[str, torch.Tensor]) -> Layout:
    old, data_start = header_of(file)
    entries = read_header(file)
    kept = [entry for entry in entries if entry.name not in mixture.head_tensors]
    none = Change()
    rows: list[tuple[str, torch.dtype, tuple[int, ...], Entry | None, torch.Tensor | None]] = [
        (entry.name, mixture.becomes(entry.dtype), mixture.changes.get(entry.name, none).shape(entry.shape), entry, None) for entry in kept
    ]
    rows += [(name, mixture.becomes(tensor.dtype), tuple(tensor.shape), None, tensor) for name, tensor in head.items()]
    same = len(kept) == len(entries) and all(entry and (dtype, shape) == (entry.dtype, entry.shape) for _, dtype, shape, entry, _ in rows)
    header: dict[str, Any] = {key: value for key, value in old.items() if key == "__metadata__"}
    place, starts = 0, []
    for name, dtype, shape, _, _ in rows:
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [place, place + size]}
        starts.append(place)
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = len(text).to_bytes(8, "little") + text
    if same:
        with file.open("rb") as stream:
            data = stream.read(data_start)
    pieces = (
        Piece(name, dtype, shape, len(data) + start, entry, mixture.changes.get(name) if entry else None, tensor)
        for (name, dtype, shape, entry, tensor), start in zip(rows, starts, strict=True)
    )
    return Layout(file, data, tuple(pieces))
