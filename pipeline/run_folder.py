"""A run folder as a whole: may a new run begin in it, and what gives way when it does."""

from __future__ import annotations

import shutil
from pathlib import Path

from pipeline.job.errors import JobError

LOGS = "logs"
WRITTEN = ("job.toml", "metrics.jsonl", "tensorboard", "delta", "predictions", "result.json", "environment.json")
"""What a run writes, logs apart."""


def refuse_earlier(folder: Path, fresh: bool) -> None:
    """Refuses a folder that holds what a new run would mix with or destroy. Other files there are nobody's business.

    Raises:
        JobError: an earlier run and no `--fresh`, or files of a run's names that no run wrote.
    """
    if folder.exists() and not folder.is_dir():
        raise JobError(f"{folder}: is a file. Use --run to name another folder.")
    found = [name for name in WRITTEN if (folder / name).exists()]
    if not found:
        return
    if not fresh:
        raise JobError(f"{folder}: holds an earlier run. Use --run for another folder, or --fresh to replace it.")
    if "metrics.jsonl" not in found:
        raise JobError(f"{folder}: is not a run folder, so --fresh does not touch its {found[0]}. Use --run for another folder.")


def clear(folder: Path) -> None:
    """Removes an earlier run but for its logs. Called when the new run is about to write, so that a mistake costs nothing."""
    for path in [*(folder / name for name in WRITTEN), *folder.glob(".delta.*")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def remove_if_empty_handed(folder: Path) -> None:
    """Removes what a start leaves that failed before it wrote anything."""
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= {LOGS}:
        shutil.rmtree(folder)
