"""A collective waits for the slowest rank, and for ever for a lost one. Every rank notes where it is and watches itself.

`logs/rank<N>.json` in the run folder says, a few seconds late at most, which step and phase a rank is in. A rank that stays at
one place for too long writes a report of all ranks' places and ends the run.
"""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
_BEAT_S = 10.0


@dataclass(frozen=True)
class Place:
    """Where a rank is. `since` in seconds since 1970."""

    rank: int
    host: str
    pid: int
    step: int
    """Being taken, counted from 1; 0 before the first."""
    phase: str
    since: float


class Watchdog:
    """Without `start`, a note of where this rank is that nobody reads."""

    def __init__(self, rank: int = 0) -> None:
        self._rank = rank
        self._step, self._phase, self._since, self._patient = 0, "starting", time.time(), False
        self._mark = time.monotonic()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def at(self, phase: str, step: int | None = None, patient: bool = False) -> None:
        """Notes that this rank gets on.

        Args:
            step: the step it takes from now on; None: as before.
            patient: this phase may take any time (a download).
        """
        if step is not None:
            self._step = step
        self._phase, self._since, self._patient = phase, time.time(), patient
        self._mark = time.monotonic()

    def over(self, phase: str, items: Iterable[T]) -> Iterator[T]:
        """Iterates, and notes each item as progress."""
        for item in items:
            self.at(phase)
            yield item

    @property
    def place(self) -> str:
        """For messages."""
        return f"step {self._step}, {self._phase}"

    def start(self, logs: Path, ranks: int, timeout_s: float, on_timeout: Callable[[str], None]) -> None:
        """Watches from now on.

        Args:
            on_timeout: is handed the report, in the watching thread, and ends the process.
        """
        self._thread = threading.Thread(target=self._watch, args=(logs, ranks, timeout_s, on_timeout), name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Watches no longer; the last place stays readable."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, logs: Path, ranks: int, timeout_s: float, on_timeout: Callable[[str], None]) -> None:
        beat_s = min(_BEAT_S, timeout_s / 4)
        written, ending = None, False
        while True:
            place = Place(self._rank, platform.node(), os.getpid(), self._step, self._phase, self._since)
            if place != written:
                _write(logs, place)
                written = place
            if ending:
                return
            if not self._patient and time.monotonic() - self._mark > timeout_s:
                # The others came to the same end at about this time: let their last places arrive.
                time.sleep(beat_s / 2)
                faulthandler.dump_traceback(2)  # this rank's log
                on_timeout(_report(logs, ranks, timeout_s, place))
                return
            ending = self._ended.wait(beat_s)


def _write(logs: Path, place: Place) -> None:
    # Over the old text, in one write: a rename a beat and rank would be hard on a parallel file system.
    text = json.dumps(asdict(place)).ljust(256) + "\n"
    try:
        descriptor = os.open(_file(logs, place.rank), os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(descriptor, text.encode(), 0)
        finally:
            os.close(descriptor)
    except OSError:
        return  # a full disk stops the run where something is lost by it


def _file(logs: Path, rank: int) -> Path:
    return logs / f"rank{rank}.json"


def _report(logs: Path, ranks: int, timeout_s: float, own: Place) -> str:
    lines = [f"no progress for {timeout_s:g} s on rank {own.rank}; where each rank was:"]
    now = time.time()
    for rank in range(ranks):
        try:
            place = own if rank == own.rank else Place(**json.loads(_file(logs, rank).read_text(encoding="utf-8")))
            lines.append(f"  rank {rank} on {place.host}: step {place.step}, {place.phase}, for {now - place.since:.0f} s")
        except (OSError, ValueError, TypeError):
            lines.append(f"  rank {rank}: has not said")
    lines.append(
        "Run again to continue from the last state. What each rank was executing is in logs/; train.timeout_s sets how long to wait."
    )
    return "\n".join(lines)
