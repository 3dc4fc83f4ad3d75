"""How runs stand -> a table, and the lines below it that do not fit into one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.text import Text

from pipeline.job.printable import printable
from pipeline.screen import columns
from pipeline.watch.status import Status

_NAMES = ("run", "state", "job", "nodes", "step", "loss", "tokens/s", "left", "saved", "restarts")
_GIVE_WAY = ("restarts", "tokens/s", "nodes", "job", "saved", "loss", "left")
"""Where the terminal is too narrow, in this order."""
_FIRST = ("running", "waiting", "failed", "stopped", "cancelled", "not begun", "finished")
"""States; where the terminal is too low, the runs of the first ones are shown."""
_HEAD, _BETWEEN = 1, 2
_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def table(found: Sequence[Status], notes: Sequence[str] = (), width: int | None = None, height: int | None = None) -> RenderableType:
    """A line a run; then, where a run did not end well, what it said last.

    Args:
        width: of the terminal, in characters. None: there is none, and nothing gives way.
        height: lines that it may take. None: as many as it has.
    """
    runs = [status.run for status in found]
    names = dict(zip(runs, map(printable, _short(runs)), strict=True))
    shown, rest = list(found), ""
    if height is not None and len(found) > (room := max(1, height - _HEAD - 1 - len(notes))):
        kept = sorted(found, key=lambda status: _FIRST.index(status.state))[:room]
        shown = [status for status in found if status in kept]
        counts = Counter(status.state for status in found)
        states = ", ".join(f"{counts[state]} {state}" for state in _FIRST if counts[state])
        rest = f"and {len(found) - room:,} more; of all {len(found):,}: {states}"
    said = [f"{names[status.run]}: {status.why}" for status in shown if status.why and status.state != "finished"]
    said += [f"{names[status.run]}: then {kind}: {words}" for status in shown for kind, words in status.then.items()]
    if height is not None:
        said = said[: max(0, height - _HEAD - len(shown) - bool(rest) - len(notes))]
    rows = [_row(names[status.run], status) for status in shown]
    chosen = _fitting(rows, width)
    drawn = columns("", [_NAMES[place] for place in chosen], [[row[place] for place in chosen] for row in rows])
    # Runs are told apart by the ends of their names.
    drawn.columns[0].overflow = "fold"
    return Group(drawn, *([_line(rest)] if rest else []), *map(_line, said), *(Text(printable(note), style="dim") for note in notes))


def _fitting(rows: Sequence[Sequence[str]], width: int | None) -> list[int]:
    """Places of the columns to show: those with something in them, as many as there is room for."""
    widths = [max(cell_len(text) for text in (name, *(row[place] for row in rows))) for place, name in enumerate(_NAMES)]
    chosen = [place for place, name in enumerate(_NAMES) if name not in _GIVE_WAY or any(row[place] for row in rows)]
    for name in _GIVE_WAY:
        if width is None or sum(widths[place] + _BETWEEN for place in chosen) <= width:
            break
        chosen = [place for place in chosen if _NAMES[place] != name]
    return chosen


def _line(text: str) -> Text:
    return Text(printable(text))


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
