"""A comparison -> a sheet of words for people, the same for the screen, Markdown and LaTeX; and what a row has cost. No torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.compare.collect import Keys, Run, metric_of
from pipeline.compare.group import Comparison, Row
from pipeline.job.metrics import shown

UNKNOWN = "unknown"
_OWN_TEXTS = ("jsonl", "csv", "parquet", "chat")
T = TypeVar("T")


@dataclass(frozen=True)
class Word:
    text: str
    bold: bool = False


@dataclass(frozen=True)
class Sheet:
    names: tuple[str, ...]
    words: int
    """So many columns come first that are words; the others are numbers."""
    rows: tuple[tuple[Word, ...], ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Cost:
    """Of one run: the mean of a row's; of memory and size the largest. None where it is not known of each."""

    seconds: float | None
    """Of training; scoring is not counted."""
    rank_hours: float | None
    """Ranks x hours: GPU hours where each rank has a GPU."""
    gpu: bool | None
    peak_memory_bytes: int | None
    """Of the first rank."""
    delta_bytes: int | None


def cost_of(runs: Sequence[Run]) -> Cost:
    seconds, ranks, gpus = (_known([getattr(run, name) for run in runs]) for name in ("seconds", "ranks", "gpu"))
    peaks, sizes = _known([run.peak_memory_bytes for run in runs]), _known([run.delta_bytes for run in runs])
    return Cost(
        seconds=statistics.fmean(seconds) if seconds else None,
        rank_hours=statistics.fmean(s * r / 3600 for s, r in zip(seconds, ranks, strict=True)) if seconds and ranks else None,
        gpu=all(gpus) if gpus else None,
        peak_memory_bytes=max(peaks, default=None),
        delta_bytes=max(sizes, default=None),
    )


def _known(values: list[T | None]) -> list[T]:
    """All of them, or none."""
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else []


def sheet(found: Comparison, cost: bool = False) -> Sheet:
    """A line a row, and behind the last one that names it a published one."""
    ahead = [*(["run"] if found.each else []), "method", *(short(key, found.keys) for key in found.keys)]
    costs = [cost_of(row.runs) for row in found.rows]
    names = [*ahead, *([] if found.each else ["n"]), "trained", "steps", *found.columns, *(_cost_names(costs) if cost else [])]
    lines = []
    for place, row in enumerate(found.rows):
        lines.append(_line(row, found, costs[place] if cost else None))
        if row.published and row.published not in [later.published for later in found.rows[place + 1 :]]:
            lines.append(_published(row.published, found, len(names)))
    notes = [f"not counted: {run}: {why}" for run, why in found.left_out.items()]
    if any(cell.std is not None for row in found.rows for cell in row.cells.values()):
        notes.insert(0, f"{found.middle} ± standard deviation over n runs that differ in seeds only")
    return Sheet(tuple(names), len(ahead), tuple(lines), tuple(notes))


def _line(row: Row, found: Comparison, cost: Cost | None) -> tuple[Word, ...]:
    names = [*(str(run.folder) for run in row.runs), *row.left_out]
    words = [*([names[0]] if found.each else []), row.method, *(text(row.settings.get(key)) for key in found.keys)]
    if not found.each:
        words.append(f"{len(row.runs)} of {len(names)}" if row.left_out else str(len(row.runs)))
    words += ["" if row.parameters is None else f"{row.parameters:,}", _range([run.steps for run in row.runs])]
    cells = [_cell(row, column, found) for column in found.columns]
    return (*map(Word, words), *cells, *map(Word, _cost_words(cost) if cost else ()))


def _cell(row: Row, column: str, found: Comparison) -> Word:
    if (cell := row.cells.get(column)) is None:
        return Word("")
    kind = "texts" if row.settings.get("task.kind") in _OWN_TEXTS else str(row.settings.get("task.kind"))
    told = shown(kind, metric_of(column), cell.middle(found.middle))
    if cell.std is not None:
        told += f" ± {shown(kind, metric_of(column), cell.std)}"
    if len(cell.values) < len(row.runs):
        told += f" (n={len(cell.values)})"
    return Word(told, column in row.best)


def _published(published: Keys, found: Comparison, columns: int) -> tuple[Word, ...]:
    scores, spread, trained = published["scores"], published.get("spread", {}), published.get("parameters")
    # Run, or n, stands beside the method and its settings in every line.
    words = [published["source"], *([""] * (len(found.keys) + 1)), "" if trained is None else f"{trained:,}", ""]
    words += [f"{scores[name]:g}{f' ± {spread[name]:g}' if name in spread else ''}" if name in scores else "" for name in found.columns]
    return tuple(Word(word) for word in [*words, *([""] * (columns - len(words)))])


def _cost_names(costs: Sequence[Cost]) -> list[str]:
    gpus = [each.gpu for each in costs if each.gpu is not None]
    return ["time / s", "GPU hours" if gpus and all(gpus) else "rank hours", "peak / GiB", "delta / MiB"]


def _cost_words(cost: Cost) -> list[str]:
    found = ((cost.seconds, 1, 1), (cost.rank_hours, 3, 1), (cost.peak_memory_bytes, 2, 2**30), (cost.delta_bytes, 2, 2**20))
    return [UNKNOWN if value is None else f"{value / unit:,.{digits}f}" for value, digits, unit in found]


def settings_text(row: Row, keys: Sequence[str], among: Sequence[str]) -> list[str]:
    """`rank=8` for each of these keys that the row has, as short as it can be told from the others."""
    return [f"{short(key, among)}={text(row.settings[key])}" for key in keys if key in row.settings]


def short(key: str, keys: Sequence[str]) -> str:
    """The key's last part, where that tells it from the others."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in keys) == 1 else key


def text(value: Any) -> str:
    match value:
        case None:
            return ""
        case list():
            return "+".join(map(text, value))
        case _:
            return str(value)


def _range(steps: list[int | None]) -> str:
    known = sorted({step for step in steps if step is not None})
    return " to ".join(f"{step:,}" for step in dict.fromkeys([*known[:1], *known[-1:]]))
