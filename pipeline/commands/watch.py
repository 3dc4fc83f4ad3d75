"""Runs from outside: `status`, `logs`, `cancel`. Heavy imports are inside; none of them torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands import options
from pipeline.job.printable import printable

Runs = Annotated[list[Path] | None, typer.Argument(metavar="RUN...", help="Run folders; those under runs/ when absent.")]
OneRun = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]


def status(
    runs: Runs = None,
    watch: Annotated[bool, typer.Option("--watch", help="Again every few seconds, until Ctrl-C.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """How runs stand: in the queue, running or ended, and why; steps, loss, tokens/s, time left, the newest saved state.

    Example: zlora status --watch
    """
    from dataclasses import asdict

    from pipeline.screen import Screen, finite
    from pipeline.watch.status import find_runs, statuses
    from pipeline.watch.table import table

    if as_json:
        found, notes = statuses(find_runs(runs or ()))
        print(json.dumps({"schema_version": 1, "runs": [finite(asdict(each)) for each in found], "notes": notes}))
        return
    screen = Screen(sys.stdout)
    width, _ = screen.size
    if watch:
        screen.redrawn(lambda: table(*statuses(find_runs(runs or ())), *screen.size))
    else:
        screen.draw(table(*statuses(find_runs(runs or ())), width))


def logs(
    run: OneRun,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Also what comes, across requeues, until the job is over.")] = False,
    rank: Annotated[int | None, typer.Option("--rank", min=0, help="Only what libraries printed on that rank.")] = None,
) -> None:
    """What a run printed: the newest job's log, then its ranks' own; with --follow the first of them.

    Example: zlora logs runs/my --follow
    """
    from pipeline.watch.logs import follow as follow_log
    from pipeline.watch.logs import logs_of, shown, text_of

    found = logs_of(run, rank)
    try:
        for log in found[:1] if follow else found:
            if len(found) > 1 and not follow:
                print(printable(f"==> {log.file} <=="), flush=True)
            pieces = follow_log(log) if follow else text_of(log)
            for piece in shown(pieces) if sys.stdout.isatty() else pieces:
                sys.stdout.buffer.write(piece)
                sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)


def cancel(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    now: Annotated[bool, typer.Option("--now", help="Without saving: back to the newest state.")] = False,
) -> None:
    """End a run's job: its state is saved first, and it does not come back. Submitted again, it goes on.

    Example: zlora cancel runs/my
    """
    from pipeline.watch.cancel import cancel as cancel_runs
    from pipeline.watch.status import find_runs

    for line in cancel_runs(find_runs(runs), now, lambda text: print(printable(text), file=sys.stderr, flush=True)):
        print(printable(line))
