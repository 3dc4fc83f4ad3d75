"""Memory by part, followed through a step: every tensor storage from its birth to its end, by the operators that hand it out.

Neither the allocator nor Python counts, so the figures are the same on every machine; kernels' own scratch memory does not show.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

GATHERED, WORKING, KEPT = "gathered", "working", "kept"


@dataclass
class Storage:
    """One that was made; what lives through the forward pass is kept for the backward one."""

    part: str
    bytes: int


class Storages(TorchDispatchMode):
    """Live bytes of what was made while it is entered, by who made it; and the most there was."""

    def __init__(self) -> None:
        super().__init__()
        self.live = {GATHERED: 0, WORKING: 0}
        self.most = dict(self.live)
        """Of each, at its own moment."""
        self.total = 0
        """The most of both together."""
        self.maker = WORKING
        self.changes: list[tuple[float, Storage, int]] = []
        """Seconds, what came or went, and its bytes, negative when it went."""
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._alive: dict[int, Storage] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._follow(tensor.untyped_storage(), self.maker)
        return out

    def know(self, tensors: Iterable[torch.Tensor]) -> None:
        """Storages that were there before, and do not count."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()._cdata] = weakref.ref(tensor.untyped_storage())

    def count(self, tensors: Iterable[torch.Tensor], part: str) -> None:
        """Storages that were there before, and do."""
        for tensor in tensors:
            self._follow(tensor.untyped_storage(), part)

    def keep(self) -> None:
        """The forward pass is over: what it made and is alive is kept for the backward pass, and was so from the beginning."""
        for storage in self._alive.values():
            if storage.part == WORKING:
                storage.part = KEPT

    def again(self) -> None:
        """A step begins: the most is counted anew."""
        self.total, self.most = sum(self.live.values()), dict(self.live)

    def _follow(self, storage: torch.UntypedStorage, maker: str) -> None:
        key, made = storage._cdata, Storage(maker, storage.nbytes())
        if (known := self._known.get(key)) is not None and known() is not None:
            return

        def gone(_: object) -> None:
            self.live[maker] -= made.bytes
            self._known.pop(key, None)
            self._alive.pop(key, None)
            self.changes.append((time.perf_counter(), made, -made.bytes))

        self._known[key], self._alive[key] = weakref.ref(storage, gone), made
        self.live[maker] += made.bytes
        self.most[maker] = max(self.most[maker], self.live[maker])
        self.total = max(self.total, sum(self.live.values()))
        self.changes.append((time.perf_counter(), made, made.bytes))


def timeline(changes: list[tuple[float, Storage, int]], begin: float, points: int = 2000) -> list[dict[str, float]]:
    """Bytes by part after each change; where there are more than `points`, the highest of each stretch of time.

    Args:
        begin: seconds that are counted from.
    """
    now = {GATHERED: 0, KEPT: 0, WORKING: 0}
    rows: list[dict[str, float]] = []
    for moment, storage, count in changes:
        now[storage.part] += count
        rows.append({"s": moment - begin, **now})
    if len(rows) <= points:
        return rows
    end = rows[-1]["s"] - rows[0]["s"]
    highest: dict[int, dict[str, float]] = {}
    for row in rows:
        place = int((row["s"] - rows[0]["s"]) / end * (points - 1))
        if place not in highest or _height(row) >= _height(highest[place]):
            highest[place] = row
    return list(highest.values())


def _height(row: dict[str, float]) -> float:
    return row[GATHERED] + row[KEPT] + row[WORKING]
