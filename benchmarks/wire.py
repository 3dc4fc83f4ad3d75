"""What a process sends through torch.distributed: calls and bytes, by collective.

Of a gather and of a reduction alike, the bytes of the whole tensor.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import torch
import torch.distributed as dist

_COLLECTIVES = [
    "broadcast",
    "all_reduce",
    "reduce",
    "all_gather",
    "all_gather_into_tensor",
    "_all_gather_base",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "_reduce_scatter_base",
    "all_to_all",
    "all_to_all_single",
    "gather",
    "scatter",
    "send",
    "recv",
    "isend",
    "irecv",
]


class Wire:
    """Made before DeepSpeed is imported or joins its ranks, which binds the functions."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self._inside = False
        for name in _COLLECTIVES:
            counted = self._counted(name, getattr(dist.distributed_c10d, name))
            setattr(dist.distributed_c10d, name, counted)
            if hasattr(dist, name):
                setattr(dist, name, counted)

    def gathered(self) -> tuple[int, int]:
        """Calls and bytes of gathers so far."""
        return _sum(self.calls, "all_gather"), _sum(self.bytes, "all_gather")

    def _counted(self, name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def counting(*args: object, **kwargs: object) -> object:
            if self._inside:
                return function(*args, **kwargs)
            self.calls[name] += 1
            self.bytes[name] += max(map(_bytes_of, [*args, *kwargs.values()]))
            self._inside = True
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False

        return counting


def _sum(counts: Counter[str], part: str) -> int:
    return sum(count for name, count in counts.items() if part in name)


def _bytes_of(argument: object) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.numel() * argument.element_size()
    return sum(map(_bytes_of, argument)) if isinstance(argument, list | tuple) else 0
