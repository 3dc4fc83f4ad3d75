"""`[sweep]` of a job: many runs of one job, each with settings of its own, and its expansion into members with names. Pure."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, JsonValue, PositiveInt, field_validator, model_validator

from pipeline.job.overrides import plain_key
from pipeline.job.section import Section

MOST = 1000
"""Members; Slurm's arrays end at 1,000 unless a site says otherwise (MaxArraySize)."""
_NAME_CHARACTERS = 120
_WITHOUT = ("sweep", "cluster")
Values = Annotated[tuple[JsonValue, ...], Field(strict=False, min_length=1)]


class Sweep(Section):
    grid: dict[str, Values] = Field(default={})
    """Keys of the job -> lists of values: `"train.seed" = [1, 2]` and `"methods.0.rank" = [4, 8]`: a member for each combination."""
    settings: Annotated[tuple[dict[str, JsonValue], ...], Field(strict=False)] = ()
    """Members one by one, each a table of keys of the job and their values; with a grid, each of them with each combination."""
    max_parallel: PositiveInt | None = None
    """Of the members so many run at a time. Absent: as many as the cluster lets."""

    @field_validator("grid", mode="before")
    @classmethod
    def _of_grid(cls, grid: Any) -> Any:
        return _flat(grid) if isinstance(grid, dict) else grid

    @field_validator("settings", mode="before")
    @classmethod
    def _of_settings(cls, settings: Any) -> Any:
        return [_flat(each) if isinstance(each, dict) else each for each in settings] if isinstance(settings, list) else settings

    @model_validator(mode="after")
    def _has_members(self) -> Sweep:
        if not self.grid and not self.settings:
            raise ValueError("neither grid nor settings. Give one of them, or leave [sweep] out.")
        for key in (*self.grid, *(key for each in self.settings for key in each)):
            if (section := key.partition(".")[0]) in _WITHOUT:
                raise ValueError(f"{key}: the members of a sweep differ in what they train. Leave [{section}] out of it.")
        if twice := [key for key in self.grid if any(key in each for each in self.settings)]:
            raise ValueError(f"{twice[0]}: is in grid and in settings. Keep one of them.")
        if (count := math.prod(map(len, self.grid.values()), start=len(self.settings) or 1)) > MOST:
            raise ValueError(f"{count:,} members. Make it {MOST:,} at most, in several jobs.")
        expand(self)
        return self


@dataclass(frozen=True)
class Member:
    name: str
    """Of its run folder inside the sweep's."""
    settings: dict[str, JsonValue]
    """Key of the job -> value."""


def expand(sweep: Sweep) -> list[Member]:
    """Its members, in the order of the file, the last key of the grid changing fastest.

    Raises:
        ValueError: two have the same settings.
    """
    combinations = [dict(zip(sweep.grid, values, strict=True)) for values in itertools.product(*sweep.grid.values())]
    found = [{**each, **combination} for each in sweep.settings or ({},) for combination in combinations]
    keys = dict.fromkeys(key for settings in found for key in settings)
    last = Counter(_last(key) for key in keys)
    short = {key: _last(key) if last[_last(key)] == 1 else key for key in keys}
    names = [_bounded(",".join(f"{short[key]}={_text(value)}" for key, value in settings.items()) or "as_it_is") for settings in found]
    often = {name for name, count in Counter(names).items() if count > 1}
    names = [f"{name}-{_digest(settings)}" if name in often else name for name, settings in zip(names, found, strict=True)]
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        raise ValueError(f"two members have the same settings ({twice.rpartition('-')[0]}). Keep one of them.")
    return [Member(name, settings) for name, settings in zip(names, found, strict=True)]


def _flat(keys: dict[str, Any], above: str = "") -> dict[str, Any]:
    """TOML reads a.b = 1 as a table in a table."""
    found: dict[str, Any] = {}
    for key, value in keys.items():
        path = plain_key(f"{above}{key}")
        found |= _flat(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return found


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _text(value: JsonValue) -> str:
    """A value in a folder's name."""
    match value:
        case bool():
            return str(value).lower()
        case str() if "/" in value:
            return _plain(value.rstrip("/").rpartition("/")[2])
        case list():
            return "+".join(map(_text, value)) or "none"
        case dict():
            return _text(value["kind"]) if "kind" in value else _digest(value)
        case None:
            return "none"
        case _:
            return _plain(str(value))


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.+-]", "_", text) or "_"


def _bounded(name: str) -> str:
    return name if len(name) <= _NAME_CHARACTERS else f"{name[: _NAME_CHARACTERS - 9]}-{_digest(name)}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]
