"""The bytes of one piece of a result, a run of rows at a time: the base's own, the base's in another dtype, or the base's changed.

The sum is in fp32 (in the base's dtype where that is wider) and rounded once. Whatever makes a piece makes the same bytes: block sizes do
not depend on threads or on what was asked beside it. Holds a few blocks of `_BLOCK_ELEMENTS`: 20 MB at most, whatever the tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from pipeline.deltas.layout import Piece
from pipeline.job.errors import JobError
from pipeline.weights.index import Entry
from pipeline.weights.read import Reader, byte_view

_BLOCK_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class Rounding:
    """What the one rounding made of a changed or converted tensor."""

    largest_error: float = 0.0
    changed_elements: int = 0
    """The base's, whose exact change is not zero."""
    vanished_elements: int = 0
    """Of them, those that are rounded to what the base's element is in the result's dtype."""


def make_piece(piece: Piece, reader: Reader, write: Callable[[memoryview], None]) -> Rounding | None:
    """Writes it. None: byte for byte the base's.

    Raises:
        JobError: a result that is not finite.
    """
    if piece.entry is None:
        assert piece.head is not None
        write(byte_view(piece.head.to(piece.dtype).contiguous()))
        return None
    if piece.change is None and piece.dtype == piece.entry.dtype:
        reader.read_run(piece.entry.file, piece.entry.start, piece.entry.bytes, write)
        return None
    return _round(piece, piece.entry, reader, write)


def _round(piece: Piece, entry: Entry, reader: Reader, write: Callable[[memoryview], None]) -> Rounding:
    rows = entry.shape[0] if entry.shape else 1
    columns = entry.numel // rows if rows else 0
    block = max(1, _BLOCK_ELEMENTS // max(1, columns))
    wide = torch.promote_types(entry.dtype, torch.float32)
    found = Rounding()
    for first in range(0, rows if columns else 0, block):
        last = min(rows, first + block)
        stored = torch.empty((last - first) * columns, dtype=entry.dtype)
        reader.read(entry, first * columns, stored)
        base = stored.view(-1, columns).to(wide)
        if piece.change is None:
            found = _write(base, piece, write, found)
            continue
        exact, moved = piece.change.rows(base, first, rows)
        found = _write(exact, piece, write, found)
        vanished = moved & (exact.to(piece.dtype) == base.to(piece.dtype))
        found = replace(
            found,
            changed_elements=found.changed_elements + int(moved.sum()),
            vanished_elements=found.vanished_elements + int(vanished.sum()),
        )
    if piece.change and (more := piece.change.behind(rows)) is not None:
        found = _write(more.to(wide), piece, write, found)
    return found


def _write(exact: torch.Tensor, piece: Piece, write: Callable[[memoryview], None], found: Rounding) -> Rounding:
    rounded = exact.to(piece.dtype)
    # What is infinite may be the base's own, where nothing is added to it.
    if bool((~rounded.isfinite() & (exact.isfinite() if piece.change is None else True)).any()):
        assert piece.entry is not None
        why = "Is the delta sound?" if piece.change else "Choose another --dtype: bf16 has the range of fp32."
        raise JobError(f'{piece.entry.file}: tensor "{piece.name}" is not finite after the merge in {piece.dtype}. {why}')
    write(byte_view(rounded.contiguous()))
    error = (rounded.to(exact.dtype) - exact).abs().nan_to_num_(0.0).max() if exact.numel() else 0.0
    return replace(found, largest_error=max(found.largest_error, float(error)))
