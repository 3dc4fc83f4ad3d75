"""The hub's copy of a data set -> a source of examples, for a task that names no folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.job.errors import JobError
from pipeline.job.section import Split
from pipeline.tasks.example import Dropped, Example, Source

CONVERTED = "refs/convert/parquet"
"""Where the main branch holds a loading script, which `datasets` no longer runs, the hub keeps its result on this one."""


@dataclass(frozen=True)
class HubCopy:
    name: str
    files: str
    """What to put into a folder instead."""
    splits: tuple[str, str, str] = ("train", "validation", "test")
    """The hub's names of train, valid and test."""
    revision: str | None = CONVERTED
    folder: str | None = None
    """Of the revision, where it holds several data sets."""


def from_hub(copy: HubCopy, split: Split, examples: Callable[[dict[str, Any], str], Iterable[Example | Dropped]]) -> Source:
    """A split.

    Args:
        examples: those of one row, given the row and where it is.

    Raises:
        JobError: the copy cannot be had; later, that it has other columns.
    """
    from datasets import load_dataset

    name = dict(zip(("train", "valid", "test"), copy.splits, strict=True))[split]
    chosen = {} if copy.folder is None else {"data_files": {name: f"{copy.folder}/{name}/*.parquet"}}
    try:
        rows = load_dataset(copy.name, revision=copy.revision, split=name, **chosen)
    except Exception as error:  # the hub's failures have no common type
        raise JobError(
            f'task.data: absent, and the hub\'s copy "{copy.name}" cannot be had ({type(error).__name__}: {_first_line(error)}). '
            f"Name a folder with {copy.files} in task.data."
        ) from None

    def read() -> Iterator[Example | Dropped]:
        for number, row in enumerate(rows, 1):
            where = f"{copy.name}/{split}:{number}"
            try:
                yield from examples(row, where)
            except (KeyError, TypeError, IndexError, ValueError) as error:
                raise JobError(
                    f"{where}: not the columns expected of the hub's copy ({type(error).__name__}: {error}); it has {', '.join(row)}. "
                    f"Name a folder with {copy.files} in task.data."
                ) from None

    files = tuple(Path(part["filename"]) for part in rows.cache_files)
    return Source(files, read, version="" if files else rows._fingerprint)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]
