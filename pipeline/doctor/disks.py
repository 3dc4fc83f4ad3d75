"""The folders that a run writes and reads: whether there is room, how fast they are, whether a file can be locked there. No torch.

What is written for that is gone when it has been measured. Speeds are of one process and one file, past the page cache.
"""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.doctor.finding import Finding, Group
from pipeline.screen import size_text
from pipeline.weights.digest import cache_folder

_GROUP: Group = "Disks"
_BLOCK_BYTES = 8 << 20
_MOST_BYTES = 128 << 20
_LONGEST_S = 1.0
"""Of writing, and of reading."""
_NEEDED_BYTES = {"run folders": 2 << 30, "hub's cache": 2 << 30, "zlora's cache": 1 << 28}
"""Below this a small run fails: its states and deltas; a small base; the tokens of a small data set."""
_AMPLE_BYTES = {"run folders": 10 << 30, "hub's cache": 20 << 30, "zlora's cache": 1 << 30}
"""A 7B base takes 14 GB."""
_FEWEST_FILES = 10_000
_SLOW_BYTES_S = 50e6
"""Half of an old spinning disk."""
_ANOTHER = {
    "run folders": "name a folder on another disk with --run",
    "hub's cache": "set HF_HOME to a folder on another disk",
    "zlora's cache": "set XDG_CACHE_HOME to a folder on another disk",
}


@dataclass(frozen=True)
class Disk:
    """A folder as it was found, or, where it does not exist yet, the nearest one above it."""

    name: str
    folder: Path
    device: int
    """Number of its file system."""
    refused: str = ""
    """Why nothing can be written there; empty: it can."""
    free_bytes: int = 0
    free_files: int | None = None
    """None: the file system does not count them."""
    write_bytes_s: float | None = None
    read_bytes_s: float | None = None
    locks: bool = True
    """Whether a second process is kept away from a locked file."""


def places(run: Path | None) -> dict[str, Path]:
    """The folders by what they are for.

    Args:
        run: that `--run` names.
    """
    from huggingface_hub import constants

    return {"run folders": run or Path("runs"), "hub's cache": Path(constants.HF_HUB_CACHE), "zlora's cache": cache_folder()}


def look_at_disks(folders: dict[str, Path], told: Callable[[str], None]) -> list[Disk]:
    """Args:
    told: is handed each folder before it is looked at.
    """
    disks: list[Disk] = []
    for name, folder in folders.items():
        told(f"measuring {name}: {folder}")
        nearest = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.is_dir())
        # What a file system does once it does again.
        known = next((disk for disk in disks if disk.device == nearest.stat().st_dev and not disk.refused), None)
        disks.append(_look(Disk(name, folder.absolute(), nearest.stat().st_dev), nearest, known))
    return disks


def _look(disk: Disk, nearest: Path, known: Disk | None) -> Disk:
    try:
        counts = os.statvfs(nearest)
        disk = replace(disk, free_bytes=counts.f_bavail * counts.f_frsize, free_files=counts.f_favail if counts.f_files else None)
        with tempfile.TemporaryDirectory(prefix=".zlora-doctor-", dir=nearest) as own:
            if known:
                return replace(disk, write_bytes_s=known.write_bytes_s, read_bytes_s=known.read_bytes_s, locks=known.locks)
            disk = replace(disk, locks=_locks(Path(own) / "lock"))
            if disk.free_bytes < 2 * _MOST_BYTES:
                return disk
            write, read = _speeds(Path(own) / "data")
            return replace(disk, write_bytes_s=write, read_bytes_s=read)
    except OSError as error:
        return replace(disk, refused=os.strerror(error.errno or errno.EIO))


def _locks(file: Path) -> bool:
    first, second = (os.open(file, os.O_RDWR | os.O_CREAT, 0o644) for _ in range(2))
    try:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(first)
        os.close(second)
    return False


def _speeds(file: Path) -> tuple[float, float]:
    """Bytes a second, written to the disk and read back from it."""
    # Random: a file system that compresses must not be praised for it.
    block = os.urandom(_BLOCK_BYTES)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        written = _timed(lambda: _write(descriptor, block))
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.lseek(descriptor, 0, os.SEEK_SET)
        return written, _timed(lambda: len(os.read(descriptor, _BLOCK_BYTES)))
    finally:
        os.close(descriptor)


def _write(descriptor: int, block: bytes) -> int:
    count = os.write(descriptor, block)
    # After each block: a disk is not to be given more than it can take in time.
    os.fdatasync(descriptor)
    return count


def _timed(move: Callable[[], int]) -> float:
    begun, done = time.perf_counter(), 0
    while done < _MOST_BYTES and time.perf_counter() - begun < _LONGEST_S and (moved := move()):
        done += moved
    return done / (time.perf_counter() - begun)


def judge_disk(disk: Disk) -> list[Finding]:
    """Room and speed are one finding, locks another where files are locked."""
    another = _ANOTHER[disk.name]
    if disk.refused:
        # What is there already can be read, and that may be all.
        if disk.name == "hub's cache":
            repair = f"zlora fetch cannot bring anything there: make it writable, or {another}. Nothing to do where all you need is there."
            return [Finding(_GROUP, disk.name, f"{disk.folder}: {disk.refused}", "warning", repair)]
        return [Finding(_GROUP, disk.name, f"{disk.folder}: {disk.refused}", "problem", f"Make it writable, or {another}.")]
    speed = ""
    if disk.write_bytes_s is not None and disk.read_bytes_s is not None:
        speed = f"; writes {disk.write_bytes_s / 1e6:,.0f}, reads {disk.read_bytes_s / 1e6:,.0f} MB/s"
    value = f"{disk.folder}: {size_text(disk.free_bytes)} free{speed}"
    findings = [_room(disk, value, another)]
    if not disk.locks and disk.name != "hub's cache":
        repair = f"Two trainings could write one run folder. Mount it with locks (NFS without nolock, Lustre with flock), or {another}."
        findings.append(Finding(_GROUP, "locks", f"{disk.folder}: this file system knows no locks", "warning", repair))
    return findings


def _room(disk: Disk, value: str, another: str) -> Finding:
    if disk.free_bytes < _NEEDED_BYTES[disk.name]:
        return Finding(_GROUP, disk.name, value, "problem", f"There is no room for a small run. Make room, or {another}.")
    if disk.free_files is not None and disk.free_files < _FEWEST_FILES:
        value = f"{value}; {disk.free_files:,} more files"
        return Finding(_GROUP, disk.name, value, "problem", f"No inodes are left. Remove files, or {another}.")
    if disk.free_bytes < _AMPLE_BYTES[disk.name]:
        return Finding(_GROUP, disk.name, value, "warning", f"Little room: zlora plan JOB says what a run needs. Or {another}.")
    if min(disk.write_bytes_s or _SLOW_BYTES_S, disk.read_bytes_s or _SLOW_BYTES_S) < _SLOW_BYTES_S:
        return Finding(
            _GROUP, disk.name, value, "warning", f"Slow to load a base from and to save states to. If there is a faster disk, {another}."
        )
    return Finding(_GROUP, disk.name, value)
