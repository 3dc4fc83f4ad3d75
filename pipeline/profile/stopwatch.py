"""Where time goes: a stack of names; at every change, the time since the last one belongs to the name on top.

On a GPU the marks are events on the stream that computes, read when all is over: nothing waits for them, and a gather counts only
for as long as computing waits for it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.cluster.watchdog import Watchdog

Key = tuple[str, str]
"""Phase, and what in it: a name pushed, or the phase itself."""
Mark = float | torch.cuda.Event
BETWEEN, GATHER = "other", "gather"
PARTS = ("data", GATHER, "forward", "backward", "reduce", "optimizer", BETWEEN)
"""Of a step's time."""


class Stopwatch:
    """Counts nothing until a phase begins.

    Args:
        device: whose time is counted; None: the processor's, whatever computes.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._cuda = device is not None and device.type == "cuda"
        self._stack: list[str] = []
        self._last: Mark | None = None
        self._begins: list[tuple[Mark, str]] = []
        self._spans: list[tuple[Key, Mark, Mark]] = []

    def phase(self, name: str) -> None:
        """From now on; whatever was pushed is over."""
        self._cut()
        self._stack = [name]
        assert self._last is not None
        self._begins.append((self._last, name))

    def push(self, name: str) -> None:
        if self._stack:
            self._cut()
            self._stack.append(name)

    def pop(self, name: str) -> None:
        """Ends what was pushed last by that name, and all above it."""
        if name in self._stack[1:]:
            self._cut()
            while self._stack.pop() != name:
                pass

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        self.push(name)
        try:
            yield
        finally:
            self.pop(name)

    def stop(self) -> None:
        """Until the next phase."""
        self._cut()
        self._stack, self._last = [], None

    def seconds(self) -> dict[Key, float]:
        """Of everything so far, each second once."""
        if self._cuda:
            torch.cuda.synchronize()
        total: dict[Key, float] = defaultdict(float)
        for key, begin, end in self._spans:
            total[key] += _between_s(begin, end)
        return dict(total)

    def begins(self) -> list[tuple[float, str]]:
        """When each phase began, by the processor's clock, and its name."""
        return [(mark, name) for mark, name in self._begins if isinstance(mark, float)]

    def _cut(self) -> None:
        now = self._now()
        if self._stack and self._last is not None:
            self._spans.append(((self._stack[0], self._stack[-1]), self._last, now))
        self._last = now

    def _now(self) -> Mark:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between_s(begin: Mark, end: Mark) -> float:
    if isinstance(begin, float):
        assert isinstance(end, float)
        return end - begin
    assert not isinstance(end, float)
    return begin.elapsed_time(end) / 1e3


class Places(Watchdog):
    """The notes that every rank takes of where it is, turned into phases of a stopwatch."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        self.stopwatch: Stopwatch | None = None
        self.seconds: dict[str, float] = {}
        """At each place before the first step."""
        self._begun: float | None = time.perf_counter()

    def at(self, phase: str, step: int | None = None, patient: bool = False) -> None:
        if self._begun is not None:
            now = time.perf_counter()
            self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._begun
            self._begun = now if phase_of(phase) == BETWEEN else None
        super().at(phase, step, patient)
        if self.stopwatch:
            self.stopwatch.phase(phase_of(phase))


def phase_of(place: str) -> str:
    """The part of a step that a rank is in at a place of its loop (pipeline/train/loop.py, step.py)."""
    match place.split()[0]:
        case "dealing":
            return "data"
        case "micro-batch":
            return "forward"
        case "all-reduce":
            return "reduce"
        case "updating":
            return "optimizer"
    return BETWEEN
