"""What a study's runs have reached, as one object: the learning rates tried, and rows of methods, sizes, numbers of examples over seeds.

The rows are those of `zlora compare`; this says which runs belong into which table.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.compare.collect import collect
from pipeline.compare.forms import as_object
from pipeline.compare.group import compare
from pipeline.job.errors import JobError
from pipeline.job.read import read_resolved
from pipeline.job.spec import Job

FIRST_SEED = 1
CHOSEN_BY = {"e2e": "BLEU", "glue": "accuracy"}
"""Kind of task -> the metric of the dev set."""


def finished(folder: Path) -> list[Path]:
    """The runs of a sweep that have a result."""
    return sorted(file.parent for file in folder.glob("*/result.json"))


def tried(folder: Path) -> dict[float, float]:
    """Learning rate -> score of the first seed on the dev set."""
    found = {}
    for run in finished(folder):
        job = _job(run)
        if job.train.seed == FIRST_SEED:
            valid = json.loads((run / "result.json").read_text(encoding="utf-8"))["valid"]
            found[job.train.learning_rate] = valid[CHOSEN_BY[job.task.kind]]
    return dict(sorted(found.items()))


def chosen(folder: Path) -> float:
    """The best of them; of equals the smallest.

    Raises:
        JobError: there is none yet.
    """
    scores = tried(folder)
    if not scores:
        raise JobError(f"{folder}: no learning rate has been tried yet, or all runs failed. Run this part of the study first.")
    return max(scores, key=lambda rate: scores[rate])


def finals(folder: Path) -> list[Path]:
    """The runs of a search with the learning rate that was chosen: one a seed."""
    runs = finished(folder)
    best = chosen(folder) if runs else None
    return [run for run in runs if _job(run).train.learning_rate == best]


def study(out: Path, methods: Sequence[str], few: Sequence[str]) -> dict[str, Any]:
    """Args:
    methods, few: of `e2e` and `sst2`, and of the low-data series; in the order of the tables."""
    lora = finals(out / "e2e_lora")
    fours = [run for run in finished(out / "rank") if getattr(_job(run).methods[0], "rank", None) == 4]
    runs = {
        "e2e": [run for method in methods for run in finals(out / f"e2e_{method}")],
        "sst2": [run for method in methods for run in finals(out / f"sst2_{method}")],
        # With rows of other parts, where there are any of its own.
        "rank": [*own, *lora] if (own := finished(out / "rank")) else [],
        "weights": [*own, *fours] if (own := finished(out / "weights")) else [],
        "few": [run for m in few if (own := finished(out / f"few_{m}")) for run in (*own, *finals(out / f"e2e_{m}"))],
    }
    searched = [f"{part}_{method}" for part in ("e2e", "sst2") for method in methods if finished(out / f"{part}_{method}")]
    return {
        "schema_version": 1,
        "base": _base(out),
        "rates": {
            job: {"tried": {f"{rate:g}": score for rate, score in tried(out / job).items()}, "chosen": chosen(out / job)}
            for job in searched
        },
        "parts": {part: _rows(found) for part, found in runs.items() if found},
    }


def _base(out: Path) -> dict[str, Any] | None:
    """What pretraining has ended with."""
    file = out / "pretrain" / "result.json"
    if not file.exists():
        return None
    result = json.loads(file.read_text(encoding="utf-8"))
    manifest = json.loads((out / "pretrain" / "delta" / "manifest.json").read_text(encoding="utf-8"))
    return {"parameters": manifest["parameters"], "seconds": result["seconds"], "steps": result["steps"], "valid": result["valid"]}


def _rows(runs: list[Path]) -> list[dict[str, Any]]:
    found = []
    for row in as_object(compare(collect(runs)))["rows"]:
        job = _job(Path(row["runs"][0]))
        first = job.methods[0]
        found.append(
            {
                "method": row["method"],
                "kind": getattr(first, "placement", first.kind),
                "rank": getattr(first, "rank", None),
                "examples": getattr(job.task, "train_examples", None),
                "learning_rate": job.train.learning_rate,
                "steps": job.train.steps,
                "batch_examples": job.train.batch_examples,
                "parameters": row["parameters"],
                "runs": len(row["runs"]),
                "seconds": row["cost"]["seconds"],
                "results": {name: {key: cell[key] for key in ("values", "mean", "std")} for name, cell in row["results"].items()},
            }
        )
    return found


def _job(run: Path) -> Job:
    job = read_resolved(run / "job.toml")
    if job is None:
        raise JobError(f"{run}: its job.toml cannot be read, or another version wrote it. Remove the folder and run the study again.")
    return job
