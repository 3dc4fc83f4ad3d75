"""How runs stand -> a table, and the lines below it that do not fit into one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from rich.console import Group, RenderableType
from rich.text import Text

from pipeline.screen import columns
from pipeline.watch.status import Status

_NAMES = ("run", "state", "job", "nodes", "step", "loss", "tokens/s", "left", "saved", "restarts")
_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def table(found: Sequence[Status], notes: Sequence[str] = ()) -> RenderableType:
    """A line a run; then, where a run did not end well, what it said last."""
    names = _short([status.run for status in found])
    said = [f"{name}: {status.why}" for name, status in zip(names, found, strict=True) if status.why and status.state != "finished"]
    said += [f"{name}: then {kind}: {words}" for name, status in zip(names, found, strict=True) for kind, words in status.then.items()]
    lines = [Text(line, style="dim" if number >= len(said) else "") for number, line in enumerate([*said, *notes])]
    return Group(columns("", _NAMES, [_row(name, status) for name, status in zip(names, found, strict=True)]), *lines)


def _row(name: str, status: Status) -> tuple[str, ...]:
    step = f"{status.step:,} / {status.steps:,}" if status.steps else f"{status.step:,}"
    left = "" if status.left_s is None else duration(status.left_s)
    saved = "" if status.saved_age_s is None else f"step {status.saved_step:,}, {duration(status.saved_age_s)} ago"
    return (
        name,
        status.words,
        status.job or "",
        status.nodes or "",
        step,
        "" if status.loss is None else f"{status.loss:.4f}",
        "" if status.tokens_per_s is None else f"{status.tokens_per_s:,.0f}",
        left,
        saved,
        str(status.restarts or ""),
    )


def _short(runs: list[str]) -> list[str]:
    """Without the folders that all of them share."""
    parts = [PurePath(run).parts for run in runs]
    shared = 0
    while len(runs) > 1 and all(len(own) > shared + 1 and own[: shared + 1] == parts[0][: shared + 1] for own in parts):
        shared += 1
    return [str(PurePath(*own[shared:])) for own in parts]


def duration(seconds: float) -> str:
    """For people: two units at most."""
    whole = round(seconds)
    if whole < _MINUTE:
        return f"{whole} s"
    if whole < _HOUR:
        return f"{whole // _MINUTE} min"
    if whole < _DAY:
        return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE:02} min"
    return f"{whole // _DAY} d {whole % _DAY // _HOUR} h"
