"""The short tables of a run: what is about to be trained, how it scores, where everything is."""

from __future__ import annotations

import html
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from pipeline.cluster.failures import to_go_on
from pipeline.cluster.launch import started_here
from pipeline.evaluate.gather import Gathering
from pipeline.evaluate.score import Scores
from pipeline.job.labels import labels_of
from pipeline.job.method import merges
from pipeline.job.metrics import shown
from pipeline.job.spec import Job
from pipeline.job.task import Glue
from pipeline.model.zero3 import shard_bytes
from pipeline.runs.session import Session, TrainingSet
from pipeline.screen import Screen, size_text
from pipeline.tasks.open import sources_of
from pipeline.train.loop import Course

_SHOWN = 3
_RECORDED = 10
_COMPARED = (
    *("targets", "rank", "alpha", "layers", "prefix_tokens", "infix_tokens", "placement"),
    *("learning_rate", "batch_examples", "steps", "epochs", "seed"),
)
"""Keys of methods and of [train]; a table of all would show none."""


def show_start(
    screen: Screen,
    run: Path,
    job: Job,
    session: Session,
    course: Course,
    data: TrainingSet,
    notes: tuple[tuple[str, str], ...],
) -> None:
    """What is about to happen."""
    base, ranks = session.base, session.ranks
    delta = session.delta
    whole, trained = base.parameters, delta.parameters
    where = f"{ranks.count} x {ranks.device.type.upper()}"
    lengths = f"{course.steps:,} of {job.train.batch_examples} examples, {len(course.data):,} examples in all"
    rows = [
        ("base", f"{job.base.model} ({job.base.dtype}, loaded in {base.load_s:.1f} s)"),
        ("frozen", f"{whole - delta.base_parameters:,} parameters"),
        ("trained", f"{trained:,} parameters ({100 * trained / whole:.2f} % of the base)"),
        (
            "per rank",
            f"{size_text(shard_bytes(session.root))} of the base between steps, {size_text(delta.held * 16)} of what it trains, on {where}",
        ),
        ("steps", lengths),
    ]
    rows += [("left out", str(reason)) for reason in data.dropped]
    if data.too_long:
        rows.append(("too long", f"{data.too_long:,} examples: truncated or left out, as task.too_long says"))
    if job.train.dropout:
        rows.append(("dropout", "the base's own is on: reproducible on the same number of ranks only"))
    screen.table(str(run), [*rows, *notes])


def show_scores(screen: Screen, title: str, scores: Scores, told: set[str]) -> None:
    """Metrics, and the first few texts beside a reference.

    Args:
        told: the notes that a person has seen already; takes those that are new.
    """
    for part in scores.parts:
        rows = [(name, shown(part.kind, name, value)) for name, value in part.metrics.items()]
        if part.predictions:
            rows.append(("scored with", _gathering_text(scores.gathering)))
        if part.too_long:
            rows.append(("too long", f"{part.too_long:,} examples did not fit the context and were cut or left out"))
        for prediction in part.predictions[:_SHOWN]:
            rows += [("prompt", prediction.prompt), ("predicted", prediction.prediction or "(nothing)")]
            rows += [("reference", reference) for reference in prediction.references[:1]]
        screen.table(": ".join(filter(None, (part.title, title))), rows)
        for note in part.notes:
            if note not in told:
                screen.print(note)
        told.update(part.notes)


def stopped_text(step: int, steps: int, cause: str | None) -> str:
    """What a person reads when training has stopped on request."""
    why = {"SIGINT": " by Ctrl-C", None: ""}.get(cause, f" by {cause}")
    command = shlex.join(["zlora", *(argument for argument in sys.argv[1:] if argument != "--fresh")])
    how = command if started_here() else "the same command again, without --fresh"
    return f"Stopped{why} after step {step:,} of {steps:,}; everything is saved.{to_go_on(f'To go on: {how}')}"


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
    best, early = result.get("best"), result.get("stopped_early", False)
    chosen = run / ("best" if best else "delta")
    # GLUE keeps the labels of its test splits to itself.
    split = ["--split", "valid"] if any(isinstance(task, Glue) for task in sources_of(job.task)) else []
    rows = [
        ("time", f"{result['seconds'] or 0:.0f} s for {result['steps']:,} steps"),
        ("loss", "not finite at the last step" if result["loss"] is None else f"{result['loss']:.4f} at the last step"),
        ("peak memory", f"{size_text(result['peak_memory_bytes'] or 0)} on the first rank"),
        ("delta", str(run / "delta")),
        ("TensorBoard", shlex.join(["tensorboard", "--logdir", str(run / "tensorboard")])),
        ("score it", shlex.join(["zlora", "evaluate", str(run), *split])),
    ]
    if merges(job.methods):
        rows.append(("merge it", shlex.join(["zlora", "merge", job.base.model, str(chosen), *revision, "--out", "MERGED"])))
    elif labels_of(sources_of(job.task)[0]) == ():
        rows.append(("use it", shlex.join(["zlora", "generate", "--base", job.base.model, "--delta", str(chosen), *revision])))
    if result["skipped_steps"]:
        rows.insert(2, ("skipped steps", f"{result['skipped_steps']} (gradients out of range)"))
    if best:
        value = shown(job.task.kind, best["metric"], best["value"])
        rows.insert(
            rows.index(("delta", str(run / "delta"))) + 1, ("best delta", f"{chosen}: {best['metric']} {value} after step {best['step']:,}")
        )
    if early:
        patience = f"{job.evaluate.patience} scorings in a row no better by {job.evaluate.best_metric}"
        rows.insert(0, ("ended early", f"after step {result['steps']:,}: {patience}"))
    if again:
        more = "evaluate.patience" if early else "train.epochs or train.steps"
        rows.append(("nothing to do", f"this run is finished: set {more} higher to go on, or use --fresh to begin again"))
    screen.table("done", rows)


def comparable(job: Job) -> dict[str, str | float]:
    """What runs are told apart by, for TensorBoard's table of them."""
    found: dict[str, str | float] = {"base": Path(job.base.model).name, "task": job.task.kind}
    for number, method in enumerate(job.methods):
        # Of several methods, each with its place.
        name = "method" if len(job.methods) == 1 else f"method_{number}"
        asked = method.model_dump(mode="json", exclude_none=True)
        found[name] = asked.pop("kind")
        found |= {f"{name}.{key}": _one_value(value) for key, value in asked.items() if key in _COMPARED}
    return found | job.train.model_dump(mode="json", include=set(_COMPARED), exclude_none=True)


def _one_value(value: Any) -> str | float:
    match value:
        case dict():
            return ", ".join(f"{key} {each}" for key, each in value.items())
        case list():
            return ", ".join(map(str, value))
        case _:
            return value


def markdown(scores: Scores) -> str:
    """Samples for TensorBoard: a row each."""
    shown = [prediction for part in scores.parts for prediction in part.predictions[:_RECORDED]]
    rows = [(p.prompt, p.prediction, "".join(p.references[:1]) or "(withheld)") for p in shown]
    return "\n".join(
        ["| prompt | predicted | reference |", "| :--- | :--- | :--- |", *(f"| {' | '.join(map(_literal, row))} |" for row in rows)]
    )


def _literal(text: str) -> str:
    """A text as it is, in Markdown: a model may write headings, tags and bars."""
    escaped = re.sub(r"([\\`*_{}\[\]()#+.!~-])", r"\\\1", html.escape(text.strip(), quote=False))
    return escaped.replace("|", "&#124;").replace("\n", "<br>")
