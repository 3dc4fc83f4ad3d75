"""Small safetensors files, written and read whole: deltas and states."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from pipeline.job.errors import JobError
from pipeline.weights.index import read_header


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
    ValueError: not a whole safetensors file."""
    try:
        # What does not begin as such a file, or is larger than this machine, is not read at all.
        read_header(file)
        if file.stat().st_size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
            raise ValueError(f"{file.stat().st_size:,} bytes, more than this machine has memory")
        # Not mapped: a mapped file cannot be removed on NFS.
        return load(file.read_bytes())
    except (OSError, SafetensorError, JobError, MemoryError) as error:
        raise ValueError(str(error)) from None
