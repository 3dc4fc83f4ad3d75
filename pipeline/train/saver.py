"""Writing behind training: a save costs the step loop a copy of the trained tensors, the files are written meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Saver:
    """One write at a time, in order. A failed write is raised by the next call.

    A save that is due while the one before it is still being written waits for it: letting it pass would lose more steps to a
    crash than `save_every_steps` and one write's.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._writing: Future[None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Runs `write` behind the caller."""
        self.finish()
        self._writing = self._pool.submit(write)

    def check(self) -> None:
        """Raises what the last write failed with, if it is over. Does not wait."""
        if self._writing is not None and self._writing.done():
            self.finish()

    def finish(self) -> None:
        """Waits for the last write."""
        if (writing := self._writing) is not None:
            self._writing = None
            writing.result()
