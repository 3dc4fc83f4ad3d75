"""What `zlora generate` is asked: prompts of the command line or of a file, checked before anything heavy begins. No torch.

A `.jsonl` file has one {"prompt": "..."} a line, its other keys are kept beside the answer; any other file has one prompt a line.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.job.errors import JobError
from pipeline.tasks.files import lines
from pipeline.tasks.json_rows import Row, field, json_lines
from pipeline.tasks.named import chosen


@dataclass(frozen=True)
class Asked:
    """One prompt."""

    prompt: str
    source: str
    """File and line, or the option, for messages."""
    row: Row
    """The other keys of its line."""
    delta: str | None = None
    """Which of those that are served by name is asked for; None: the base alone, or the only delta."""

    def answered(self, prediction: str) -> dict[str, Any]:
        """One line of output; a key `prediction` that was there gives way."""
        return {**self.row, "prompt": self.prompt, "prediction": prediction}


def read_prompts(texts: list[str], file: Path | None, names: tuple[str, ...] = (), use: str | None = None) -> list[Asked]:
    """The prompts of the command line, or those of a file; none where neither is given.

    Args:
        names: of the deltas that are served.
        use: the one of a prompt that says none.

    Raises:
        JobError: both are given, no such file, one without prompts, a bad line by its number.
    """
    if texts and file is not None:
        raise JobError(f"--prompt and --prompt-file {file} are both given. Keep one of them.")
    if file is None:
        return [asking(as_prompt(text, f"--prompt {number}"), names, use) for number, text in enumerate(texts, 1)]
    if not file.is_file():
        raise JobError(f"--prompt-file {file}: there is no such file (looked in {file.absolute().parent}).")
    if file.suffix == ".jsonl":
        asked = [asking(Asked(field(row, "prompt", str, where), where, row), names, use) for row, where in json_lines(file)]
    else:
        asked = [asking(line_prompt(line, f"{file}:{number}"), names, use) for number, line in lines(file)]
    if not asked:
        raise JobError(f"--prompt-file {file}: holds no prompt. Give it at least one line.")
    return asked


def asking(one: Asked, names: tuple[str, ...], use: str | None) -> Asked:
    """A prompt with the delta that it asks for, where some are served by name: that of its row, else `use`.

    Raises:
        JobError: none of that name is served.
    """
    if not names:
        return one
    delta = chosen(one.row["delta"], names, one.source) if "delta" in one.row else use
    return replace(one, delta=delta, row={**one.row, "delta": delta})


def line_prompt(line: str, where: str) -> Asked:
    """The prompt of a line of text.

    Raises:
        JobError: an empty line, which is more often a slip than a prompt.
    """
    text = line.removesuffix("\n").removesuffix("\r")
    if not text.strip():
        raise JobError(f'{where}: an empty line. Remove it; an empty prompt is {{"prompt": ""}} in a .jsonl file.')
    return as_prompt(text, where)


def as_prompt(text: str, where: str) -> Asked:
    """Raises:
    JobError: not text."""
    # Bytes that are no UTF-8 arrive as half surrogates.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise JobError(f"{where}: not UTF-8 text. Convert it.")
    return Asked(text, where, {})
