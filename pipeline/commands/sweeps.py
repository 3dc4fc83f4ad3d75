"""Many runs: `sweep`, `compare`. Heavy imports are inside; none of them torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.commands import options
from pipeline.job.errors import JobError

if TYPE_CHECKING:
    from pipeline.compare.group import Comparison
    from pipeline.compare.sheet import Sheet
    from pipeline.screen import Screen


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
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or folders of them, such as a sweep's.")],
    form: Annotated[Literal["table", "markdown", "latex", "csv", "json"], typer.Option("--format", help="Of what is printed.")] = "table",
    as_json: options.AsJson = False,
    metric: Annotated[
        list[str] | None, typer.Option("--metric", metavar="NAME", help='Only this one: BLEU, or one column: "test BLEU". May come again.')
    ] = None,
    median: Annotated[bool, typer.Option("--median", help="The median over seeds, as the paper's on GLUE; else the mean.")] = False,
    each: Annotated[bool, typer.Option("--each", help="A row a run; else runs that differ in seeds only are one row.")] = False,
    cost: Annotated[bool, typer.Option("--cost", help="Also time, GPU or rank hours, peak memory, size of the delta.")] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Scores against log10 of trained parameters: .png, .svg or .pdf.")
    ] = None,
    curves: Annotated[Path | None, typer.Option("--curves", metavar="FILE", help="Learning curves: .png, .svg or .pdf.")] = None,
) -> None:
    """Runs side by side: method, settings that differ, trained parameters, scores over seeds, the best in bold, published rows.

    Example: zlora compare runs/study --metric BLEU --cost --plot study.png
    """
    from pipeline.compare import forms
    from pipeline.compare.collect import collect
    from pipeline.compare.group import compare as compare_runs
    from pipeline.compare.sheet import sheet
    from pipeline.screen import Screen, json_text

    asked = tuple(metric or ())
    found = compare_runs(collect(runs), "median" if median else "mean", each, asked)
    if asked and not found.columns:
        raise JobError(f"--metric {asked[0]}: no run here has it. Leave the option out to see what there is.")
    if plot or curves:
        _draw(found, plot, curves, asked)
    if as_json or form == "json":
        print(json_text(forms.as_object(found)))
    elif form == "csv":
        print(forms.as_csv(found), end="")
    else:
        _print(sheet(found, cost), form, Screen(sys.stdout))


def _print(sheet: Sheet, form: str, screen: Screen) -> None:
    from pipeline.compare import forms

    match form:
        case "markdown":
            print(forms.markdown(sheet), end="")
        case "latex":
            print(forms.latex(sheet), end="")
        case _:
            screen.draw(forms.drawn(sheet, screen.coloured))


def _draw(found: Comparison, plot: Path | None, curves: Path | None, metrics: tuple[str, ...]) -> None:
    from pipeline.compare import figures

    for file in filter(None, (plot, curves)):
        figures.refuse_ending(file)
    if plot:
        figures.draw_scores(found, plot)
    if curves:
        figures.draw_curves(found, curves, metrics)
