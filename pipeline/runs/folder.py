"""A run folder as a whole: who works in it, what stands in a new run's way, and what gives way to it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.job.errors import JobError

LOGS = "logs"
LOCK = ".lock"
SCORES = "scores.jsonl"
"""What `zlora evaluate` has scored, one object a call."""
WRITTEN = (
    *("environment.json", "deepspeed.json", "job.toml", "metrics.jsonl", SCORES),
    *("tensorboard", "state", "delta", "best", "predictions", "result.json"),
)
"""What a run writes, logs apart; the first of them first."""
_RETRY_S = 2.0
_GLANCE_S = 0.1
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Hold:
    """One training at a time works in a run folder. The kernel lets go of the lock when the process ends, however it ends.

    Args:
        wait_s: for a holder on another machine: a file server keeps the locks of a machine that died for a while.

    Raises:
        JobError: another process works in it; with its number, host and start.
    """

    def __init__(self, folder: Path, wait_s: float = 0.0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.shared = True
        """False where the file system knows no locks, so that nothing keeps another process away."""
        deadline, waiting = time.monotonic() + wait_s, False
        while not self._taken(folder):
            holder = _holder(folder)
            if time.monotonic() > deadline or holder.get("host") == platform.node():
                raise JobError(f"{folder}: {_told(holder)} Wait for its end, or use --run for another folder.")
            if not waiting:
                print(f"{folder}: {_told(holder)} Waiting {wait_s:g} s in case it died there.", file=sys.stderr, flush=True)
                waiting = True
            time.sleep(_RETRY_S)
        job = os.environ.get("SLURM_JOB_ID")
        holder = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S"), "slurm_job": job}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)

    def _taken(self, folder: Path) -> bool:
        if not self._take(folder):
            # It may have been somebody who only looked (`held`).
            time.sleep(_GLANCE_S)
            return self._take(folder)
        return True

    def _take(self, folder: Path) -> bool:
        # Not inherited by child processes: the lock must not outlive this one.
        self._descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self.shared = False
        # A start that came to nothing may have removed the file between opening and locking it.
        if not (folder / LOCK).exists() or not os.path.samestat(os.fstat(self._descriptor), (folder / LOCK).stat()):
            os.close(self._descriptor)
            folder.mkdir(parents=True, exist_ok=True)
            return self._take(folder)
        return True

    def release(self) -> None:
        """Lets go before the process ends."""
        os.close(self._descriptor)


def held(folder: Path) -> bool:
    """Whether a training works in the folder now, as far as this machine can tell: there are file systems without locks."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _holder(folder: Path) -> dict[str, Any]:
    try:
        holder = json.loads((folder / LOCK).read_text(encoding="utf-8"))
        return holder if isinstance(holder, dict) else {}
    except (OSError, ValueError):
        return {}


def _told(holder: dict[str, Any]) -> str:
    if "pid" not in holder:
        return "another process is training here."
    job = f" (Slurm job {holder['slurm_job']})" if holder.get("slurm_job") else ""
    return f"process {holder['pid']} on {holder.get('host')}{job} has been training here since {holder.get('since')}."


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
    # What tells a run's folder from another goes last; and no state goes in pieces, or one of the old run's might be gone on from.
    for name in reversed(WRITTEN):
        remove(folder / name)
    remove_halves(folder)


def remove(path: Path) -> None:
    """Removes a file or folder of the run, a folder from under its name at once; or nothing."""
    if path.is_dir():
        shutil.rmtree(path.rename(path.parent / f".{path.name}.old-{os.getpid()}"))
    else:
        path.unlink(missing_ok=True)


def remove_halves(folder: Path) -> None:
    """Removes what a killed process left half-written or half-removed."""
    for name in WRITTEN:
        for path in folder.glob(f".{name}.*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def remove_if_empty_handed(folder: Path) -> None:
    """Removes what a start leaves that failed before it wrote anything: its logs and its lock, and the folder if that was all."""
    if not folder.is_dir() or not {path.name for path in folder.iterdir()} <= {LOGS, LOCK}:
        return
    try:
        hold = Hold(folder)
    except JobError:
        return
    for path in [*(folder / LOGS).glob("rank*.txt"), *(folder / LOGS).glob("rank*.json"), folder / LOCK]:
        path.unlink(missing_ok=True)
    for path in (folder / LOGS, folder):
        with suppress(OSError):
            path.rmdir()
    hold.release()


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The whole rows of `metrics.jsonl` or `scores.jsonl`, none without the file; a process killed while writing leaves half of one."""
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]
