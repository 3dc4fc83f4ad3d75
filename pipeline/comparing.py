"""`zlora compare`: run folders -> one table: the settings that differ, and the results; mean and spread over seeds. No torch."""

from __future__ import annotations

import csv
import io
import json
import statistics
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.job.changes import flat
from pipeline.job.errors import JobError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SEEDS = ("train.seed", "evaluate.seed", "task.train_examples_seed", "task.dev_seed")
_NOT_SETTINGS = ("cluster.", "sweep.")
Row = dict[str, Any]


def compare(runs: Sequence[Path]) -> dict[str, Any]:
    """Ready for JSON: the keys that differ, a row a run, and a row a group of runs in which only seeds differ.

    Raises:
        JobError: a folder has no job.
    """
    jobs = [_job(run) for run in runs]
    keys = list(dict.fromkeys(key for job in jobs for key in job))
    differ = [key for key in keys if len({json.dumps(job.get(key)) for job in jobs}) > 1]
    rows = [
        {"run": str(run), "settings": {key: job.get(key) for key in differ}, **_results(run)} for run, job in zip(runs, jobs, strict=True)
    ]
    return {"schema_version": 1, "keys": differ, "runs": rows, "groups": _groups(rows, differ)}


def _job(run: Path) -> Row:
    file = run / "job.toml"
    try:
        found = flat("", tomllib.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise JobError(f"{run}: not a run to compare ({error}). Name runs that have begun.") from None
    return {key: value for key, value in found.items() if not key.startswith(_NOT_SETTINGS)}


def _results(run: Path) -> Row:
    result, manifest = _object(run / "result.json"), _object(run / "delta" / "manifest.json")
    scores = {f"{split} {name}": value for split in ("valid", "test", "train") for name, value in result.get(split, {}).items()}
    best = result.get("best") or {}
    if best:
        scores[f"best {best['split']} {best['metric']}"] = best["value"]
    return {
        "finished": bool(result),
        "results": {"loss": result.get("loss"), **scores} if result else {},
        "steps": result.get("steps"),
        "parameters": manifest.get("parameters"),
        "seconds": result.get("seconds"),
        "peak_memory_bytes": result.get("peak_memory_bytes"),
    }


def _groups(rows: list[Row], differ: list[str]) -> list[Row]:
    """Of two finished runs or more, equal but for seeds. The spread is the standard deviation of a sample."""
    others = [key for key in differ if key not in SEEDS]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["finished"]:
            groups.setdefault(json.dumps([row["settings"][key] for key in others]), []).append(row)
    return [
        {
            "settings": {key: group[0]["settings"][key] for key in others},
            "runs": len(group),
            "mean": {name: statistics.fmean(values) for name, values in _values(group).items()},
            "spread": {name: statistics.stdev(values) for name, values in _values(group).items()},
        }
        for group in groups.values()
        if len(group) > 1
    ]


def _values(group: list[Row]) -> dict[str, list[float]]:
    found = {name: [row["results"].get(name) for row in group] for name in group[0]["results"]}
    return {name: values for name, values in found.items() if all(isinstance(value, int | float) for value in values)}


def cells(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Names of columns, and rows: a run each, then a group each with mean ± spread."""
    rows, keys = found["runs"], found["keys"]
    results = list(dict.fromkeys(name for row in rows for name in row["results"]))
    names = ["run", *(_short(key, keys) for key in keys), *results, "steps", "trained", "time / s", "peak / GiB"]
    lines = []
    for row in rows:
        peak = row["peak_memory_bytes"]
        ends = [_text(row[name]) for name in ("steps", "parameters")]
        ends += [_number(row["seconds"], 1), _number(peak and peak / 2**30, 2)]
        name = row["run"] if row["finished"] else f"{row['run']} (not finished)"
        scores = [_number(row["results"].get(each)) for each in results]
        lines.append([name, *(_text(row["settings"][key]) for key in keys), *scores, *ends])
    for group in found["groups"]:
        shown = [f"{_number(group['mean'][n])} ± {_number(group['spread'][n])}" if n in group["mean"] else "" for n in results]
        settings = [_text(group["settings"].get(key)) if key in group["settings"] else "" for key in keys]
        lines.append([f"mean of {group['runs']}", *settings, *shown, "", "", "", ""])
    return names, lines


def markdown(names: list[str], lines: list[list[str]]) -> str:
    rows = [names, [":---", *["---:"] * (len(names) - 1)], *lines]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows) + "\n"


def as_csv(names: list[str], lines: list[list[str]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([names, *lines])
    return out.getvalue()


def _short(key: str, keys: list[str]) -> str:
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in keys) == 1 else key


def _text(value: Any) -> str:
    match value:
        case None:
            return ""
        case list():
            return "+".join(map(_text, value))
        case _:
            return str(value)


def _number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _object(file: Path) -> Row:
    with suppress(OSError, ValueError):
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}
