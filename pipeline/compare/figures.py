"""Two pictures of a comparison: scores against log10 of the trained parameters, as in figure 2 of the LoRA paper, and learning curves."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pipeline.compare.collect import Points, curves, metric_of
from pipeline.compare.group import Cell, Comparison, Row, says_what_is_scored
from pipeline.compare.methods import family
from pipeline.compare.sheet import settings_text
from pipeline.job.errors import JobError

ENDS = (".png", ".svg", ".pdf")
_COLOURS = ("#5e81ac", "#bf616a", "#a3be8c", "#d08770", "#b48ead", "#4c566a", "#ebcb8b", "#88c0d0")
_MARKS = "osD^vP*X"
_LINES = ("-", "-.", ":")
"""One after another, where there are more lines than colours; dashed is what does not count."""
_NOT_COUNTED: dict[str, Any] = {"linestyle": "--", "linewidth": 0.7}
_ACROSS = 3
_POINTS = 100
"""Of a curve of losses: where there are more steps, so many means of neighbours."""
_TRAIN_LOSS = "train loss"
K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


def refuse_ending(file: Path) -> None:
    """Raises:
    JobError: not the name of a picture."""
    if file.suffix not in ENDS:
        raise JobError(f"{file}: the name of a picture ends in {', '.join(ENDS)}. Choose one of them.")


def draw_scores(found: Comparison, file: Path) -> None:
    """A panel a column and task; in it a line a method, its spread over seeds, and published values hollow.

    Raises:
        JobError: there is nothing to draw.
    """
    tasks = _by(lambda row: row.scored, (row for row in found.rows if row.parameters))
    panels = {
        f"{column}\n{_task_text(rows[0], found)}" if len(tasks) > 1 else column: (column, rows)
        for rows in tasks.values()
        for column in found.columns
        if column != "loss" and any(column in row.cells for row in rows)
    }
    if not panels:
        raise JobError(f"--plot {file}: no run here has a score and a delta whose parameters are known. Name others, or another --metric.")
    lines = _by(lambda row: _line_name(row, found), (row for row in found.rows if row.parameters))
    figure, axes = _figure(list(panels), "log10 of trained parameters")
    for place, name in enumerate(lines):
        for title, (column, rows) in panels.items():
            own = sorted((row for row in lines[name] if row in rows and column in row.cells), key=lambda row: row.parameters or 0)
            _score_line(axes[title], own, column, found, _pen(place) | {"marker": _MARKS[place % len(_MARKS)]})
    for title, (column, rows) in panels.items():
        _published_points(axes[title], column, {name: [row for row in own if row in rows] for name, own in lines.items()})
    handles = [Line2D([], [], marker=_MARKS[place % len(_MARKS)], label=name, **_pen(place)) for place, name in enumerate(lines)]
    if any(column in row.published["scores"] for row in found.rows if row.published for column, _ in panels.values()):
        handles.append(Line2D([], [], color="black", marker="o", markerfacecolor="none", linestyle="", label="published"))
    _save(figure, handles, file)


def _score_line(axes: Axes, rows: list[Row], column: str, found: Comparison, pen: dict[str, Any]) -> None:
    if rows:
        x, cells = [math.log10(row.parameters or 1) for row in rows], [row.cells[column] for row in rows]
        axes.errorbar(x, [cell.middle(found.middle) for cell in cells], [cell.std or 0.0 for cell in cells], capsize=3, **pen)


def _published_points(axes: Axes, column: str, lines: dict[str, list[Row]]) -> None:
    """Each once, in the colour of the line whose rows name it, or black where several lines' do."""
    naming = [(place, row, row.published) for place, rows in enumerate(lines.values()) for row in rows if row.published]
    for named in _by(lambda each: json.dumps(each[2]), naming).values():
        (_, row, published), places = named[0], {place for place, _, _ in named}
        if (value := published["scores"].get(column)) is not None:
            colour = _pen(places.pop())["color"] if len(places) == 1 else "black"
            x, spread = math.log10(published.get("parameters") or row.parameters or 1), published.get("spread", {}).get(column, 0.0)
            axes.errorbar([x], [value], [spread], color=colour, marker="o", markerfacecolor="none", linestyle="", capsize=3)


def draw_curves(found: Comparison, file: Path, metrics: Sequence[str] = ()) -> None:
    """The training loss and each column scored in training against steps: a line a row, a band of one standard deviation over its runs.

    Raises:
        JobError: there is nothing to draw.
    """
    read = [([curves(run.folder) for run in row.runs], [curves(Path(run)) for run in row.left_out]) for row in found.rows]
    every = [curve for counted, left_out in read for curve in (*counted, *left_out)]
    columns = dict.fromkeys(column for _, scores in every for column in scores if not metrics or {column, metric_of(column)} & {*metrics})
    steps = max((losses[-1][0] for losses, _ in every if losses), default=0)
    if not steps:
        raise JobError(f"--curves {file}: no run here has taken a step. Name runs that have begun.")
    width = math.ceil(steps / _POINTS)
    loss = f"{_TRAIN_LOSS}, mean of {width:,} steps" if width > 1 else _TRAIN_LOSS
    figure, axes = _figure([loss, *columns], "step")
    for place, (counted, left_out) in enumerate(read):
        for title in (loss, *columns):
            own, others = ([_thinned(c[0], width) if title == loss else c[1].get(title, []) for c in some] for some in (counted, left_out))
            _band(axes[title], own, found, _pen(place))
            for points in others:
                axes[title].plot(*_split(points), **{**_pen(place), **_NOT_COUNTED})
    for column in columns:
        if metric_of(column) == "perplexity":
            axes[column].set_yscale("log")
    handles = [Line2D([], [], label=_row_name(row, found), **_pen(place)) for place, row in enumerate(found.rows)]
    if any(left_out for _, left_out in read):
        handles.append(Line2D([], [], color="black", label="not counted", **_NOT_COUNTED))
    _save(figure, handles, file)


def _band(axes: Axes, runs: list[Points], found: Comparison, pen: dict[str, Any]) -> None:
    at = _by(lambda point: point[0], (point for points in runs for point in points))
    cells = [(step, Cell(tuple(value for _, value in at[step]))) for step in sorted(at)]
    if not cells:
        return
    x, y = [step for step, _ in cells], [cell.middle(found.middle) for _, cell in cells]
    # A single scoring is a point.
    axes.plot(x, y, marker="o" if len(x) == 1 else None, **pen)
    spread = [cell.std or 0.0 for _, cell in cells]
    if any(spread):
        low, high = ([value + sign * own for value, own in zip(y, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=pen["color"], alpha=0.2, linewidth=0)


def _thinned(points: Points, width: int) -> Points:
    """Means over so many steps, each at the last step of its stretch."""
    stretches = _by(lambda point: (point[0] - 1) // width, points)
    return [(own[-1][0], statistics.fmean(value for _, value in own)) for own in stretches.values()]


def _split(points: Points) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _pen(place: int) -> dict[str, Any]:
    """How the line of this place among all is drawn."""
    return {"color": _COLOURS[place % len(_COLOURS)], "linestyle": _LINES[place // len(_COLOURS) % len(_LINES)], "linewidth": 1.4}


def _by(key: Callable[[T], K], values: Iterable[T]) -> dict[K, list[T]]:
    found: dict[K, list[T]] = {}
    for value in values:
        found.setdefault(key(value), []).append(value)
    return found


def _line_name(row: Row, found: Comparison) -> str:
    """Sizes of a method are points of one line; what else differs among its rows makes several."""
    others = [other for other in found.rows if family(other.settings) == family(row.settings)]
    keys = [key for key in found.keys if not key.startswith("methods[") and not says_what_is_scored(key)]
    differ = [key for key in keys if any(other.settings.get(key) != row.settings.get(key) for other in others)]
    return ", ".join([family(row.settings), *settings_text(row, differ, found.keys)])


def _row_name(row: Row, found: Comparison) -> str:
    return ", ".join([row.method, *settings_text(row, found.keys, found.keys)])


def _task_text(row: Row, found: Comparison) -> str:
    return ", ".join(settings_text(row, [key for key in found.keys if says_what_is_scored(key)], found.keys))


def _figure(titles: list[str], below: str) -> tuple[Figure, dict[str, Axes]]:
    matplotlib.use("agg")
    across = min(_ACROSS, len(titles))
    down = math.ceil(len(titles) / across)
    figure = Figure(figsize=(4.4 * across if across > 1 else 6.0, 3.4 * down + 0.8), layout="constrained")
    places = figure.subplots(down, across, squeeze=False).flatten()
    for axes in places[len(titles) :]:
        axes.set_visible(False)
    for axes, title in zip(places, titles, strict=False):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(below, fontsize=9)
        axes.tick_params(which="both", labelsize=8)
        axes.grid(alpha=0.25)
    return figure, dict(zip(titles, places, strict=False))


def _save(figure: Figure, handles: list[Line2D], file: Path) -> None:
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)), fontsize=8, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
