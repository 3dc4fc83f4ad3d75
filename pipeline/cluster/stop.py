"""Requests to stop early: a signal sets a flag, which the ranks look at together at the next step boundary.

A rank that acted on a signal alone would leave the others waiting in a collective.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

STOPPED = 75
"""Exit code: ended early on request, everything saved (EX_TEMPFAIL, which batch systems take for "again, please")."""


class StopRequest:
    """Whether somebody wants this rank to stop. Nobody does until `listen` and a signal."""

    def __init__(self) -> None:
        self.signal: str | None = None
        """The first signal that came."""
        self.can_wait = False
        """Between steps somebody looks at `asked`. Until then there is nothing to save, and a signal ends the process."""

    @property
    def asked(self) -> bool:
        return self.signal is not None

    def listen(self, names: tuple[str, ...], at_once: Callable[[str], None]) -> None:
        """Takes the named signals and SIGINT for requests; those that came since the launcher held them back, too.

        Args:
            at_once: is handed the signal's name while nothing can wait, in another thread, and ends the process.
        """
        numbers = [signal.Signals[name] for name in {*names, "SIGINT"}]
        # A handler in Python would wait for the main thread, which may be waiting for other ranks; a byte in a pipe does not.
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in numbers:
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._read, args=(reading, set(numbers), at_once), name="stop requests", daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)

    def _read(self, pipe: int, numbers: set[signal.Signals], at_once: Callable[[str], None]) -> None:
        while byte := os.read(pipe, 1):
            # Other signals with a handler in Python come along.
            if (number := signal.Signals(byte[0])) not in numbers:
                continue
            name = number.name
            self.signal = self.signal or name
            if not self.can_wait:
                at_once(name)
