"""The whole program on a page: what every rank does, one call per room, in order.

job -> base (weights, model) -> delta (methods) -> sequences (tasks) -> steps (train) -> scores (evaluate)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pipeline.evaluate.best import BestDelta, refuse_unscorable, weights_in
from pipeline.evaluate.score import add_scores, write_predictions
from pipeline.job.changes import scored_otherwise
from pipeline.job.errors import Diverged, JobError, Stopped
from pipeline.job.read import read_resolved
from pipeline.job.section import Split
from pipeline.job.spec import Job
from pipeline.methods.files import begin, restore
from pipeline.runs.folder import SCORES
from pipeline.runs.report import show_end, show_scores, show_start, stopped_text
from pipeline.runs.resume import find_start
from pipeline.runs.session import open_session
from pipeline.runs.writer import Writer
from pipeline.screen import Screen
from pipeline.tasks.open import has_split, sources_of
from pipeline.train.engine import Ranks, StopAgreed
from pipeline.train.loop import Course, rehearse, take_steps
from pipeline.train.step import Stepper

DELTAS = {"best": "best", "last": "delta"}
"""Which of a run's deltas -> its folder."""


def train(job: Job, run: Path, ranks: Ranks, screen: Screen, fresh: bool = False, accept_changes: bool = False) -> None:
    """Trains the job's delta into the run folder, from the newest state there if it has one.

    Args:
        fresh: an earlier run in the folder gives way, once everything that can be wrong with the job has been checked.
        accept_changes: go on with a job whose trajectory is another than the run's so far.

    Raises:
        Stopped: on request, after saving.
        Diverged: loss or gradient is not finite, several times in a row.
    """
    start, tensors = find_start(job, run, ranks, screen, fresh, accept_changes)
    if start.finished:
        show_end(screen, run, job, start.finished, again=True)
        return
    refuse_unscorable(job, ranks.first)
    session = open_session(job, ranks, screen)
    data = session.training_set()
    start.refuse_changed(job.base.model, session.base_config, data.files)
    course = Course(data.sequences, data.stream, session.train, start.progress)
    course.refuse_impossible()
    held_out = session.evaluation(job.evaluate.split)
    stepper = Stepper(session.engine, session.root, session.delta, job.train, ranks, fp16=job.base.dtype == "fp16")
    best = BestDelta(job.evaluate, start.best, weights_in(tensors))
    notes = start.notes
    if start.record:
        stepper.restore(tensors, start.progress)
        del tensors
    elif any(method.start for method in job.methods):
        notes = (*notes, *begin(session.delta, session.base_digest()))
    show_start(screen, run, job, session, course, data, notes)
    if not held_out:
        screen.print(f"not scored: there is no {job.evaluate.split} split")
    progress = good = start.progress
    told: set[str] = set()
    rehearse(course, stepper, ranks)
    # From here on somebody looks for requests to stop, and there may be something half-written.
    ranks.stop.can_wait, ranks.watch.steps = True, course.steps
    with Writer(session, run, course, data.files, stepper, start, best) as writer, screen.training(course.steps, progress.step) as bar:

        def score_if_due(step: int) -> None:
            if not held_out or not _scores_due(job, step, course.steps):
                return
            scores = session.score(held_out)
            writer.scored(step, scores)
            show_scores(screen, f"{scores.split} after {step} steps" if step else f"{scores.split} before training", scores, told)

        try:
            if ranks.any(ranks.stop.asked)[0]:
                raise StopAgreed
            if start.scores is None:
                score_if_due(progress.step)
            steps = take_steps(course, stepper, ranks)
            while not writer.patience_is_over and (taken := next(steps, None)):
                progress = taken.progress
                writer.took(taken)
                bar.update(progress.step, taken.values["loss"], taken.values["tokens"] / taken.values["step_s"])
                if not taken.bad:
                    good = progress
                    if _save_due(job, progress.step, course.steps):
                        writer.save(progress)
                if taken.stop:
                    raise StopAgreed
                score_if_due(progress.step)
        except StopAgreed:
            writer.save(progress)
            writer.settle()
            raise Stopped(stopped_text(progress.step, course.steps, ranks.stop.signal)) from None
        except Diverged:
            # Bad steps have changed nothing, so what there is belongs to the last good one.
            writer.save(good)
            writer.settle()
            raise
        writer.save(progress)
        result = writer.conclude(progress.step)
    if ranks.first:
        show_end(screen, run, job, result)


def _save_due(job: Job, step: int, steps: int) -> bool:
    return step == steps or step % job.train.save_every_steps == 0


def _scores_due(job: Job, step: int, steps: int) -> bool:
    if step == 0:
        return job.evaluate.at_start
    return step == steps or (job.evaluate.every_steps is not None and step % job.evaluate.every_steps == 0)


def evaluate(job: Job, run: Path, split: Split, which: Literal["best", "last"], ranks: Ranks, screen: Screen) -> dict[str, Any]:
    """Scores a run's delta on a split; writes scores and predictions into the run folder.

    Args:
        which: of the run's deltas.
    """
    if not any(has_split(task, split) for task in sources_of(job.task)):
        raise JobError(f"--split {split}: the job has no {split} split. Name its file in [task], or choose another.", everywhere=True)
    session = open_session(job, ranks, screen)
    manifest = restore(session.delta, run / DELTAS[which], session.base_digest())
    scores = session.score(session.evaluation(split))
    file = run / "predictions" / (f"{split}-best.jsonl" if which == "best" else f"{split}.jsonl")
    written = write_predictions(file, scores) if ranks.first else None
    show_scores(screen, f"{split} by the {which} delta of {run}, after {manifest.step} steps", scores, set())
    if written:
        screen.print(f"predictions  {written}")
    trained = read_resolved(run / "job.toml")
    found = {
        "schema_version": 1,
        "run": str(run),
        "split": split,
        "delta": which,
        "delta_sha256": manifest.sha256,
        "changed": scored_otherwise(trained, job) if trained else {},
        "step": manifest.step,
        "prompts": sum(len(part.predictions) for part in scores.parts),
        "too_long": sum(part.too_long for part in scores.parts),
        "metrics": scores.metrics,
        "notes": [note for part in scores.parts for note in part.notes],
        "predictions": str(written) if written else None,
    }
    if ranks.first:
        add_scores(run / SCORES, found)
    return found
