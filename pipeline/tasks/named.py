"""Deltas by name, where one base serves many: as the command line names them, and as a prompt asks for one."""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.job.errors import JobError

BASE = "base"
"""What asks for the base alone."""
_NAMED = re.compile(r"([A-Za-z0-9_.-]+)=(.+)", re.DOTALL)


def named_deltas(given: list[str]) -> dict[str | None, Path]:
    """By name; under None the only one, where it is given without a name.

    Raises:
        JobError: several of which one has no name, a name that is given twice or means the base.
    """
    if len(given) == 1 and (Path(given[0]).is_dir() or not _NAMED.fullmatch(given[0])):
        return {None: Path(given[0])}
    found: dict[str | None, Path] = {}
    for value in given:
        match = _NAMED.fullmatch(value)
        if match is None:
            raise JobError(f"--delta {value}: one of several needs a name of letters, digits, _ . -. Write NAME={value}.")
        name, folder = match.groups()
        if name in found or name == BASE:
            taken = "means the base alone" if name == BASE else f"is {found[name]} already"
            raise JobError(f'--delta {value}: "{name}" {taken}. Choose another name.')
        found[name] = Path(folder)
    return found


def used(use: str | None, names: tuple[str, ...]) -> str | None:
    """What `--use` means.

    Raises:
        JobError: no deltas with names are given, or none of this name.
    """
    if use is not None and not names:
        raise JobError(f"--use {use}: no delta has a name. Give --delta {use}=DIR.")
    return chosen(use, names, "--use")


def chosen(name: object, names: tuple[str, ...], where: str) -> str | None:
    """The delta that is asked for; None: the base alone.

    Raises:
        JobError: there is no such delta.
    """
    if name is None or name == BASE:
        return None
    if isinstance(name, str) and name in names:
        return name
    raise JobError(f"{where}: no delta {name!r} is served. There are {', '.join((BASE, *names))}.")
