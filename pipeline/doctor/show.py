"""The findings as a table for people, and below it what to do."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from pipeline.doctor.finding import Finding, State
from pipeline.screen import Screen

_MARKS: dict[State, tuple[str, str]] = {"good": ("ok  ", "green"), "warning": ("warn", "yellow"), "problem": ("BAD ", "bold red")}
"""Words, so that a log without colours says it too."""


def show(findings: Sequence[Finding], screen: Screen) -> None:
    """One column of marks through all groups; then a line for each repair, and the verdict."""
    width = max(len(finding.name) for finding in findings)
    for group in dict.fromkeys(finding.group for finding in findings):
        rows = [(finding.name.ljust(width), _marked(finding, finding.value)) for finding in findings if finding.group == group]
        screen.table(group, rows)
    wrong = [finding for state in ("problem", "warning") for finding in findings if finding.state == state]
    if wrong:
        screen.table("What to do", [(finding.name.ljust(width), _marked(finding, finding.repair)) for finding in wrong])
    screen.print()
    screen.print(_verdict(findings))


def _marked(finding: Finding, text: str) -> Text:
    mark, style = _MARKS[finding.state]
    return Text.assemble((mark, style), "  ", text)


def _verdict(findings: Sequence[Finding]) -> str:
    problems, warnings = (sum(finding.state == state for finding in findings) for state in ("problem", "warning"))
    counted = " and ".join(f"{count} {word}{'s'[: count != 1]}" for count, word in ((problems, "problem"), (warnings, "warning")) if count)
    if problems:
        return f"{counted}: mend what is marked BAD, then run zlora doctor again."
    return f"No problem found{f'; {counted}' if counted else ''}."
