"""Lives of a training run: real rank processes that a test may kill at any moment, started quickly.

Each life forks its ranks from a server that has everything loaded. They are what the launcher would have started
(`as_rank`: lock, signals, watchdog, logs, exit codes), but for the seconds of imports.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from pathlib import Path

from tests.ranks import forks, rank_environment


class Life:
    """A run of `zlora train JOB --run RUN` on `count` ranks of its own."""

    def __init__(self, job: Path, run: Path, overrides: tuple[str, ...] = (), count: int = 2, slow_disk_s: float = 0.0) -> None:
        context = forks()
        self._folder = tempfile.TemporaryDirectory(prefix="zlora-life-")
        self.said = Path(self._folder.name) / "said.txt"
        arguments = (str(job), str(run), overrides, count, self._folder.name, slow_disk_s)
        self.ranks = [context.Process(target=_rank, args=(rank, *arguments), daemon=True) for rank in range(count)]
        for process in self.ranks:
            process.start()

    def kill(self, rank: int) -> None:
        self.ranks[rank].kill()

    def signal(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.ranks[rank].pid, number)

    @property
    def alive(self) -> bool:
        return any(process.is_alive() for process in self.ranks)

    def end(self, timeout_s: float = 60.0) -> list[int]:
        """Waits for all ranks; returns their exit codes, negative where a signal ended one. What is left then is killed."""
        deadline = time.monotonic() + timeout_s
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        for process in self.ranks:
            if process.is_alive():
                process.kill()
                process.join()
        return [process.exitcode for process in self.ranks]


def _rank(rank: int, job: str, run: str, overrides: tuple[str, ...], count: int, folder: str, slow_disk_s: float) -> None:
    os.environ |= rank_environment(rank, count, folder)
    said = os.open(Path(folder) / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    from pipeline.job.read import read_job
    from pipeline.rank import as_rank
    from pipeline.run import train

    asked = read_job(Path(job), overrides)
    if slow_disk_s:
        real = os.fsync

        def fsync(descriptor: int) -> None:
            time.sleep(slow_disk_s)
            real(descriptor)

        os.fsync = fsync
    as_rank(Path(run), lambda ranks, screen: train(asked, Path(run), ranks, screen), training=asked.train)
