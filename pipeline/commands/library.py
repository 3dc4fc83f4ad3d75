"""Deltas as products: `deltas list`, and what is made from them. Heavy imports are inside."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.commands import options

deltas = typer.Typer(
    name="deltas",
    help="A library of deltas, and what can be made from them.\n\nExample: zlora deltas list runs",
    no_args_is_help=True,
    rich_markup_mode=None,
)
_SHOWN = 10
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]


@deltas.command("list")
def list_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of runs or deltas, however they are grouped in it.")],
    base: Annotated[str | None, typer.Option(metavar="BASE", help="The base they should be of; that of most when absent.")] = None,
    revision: Revision = None,
    as_json: options.AsJson = False,
) -> None:
    """List the deltas of a folder: task, method, size, score, base. Names copies, deltas of another base and broken ones.

    Example: zlora deltas list runs --base gpt2-medium
    """
    from pipeline.deltas.library import look_through
    from pipeline.screen import Screen, size_text

    digest = None
    if base:
        from pipeline.weights.digest import base_digest, file_digests
        from pipeline.weights.hub import local_base, weight_names

        place = local_base(base, revision)
        digest = base_digest(file_digests(tuple(place / name for name in weight_names(place))))
    shelf = look_through(folder, digest)
    if as_json:
        print(json.dumps({"schema_version": 1, "base_digest": shelf.base_digest, "deltas": [asdict(row) for row in shelf.rows]}))
        return
    screen = Screen(sys.stdout)
    rows = []
    for row in shelf.rows:
        if row.problem is None:
            size = size_text(row.bytes or 0) if (row.bytes or 0) >= 2**20 else f"{row.bytes:,} bytes"
            told = (row.task, row.method, f"{row.parameters:,}", size, row.score, row.date)
            rows.append((row.folder, *(text or "-" for text in told)))
    screen.columns(str(folder), ("delta", "task", "method", "parameters", "size", "score", "written (UTC)"), rows)
    screen.print(f"base {(shelf.base_digest or 'not known')[:12]}")
    for row in shelf.rows:
        if row.problem:
            screen.print(f"broken: {row.problem}")
        if row.other_base:
            screen.print(f"another base: {row.folder} is of {(row.base_digest or '')[:12]} ({row.base})")
        if row.same_as is not None:
            screen.print(f"the same tensors: {row.folder} and {row.same_as}")


@deltas.command()
def extract(
    base: Annotated[str, typer.Option("--base", metavar="BASE", help="Folder or hub id of the base.")],
    finetuned: Annotated[str, typer.Option("--finetuned", metavar="DIR", help="Folder or hub id of what was trained from it, whole.")],
    rank: Annotated[int, typer.Option(min=1, help="Of every target.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the delta goes; absent or empty.")],
    targets: Annotated[str, typer.Option(metavar="q,v", help="Roles or paths of linear maps, as in a job; all roles when absent.")] = "",
    exact: Annotated[bool, typer.Option("--exact", help="Large matrices by all singular vectors too, not randomised.")] = False,
    revision: Revision = None,
    as_json: options.AsJson = False,
) -> None:
    """Make a LoRA delta of a checkpoint that was trained whole: the nearest of a rank, by SVD of the difference; and what it leaves out.

    Example: zlora deltas extract --base gpt2-medium --finetuned my-model --rank 8 --out delta
    """
    from pipeline.exchange.extracting import extract as extract_files
    from pipeline.screen import Screen

    screen = Screen(sys.stderr)
    chosen = tuple(filter(None, targets.split(",")))
    report = extract_files(base, finetuned, revision, rank, out, chosen, exact, lambda names: screen.progress("extracting", names))
    _show(report, out, as_json)
    if as_json:
        return
    screen, left, total = Screen(sys.stdout), report["left_out"], report["total"]
    screen.print(f"lost by the rank {total['lost_by_rank']:.4%}; outside the targets {total['left_out']:.4%}, in {len(left)} tensors")
    for row in left[:_SHOWN]:
        screen.print(f"  left out: {row['tensor']}, {row['share']:.4%}")
    if len(left) > _SHOWN:
        screen.print(f"  and {len(left) - _SHOWN} more: {out / 'made.json'}")
    for name in report["only_in_finetuned"]:
        screen.print(f"  left out: {name}, which the base does not have")


@deltas.command()
def resize(
    delta: Annotated[Path, typer.Argument(metavar="DELTA", help="A run's folder delta/ or best/.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the new delta goes; absent or empty.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Of every pair; of each part of a fused map's.")] = None,
    energy: Annotated[float | None, typer.Option(help="Instead: the share of each part's squared norm to keep, such as 0.99.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Give a LoRA delta another rank: the nearest there is of that rank, and how near. The product B A is never made.

    Example: zlora deltas resize runs/my/delta --rank 4 --out small
    """
    from pipeline.deltas.resize import resize as resize_files

    _show(resize_files(delta, out, rank, energy), out, as_json)


@deltas.command()
def combine(
    delta: Annotated[list[str], typer.Argument(metavar="DELTA[:WEIGHT]...", help="LoRA deltas of one base, each with a weight.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the new delta goes; absent or empty.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Of every pair, by SVD; the exact sum, of the ranks' sum, when absent.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Add LoRA deltas with weights as one delta: exactly, with their ranks beside each other, or of a given rank.

    Example: zlora deltas combine runs/a/delta:0.7 runs/b/delta:0.3 --out both
    """
    from pipeline.deltas.combine import combine as combine_files
    from pipeline.deltas.mixture import parse_share

    _show(combine_files([parse_share(text) for text in delta], out, rank), out, as_json)


def _show(report: dict[str, Any], out: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report))
        return
    from pipeline.screen import Screen

    screen, total = Screen(sys.stdout), report["total"]
    rows = [
        (name, str(row["rank"]), f"{row['norm']:.4g}", f"{row['error']:.3g}", _kept(row["norm"], row["error"]))
        for name, row in report["modules"].items()
    ]
    screen.columns(str(out), ("module", "rank", "norm", "error", "kept of its square"), rows)
    screen.print(f"in total: norm {total['norm']:.4g}, error {total['error']:.3g}; {total['kept_energy']:.4%} of the squared norm is kept")


def _kept(norm: float, error: float) -> str:
    return f"{1 - (error / norm) ** 2:.4%}" if norm else "-"
