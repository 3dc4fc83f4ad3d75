"""Many runs: `sweep`, `compare`. Heavy imports are inside; none of them torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.commands import options


def sweep(
    job: options.JobFile,
    run: Annotated[Path | None, typer.Option("--run", metavar="DIR", help="Folder of all runs; runs/<job name> when absent.")] = None,
    ranks: options.RankCount = None,
    overrides: options.Overrides = None,
) -> None:
    """Train the members of a job's [sweep] one after another on this machine; those that are finished are passed over.

    Example: zlora sweep study.toml --ranks 2
    """
    from pipeline.screen import Screen
    from pipeline.sweeping import sweep as sweep_here

    sys.exit(sweep_here(job, run or Path("runs") / job.stem, tuple(overrides or ()), ranks, Screen(sys.stdout)))


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or folders of them.")],
    form: Annotated[Literal["table", "markdown", "csv"], typer.Option("--format", help="Of what is printed.")] = "table",
    as_json: options.AsJson = False,
) -> None:
    """Runs side by side: the settings that differ, scores, loss, trained parameters, time, memory; mean and spread over seeds.

    Example: zlora compare runs/study --format markdown
    """
    from pipeline.comparing import as_csv, cells, markdown
    from pipeline.comparing import compare as compare_runs
    from pipeline.screen import Screen, finite
    from pipeline.watch.status import find_runs

    found = compare_runs(find_runs(runs))
    if as_json:
        print(json.dumps(finite(found)))
        return
    names, lines = cells(found)
    match form:
        case "markdown":
            print(markdown(names, lines), end="")
        case "csv":
            print(as_csv(names, lines), end="")
        case _:
            Screen(sys.stdout).columns("", names, lines)
