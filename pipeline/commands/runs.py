"""A run: `train`, `evaluate`. Heavy imports are inside."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.commands import options
from pipeline.job.errors import JobError

if TYPE_CHECKING:
    from pipeline.job.spec import Job
    from pipeline.screen import Screen
    from pipeline.train.engine import Ranks


def train(
    job: options.JobFile,
    run: options.RunFolder = None,
    ranks: options.RankCount = None,
    overrides: options.Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace the run in the run folder instead of going on with it.")] = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on with another learning rate, schedule or the like than the run began with.")
    ] = False,
) -> None:
    """Train a job's delta on this machine, or on the ranks that torchrun or srun started. A run that was begun goes on.

    Example: zlora train jobs/e2e/local.toml --ranks 2 --set train.steps=200
    """
    from pipeline.cluster.failures import JOB_ERROR
    from pipeline.cluster.launch import inside_ranks, launch
    from pipeline.job.read import read_job
    from pipeline.runs.folder import refuse_foreign, remove_if_empty_handed

    asked = read_job(job, tuple(overrides or ()))
    if asked.sweep:
        raise JobError(f"{job}: has a [sweep], so it is many runs. Use zlora sweep to train one after another here, or zlora submit.")
    folder = run or Path("runs") / job.stem
    refuse_foreign(folder)
    if not inside_ranks():
        code = launch(sys.argv[1:], ranks, asked.train.stop_signals)
        if code == JOB_ERROR:
            remove_if_empty_handed(folder)
        sys.exit(code)
    from pipeline.rank import as_rank

    def body(joined: Ranks, screen: Screen) -> None:
        from pipeline.run import train as train_here

        train_here(asked, folder, joined, screen, fresh, accept_changes)

    as_rank(folder, body, training=asked.train)


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    split: Annotated[Literal["train", "valid", "test"], typer.Option(help="What to score.")] = "test",
    delta: Annotated[
        Literal["best", "last"] | None, typer.Option("--delta", help="best where the job has evaluate.best_metric, else last, when absent.")
    ] = None,
    ranks: options.RankCount = None,
    overrides: options.Overrides = None,
    as_json: options.AsJson = False,
) -> None:
    """Score a run's delta by its task's own metrics, loss and perplexity; write the predictions.

    Example: zlora evaluate runs/local --set evaluate.max_prompts=100
    """
    from pipeline.cluster.launch import inside_ranks, launch

    asked = _job_of(run, overrides)
    which = delta or ("best" if asked.evaluate.best_metric else "last")
    if which == "best" and not (run / "best").is_dir():
        raise JobError(f"{run}: has no best delta: none was asked for by evaluate.best_metric, or none scored yet. Use --delta last.")
    if not inside_ranks():
        sys.exit(launch(sys.argv[1:], ranks))
    from pipeline.rank import as_rank

    def body(joined: Ranks, screen: Screen) -> dict[str, Any]:
        from pipeline.run import evaluate as evaluate_here

        return evaluate_here(asked, run, split, which, joined, screen)

    as_rank(run, body, as_json)


def _job_of(run: Path, overrides: list[str] | None) -> Job:
    from pipeline.job.read import read_job

    if not (run / "job.toml").is_file():
        raise JobError(f"{run}: not a run folder: it has no job.toml. Name the folder that zlora train wrote.")
    return read_job(run / "job.toml", tuple(overrides or ()))


def profile(
    job: options.JobFile,
    run: options.RunFolder = None,
    ranks: options.RankCount = None,
    steps: Annotated[int, typer.Option(min=2, help="Real steps as they are, and as many more by the clock.")] = 5,
    overrides: options.Overrides = None,
    as_json: options.AsJson = False,
) -> None:
    """Take a few real steps of a job and say where their time and memory go; nothing is trained to be kept.

    Writes profile.json, profile.png, trace.json.gz (for a browser's trace viewer) and TensorBoard's events into the run folder.

    Example: zlora profile jobs/e2e/local.toml --ranks 2
    """
    from pipeline.cluster.failures import JOB_ERROR
    from pipeline.cluster.launch import inside_ranks, launch
    from pipeline.job.read import read_job
    from pipeline.runs.folder import remove_if_empty_handed

    asked = read_job(job, tuple(overrides or ()))
    folder = run or Path("runs") / job.stem
    if not inside_ranks():
        options.say_of_sweep(job, asked)
        code = launch(sys.argv[1:], ranks)
        if code == JOB_ERROR:
            remove_if_empty_handed(folder)
        sys.exit(code)
    from pipeline.rank import as_rank

    def body(joined: Ranks, screen: Screen) -> dict[str, Any]:
        from pipeline.profile.run import profile as profile_here

        return profile_here(asked, folder, joined, screen, steps)

    as_rank(folder, body, as_json)
