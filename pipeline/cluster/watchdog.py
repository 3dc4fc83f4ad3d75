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
RANK_FAILED = 76
"""Exit code: a rank, node or collective failed; running again goes on."""
ENDED = "ended with exit code "
"""The last phase of a rank that did not end well."""
_BEAT_S = 10.0
_LAST_WORDS_S = 10.0


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
    steps: int = 0
    """Of the whole run; 0: not known yet."""


class Watchdog:
    """Without `start`, a note of where this rank is that nobody reads."""

    def __init__(self, rank: int = 0) -> None:
        self._rank = rank
        self.steps = 0
        """Of the whole run, for those who look at it from outside; 0: not known yet."""
        self._step, self._phase, self._since, self._patient = 0, "starting", time.time(), False
        self._mark = time.monotonic()
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []

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
            on_timeout: is handed the report, in a thread of its own, and ends the process.
        """
        beat_s = min(_BEAT_S, timeout_s / 4)

        def give_up() -> None:
            # Whatever the report waits for (a dead file system, say), the process ends.
            threading.Timer(_LAST_WORDS_S, os._exit, [RANK_FAILED]).start()
            faulthandler.dump_traceback(2)  # this rank's log
            on_timeout(_report(logs, ranks, timeout_s, self._place()))

        self._threads = [
            threading.Thread(target=self._tell, args=(logs, beat_s), name="watchdog's notes", daemon=True),
            threading.Thread(target=self._watch, args=(beat_s, timeout_s, give_up), name="watchdog", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Watches no longer; the last place stays readable."""
        self._ended.set()
        for thread in self._threads:
            thread.join(_BEAT_S)

    def _place(self) -> Place:
        return Place(self._rank, platform.node(), os.getpid(), self._step, self._phase, self._since, self.steps)

    def _tell(self, logs: Path, beat_s: float) -> None:
        written = None
        while True:
            ending, place = self._ended.is_set(), self._place()
            if place != written:
                _write(logs, place)
                written = place
            if ending:
                return
            self._ended.wait(beat_s)

    def _watch(self, beat_s: float, timeout_s: float, give_up: Callable[[], None]) -> None:
        """Touches no file: it must come back from where others do not."""
        late = False
        while not self._waited(beat_s):
            if self._patient or time.monotonic() - self._mark <= timeout_s:
                late = False
            elif late:
                threading.Thread(target=give_up, name="watchdog's report", daemon=True).start()
                return
            else:
                # Looked at twice; and the others come to the same end at about this time: their last places may arrive.
                late = True

    def _waited(self, beat_s: float) -> bool:
        """Waits a beat; True where the watch has ended. A process that was suspended meanwhile gets all its time again."""
        begun = time.monotonic()
        ended = self._ended.wait(beat_s)
        if time.monotonic() - begun > 2 * beat_s:
            self._mark = time.monotonic()
        return ended


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
    lines.append("What each rank was executing is in logs/; train.timeout_s sets how long to wait.")
    return "\n".join(lines)
