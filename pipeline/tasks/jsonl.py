"""Your own data: JSON lines of {"prompt": "...", "completion": "..."}. Rows with the same prompt are references of one prompt."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.job.errors import JobError
from pipeline.job.spec import Jsonl, Split
from pipeline.tasks.example import Example


def read_jsonl(task: Jsonl, split: Split) -> list[Example]:
    """All examples of a split, in file order; the texts are taken exactly as they are.

    Raises:
        JobError: no file for this split, or a malformed line.
    """
    file = split_file(task, split)
    if file is None:
        place = f"{task.data}/{split}.jsonl" if Path(task.data).is_dir() else f'{split} = "FILE" in [task]'
        raise JobError(f"task.data = {task.data}: there is no {split} split. Add {place}, or choose another split.")
    if not file.is_file():
        raise JobError(f"{file}: not a file. Name the {split} split's JSON-lines file.")
    examples = []
    with file.open(encoding="utf-8-sig") as stream:
        try:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    examples.append(_example(line, f"{file}:{number}"))
        except UnicodeDecodeError as error:
            raise JobError(f"{file}: not UTF-8 text ({error}). Convert the file.") from None
    return examples


def split_file(task: Jsonl, split: Split) -> Path | None:
    """Where a split is, if the job has it."""
    named = {"train": None, "valid": task.valid, "test": task.test}[split]
    if named is not None:
        return Path(named)
    if Path(task.data).is_dir():
        file = Path(task.data) / f"{split}.jsonl"
        return file if file.is_file() else None
    return Path(task.data) if split == "train" else None


def _example(line: str, where: str) -> Example:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise JobError(f"{where}: not valid JSON: {error.msg} at column {error.colno}. Mend the line.") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting of thousands of levels
        raise JobError(f"{where}: not readable JSON: {error}. Mend the line.") from None
    if not isinstance(row, dict):
        raise JobError(f'{where}: not an object with "prompt" and "completion". Mend the line.')
    for key in ("prompt", "completion"):
        if not isinstance(row.get(key), str):
            found = f"has {', '.join(sorted(map(str, row)))}" if key not in row else f"it is {type(row[key]).__name__}, not text"
            raise JobError(f'{where}: "{key}" is missing or not text ({found}). Mend the line.')
        if any("\ud800" <= character <= "\udfff" for character in row[key]):
            raise JobError(f'{where}: "{key}" holds half of a surrogate pair (\\ud800 to \\udfff), which is not text. Mend the line.')
    if not row["completion"]:
        raise JobError(f'{where}: "completion" is empty: there is nothing to learn. Mend or remove the line.')
    return Example(row["prompt"], row["completion"], where)
