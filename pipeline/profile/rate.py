"""The rate that a step is held against: of matrix products alone, on this device, while all ranks do the same."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

_WIDTH = {"cpu": 1024, "cuda": 8192}
_PRODUCTS = 5


def matrix_flops_s(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of square products in a dtype: the best of a few. A collective."""
    width = _WIDTH[device.type]
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    a @ b
    dist.barrier()
    for _ in range(_PRODUCTS):
        _wait(device)
        begun = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - begun)
    return 2 * width**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
