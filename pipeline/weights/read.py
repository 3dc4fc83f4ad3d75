"""Ranged reads: a run of a tensor's elements from its file into memory that is already there.

Nothing is mapped, so resident memory grows by the destination alone; a change of dtype goes through a small buffer.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch

from pipeline.job.errors import JobError
from pipeline.weights.index import Entry

_CHUNK_ELEMENTS = 1 << 20
_CHUNK_BYTES = 1 << 18


class Reader:
    """Keeps files open between reads and counts what it read. Use as a context manager."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self.bytes_read = 0

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def read(self, entry: Entry, first: int, out: torch.Tensor) -> None:
        """Fills `out` (1-D, contiguous, any device) with elements `first ... first + out.numel()` of the flattened tensor.

        Raises:
            JobError: the file ends before the tensor does.
        """
        if entry.dtype == out.dtype and out.device.type == "cpu":
            self._read_bytes(entry, first * entry.dtype.itemsize, out)
            return
        buffer = torch.empty(min(_CHUNK_ELEMENTS, out.numel()), dtype=entry.dtype)
        for begin in range(0, out.numel(), _CHUNK_ELEMENTS):
            piece = buffer[: min(_CHUNK_ELEMENTS, out.numel() - begin)]
            self._read_bytes(entry, (first + begin) * entry.dtype.itemsize, piece)
            out[begin : begin + piece.numel()].copy_(piece)

    def _read_bytes(self, entry: Entry, offset: int, out: torch.Tensor) -> None:
        view, descriptor = byte_view(out), self._open(entry.file)
        done = 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], entry.start + offset + done)
            if count == 0:
                raise JobError(f'{entry.file}: ends inside tensor "{entry.name}". Fetch the file again.')
            done += count
        self.bytes_read += done

    def read_run(self, file: Path, start: int, count: int, take: Callable[[memoryview], None]) -> None:
        """Hands on a run of bytes, some at a time.

        Raises:
            JobError: the file ends before it does.
        """
        buffer = memoryview(bytearray(min(count, _CHUNK_BYTES)))
        descriptor, end = self._open(file), start + count
        while start < end:
            done = os.preadv(descriptor, [buffer[: min(len(buffer), end - start)]], start)
            if done == 0:
                raise JobError(f"{file}: ends early, at byte {start:,}. Fetch the file again.")
            take(buffer[:done])
            start += done
            self.bytes_read += done

    def _open(self, file: Path) -> int:
        if file not in self._files:
            self._files[file] = os.open(file, os.O_RDONLY)
        return self._files[file]


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    # numpy knows no bfloat16, and its arrays are buffers though its types do not say so.
    return memoryview(tensor.view(-1).view(torch.uint8).numpy()).cast("B") if tensor.numel() else memoryview(b"")  # type: ignore[arg-type]
