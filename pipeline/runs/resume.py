"""Does a run begin or go on, and from where? The first rank looks into the run folder and decides; the others are told."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.cluster.launch import batch_job, restarted
from pipeline.job.changes import changes, measured_otherwise, refuse_changes
from pipeline.job.errors import JobError
from pipeline.job.read import job_digest, read_resolved, resolved
from pipeline.job.spec import Job
from pipeline.runs.folder import begun, read_rows
from pipeline.screen import Screen
from pipeline.train.engine import Ranks
from pipeline.train.environment import started_by
from pipeline.weights.delta import read_delta
from pipeline.weights.record import DataFile
from pipeline.weights.state import Best, Progress, Record, newest_state


@dataclass(frozen=True)
class Start:
    """Where training starts, as every rank knows it."""

    goes_on: bool = False
    """There is a run in the folder, perhaps without a state yet."""
    record: Record | None = None
    """Of the state that it goes on from."""
    scores: dict[str, float | None] | None = None
    """Those due at this step, where they are written down already."""
    best: Best | None = None
    """Of the record, where its scores are those that the job asks for."""
    delta_written: bool = False
    """The delta of this step is in its place, and whole."""
    notes: tuple[tuple[str, str], ...] = ()
    """What a person should know, as rows of a table."""
    finished: dict[str, Any] | None = None
    """The result, where there is nothing left to do."""

    @property
    def progress(self) -> Progress:
        return self.record.progress if self.record else Progress()

    def refuse_changed(self, base: str, base_config: str, data: tuple[DataFile, ...]) -> None:
        """Raises:
        JobError: on every rank; the base's configuration or the data are not those the run began with."""
        if self.record is None:
            return
        if self.record.base_config != base_config:
            raise JobError(
                f"{base}: its config.json is not the one that the run began with. Put it back, or use --run for another folder.",
                everywhere=True,
            )
        _refuse_changed(self.record.data, data)


def find_start(
    job: Job, run: Path, ranks: Ranks, screen: Screen, fresh: bool, accept_changes: bool
) -> tuple[Start, dict[str, torch.Tensor] | None]:
    """The start, and on the first rank the state's tensors.

    Raises:
        JobError: on every rank; the run's job is another, or none of its states is whole.
    """
    told: list[Any] = [None, None]
    tensors = None
    if ranks.first:
        try:
            told[0], tensors = _decide(job, run, ranks, screen, accept_changes) if _goes_on(run, fresh) else (Start(), None)
        except JobError as error:
            told[1] = str(error)
    dist.broadcast_object_list(told)
    if told[1]:
        raise JobError(told[1], everywhere=True)
    return told[0], tensors


def _goes_on(run: Path, fresh: bool) -> bool:
    if not begun(run):
        return False
    # Started again by the batch system, the command is the same: it must not replace the run that it began itself.
    return not fresh or (restarted() and batch_job() is not None and started_by(run) == batch_job())


def _decide(job: Job, run: Path, ranks: Ranks, screen: Screen, accept_changes: bool) -> tuple[Start, dict[str, torch.Tensor] | None]:
    state = newest_state(run / "state", screen.print)
    record = state.record if state else None
    before = resolved(record.job, run / "state") if record else read_resolved(run / "job.toml")
    changed = changes(before, job) if before else []
    refuse_changes(changed, str(run), accept_changes)
    step = record.progress.step if record else 0
    scores = None if measured_otherwise(changed) else _scores(run, job.evaluate.split, step)
    if state is None or record is None:
        note = ("goes on", "from the beginning: it ended before its first state")
        return Start(goes_on=True, scores=scores, notes=(note,)), None
    delta_written = _delta_step(run / "delta") == step
    result = _result(run, job)
    if result and result["steps"] == step and delta_written and _best_is_whole(run, result):
        return Start(True, record, finished=result), None
    texts = [str(change) for change in changed]
    if record.ranks != ranks.count:
        texts.append(f"ranks {record.ranks} -> {ranks.count}")
        if job.memory.int8_gathers:
            texts.append("the base is rounded for as many ranks as share it, so the run goes on otherwise than it would have")
        if job.train.dropout:
            texts.append("with the base's own dropout on, other ranks draw other masks, so the run goes on otherwise than it would have")
    if {"train.epochs", "train.steps"} & {change.key for change in changed} and job.train.schedule != "constant":
        texts.append("the learning rate follows the schedule of the new length from here on")
    best = record.best
    if best and (measured_otherwise(changed) or best.metric != job.evaluate.best_metric):
        texts.append("the best delta so far is given up" + (" and chosen anew" if job.evaluate.best_metric else ""))
        best = None
    notes = [("goes on", f"after step {step:,}")] + ([("changed", "; ".join(texts))] if texts else [])
    return Start(True, record, scores, best, delta_written, tuple(notes)), state.tensors


def _scores(run: Path, split: str, step: int) -> dict[str, float | None] | None:
    rows = [row for row in read_rows(run / "metrics.jsonl") if row.get("split") == split and row["step"] == step]
    return {key: value for key, value in rows[-1].items() if key not in ("step", "split")} if rows else None


def _result(run: Path, job: Job) -> dict[str, Any] | None:
    try:
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
        return result if result["job_digest"] == job_digest(job) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _best_is_whole(run: Path, result: dict[str, Any]) -> bool:
    best = result.get("best")
    return best is None or _delta_step(run / "best") == best["step"]


def _delta_step(folder: Path) -> int | None:
    """None where there is no delta, or a damaged one: the state has what it takes to write it again."""
    try:
        return read_delta(folder).manifest.step
    except JobError:
        return None


def _refuse_changed(before: tuple[DataFile, ...], now: tuple[DataFile, ...]) -> None:
    """Raises:
    JobError: on every rank; the examples are not those that the run began with."""
    if [file.sha256 for file in before] == [file.sha256 for file in now]:
        return
    for old, new in zip(before, now, strict=False):
        if old.sha256 != new.sha256:
            counts = "" if old.examples == new.examples else f" ({old.examples:,} then, {new.examples:,} now)"
            raise JobError(
                f"{new.file}: its examples are not those that the run began with{counts}. "
                "Put back the file (and the base's tokenizer), or begin another run with --run or --fresh.",
                everywhere=True,
            )
    raise JobError(
        f"{(before or now)[0].file}: the run began with {len(before)} files of examples, now there are {len(now)}. "
        "Put them back, or begin another run with --run or --fresh.",
        everywhere=True,
    )
