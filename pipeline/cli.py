"""The doors: every command by its name, and what becomes of an error. The commands are in `pipeline/commands/`,
where everything heavy is imported inside its command, so that `--help` answers at once."""

from __future__ import annotations

import signal
import sys
from typing import NoReturn

import typer

from pipeline.commands import analysis, before, deltas, library, machine, outward, queue, runs, sweeps, texts, watch
from pipeline.job.errors import JobError, of_system

app = typer.Typer(
    name="zlora",
    help="Adapt billion-scale transformers: a frozen base sharded by ZeRO-3, a trained delta of megabytes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    before.check,
    before.plan,
    before.methods,
    before.fetch,
    before.data,
    runs.profile,
    runs.train,
    runs.evaluate,
    texts.generate,
):
    app.command()(command)
for folder_command in (deltas.merge, deltas.switch, deltas.unmerge, deltas.verify):
    app.command()(folder_command)
app.command()(analysis.analyze)
app.command("import")(deltas.import_)
app.command()(outward.export)
app.add_typer(library.deltas)
app.command()(texts.score)
app.command()(machine.doctor)
app.command()(machine.latency)
app.command()(queue.submit)
app.command()(sweeps.sweep)
app.command()(sweeps.compare)
app.command()(watch.status)
app.command()(watch.logs)
app.command()(watch.cancel)
app.command()(queue.batch)


def main() -> None:
    """Runs the command line; what the user can repair becomes one line and exit code 2."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        # By way of an exception, so that a half-written folder is removed on the way out. What nohup ignores stays ignored.
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, lambda received, _: sys.exit(128 + received))
    try:
        app()
    except JobError as error:
        _refuse(str(error))
    except OSError as error:
        if (text := of_system(error)) is None:
            raise
        _refuse(text)


def _refuse(text: str) -> NoReturn:
    from pipeline.cluster.failures import JOB_ERROR, report_failure

    report_failure(f"error: {text}", JOB_ERROR, sys.stderr)
    sys.exit(JOB_ERROR)
