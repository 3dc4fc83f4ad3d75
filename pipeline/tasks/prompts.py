"""What `zlora generate` is asked: prompts of the command line or of a file, checked before anything heavy begins. No torch.

A `.jsonl` file has one {"prompt": "..."} a line, its other keys are kept beside the answer; any other file has one prompt a line.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.job.errors import JobError
from pipeline.tasks.files import lines
from pipeline.tasks.json_rows import Row, field, json_lines


@dataclass(frozen=True)
class Asked:
    """One prompt."""

    prompt: str
    source: str
    """File and line, or the option, for messages."""
    row: Row
    """The other keys of its line."""

    def answered(self, prediction: str) -> dict[str, Any]:
        """One line of output; a key `prediction` that was there gives way."""
        return {**self.row, "prompt": self.prompt, "prediction": prediction}


def read_prompts(texts: list[str], file: Path | None) -> list[Asked]:
    """The prompts of the command line, or those of a file; none where neither is given.

    Raises:
        JobError: both are given, no such file, one without prompts, a bad line by its number.
    """
    if texts and file is not None:
        raise JobError(f"--prompt and --prompt-file {file} are both given. Keep one of them.")
    if file is None:
        return [as_prompt(text, f"--prompt {number}") for number, text in enumerate(texts, 1)]
    if not file.is_file():
        raise JobError(f"--prompt-file {file}: there is no such file (looked in {file.absolute().parent}).")
    if file.suffix == ".jsonl":
        asked = [Asked(field(row, "prompt", str, where), where, row) for row, where in json_lines(file)]
    else:
        asked = [line_prompt(line, f"{file}:{number}") for number, line in lines(file)]
    if not asked:
        raise JobError(f"--prompt-file {file}: holds no prompt. Give it at least one line.")
    return asked


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
