"""`zlora generate` on every rank: a list of prompts at once, or one after another as a person gives them.

In a conversation the first rank reads standard input and tells the others; each of its lines out is a message that
`cluster/talk.py` shows to the person.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.cluster.launch import started_here
from pipeline.generator import Generator, Ready
from pipeline.job.errors import JobError
from pipeline.screen import Screen
from pipeline.tasks.prompts import Asked, line_prompt
from pipeline.train.engine import StopAgreed, from_first
from pipeline.weights.atomic import write_text

STDIN = "(standard input)"


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
        manifest = generator.manifest
        screen.say(
            {
                "schema_version": 1,
                "base": generator.source.base,
                "delta": str(generator.source.delta) if generator.source.delta else None,
                "step": manifest.step if manifest else None,
                "dtype": generator.dtype,
                "separator": generator.separator,
                "prompts": len(rows),
                "seconds": round(seconds, 3),
                "out": str(out) if out else None,
                "answers": None if out else rows,
            }
        )
    elif not out:
        for row in rows:
            screen.say(row)


def converse(generator: Generator) -> None:
    """Answers one line of standard input after another until it ends."""
    ranks, screen, framed = generator.ranks, generator.screen, started_here()
    _show(screen, generator)
    lines = _lines() if ranks.first else iter(())
    if ranks.first and framed:
        # From here on Ctrl-C ends an answer, not the process.
        ranks.stop.can_wait = True
        ranks.stop.listen((), lambda name: None)
    with generator.ready() as ready:
        if framed:
            screen.say({"ready": True})
        place = 0
        while True:
            ranks.watch.at("waiting for a prompt")
            told = from_first(ranks, f"prompt {place}", lambda: json.dumps(next(lines, None)))
            if (line := json.loads(told)) is None:
                return
            try:
                message = _answer(ready, line_prompt(*line), place, framed)
            except JobError as error:
                if not framed:
                    raise
                message = {"refused": str(error)}
            screen.say(message if framed else message["answer"])
            place += 1


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
    source, ranks, manifest = generator.source, generator.ranks, generator.manifest
    rows = [("base", f"{source.base} ({generator.dtype}, on {ranks.count} x {ranks.device.type.upper()})")]
    if manifest:
        rows.append(("delta", f"{source.delta} after {manifest.step} steps"))
    rows.append(("separator", json.dumps(generator.separator) if generator.separator else "none"))
    screen.table("generate", rows)


def _lines() -> Iterator[tuple[str, str]]:
    """Each line of standard input and its place, as soon as it is there."""
    for number, raw in enumerate(iter(sys.stdin.buffer.readline, b""), 1):
        yield raw.decode("utf-8", "surrogateescape"), f"{STDIN}:{number}"
