"""The mark of a folder that is in the middle of being changed in place: every reader refuses it."""

from __future__ import annotations

from pathlib import Path

from pipeline.job.errors import JobError

SWITCHING = ".switch"
"""Folder in it, with what finishes the change or takes it back."""


def refuse_unfinished(folder: Path) -> None:
    """Raises:
    JobError: it is neither what it was nor what it shall be."""
    if (folder / SWITCHING).exists():
        raise JobError(
            f"{folder}: is in the middle of a switch to another delta. Run the same zlora switch (or unmerge) again to finish it, "
            f"or zlora switch {folder} --roll-back to take it back."
        )
