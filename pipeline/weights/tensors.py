"""Small safetensors files, written and read whole: deltas and states."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from pipeline.job.errors import JobError
from pipeline.weights.index import Entry, read_header
from pipeline.weights.read import Reader


def save_tensors(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Raises:
    OSError: as the system tells it, a full disk included."""
    if empty := [name for name, tensor in tensors.items() if tensor.numel() == 0]:
        raise AssertionError(f"refusing to write empty tensors: {empty[0]}")
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError:  # how the library tells of a full disk
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file)) from None


def load_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Raises:
    ValueError: not a whole safetensors file, or larger than the machine's memory."""
    try:
        entries = read_header(file)
        if file.stat().st_size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
            raise ValueError(f"{file.stat().st_size:,} bytes, more than this machine has memory")
        # Not mapped: a mapped file cannot be removed on NFS. Nor read whole beside its tensors.
        with Reader() as reader:
            return {entry.name: _read(entry, reader) for entry in entries}
    except (OSError, JobError, MemoryError) as error:
        raise ValueError(str(error)) from None


def _read(entry: Entry, reader: Reader) -> torch.Tensor:
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    reader.read(entry, 0, tensor.view(-1))
    return tensor
