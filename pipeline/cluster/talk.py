"""The person's side of a conversation with the ranks: reads lines, hands them to the first rank, shows what it answers. No torch.

The launcher owns the terminal, so line editing and Ctrl-C are its business: the ranks are no part of the terminal's session.
A message of the first rank is one JSON object a line: `ready`, `piece` of an answer, the whole `answer`, another `delta`, or `refused`.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from pipeline.job.errors import JobError

_POLL_S = 0.5
_PROMPT = "> "
_HELP = "Ctrl-D ends; Ctrl-C interrupts an answer; arrow up brings back an earlier prompt."


def talk(first: subprocess.Popen[bytes], alive: Callable[[], bool]) -> None:
    """Goes on until the person's input ends or a rank has ended.

    Args:
        first: the first rank, with pipes for standard input and output.
        alive: whether all ranks are.

    Raises:
        JobError: a line of piped input that has no answer.
    """
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    messages = _messages(first, alive)
    if (ready := next(messages, None)) is None:
        return
    if terminal:
        print(_HELP)
        if ready["deltas"]:
            print(f"/delta NAME changes the delta: {', '.join(ready['deltas'])}.")
    for line in _typed() if terminal else iter(sys.stdin.buffer.readline, b""):
        assert first.stdin is not None
        with suppress(BrokenPipeError):
            first.stdin.write(line.removesuffix(b"\n") + b"\n")
        with _interrupting(first) if terminal else nullcontext():
            if not _show(messages, terminal):
                return
    assert first.stdin is not None
    first.stdin.close()


def _typed() -> Iterator[bytes]:
    """Lines from the terminal; an empty one, or one that Ctrl-C gave up, is asked for again."""
    with suppress(ImportError):
        import readline  # noqa: F401  input() uses it: line editing and history
    while True:
        try:
            line = input(_PROMPT)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print(f"\n{_HELP}")
            continue
        if line.strip():
            yield line.encode("utf-8", "surrogateescape")


@contextmanager
def _interrupting(first: subprocess.Popen[bytes]) -> Iterator[None]:
    """Ctrl-C goes to the first rank, which ends its answer together with the others."""
    before = signal.signal(signal.SIGINT, lambda *_: first.send_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _show(messages: Iterator[dict[str, Any]], terminal: bool) -> bool:
    """One answer, as it comes; False where the rank is gone."""
    shown = ""
    for message in messages:
        match message:
            case {"piece": str(piece)} if terminal:
                print(_plain(piece), end="", flush=True)
                shown += piece
            case {"answer": dict(row), "interrupted": bool(interrupted)}:
                text = row["prediction"]
                if not terminal:
                    sys.stdout.buffer.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                    sys.stdout.buffer.flush()
                else:
                    rest = text[len(shown) :] if text.startswith(shown) else f"\n{text}"
                    print(_plain(rest) + (" [interrupted]" if interrupted else ""), flush=True)
                return True
            case {"delta": str(name)}:
                if terminal:
                    print(f"delta: {name}", flush=True)
                return True
            case {"refused": str(reason)}:
                if not terminal:
                    raise JobError(reason)
                print(reason, flush=True)
                return True
    return False


def _plain(text: str) -> str:
    """Without control characters: what a model writes must not steer the terminal."""
    return "".join(character if character.isprintable() or character in "\n\t" else "\ufffd" for character in text)


def _messages(first: subprocess.Popen[bytes], alive: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    assert first.stdout is not None
    pipe, waiting = first.stdout.fileno(), b""
    while True:
        *whole, waiting = waiting.split(b"\n")
        for line in whole:
            yield json.loads(line)
        if select.select([pipe], [], [], _POLL_S)[0]:
            if not (read := os.read(pipe, 1 << 16)):
                return
            waiting += read
        elif not alive():
            return
