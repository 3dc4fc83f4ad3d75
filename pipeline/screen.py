"""What a person sees: one progress bar, short tables, no library's warnings, nothing twice.

On a rank, everything that libraries print (file descriptors 1 and 2) goes to `logs/rank<N>.txt`; the first rank keeps the
terminal for what is written through `Screen`.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, TypeVar

from rich.console import Console, RenderableType
from rich.live import Live
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pipeline.job.printable import printable

T = TypeVar("T")
_LINE_EVERY_S = 10.0
_REDRAWN_EVERY_S = 5.0
_ANY = 100_000
_LINES = 1
"""`_IOLBF`."""


class Screen:
    """A console for people. On all ranks but the first it shows nothing.

    Args:
        out: standard output, for what programs read.
    """

    def __init__(self, stream: TextIO, shown: bool = True, out: TextIO | None = None) -> None:
        self._out = out if shown else None
        width = None if stream.isatty() else 120
        self._bars: Progress | None = None
        self._console = Console(file=stream, quiet=not shown, highlight=False, width=width, soft_wrap=not stream.isatty())

    def print(self, text: str = "") -> None:
        self._console.print(printable(text), markup=False)

    def say(self, value: dict[str, Any]) -> None:
        """One JSON object, a line of standard output."""
        if self._out:
            print(json_text(value), file=self._out, flush=True)

    @property
    def coloured(self) -> bool:
        """Whether colours and styles are seen."""
        return self._console.color_system is not None and not self._console.no_color

    def table(self, title: str, rows: Iterable[tuple[str, str | Text]]) -> None:
        """Two columns: what, and its value."""
        # Text, not str: brackets in data and paths must not be read as markup.
        table = Table(title=_text(title), title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
        for name, value in rows:
            table.add_row(_text(f"  {name}"), value if isinstance(value, Text) else _text(value))
        self._console.print(table)

    def columns(self, title: str, names: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Named columns: words on the left, numbers on the right."""
        self.draw(columns(title, names, rows))

    @property
    def size(self) -> tuple[int, int] | tuple[None, None]:
        """Characters of a line, and lines; None where there is no terminal."""
        return self._console.size if self._console.is_terminal else (None, None)

    def draw(self, drawn: RenderableType) -> None:
        """As wide as it is where there is no terminal, for a pager or another program."""
        usual = self._console.width
        if not self._console.is_terminal:
            wanted = Measurement.get(self._console, self._console.options.update(max_width=_ANY), drawn).maximum
            self._console.width = max(usual, wanted)
        self._console.print(drawn)
        self._console.width = usual

    def redrawn(self, draw: Callable[[], RenderableType]) -> None:
        """Draws in one place, again and again until Ctrl-C; where there is no terminal, below one another."""
        with suppress(KeyboardInterrupt), Live(draw(), console=self._console, auto_refresh=False) as live:
            while True:
                time.sleep(_REDRAWN_EVERY_S)
                if self._console.is_terminal:
                    live.update(draw(), refresh=True)
                else:
                    self.draw(draw())

    def progress(self, label: str, items: Iterable[T]) -> Iterator[T]:
        """Iterates with a bar that goes away when done; beside the training's bar where that is there."""
        items = list(items)
        with self._live(transient=True) as bar:
            task = bar.add_task(label, total=len(items), note="")
            for item in items:
                yield item
                bar.advance(task)
            bar.remove_task(task)

    def passing(self, label: str, places: Iterable[int], total: int) -> Iterator[int]:
        """Iterates over how much of `total` (0: not known) is done, with a bar that goes away in the end."""
        with self._live(transient=True) as bar:
            task = bar.add_task(label, total=total or None, note="")
            for place in places:
                bar.update(task, completed=place)
                yield place
            bar.remove_task(task)

    def named(self, label: str, items: Iterable[T], total: int) -> Iterator[T]:
        """Iterates over `total` items with a bar that goes away when done; an item that is a text says what was done last."""
        with self._live(transient=True) as bar:
            task = bar.add_task(label, total=total, note="")
            for item in items:
                bar.update(task, advance=1, note=item if isinstance(item, str) else "")
                yield item
            bar.remove_task(task)

    @contextmanager
    def bytes(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar that goes away when done; what is yielded is told how many bytes there are."""
        with self._live(transient=True) as bar:
            task = bar.add_task(label, total=total, note=size_text(total))
            yield lambda done: bar.update(task, completed=min(done, total))
            bar.remove_task(task)

    @contextmanager
    def training(self, steps: int, done: int = 0) -> Iterator[StepBar]:
        """The bar of the training loop."""
        with self._live(transient=False) as bar:
            yield StepBar(bar, self._console, steps, done)

    @contextmanager
    def _live(self, transient: bool) -> Iterator[Progress]:
        if self._bars is not None:
            yield self._bars
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, transient=transient, disable=not self._console.is_terminal) as self._bars:
            try:
                yield self._bars
            finally:
                self._bars = None


def columns(title: str, names: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> Table:
    """Named columns: words on the left, numbers on the right."""
    table = Table(title=_text(title) if title else None, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.header_style = "dim"
    rows = list(rows)
    for place, name in enumerate(names):
        number = any(str(row[place])[:1].isdigit() and place > 1 for row in rows)
        table.add_column(_text(f"  {name}" if place == 0 else name), justify="right" if number else "left")
    for row in rows:
        table.add_row(*(Text("  ") + _text(value) if place == 0 else _text(value) for place, value in enumerate(row)))
    return table


def _text(value: str | Text) -> Text:
    return value if isinstance(value, Text) else Text(printable(value))


class StepBar:
    """A bar on a terminal; elsewhere (a Slurm log, a pipe) a line now and then."""

    def __init__(self, bar: Progress, console: Console, steps: int, done: int) -> None:
        self._bar, self._console, self._steps = bar, console, steps
        self._task = bar.add_task("training", total=steps, completed=done, note="")
        self._first: tuple[int, float] | None = None
        self._said = time.monotonic()

    def update(self, done: int, loss: float, tokens_per_s: float) -> None:
        """Shows that `done` steps are finished; the rate counts all tokens but padding."""
        note = f"loss {loss:.4f} · {tokens_per_s:,.0f} tokens/s"
        self._bar.update(self._task, completed=done, note=note)
        now = time.monotonic()
        # What came before the first step (loading, a first evaluation) says nothing about the rest.
        first, begun = self._first = self._first or (done, now)
        if not self._console.is_terminal and (now - self._said > _LINE_EVERY_S or done == self._steps):
            left = f" · {(now - begun) / (done - first) * (self._steps - done):.0f} s left" if done > first else ""
            self._console.print(f"step {done}/{self._steps} · {note}{left}", markup=False)
            self._said = now


def take_terminal(logs: Path | None, rank: int) -> tuple[TextIO, TextIO]:
    """Sends this process's standard output and error to `logs/rank<N>.txt`, or nowhere; returns the terminal's two."""
    if logs:
        logs.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    out, error = (os.fdopen(os.dup(fd), "w", encoding="utf-8", errors="replace", buffering=1) for fd in (1, 2))
    log = os.open(logs / f"rank{rank}.txt" if logs else os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    _buffer_lines()
    return out, error


def _buffer_lines() -> None:
    """What C libraries print (NCCL) is in the log at once: a rank may be ended without their buffer being written."""
    with suppress(OSError, AttributeError, ValueError):
        libc = ctypes.CDLL(None)
        libc.setvbuf(ctypes.c_void_p.in_dll(libc, "stdout"), None, _LINES, 0)


def json_text(value: dict[str, Any]) -> str:
    """One line."""
    return json.dumps(finite(value), ensure_ascii=False, allow_nan=False)


def finite(value: Any) -> Any:
    """None in place of infinity and NaN, which JSON has not."""
    match value:
        case dict():
            return {key: finite(item) for key, item in value.items()}
        case list() | tuple():
            return [finite(item) for item in value]
        case float() if not math.isfinite(value):
            return None
        case _:
            return value


def size_text(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
