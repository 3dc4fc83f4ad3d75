"""Settings laid over a job's keys, one by one: of `--set`, and of a sweep's members."""

from __future__ import annotations

import re
import sys
from typing import Any

from pipeline.job.errors import JobError
from pipeline.job.toml import EITHER

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_override(text: str) -> tuple[str, Any]:
    """Key and value of a `--set` text; the value is read as TOML, or is text where that fails."""
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise JobError(f'--set {text}: not of the form section.key=value, such as "train.steps=20".')
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw
    return plain_key(key), value


def plain_key(key: str) -> str:
    """methods[0].rank as methods.0.rank"""
    return re.sub(r"\[(\d+)\]", r".\1", key.strip())


def make_room(asked: dict[str, Any], keys: list[str]) -> None:
    """Removes the file's own choice between two keys where one of `keys` makes the other choice."""
    for key in keys:
        section, _, name = key.partition(".")
        for pair in EITHER:
            if section in ("train", "cluster") and name in pair and isinstance(own := asked.get(section), dict):
                for other in pair - {name}:
                    own.pop(other, None)


def put(asked: dict[str, Any], key: str, value: Any, said: str) -> None:
    """Sets one key.

    Args:
        said: how it was asked for, for messages.
    """
    *parents, last = key.split(".")
    place: Any = asked
    for part in parents:
        if isinstance(place, list):
            if not part.isdigit() or int(part) >= len(place):
                raise JobError(f"{said}: {part} is not one of the {len(place)} entries, counted from 0.")
            place = place[int(part)]
        elif isinstance(place, dict):
            place = place.setdefault(part, {})
    if isinstance(place, list):
        raise JobError(f"{said}: {'.'.join(parents)} is a list. Name an entry: {'.'.join(parents)}.0.{last}")
    if not isinstance(place, dict):
        raise JobError(f"{said}: {'.'.join(parents)} is a value and has no keys. Set it itself.")
    place[last] = value
