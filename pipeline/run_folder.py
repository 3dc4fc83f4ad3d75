"""A run folder as a whole: who works in it, what stands in a new run's way, and what gives way to it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shutil
import time
from pathlib import Path

from pipeline.job.errors import JobError

LOGS = "logs"
LOCK = ".lock"
WRITTEN = ("environment.json", "job.toml", "metrics.jsonl", "tensorboard", "state", "delta", "predictions", "result.json")
"""What a run writes, logs apart; the first of them first."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Hold:
    """One training at a time works in a run folder. The kernel lets go of the lock when the process ends, however it ends.

    Raises:
        JobError: another process works in it; with its number, host and start.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.shared = True
        """False where the file system knows no locks, so that nothing keeps another process away."""
        # Not inherited by child processes: the lock must not outlive this one.
        self._descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JobError(f"{folder}: {_holder(folder)} Wait for its end, or use --run for another folder.") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self.shared = False
        job = os.environ.get("SLURM_JOB_ID")
        holder = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S"), "slurm_job": job}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)

    def release(self) -> None:
        """Lets go before the process ends."""
        os.close(self._descriptor)


def _holder(folder: Path) -> str:
    try:
        holder = json.loads((folder / LOCK).read_text(encoding="utf-8"))
        job = f" (Slurm job {holder['slurm_job']})" if holder["slurm_job"] else ""
        return f"process {holder['pid']} on {holder['host']}{job} has been training here since {holder['since']}."
    except (OSError, ValueError, KeyError, TypeError):
        return "another process is training here."


def refuse_foreign(folder: Path) -> None:
    """Refuses a folder that holds files of a run's names which no run wrote. Other files there are nobody's business.

    Raises:
        JobError: naming one of them.
    """
    if folder.exists() and not folder.is_dir():
        raise JobError(f"{folder}: is a file. Use --run to name another folder.")
    if not begun(folder) and (found := [name for name in WRITTEN if (folder / name).exists()]):
        raise JobError(f"{folder}: is not a run folder, but has a {found[0]} that a run would write over. Use --run for another folder.")


def begun(folder: Path) -> bool:
    """Whether a run has written here."""
    return (folder / WRITTEN[0]).is_file()


def clear(folder: Path) -> None:
    """Removes an earlier run but for its logs. Called when the new run is about to write, so that a mistake costs nothing."""
    # What tells a run's folder from another goes last.
    for path in [*(folder / name for name in reversed(WRITTEN)), *folder.glob(".delta.*")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def remove_if_empty_handed(folder: Path) -> None:
    """Removes what a start leaves that failed before it wrote anything."""
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= {LOGS, LOCK}:
        try:
            hold = Hold(folder)
        except JobError:
            return
        shutil.rmtree(folder)
        hold.release()
