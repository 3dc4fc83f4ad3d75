"""Files of data -> lines of text, with file and line for messages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline.job.errors import JobError


def split_path(folder: Path, names: tuple[str, ...], what: str) -> Path:
    """The first of `names` that is in the folder.

    Raises:
        JobError: the folder is a file, or holds none of them.
    """
    listed = " or ".join(names)
    if folder.is_file():
        raise JobError(f"task.data = {folder}: is a file. Name the folder that holds {listed}.")
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise JobError(f"{folder}: no {what} file. Put {listed} there.")


def raw_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Each line with its number, its end included. Only a line feed ends a line, whatever Unicode says."""
    with file.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            yield number, raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw


def decoded(raw: bytes, where: str) -> str:
    """Raises:
    JobError: not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"byte 0x{raw[error.start]:02x} at column {error.start + 1}"
        raise JobError(f"{where}: not UTF-8 text ({what}). Convert the file.") from None


def lines(file: Path) -> Iterator[tuple[int, str]]:
    """Each line with its number, as text.

    Raises:
        JobError: a line is not UTF-8.
    """
    for number, raw in raw_lines(file):
        yield number, decoded(raw, f"{file}:{number}")


def whole_text(file: Path) -> str:
    """The file's text without a byte order mark."""
    return "".join(line for _, line in lines(file))
