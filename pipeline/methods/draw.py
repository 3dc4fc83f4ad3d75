"""Where a trained tensor's first values come from: the seed and its name, so that every rank draws the same."""

from __future__ import annotations

import hashlib

import torch


def generator_of(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
