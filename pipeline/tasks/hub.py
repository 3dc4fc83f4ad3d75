"""The hub's copy of a data set -> a source of examples, for a task that names no folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.job.errors import JobError
from pipeline.job.section import Split
from pipeline.tasks.example import Dropped, Example, Source
from pipeline.weights.hub import fetch

if TYPE_CHECKING:
    from datasets import Dataset

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

    def chosen(self, split: Split) -> dict[str, Any]:
        """What `load` is asked for, to have a split."""
        name = dict(zip(("train", "valid", "test"), self.splits, strict=True))[split]
        return {"split": name} if self.folder is None else {"split": name, "data_files": {name: f"{self.folder}/{name}/*.parquet"}}


def from_hub(copy: HubCopy, split: Split, examples: Callable[[dict[str, Any], str], Iterable[Example | Dropped]]) -> Source:
    """A split.

    Args:
        examples: those of one row, given the row and where it is.

    Raises:
        JobError: the copy cannot be had; later, that it has other columns.
    """
    try:
        rows = load(copy.name, revision=copy.revision, **copy.chosen(split))
    except JobError as error:
        raise JobError(f"task.data: absent, so from the hub: {error} Or name a folder with {copy.files} in task.data.") from None
    except Exception as error:  # the library's failures have no common type
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


def load(name: str, revision: str | None, split: str, data_files: dict[str, str] | None = None) -> Dataset:
    """The rows of a split. The files come through the hub's cache, so that they are found again without a network.

    (`load_dataset` with a hub id does not find again what `data_files` chose.)
    """
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    folder = fetch(name, revision, "dataset", data_patterns(revision, data_files)).folder
    return load_dataset(str(folder), split=split, data_files=data_files)


def data_patterns(revision: str | None, data_files: dict[str, str] | None = None) -> tuple[str, ...]:
    """Which files of a revision are wanted."""
    if data_files:
        return tuple(data_files.values())
    return ("*.parquet",) if revision == CONVERTED else ("*.parquet", "*.csv", "*.json", "*.jsonl", "README.md")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]
