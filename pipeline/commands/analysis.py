"""What a delta is like: `analyze`. Heavy imports are inside."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands import options
from pipeline.job.errors import JobError


def analyze(
    delta: Annotated[Path, typer.Argument(metavar="DELTA", help="A run's folder delta/ or best/.")],
    delta2: Annotated[Path | None, typer.Argument(metavar="DELTA2", help="Another of the same base, to compare.")] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="BASE", help="Folder or hub id of their base, for whatever needs its weights.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where report and figures go; absent or empty.")] = None,
    directions: Annotated[int, typer.Option(min=1, help="Directions that subspaces are compared up to.")] = 64,
    layers: Annotated[str, typer.Option(metavar="0,11", help="Numbers of the only layers to look at; all when absent.")] = "",
    targets: Annotated[str, typer.Option(metavar="q,v", help="The only roles to look at; all when absent.")] = "",
    exact: Annotated[bool, typer.Option("--exact", help="Large matrices by all singular vectors too, not randomised.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Look into deltas as section 7 of the paper does: spectra, subspace similarity of two, the base's weight in their directions.

    Example: zlora analyze runs/r8 runs/r64 --base gpt2-medium --out look
    """
    from pipeline.analyze.report import analyze as analyze_deltas
    from pipeline.analyze.show import show_analysis
    from pipeline.screen import Screen, json_text

    screen = Screen(sys.stderr)
    roles, numbers = (tuple(filter(None, text.split(","))) for text in (targets, layers))
    if wrong := next((number for number in numbers if not number.isdecimal()), None):
        raise JobError(f'--layers: "{wrong}" is no number of a layer. Give them as in 0,11.')
    report = analyze_deltas(
        [delta, delta2] if delta2 else [delta], base, revision, out, directions, tuple(map(int, numbers)), roles, exact, screen.named
    )
    if as_json:
        print(json_text(report))
        return
    show_analysis(Screen(sys.stdout), report, out)
