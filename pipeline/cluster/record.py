"""What a batch system did with a run: `slurm.jsonl` in its folder, one object an event, appended by whoever saw it happen.

Login node and batch script write at any time: lines are only ever added.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

FILE = "slurm.jsonl"
Then = Literal["done", "requeued", "not requeued", "left to Slurm"]
Cause = Literal["time limit", "preempted", "requeued", "cancelled", ""]
"""Why Slurm ends an allocation: its limit, another job, to start it again (a lost node, or another job), for good; or it does not."""


@dataclass(frozen=True)
class Submitted:
    job: str
    """Slurm's id; it stays when the job is requeued."""
    script: str
    """In the run folder."""
    template: str
    template_sha256: str
    job_digest: str
    nodes: int
    ranks_per_node: int
    command: tuple[str, ...]
    """Of the person who submitted."""
    after: str | None = None
    kind: str = "train"
    """What it does: train, or a command that comes after: evaluate, merge."""
    log: str = ""
    """In the run folder."""


@dataclass(frozen=True)
class Began:
    """A sitting: one allocation of the job."""

    job: str
    restart: int
    """How often it had been started before."""
    nodes: str
    """As Slurm writes a list of them: node[1-2]."""


@dataclass(frozen=True)
class Told:
    """Slurm has told the batch script that the sitting is to end; the last word where the script was killed before it could say more."""

    job: str
    restart: int
    signal: str
    cause: Cause


@dataclass(frozen=True)
class Ended:
    """Missing for a sitting that was killed with its node."""

    job: str
    restart: int
    exit_code: int
    why: str
    step: int
    """Of the newest saved state; 0: none."""
    then: Then
    cause: Cause = ""
    at_s: float = 0.0
    """Since 1970."""


@dataclass(frozen=True)
class Refused:
    """Slurm did not take it back."""

    job: str
    why: str


@dataclass(frozen=True)
class Cancelled:
    """Somebody asked for its end: it is not to come back."""

    job: str


Event = Submitted | Began | Told | Ended | Refused | Cancelled
_KINDS: dict[str, type[Any]] = {kind.__name__.lower(): kind for kind in (Submitted, Began, Told, Ended, Refused, Cancelled)}


def note(run: Path, event: Event) -> None:
    """Adds a line; in one write, so that two writers do not mix theirs."""
    kind = next(name for name, known in _KINDS.items() if isinstance(event, known))
    line = json.dumps({"event": kind, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **asdict(event)}, ensure_ascii=False)
    descriptor = os.open(run / FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line.encode() + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def events(run: Path) -> list[Event]:
    """In the order in which they were seen; a line that a killed process cut, or another version wrote, is passed over."""
    try:
        lines = (run / FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    found = (_event(line) for line in lines)
    return [event for event in found if event]


def _event(line: str) -> Event | None:
    try:
        values: dict[str, Any] = json.loads(line)
        kind = _KINDS[values["event"]]
        known = {field.name for field in fields(kind)}
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if name in known})
    except (ValueError, KeyError, TypeError):
        return None


def newest_step(run: Path) -> int:
    """Of the states that are whole, by their names; 0: there is none."""
    return max((int(path.name[5:]) for path in (run / "state").glob("step-*") if path.name[5:].isdigit()), default=0)
