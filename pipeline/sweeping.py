"""`zlora sweep`: trains a sweep's members one after another on this machine. No torch; each member is a `zlora train` of its own.

The sweep's folder has `jobs/<member>.toml`, the resolved job of each, and `<member>/`, its run folder.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.cluster.launch import PROGRAM
from pipeline.cluster.stop import STOPPED
from pipeline.job.errors import JobError
from pipeline.job.read import job_digest, job_toml, read_members
from pipeline.job.spec import Job
from pipeline.screen import Screen

JOBS = "jobs"
_INTERRUPTED = 130


@dataclass(frozen=True)
class Run:
    """A member and where it is trained."""

    name: str
    job: Job
    folder: Path

    @property
    def finished(self) -> bool:
        """By the job as it is now: a member whose steps were raised is not."""
        with suppress(OSError, ValueError):
            return bool(json.loads((self.folder / "result.json").read_text(encoding="utf-8")).get("job_digest") == job_digest(self.job))
        return False


def runs_of(job: Path, folder: Path, overrides: tuple[str, ...] = ()) -> list[Run]:
    """The sweep's members.

    Raises:
        JobError: the job has no sweep, or one of its members is no job.
    """
    found = [Run(member.name, own, folder / member.name) for member, own in read_members(job, overrides)]
    if not found:
        raise JobError(f'{job}: has no [sweep]. Add one, such as [sweep.grid] with "train.seed" = [1, 2, 3], or use zlora train.')
    return found


def sweep(job: Path, folder: Path, overrides: tuple[str, ...], ranks: int | None, screen: Screen) -> int:
    """Trains what is not finished, in order; a member that fails does not keep the others from it. The exit code for the shell."""
    members, failed = runs_of(job, folder, overrides), dict[str, int]()
    (folder / JOBS).mkdir(parents=True, exist_ok=True)
    # All at once, so that zlora compare knows of those that have not begun.
    for member in members:
        _resolved(folder, member).write_text(job_toml(member.job), encoding="utf-8")
    for number, member in enumerate(members, 1):
        screen.print(f"{number} of {len(members)}: {member.name}{': is finished' if member.finished else ''}")
        if member.finished:
            continue
        count = ["--ranks", str(ranks)] if ranks else []
        code, asked = _run(["train", str(_resolved(folder, member)), "--run", str(member.folder), *count], member.job.train.stop_signals)
        if asked or code in (STOPPED, _INTERRUPTED):
            screen.print(f"Stopped in {member.name}. The same command again goes on.")
            return code or STOPPED
        if code:
            failed[member.name] = code
    rows = [(member.name, f"failed with exit code {failed[member.name]}" if member.name in failed else "finished") for member in members]
    screen.table(str(folder), [*rows, ("compare", f"zlora compare {folder}")])
    return next(iter(failed.values()), 0)


def _resolved(folder: Path, member: Run) -> Path:
    return folder / JOBS / f"{member.name}.toml"


def _run(words: list[str], stop_signals: tuple[str, ...]) -> tuple[int, bool]:
    """Trains one member. Its exit code, and whether a request to stop came, which it is handed."""
    asked, started = False, list[subprocess.Popen[bytes]]()

    def on_signal(number: int, _: object) -> None:
        nonlocal asked
        asked = True
        # A terminal sends Ctrl-C to both; twice within a second is once.
        if started and started[0].poll() is None:
            started[0].send_signal(number)

    before = {number: signal.signal(number, on_signal) for number in {*(signal.Signals[name] for name in stop_signals), signal.SIGINT}}
    try:
        started.append(subprocess.Popen([sys.executable, "-c", PROGRAM, *words]))
        return started[0].wait(), asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
