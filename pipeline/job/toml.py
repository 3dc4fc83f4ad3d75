"""A job's TOML file -> its keys, with those of the files that it extends underneath.

`extends = "other.toml"` names a file beside this one, or a path from here; of several, a later one lies over an earlier one. Sections
are laid over one another key by key; a list, `methods` among them, `published`, and a section of another kind take the place of the whole.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from pipeline.job.errors import JobError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EITHER = ({"epochs", "steps"}, {"warmup_steps", "warmup_ratio"}, {"gpus_per_node", "ranks_per_node"})
"""Keys of [train] and [cluster] of which a job has one: one of them takes the place of the other in what lies underneath."""
_WHOLE = "published"
"""One row of somebody's: nothing of another row shows through it."""
Keys = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    keys: Keys
    file: Path
    under: tuple[Asked, ...]
    """What this file extends, the uppermost last."""

    def origin(self, path: list[str]) -> Path:
        """The file that gives a key, or the section that lacks it."""
        place: Any = self.keys
        for part in path:
            if isinstance(place, list):
                # It takes the place of the whole list beneath.
                return self.file
            if not isinstance(place, dict) or part not in place:
                break
            place = place[part]
        else:
            return self.file
        return next((under.origin(path) for under in reversed(self.under) if under.has(path)), self.file)

    def has(self, path: list[str]) -> bool:
        place: Any = self.merged
        for part in path:
            if isinstance(place, list):
                return part.isdigit() and int(part) < len(place)
            if not isinstance(place, dict) or part not in place:
                return False
            place = place[part]
        return True

    @property
    def merged(self) -> Keys:
        """All keys, as one file would have them."""
        return reduce(laid_over, (*(under.merged for under in self.under), self.keys))


def read_toml(file: Path, above: tuple[Path, ...] = ()) -> Asked:
    """A job file and those that it extends.

    Args:
        above: those that lead here.

    Raises:
        JobError: no such file, not TOML, or one that extends itself.
    """
    if not file.is_file():
        looked = f"(looked in {file.absolute().parent})"
        if above:
            raise JobError(f'{above[-1]}: extends = "{file}": there is no such file {looked}. Name it as seen from that file.')
        raise JobError(f"{file}: there is no such job file {looked}.")
    try:
        keys = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise JobError(f"{file}: not valid TOML: {error}.") from None
    named = keys.pop("extends", [])
    names = named if isinstance(named, list) else [named]
    if not all(isinstance(name, str) for name in names):
        raise JobError(f"{file}: extends = {json.dumps(named, default=str)}: not text. Name a file, or several in brackets.")
    for name in names:
        if (file.parent / name).resolve() in [place.resolve() for place in (*above, file)]:
            raise JobError(f'{file}: extends = "{name}": the files extend one another in a circle. Let one of them stand alone.')
    return Asked(keys, file, tuple(read_toml(file.parent / name, (*above, file)) for name in names))


def laid_over(under: Keys, over: Keys) -> Keys:
    """One section's keys over another's."""
    if "kind" in over and over["kind"] != under.get("kind"):
        return over
    beaten = {other for pair in EITHER for key in pair & set(over) for other in pair - {key}}
    found = {key: value for key, value in under.items() if key not in beaten}
    for key, value in over.items():
        below = found.get(key)
        found[key] = laid_over(below, value) if isinstance(below, dict) and isinstance(value, dict) and key != _WHOLE else value
    return found
