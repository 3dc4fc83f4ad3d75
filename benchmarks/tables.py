"""A table of results, on the screen and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

Rows = Iterable[Sequence[str]]


def show(console: Console, title: str, heads: Sequence[str], cells: Rows) -> None:
    table = Table(*heads, title=title, title_justify="left")
    for row in cells:
        table.add_row(*row)
    console.print(table)


def markdown_table(heads: Sequence[str], cells: Rows) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *cells)]
