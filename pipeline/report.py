"""The short tables of a run: what is about to be trained, how it scores, where everything is."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from pipeline.cluster.launch import started_here
from pipeline.evaluate.gather import Gathering
from pipeline.evaluate.score import Scores
from pipeline.job.spec import Job
from pipeline.methods.attach import Delta
from pipeline.model.causal import Causal
from pipeline.model.load import LoadedBase
from pipeline.model.zero3 import shard_bytes
from pipeline.screen import Screen, size_text
from pipeline.train.engine import Ranks
from pipeline.train.loop import Course

_SHOWN = 3
_RECORDED = 10


def show_start(
    screen: Screen,
    run: Path,
    job: Job,
    base: LoadedBase,
    delta: Delta,
    root: Causal,
    ranks: Ranks,
    course: Course,
    too_long: int,
    notes: tuple[tuple[str, str], ...],
) -> None:
    """What is about to happen."""
    frozen, trained = base.parameters, delta.parameters
    where = f"{ranks.count} x {ranks.device.type.upper()}"
    lengths = f"{course.steps:,} of {job.train.batch_examples} examples, {len(course.sequences):,} examples in all"
    rows = [
        ("base", f"{job.base.model} ({job.base.dtype}, loaded in {base.load_s:.1f} s)"),
        ("frozen", f"{frozen:,} parameters"),
        ("trained", f"{trained:,} parameters ({100 * trained / frozen:.2f} %)"),
        ("per rank", f"{size_text(shard_bytes(root))} of the base between steps, {size_text(trained * 16)} of the delta, on {where}"),
        ("steps", lengths),
    ]
    if too_long:
        rows.append(("too long", f"{too_long:,} examples: {'truncated' if job.task.too_long == 'truncate' else 'dropped'}"))
    if job.train.dropout:
        rows.append(("dropout", "the base's own is on: reproducible on the same number of ranks only"))
    screen.table(str(run), [*rows, *notes])


def show_scores(screen: Screen, title: str, scores: Scores) -> None:
    """Metrics, and the first few texts beside a reference."""
    rows = [(name, f"{value:.2f}") for name, value in scores.metrics.items()]
    rows.append(("generated with", _gathering_text(scores.gathering)))
    if scores.too_long:
        rows.append(("too long", f"{scores.too_long:,} examples did not fit the context and were cut or left out"))
    for prediction in scores.predictions[:_SHOWN]:
        rows += [
            ("prompt", prediction.prompt),
            ("generated", prediction.prediction or "(nothing)"),
            ("reference", prediction.references[0]),
        ]
    screen.table(title, rows)


def stopped_text(step: int, steps: int, cause: str | None) -> str:
    """What a person reads when training has stopped on request."""
    why = {"SIGINT": " by Ctrl-C", None: ""}.get(cause, f" by {cause}")
    command = shlex.join(["zlora", *(argument for argument in sys.argv[1:] if argument != "--fresh")])
    how = command if started_here() else "the same command again, without --fresh"
    return f"Stopped{why} after step {step:,} of {steps:,}; everything is saved. To go on: {how}"


def _gathering_text(gathering: Gathering) -> str:
    if not gathering.sharded:
        return "the base whole on every rank"
    sizes = f"{size_text(gathering.needed_bytes)} needed, {size_text(gathering.free_bytes)} free on each rank"
    return f"the base gathered {'in each pass' if gathering.each_pass else 'once'} ({sizes})"


def show_end(screen: Screen, run: Path, job: Job, result: dict[str, Any], again: bool = False) -> None:
    """What came out and where it is.

    Args:
        again: the run was finished before.
    """
    revision = ["--revision", job.base.revision] if job.base.revision else []
    rows = [
        ("time", f"{result['seconds'] or 0:.0f} s for {result['steps']:,} steps"),
        ("loss", "not finite at the last step" if result["loss"] is None else f"{result['loss']:.4f} at the last step"),
        ("peak memory", f"{size_text(result['peak_memory_bytes'] or 0)} on the first rank"),
        ("delta", str(run / "delta")),
        ("TensorBoard", shlex.join(["tensorboard", "--logdir", str(run / "tensorboard")])),
        ("score it", shlex.join(["zlora", "evaluate", str(run)])),
        ("merge it", shlex.join(["zlora", "merge", job.base.model, str(run / "delta"), *revision, "--out", "MERGED"])),
    ]
    if result["skipped_steps"]:
        rows.insert(2, ("skipped steps", f"{result['skipped_steps']} (gradients out of range)"))
    if again:
        rows.append(
            ("nothing to do", "this run is finished: set train.epochs or train.steps higher to go on, or use --fresh to begin again")
        )
    screen.table("done", rows)


def markdown(scores: Scores) -> str:
    """Samples for TensorBoard."""
    return "\n\n---\n\n".join(
        f"**prompt** {p.prompt}\n\n**generated** {p.prediction}\n\n**reference** {p.references[0]}" for p in scores.predictions[:_RECORDED]
    )
