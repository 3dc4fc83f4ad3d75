"""Requests to stop early: a signal sets a flag, which the ranks look at together at the next step boundary.

A rank that acted on a signal alone would leave the others waiting in a collective.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

STOPPED = 75
"""Exit code: ended early on request, everything saved (EX_TEMPFAIL, which batch systems take for "again, please")."""


class StopRequest:
    """Whether somebody wants this rank to stop. Nobody does until `listen` and a signal."""

    def __init__(self) -> None:
        self.signal: str | None = None
        """The first signal that came."""
        self.can_wait = False
        """Between steps somebody looks at `asked`. Until then, nothing is there to be saved and a signal ends the process."""

    @property
    def asked(self) -> bool:
        return self.signal is not None

    def listen(self, names: tuple[str, ...]) -> None:
        """Takes the named signals and SIGINT for requests."""
        for name in {*names, "SIGINT"}:
            signal.signal(signal.Signals[name], self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number).name
        if not self.can_wait:
            sys.exit(STOPPED)
