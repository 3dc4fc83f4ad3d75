"""Does a run begin or go on, and from where? The first rank looks into the run folder and decides; the others are told."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.job.changes import changes, refuse_changes
from pipeline.job.read import job_digest, read_resolved
from pipeline.job.spec import Job
from pipeline.run_folder import begun
from pipeline.screen import Screen
from pipeline.train.board import read_rows
from pipeline.train.engine import Ranks
from pipeline.weights.delta import read_manifest
from pipeline.weights.state import Progress, State, newest_state


@dataclass(frozen=True)
class Start:
    """Where training starts, as every rank knows it."""

    progress: Progress = field(default_factory=Progress)
    goes_on: bool = False
    """There is a run in the folder, perhaps without a state yet."""
    from_state: bool = False
    scored: bool = False
    """The scores due at this step are written down already."""
    delta_written: bool = False
    """The delta of this step is in its place."""
    notes: tuple[tuple[str, str], ...] = ()
    """What a person should know, as rows of a table."""
    finished: dict[str, Any] | None = None
    """The result, where there is nothing left to do."""


def find_start(job: Job, run: Path, ranks: Ranks, screen: Screen, fresh: bool, accept_changes: bool) -> tuple[Start, State | None]:
    """The start, and on the first rank the state that belongs to it.

    Raises:
        JobError: the run's job is another, or none of its states is whole.
    """
    told: list[Any] = [None]
    state = None
    if ranks.first:
        told[0], state = _decide(job, run, ranks, screen, accept_changes) if begun(run) and not fresh else (Start(), None)
    dist.broadcast_object_list(told)
    return told[0], state


def _decide(job: Job, run: Path, ranks: Ranks, screen: Screen, accept_changes: bool) -> tuple[Start, State | None]:
    state = newest_state(run / "state", screen.print)
    before = Job.model_validate(state.record.job) if state else read_resolved(run / "job.toml")
    changed = changes(before, job) if before else []
    refuse_changes(changed, str(run), accept_changes)
    if state is None:
        return Start(goes_on=True, notes=(("goes on", "from the beginning: it ended before its first state"),)), None
    progress, record = state.record.progress, state.record
    result = _result(run, job)
    delta_written = _delta_step(run) == progress.step
    if result and result["steps"] == progress.step and delta_written:
        return Start(finished=result), state
    texts = [str(change) for change in changed]
    if record.ranks != ranks.count:
        texts.append(f"ranks {record.ranks} -> {ranks.count}")
        if job.train.dropout:
            texts.append("with the base's own dropout on, other ranks draw other masks, so the run goes on otherwise than it would have")
    notes = [("goes on", f"after step {progress.step:,}")] + ([("changed", "; ".join(texts))] if texts else [])
    scored = any(row.get("split") == job.evaluate.split and row["step"] == progress.step for row in read_rows(run / "metrics.jsonl"))
    return Start(progress, True, True, scored, delta_written, tuple(notes)), state


def _result(run: Path, job: Job) -> dict[str, Any] | None:
    try:
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
        return result if result["job_digest"] == job_digest(job) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _delta_step(run: Path) -> int | None:
    if not (run / "delta").is_dir():
        return None
    return read_manifest(run / "delta").step
