"""Where a delta comes from: the run folder that it lies in -> job, scores, data and versions, as far as they are there. No torch.

A run is believed only where it was a run of the job that the delta's manifest names by its digest.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.job.read import job_digest, read_resolved
from pipeline.job.spec import Job
from pipeline.weights.manifest import Manifest
from pipeline.weights.parse import parse_json, read_json
from pipeline.weights.record import DataFile


@dataclass(frozen=True)
class Origin:
    job: Job | None = None
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    """By split: metrics of exactly this delta, after its step."""
    chosen: str | None = None
    """The metric by which it is the best of its run; None: it is the last."""
    data: tuple[DataFile, ...] = ()
    environment: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)


def origin_of(folder: Path, manifest: Manifest) -> Origin:
    """Of a delta folder; empty where it does not lie in its run."""
    run = folder.resolve().parent
    job, result, state = read_resolved(run / "job.toml"), _json(run / "result.json"), _state(run)
    digests = {result.get("job_digest"), state.get("job_digest"), job_digest(job) if job else None}
    if job is None or not manifest.job_digest or manifest.job_digest not in digests:
        return Origin()
    try:
        data = tuple(DataFile.model_validate(row) for row in state.get("data", ()))
    except (ValidationError, TypeError):
        data = ()
    return Origin(
        job, _scores(run, manifest.step), _json(folder / "score.json").get("metric"), data, _json(run / "environment.json"), result
    )


def _json(file: Path) -> dict[str, Any]:
    try:
        value = read_json(file)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _state(run: Path) -> dict[str, Any]:
    """The newest state's record."""
    return next(filter(None, (_json(file) for file in sorted((run / "state").glob("step-*/state.json"), reverse=True))), {})


def _scores(run: Path, step: int) -> dict[str, dict[str, float]]:
    """A run that goes on may have scored a step twice: the later row counts."""
    scores = {}
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    for line in lines:
        try:
            row = parse_json(line)
        except (ValueError, json.JSONDecodeError):
            continue
        if isinstance(row, dict) and isinstance(row.get("split"), str) and row.get("step") == step:
            scores[row["split"]] = {
                name: float(value)
                for name, value in row.items()
                if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
            }
    return scores
