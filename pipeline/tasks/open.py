"""Task section -> examples of a split."""

from __future__ import annotations

from pipeline.job.errors import JobError
from pipeline.job.spec import E2E, Dart, Jsonl, SamSum, Split, Task, WebNlg, WikiSql
from pipeline.tasks.dart import HUB as DART_HUB
from pipeline.tasks.dart import read_dart
from pipeline.tasks.e2e import HUB as E2E_HUB
from pipeline.tasks.e2e import read_e2e
from pipeline.tasks.example import Example
from pipeline.tasks.hub import HubCopy
from pipeline.tasks.jsonl import read_jsonl, split_file
from pipeline.tasks.samsum import HUB as SAMSUM_HUB
from pipeline.tasks.samsum import read_samsum
from pipeline.tasks.webnlg import HUB as WEBNLG_HUB
from pipeline.tasks.webnlg import read_webnlg
from pipeline.tasks.wikisql import HUB as WIKISQL_HUB
from pipeline.tasks.wikisql import read_wikisql


def read_examples(task: Task, split: Split) -> list[Example]:
    """All examples of a split, in file order.

    Raises:
        JobError: the split is not there, is malformed or empty.
    """
    match task:
        case E2E():
            examples = read_e2e(task, split)
        case WebNlg():
            examples = read_webnlg(task, split)
        case Dart():
            examples = read_dart(task, split)
        case SamSum():
            examples = read_samsum(task, split)
        case WikiSql():
            examples = read_wikisql(task, split)
        case Jsonl():
            examples = read_jsonl(task, split)
    if not examples:
        raise JobError(f"task.data = {task.data or '(the hub)'}: the {split} split has no examples. Give it at least one.")
    return examples


def separator_text(task: Task, end_token: str) -> str:
    """What stands between prompt and completion: each task's own, nothing for your own texts."""
    if task.separator is not None:
        return task.separator
    match task:
        case E2E() | WebNlg() | Dart():
            return end_token
        case SamSum():
            return "\n\n"
        case WikiSql():
            return "\nA:"
        case Jsonl():
            return ""


def has_split(task: Task, split: Split) -> bool:
    """Whether the task has this split; your own data may lack some."""
    return split_file(task, split) is not None if isinstance(task, Jsonl) else True


def hub_copy(task: Task) -> HubCopy | None:
    """Where the data of a task comes from that names no folder; None where it names one."""
    if task.data is not None:
        return None
    match task:
        case E2E():
            return E2E_HUB
        case WebNlg():
            return WEBNLG_HUB
        case Dart():
            return DART_HUB
        case SamSum():
            return SAMSUM_HUB
        case WikiSql():
            return WIKISQL_HUB
        case Jsonl():
            return None
