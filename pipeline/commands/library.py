"""Deltas as products: `deltas list`, and what is made from them. Heavy imports are inside."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands import options

deltas = typer.Typer(
    name="deltas",
    help="A library of deltas, and what can be made from them.\n\nExample: zlora deltas list runs",
    no_args_is_help=True,
    rich_markup_mode=None,
)
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
