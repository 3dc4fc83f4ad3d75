"""A sheet -> the screen, Markdown, LaTeX; a comparison in full digits -> CSV, or an object for JSON. No torch."""

from __future__ import annotations

import csv
import io
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from pipeline.compare.group import Cell, Comparison, Row
from pipeline.compare.sheet import Sheet, Word, cost_of, text
from pipeline.job.printable import printable
from pipeline.screen import columns

_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"}, "±": r"$\pm$", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip
_STAR = "* the best of those that are scored on the same"
_COSTS = ("seconds", "rank_hours", "peak_memory_bytes", "delta_bytes")


def drawn(sheet: Sheet, coloured: bool) -> RenderableType:
    """For the screen; where it has no bold, the best has a star."""
    star = not coloured and any(word.bold for row in sheet.rows for word in row)
    rows = [[_shown(word, " *" if star and word.bold else "") for word in row] for row in sheet.rows]
    notes = [*([_STAR] if star else []), *sheet.notes]
    return Group(columns("", sheet.names, rows), *(Text(printable(note), style="dim") for note in notes))


def _shown(word: Word, star: str) -> Text:
    return Text(printable(word.text) + star, style="bold" if word.bold else "")


def markdown(sheet: Sheet) -> str:
    def cell(word: Word) -> str:
        told = printable(word.text).replace("|", "&#124;")
        return f"**{told}**" if word.bold else told

    head = [list(map(cell, map(Word, sheet.names))), [":---" if place < sheet.words else "---:" for place in range(len(sheet.names))]]
    lines = [f"| {' | '.join(row)} |" for row in (*head, *(list(map(cell, row)) for row in sheet.rows))]
    return "\n".join([*lines, *(f"\n{printable(note)}" for note in sheet.notes)]) + "\n"


def latex(sheet: Sheet) -> str:
    """A tabular for booktabs; the notes are comments above it."""

    def cell(word: Word) -> str:
        told = "".join(_LATEX.get(character, character) for character in printable(word.text))
        return f"\\textbf{{{told}}}" if word.bold else told

    def line(row: tuple[Word, ...]) -> str:
        return f"{' & '.join(map(cell, row))} \\\\"

    aligned = "l" * sheet.words + "r" * (len(sheet.names) - sheet.words)
    head = line(tuple(Word(name) for name in sheet.names))
    return "\n".join(
        [
            *(f"% {printable(note)}" for note in ("needs \\usepackage{booktabs}", *sheet.notes)),
            f"\\begin{{tabular}}{{{aligned}}}",
            *("\\toprule", head, "\\midrule"),
            *map(line, sheet.rows),
            *("\\bottomrule", "\\end{tabular}"),
            "",
        ]
    )


def as_csv(found: Comparison) -> str:
    """A line a row, every number in full: of each column mean, standard deviation, median and n, and what is published."""
    parts = [f"{name} {part}" for name in found.columns for part in ("mean", "std", "median", "n", "published")]
    names = ["runs", "not counted", "method", *found.keys, "n", "parameters", *parts, *_COSTS, "published source"]
    # A run whose job nobody can read is in no row.
    unread = {run: why for run, why in found.left_out.items() if not any(run in row.left_out for row in found.rows)}
    rest = [["", _why({run: why}), *([""] * (len(names) - 2))] for run, why in unread.items()]
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([names, *(_csv_line(row, found) for row in found.rows), *rest])
    return out.getvalue()


def _csv_line(row: Row, found: Comparison) -> list[str]:
    published, cost = row.published or {}, cost_of(row.runs)
    line: list[Any] = ["; ".join(str(run.folder) for run in row.runs), _why(row.left_out), row.method]
    line += [*(row.settings.get(key) for key in found.keys), len(row.runs), row.parameters]
    for name in found.columns:
        cell = row.cells.get(name)
        line += [cell.mean, cell.std, cell.median, len(cell.values)] if cell else [None, None, None, 0]
        line.append(published.get("scores", {}).get(name))
    return [text(value) for value in (*line, *(getattr(cost, name) for name in _COSTS), published.get("source"))]


def _why(left_out: dict[str, str]) -> str:
    return "; ".join(f"{run}: {why}" for run, why in left_out.items())


def as_object(found: Comparison) -> dict[str, Any]:
    """Ready for JSON."""
    return {
        "schema_version": 2,
        "keys": list(found.differ),
        "columns": list(found.columns),
        "middle": found.middle,
        "rows": [
            {
                "method": row.method,
                "settings": {key: row.settings[key] for key in found.differ if key in row.settings},
                "runs": [str(run.folder) for run in row.runs],
                "not_counted": row.left_out,
                "parameters": row.parameters,
                "steps": [run.steps for run in row.runs],
                "results": {column: _of_cell(cell, column in row.best) for column, cell in row.cells.items()},
                "cost": vars(cost_of(row.runs)),
                "published": row.published,
            }
            for row in found.rows
        ],
        "not_counted": found.left_out,
    }


def _of_cell(cell: Cell, best: bool) -> dict[str, Any]:
    return {"values": list(cell.values), "mean": cell.mean, "std": cell.std, "median": cell.median, "best": best}
