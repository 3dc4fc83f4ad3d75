"""Small safetensors files, written and read whole: deltas and states."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file


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
        # Not mapped: a mapped file cannot be removed on NFS.
        return load(file.read_bytes())
    except (OSError, SafetensorError) as error:
        raise ValueError(str(error)) from None
