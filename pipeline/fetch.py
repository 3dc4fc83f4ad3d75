"""A job's base and data, fetched once where there is a network, so that ranks run without one. No torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.job.section import Split
from pipeline.job.spec import Job
from pipeline.job.task import SingleTask
from pipeline.screen import Screen, size_text
from pipeline.tasks.hub import HubCopy, data_patterns, load
from pipeline.tasks.open import hub_copies, sources_of
from pipeline.weights.hub import Fetched, fetch, fetch_base

_POLL_S = 0.2
_SPLITS: tuple[Split, ...] = ("train", "valid", "test")


def fetch_all(jobs: Sequence[Job], screen: Screen) -> dict[str, Any]:
    """Of the members of a sweep: what `fetch_job` says of the first; `others` is of those with another base or other data."""
    apart = {(repr(job.base), repr(job.task)): job for job in reversed(jobs)}
    first, *others = (fetch_job(job, screen) for job in reversed(apart.values()))
    return {**first, "others": others} if others else first


def fetch_job(job: Job, screen: Screen) -> dict[str, Any]:
    """What is here now, and where.

    Raises:
        JobError: the hub does not give it, or the disk has no room for it; what is complete stays.
    """
    base = fetch_base(job.base.model, job.base.revision, lambda total, done: _bar(screen, "fetching the base", total, done))
    _show(screen, "base", base)
    data = [found for task in sources_of(job.task) for found in _fetch_data(task, screen)]
    for found in data:
        _show(screen, "data", found)
    return {"schema_version": 1, "base": _row(base), "data": [_row(found) for found in data]}


def _fetch_data(task: SingleTask, screen: Screen) -> list[Fetched]:
    copies = hub_copies(task)
    if not copies:
        places = [Path(place) for key in ("data", "valid", "test") if (place := getattr(task, key, None))]
        files = {file for place in places for file in ([place] if place.is_file() else place.rglob("*")) if file.is_file()}
        return [Fetched(str(places[0]), places[0], None, len(files), sum(file.stat().st_size for file in files), 0)]
    return [_fetch_copy(copy, screen) for copy in copies]


def _fetch_copy(copy: HubCopy, screen: Screen) -> Fetched:
    chosen = [copy.chosen(split) for split in _SPLITS]
    patterns = tuple(dict.fromkeys(pattern for one in chosen for pattern in data_patterns(copy.revision, one.get("data_files"))))
    found = fetch(copy.name, copy.revision, "dataset", patterns, bar=lambda total, done: _bar(screen, "fetching the data", total, done))
    # Made ready too: a rank's machine may have no right to write here.
    for one in screen.progress("preparing the data", chosen):
        load(copy.name, copy.revision, **one)
    return found


@contextmanager
def _bar(screen: Screen, label: str, total: int, done: Callable[[], int]) -> Iterator[None]:
    """A bar of bytes while the block runs."""
    ended = threading.Event()

    def show() -> None:
        with screen.bytes(label, total) as update:
            while not ended.wait(_POLL_S):
                update(done())

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _show(screen: Screen, what: str, found: Fetched) -> None:
    new = f"{size_text(found.new_bytes)} fetched now" if found.new_bytes else "already here"
    rows = [("here", str(found.folder)), ("size", f"{size_text(found.bytes)} in {found.files} file{'s'[: found.files != 1]}, {new}")]
    if found.commit:
        rows.insert(1, ("commit", found.commit))
    screen.table(f"{what}: {found.name}", rows)


def _row(found: Fetched) -> dict[str, Any]:
    return {
        "name": found.name,
        "path": str(found.folder),
        "commit": found.commit,
        "files": found.files,
        "bytes": found.bytes,
        "fetched_bytes": found.new_bytes,
    }
