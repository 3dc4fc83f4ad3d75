"""Runs -> rows: runs that differ in nothing but seeds are one, with mean, standard deviation and median of each column. Pure."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.compare.collect import Keys, Run, metric_of
from pipeline.compare.methods import NAMED, method_name
from pipeline.job.metrics import better

Middle = Literal["mean", "median"]
_SEEDS = re.compile(r"(train|evaluate)\.seed|task\.(sources\[\d+\]\.)?(train_examples_seed|dev_seed)")
_SECTION = re.compile(r"((methods\[\d+\]|task(?:\.sources\[\d+\])?)\.)(\w+).*")
_SCORED = re.compile(r"evaluate\.(script|max_prompts)|task\.(?!.*(train_examples|seed|weight|too_long|separator)).*")
_OF_ONE_BATCH = "loss"
"""Of the last step: a row that is lower there is not better."""


@dataclass(frozen=True)
class Cell:
    """A column of a row."""

    values: tuple[float, ...]
    """Of the runs that have one."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def std(self) -> float | None:
        """Of a sample; None of one value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def middle(self, which: Middle) -> float:
        return self.median if which == "median" else self.mean


@dataclass(frozen=True)
class Row:
    method: str
    settings: Keys
    """All of the job's but seeds; in a row of one run seeds too."""
    runs: tuple[Run, ...]
    """Those that count."""
    left_out: dict[str, str]
    """Run -> why it does not count."""
    cells: dict[str, Cell]
    published: Keys | None
    best: frozenset[str] = frozenset()
    """Columns in which it is the best of those that are scored on the same."""

    @property
    def parameters(self) -> int | None:
        return next((run.parameters for run in self.runs if run.parameters is not None), None)

    @property
    def scored(self) -> str:
        """Equal for rows whose scores can be compared."""
        return json.dumps({key: value for key, value in self.settings.items() if says_what_is_scored(key)}, sort_keys=True)


@dataclass(frozen=True)
class Comparison:
    differ: tuple[str, ...]
    """Keys of the job, seeds among them."""
    keys: tuple[str, ...]
    """Of these, what is to be shown: not what the methods' names say, nor seeds over which a row goes."""
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    left_out: dict[str, str]
    """Every run that does not count, and why."""
    middle: Middle
    each: bool
    """A row is one run."""


def compare(runs: Sequence[Run], middle: Middle = "mean", each: bool = False, metrics: Sequence[str] = ()) -> Comparison:
    """Args:
    middle: by which rows are compared.
    each: a row for each run, also where others differ in seeds only.
    metrics: columns, or metrics in all their columns; all when empty."""
    known = [run for run in runs if run.settings]
    groups: dict[str, list[Run]] = {}
    for run in known:
        groups.setdefault(str(run.folder) if each else json.dumps(_without_seeds(run.settings), sort_keys=True), []).append(run)
    each = each or all(len(group) == 1 for group in groups.values())
    differ = _differing([run.settings for run in known])
    keys = tuple(key for key in differ if (each or not _SEEDS.fullmatch(key)) and not _told(key, [run.settings for run in known]))
    columns = dict.fromkeys(column for run in known for column in run.results)
    columns |= dict.fromkeys(column for run in known if run.finished and run.published for column in run.published["scores"])
    chosen = tuple(column for column in columns if not metrics or column in metrics or metric_of(column) in metrics)
    rows = [_row(group, each, chosen) for group in groups.values()]
    best = _best(rows, [column for column in chosen if column != _OF_ONE_BATCH], middle)
    rows = [replace(row, best=frozenset(own)) for row, own in zip(rows, best, strict=True)]
    left_out = {str(run.folder): run.state for run in runs if not run.settings}
    for row in rows:
        left_out |= row.left_out
    return Comparison(differ, keys, chosen, tuple(rows), left_out, middle, each)


def says_what_is_scored(key: str) -> bool:
    """Whether a key of the job does; others of a task say what is learnt."""
    return bool(_SCORED.fullmatch(key))


def _row(group: list[Run], each: bool, columns: Sequence[str]) -> Row:
    counted, left_out = dict[str, Run](), {str(run.folder): run.state for run in group if not run.finished}
    for run in group:
        seeds = json.dumps({key: value for key, value in run.settings.items() if _SEEDS.fullmatch(key)})
        if run.finished and (first := counted.setdefault(seeds, run)) is not run:
            left_out[str(run.folder)] = f"the same job and seeds as {first.folder}"
    runs = tuple(counted.values())
    found = {column: tuple(value for run in runs if (value := run.results.get(column)) is not None) for column in columns}
    settings = group[0].settings
    return Row(
        method_name(settings),
        settings if each else _without_seeds(settings),
        runs,
        left_out,
        {column: Cell(values) for column, values in found.items() if values},
        next((run.published for run in group if run.published), None),
    )


def _without_seeds(settings: Keys) -> Keys:
    return {key: value for key, value in settings.items() if not _SEEDS.fullmatch(key)}


def _differing(jobs: Sequence[Keys]) -> tuple[str, ...]:
    keys = dict.fromkeys(key for job in jobs for key in job)
    return tuple(key for key in keys if len({json.dumps(job.get(key)) for job in jobs}) > 1)


def _told(key: str, jobs: Sequence[Keys]) -> bool:
    """Whether the method's name says it, or it differs only because another kind of method or task has no such key."""
    if not (parts := _SECTION.fullmatch(key)):
        return False
    if parts[2].startswith("methods") and parts[3] in NAMED:
        return True
    if parts[3] == "kind":
        return False
    of_kind: dict[str, set[str]] = {}
    for job in jobs:
        of_kind.setdefault(str(job.get(f"{parts[1]}kind")), set()).add(json.dumps(job.get(key)))
    values = {value for found in of_kind.values() for value in found} - {json.dumps(None)}
    return len(values) == 1 and all(len(found) == 1 for found in of_kind.values())


def _best(rows: Sequence[Row], columns: Sequence[str], middle: Middle) -> list[set[str]]:
    """Of each row the columns in which no other that is scored on the same is better; none where there is no other."""
    found: list[set[str]] = [set() for _ in rows]
    tasks = dict[str, list[int]]()
    for place, row in enumerate(rows):
        tasks.setdefault(row.scored, []).append(place)
    for places in tasks.values():
        for column in columns:
            own = {place: rows[place].cells[column].middle(middle) for place in places if column in rows[place].cells}
            name = metric_of(column)
            for place in own if len(own) > 1 else ():
                if not any(better(name, other, own[place]) for other in own.values()):
                    found[place].add(column)
    return found
