"""A base's config.json: its architecture and sizes. No torch."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from pipeline.job.errors import JobError


def read_config(folder: Path) -> PretrainedConfig:
    """The base's config.json.

    Raises:
        JobError: missing or unreadable.
    """
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers checks little: a damaged file shows as almost anything
        raise JobError(f"{folder}: its config.json cannot be read ({first_line(error)}). Fetch the base again.") from None


def first_line(error: Exception) -> str:
    """What a library says, short enough for a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
