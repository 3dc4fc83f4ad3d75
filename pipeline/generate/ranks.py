"""`zlora generate` on every rank: a list of prompts at once, or one after another as a person gives them.

In a conversation the first rank reads standard input and tells the others; each of its lines out is a message that
`cluster/talk.py` shows to the person.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from pipeline.cluster.launch import started_here
from pipeline.generate.generator import Generator, Ready
from pipeline.job.errors import JobError
from pipeline.screen import Screen
from pipeline.tasks.named import BASE, chosen
from pipeline.tasks.prompts import Asked, asking, line_prompt
from pipeline.train.engine import StopAgreed, from_first
from pipeline.weights.atomic import write_text

STDIN = "(standard input)"
CHANGE = "/delta"
"""A line that begins so changes the delta of the prompts behind it, where some are served by name."""


def answer_all(generator: Generator, asked: list[Asked], out: Path | None, as_json: bool) -> None:
    """Answers to a file, or as JSON lines on standard output; `as_json`: one object there instead."""
    ranks, screen = generator.ranks, generator.screen
    _show(screen, generator)
    begun = time.perf_counter()
    # Before any work: a prompt that does not fit.
    generator.prompt_tokens(asked)
    with generator.ready() as ready:
        label = "generating"
        texts = ready.answers(asked, lambda items: ranks.watch.over(label, screen.progress(label, items)))
    seconds = time.perf_counter() - begun
    rows = [one.answered(text) for one, text in zip(asked, texts, strict=True)]
    if out and ranks.first:
        write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        screen.print(f"{len(rows)} answers in {seconds:.1f} s  {out}")
    if as_json:
        screen.say(
            {
                "schema_version": 2,
                "base": generator.source.base,
                "deltas": [served.report() for served in generator.served.values()],
                "dtype": generator.dtype,
                "prompts": len(rows),
                "seconds": round(seconds, 3),
                "out": str(out) if out else None,
                "answers": None if out else rows,
            }
        )
    elif not out:
        for row in rows:
            screen.say(row)


def converse(generator: Generator, use: str | None) -> None:
    """Answers one line of standard input after another until it ends.

    Args:
        use: name of the delta that begins.
    """
    names = tuple(name for name in generator.served if name is not None)
    ranks, screen, framed = generator.ranks, generator.screen, started_here()
    _show(screen, generator)
    lines = _lines() if ranks.first else iter(())
    if ranks.first and framed:
        # From here on Ctrl-C ends an answer, not the process.
        ranks.stop.can_wait = True
        ranks.stop.listen((), lambda name: None)
    with generator.ready() as ready:
        if framed:
            screen.say({"ready": True, "deltas": (BASE, *names) if names else ()})
        place = 0
        for number in count(1):
            ranks.watch.at("waiting for a prompt")
            told = from_first(ranks, f"line {number}", lambda: json.dumps(next(lines, None)))
            if (line := json.loads(told)) is None:
                return
            try:
                if names and line[0].split()[:1] == [CHANGE]:
                    use = _change(line[0], line[1], names, use)
                    if framed:
                        screen.say({"delta": use or BASE})
                    continue
                message = _answer(ready, asking(line_prompt(*line), names, use), place, framed)
            except JobError as error:
                if not framed:
                    raise
                message = {"refused": str(error)}
            screen.say(message if framed else message["answer"])
            place += 1


def _change(line: str, where: str, names: tuple[str, ...], use: str | None) -> str | None:
    """The delta from here on; without a name, the one that is used."""
    name = line.split(maxsplit=1)[1:]
    return chosen(name[0].strip(), names, where) if name else use


def _answer(ready: Ready, asked: Asked, place: int, framed: bool) -> dict[str, Any]:
    """The message that ends an answer."""
    ranks, screen = ready.generator.ranks, ready.generator.screen
    so_far = ""

    def seen(text: str) -> None:
        nonlocal so_far
        # Half of a character shows as U+FFFD until its other bytes are there.
        if not text.endswith("\ufffd") and text.startswith(so_far) and text != so_far:
            if framed:
                screen.say({"piece": text[len(so_far) :]})
            so_far = text

    ranks.stop.signal = None
    try:
        (text,) = ready.answers([asked], seen=seen if ranks.first else None, place=place)
        return {"answer": asked.answered(text), "interrupted": False}
    except StopAgreed:
        return {"answer": asked.answered(so_far), "interrupted": True}


def _show(screen: Screen, generator: Generator) -> None:
    source, ranks = generator.source, generator.ranks
    rows = [("base", f"{source.base} ({generator.dtype}, on {ranks.count} x {ranks.device.type.upper()})")]
    for name, served in generator.served.items():
        if served.manifest:
            rows.append((name or "delta", f"{served.given} after {served.manifest.step} steps"))
        rows.append(("separator", json.dumps(served.separator) if served.separator else "none"))
    screen.table("generate", rows)


def _lines() -> Iterator[tuple[str, str]]:
    """Each line of standard input and its place, as soon as it is there."""
    for number, raw in enumerate(iter(sys.stdin.buffer.readline, b""), 1):
        yield raw.decode("utf-8", "surrogateescape"), f"{STDIN}:{number}"
