"""Your own data: JSON lines of {"prompt": "...", "completion": "..."}. Rows with the same prompt are references of one prompt."""

from __future__ import annotations

from pathlib import Path

from pipeline.job.errors import JobError
from pipeline.job.spec import Jsonl, Split
from pipeline.tasks.example import Example
from pipeline.tasks.json_rows import field, json_lines


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
    for row, where in json_lines(file):
        prompt, completion = field(row, "prompt", str, where), field(row, "completion", str, where)
        if not completion:
            raise JobError(f'{where}: "completion" is empty: there is nothing to learn. Mend or remove the line.')
        examples.append(Example(prompt, completion, where))
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
