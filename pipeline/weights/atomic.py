"""Nothing is done until it is renamed into place: write beside, fsync, rename."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.job.errors import JobError


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by a file with this text, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    partial = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.chmod(0o644)
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        raise of_path(path, error) from None


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def refuse_filled(folder: Path) -> None:
    """Refuses a destination that already holds something.

    Raises:
        JobError: `folder` is a file, or a folder that is not empty.
    """
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists():
        raise JobError(f"{folder}: already there and not empty. Choose another folder, or remove it first.")


@contextmanager
def new_folder(folder: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `folder`; becomes `folder` when the block ends well, vanishes when it does not.

    Args:
        replace: an older `folder` gives way; without it `folder` must be absent or empty.
    """
    if not replace:
        refuse_filled(folder)
        if folder.is_dir() and folder.resolve() != Path.cwd():
            # Now, not at the end: an empty folder that cannot be moved away (a mount point) must not cost the work.
            folder.rmdir()
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.partial-"))
    try:
        partial.chmod(0o755)
        yield partial
        for file in partial.rglob("*"):
            fsync(file)
        fsync(partial)
        if folder.exists():
            retired = _retire(folder)
            partial.replace(folder)
            shutil.rmtree(retired, ignore_errors=True)
        else:
            partial.replace(folder)
        fsync(folder.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise of_path(folder, error) from None


def of_path(path: Path, error: BaseException) -> BaseException:
    """A full disk is told by the name a person knows, not by the temporary one."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OSError(error.errno, os.strerror(error.errno), str(path))
    return error


def remove_folder(folder: Path) -> None:
    """Removes it from under its name at once: killed on the way, no half of it is left there."""
    shutil.rmtree(_retire(folder), ignore_errors=True)


def _retire(folder: Path) -> Path:
    retired = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.old-"))
    return folder.replace(retired)


def fsync(path: Path) -> None:
    """Of a file or a folder: what is in it is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
