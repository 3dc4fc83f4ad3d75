"""Dropout that belongs to the example, not to the rank: a mask is a hash of (seed, step, layer, example, position, feature).

So it does not depend on how examples are dealt to ranks and micro-batches, on packing, or on when it is recomputed, and there
is no generator state to save. The mixer is the finaliser of MurmurHash3, in place on int32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_MASK = 0xFFFFFFFF


@dataclass
class DropoutClock:
    """What every branch's dropout reads: the step it is in and the keys of the tokens it sees. Set before each forward pass."""

    seed: int
    step: int = 0
    keys: torch.Tensor | None = None
    """[N] int32, one per token of the micro-batch; None switches dropout off (evaluation)."""


def keyed_dropout(x: torch.Tensor, probability: float, clock: DropoutClock, layer: int) -> torch.Tensor:
    """Dropout of x [..., K] with N = all leading elements; scaled by 1 / (1 - p), and off where the clock has no keys.

    Args:
        layer: tells one place of the model from another.
    """
    if probability == 0.0 or clock.keys is None:
        return x
    salt = _signed(_mix(clock.seed * 0x9E3779B1 + clock.step * 0x85EBCA77 + layer * 0xC2B2AE3D))
    keys, rows = clock.keys, x.numel() // x.shape[-1]
    if rows != len(keys):
        # DeBERTa's relative positions belong to no example: keyed by their own rows, alike on all ranks.
        keys = torch.arange(rows, device=x.device, dtype=torch.int32)
    features = torch.arange(x.shape[-1], device=x.device, dtype=torch.int32) * _signed(0x27D4EB2F)
    noise = (keys ^ salt)[:, None] * _signed(0x165667B1) + features
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        noise ^= (noise >> shift) & ((1 << (32 - shift)) - 1)
        noise *= _signed(factor)
    noise ^= (noise >> 16) & 0xFFFF
    keep = noise >= int(probability * 2**32) - 2**31
    return x * (keep.view(x.shape) * (1.0 / (1.0 - probability))).to(x.dtype)


def _mix(value: int) -> int:
    value &= _MASK
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        value ^= value >> shift
        value = value * factor & _MASK
    return value ^ value >> 16


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 32) if value >= 1 << 31 else value
