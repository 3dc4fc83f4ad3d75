"""What takes back a change that is made to a folder in place, whenever it ends: bytes and files that gave way, and the way back.

`FOLDER/.switch/` stands there while the folder is neither the old nor the new one, and nothing has happened without it:

    journal.json   from what, to what, which bytes of which files are overwritten, which files give way and come
    undo/FILE      the bytes of FILE that are overwritten, end to end
    old/           files that gave way: config.json first (nothing loads a folder without one), the certificate, files of another layout
    new/           files that come in their place
    back           being taken back: from there on only that

Every step can be done twice.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.job.errors import JobError
from pipeline.weights.atomic import fsync, write_text
from pipeline.weights.parse import plain_name, read_json
from pipeline.weights.unfinished import SWITCHING

JOURNAL, UNDO, OLD, NEW, BACK = "journal.json", "undo", "old", "new", "back"
PREPARING = ".switch-preparing"
_DONE = ".switch-done"
_COPY_BYTES = 1 << 22


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Against a second change of the same folder.

    Raises:
        JobError: no such folder, or another process is at it.
    """
    if not folder.is_dir():
        raise JobError(f"{folder}: no such folder. Name one that zlora merge wrote.")
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JobError(f"{folder}: another process is changing it. Wait for it.") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def tidy(folder: Path) -> None:
    """Removes what a process left that was killed before it changed anything, or after all was done."""
    for name in (PREPARING, _DONE):
        shutil.rmtree(folder / name, ignore_errors=True)


def save_bytes(file: Path, segments: Iterable[tuple[int, int]], target: Path) -> None:
    """Copies runs of bytes, end to end, and has them on disk."""
    with file.open("rb", buffering=0) as source, target.open("wb") as copy:
        for start, end in segments:
            source.seek(start)
            while start < end:
                data = source.read(min(end - start, _COPY_BYTES))
                if not data:
                    raise JobError(f"{file}: ends early. Merge it anew from base and delta.")
                copy.write(data)
                start += len(data)
        copy.flush()
        os.fsync(copy.fileno())


def put_aside(names: Sequence[str], folder: Path, aside: Path) -> None:
    """Moves files away, in order; those that are there already have been moved."""
    for name in names:
        if not (aside / name).exists() and (folder / name).exists():
            (folder / name).replace(aside / name)
    fsync(aside)
    fsync(folder)


def put_in(names: Sequence[str], source: Path, folder: Path) -> None:
    """Moves files in, in order, over what is there; those that are gone from the source have been moved."""
    for name in names:
        if (source / name).exists():
            (source / name).replace(folder / name)
    fsync(source)
    fsync(folder)


def close(folder: Path) -> None:
    """The folder is whole again."""
    fsync(folder)
    (folder / SWITCHING).replace(folder / _DONE)
    fsync(folder)
    tidy(folder)


def roll_back(folder: Path) -> None:
    """Makes the folder byte for byte what it was. Needs neither base nor delta.

    Raises:
        JobError: there is nothing to take back.
    """
    with locked(folder):
        if not (folder / SWITCHING).exists():
            raise JobError(
                f"{folder}: no switch is unfinished here, so there is nothing to take back. Name the folder that was being switched."
            )
        take_back(folder)


def take_back(folder: Path) -> None:
    """The same, of a folder that is locked and in the middle."""
    work, journal = folder / SWITCHING, read_journal(folder)
    write_text(work / BACK, "")
    fsync(work)
    for name in journal["comes"]:
        if name not in journal["gives_way"]:
            (folder / name).unlink(missing_ok=True)
    for name, segments in journal["overwritten"].items():
        _write_back(work / UNDO / name, folder / name, segments)
    # In the other order: config.json, without which nothing loads the folder, last.
    put_in(journal["gives_way"][::-1], work / OLD, folder)
    close(folder)


def read_journal(folder: Path) -> dict[str, Any]:
    """Raises:
    JobError: it is not as it was written, or names what is not in the folder."""
    file = folder / SWITCHING / JOURNAL
    try:
        journal = read_json(file)
        names = [*journal["gives_way"], *journal["comes"], *journal["overwritten"], *journal["rows"]]
        sound = all(plain_name(name) and not (folder / name).is_symlink() for name in names) and all(
            type(start) is int and type(end) is int and 0 <= start <= end <= (folder / name).stat().st_size
            for name, segments in journal["overwritten"].items()
            for start, end in segments
        )
        tables = all(isinstance(journal[key], dict) for key in ("to", "beside", "rows", "overwritten"))
        if not sound or not tables or not isinstance(journal["deltas"], list):
            raise ValueError("not of the form of a journal")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise JobError(f"{file}: cannot be read ({error!r}). Merge the folder anew from base and delta.") from None
    return journal


def _write_back(saved: Path, file: Path, segments: Sequence[Sequence[int]]) -> None:
    with saved.open("rb") as source, file.open("r+b", buffering=0) as target:
        for start, end in segments:
            target.seek(start)
            while start < end:
                data = source.read(min(end - start, _COPY_BYTES))
                if not data:
                    raise JobError(f"{saved}: ends early. Merge the folder anew from base and delta.")
                target.write(data)
                start += len(data)
        os.fsync(target.fileno())
