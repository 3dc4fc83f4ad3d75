"""Task section -> examples of a split."""

from __future__ import annotations

from pipeline.job.errors import JobError
from pipeline.job.spec import E2E, Jsonl, Split
from pipeline.tasks.e2e import read_e2e
from pipeline.tasks.example import Example
from pipeline.tasks.jsonl import read_jsonl, split_file


def read_examples(task: E2E | Jsonl, split: Split) -> list[Example]:
    """All examples of a split, in file order.

    Raises:
        JobError: the split is not there, is malformed or empty.
    """
    match task:
        case E2E():
            examples = read_e2e(task, split)
        case Jsonl():
            examples = read_jsonl(task, split)
    if not examples:
        raise JobError(f"task.data = {task.data}: the {split} split has no examples. Give it at least one.")
    return examples


def separator_text(task: E2E | Jsonl, end_token: str) -> str:
    """What stands between prompt and completion: the paper's end token for its tasks, nothing for your own texts."""
    if task.separator is not None:
        return task.separator
    return "" if isinstance(task, Jsonl) else end_token


def has_split(task: E2E | Jsonl, split: Split) -> bool:
    """Whether the task has this split; your own data may lack some."""
    match task:
        case E2E():
            return True
        case Jsonl():
            return split_file(task, split) is not None
