"""The files that travel with the package: ds_configs/, slurm/ and the shapes of the paper's bases."""

from __future__ import annotations

from pathlib import Path

from pipeline.job.errors import JobError

AUTO = "auto"
"""The memory configuration that the plan chooses."""
_PACKAGE = Path(__file__).parent.parent
BASES = _PACKAGE / "plan" / "bases"
"""A folder with a config.json, and nothing else, for each base of the paper's jobs."""


def shipped(folder: str) -> Path:
    """The folder `ds_configs` or `slurm`: inside the installed package, or beside it in a checkout."""
    inside = _PACKAGE / folder
    return inside if inside.is_dir() else _PACKAGE.parent / folder


def memory_config(name: str) -> Path:
    """The file that `memory.config` names: one of ds_configs/, or a path.

    Raises:
        JobError: there is no such file.
    """
    if (path := shipped("ds_configs") / name).is_file() or (path := Path(name)).is_file():
        return path.resolve()
    known = ", ".join(sorted(p.name for p in shipped("ds_configs").glob("*.json")))
    raise JobError(f'memory.config: there is no file "{name}" in ds_configs/ or here. Use one of {known}, a path, or "auto".')


def known_base(model: str) -> Path | None:
    """The folder of one of the paper's bases, for whatever goes by shapes alone.

    Args:
        model: its name, with or without its owner on the hub.
    """
    name = model
    for owner in ("openai-community", "FacebookAI", "microsoft", "facebook"):
        name = name.removeprefix(f"{owner}/")
    return next((folder for folder in BASES.iterdir() if folder.name == name), None)
