"""Task section -> a split's examples, and how they are tokenised."""

from __future__ import annotations

from pipeline.job.errors import JobError
from pipeline.job.section import Split
from pipeline.job.task import E2E, Dart, Glue, Mix, OwnData, SamSum, SingleTask, Task, WebNlg, WikiSql
from pipeline.tasks.dart import open_dart
from pipeline.tasks.draw import drawn, held_back
from pipeline.tasks.e2e import open_e2e
from pipeline.tasks.example import Dropped, Example, Source
from pipeline.tasks.glue import open_glue
from pipeline.tasks.own import open_own, split_files
from pipeline.tasks.samsum import open_samsum
from pipeline.tasks.webnlg import open_webnlg
from pipeline.tasks.wikisql import open_wikisql


def open_split(task: SingleTask, split: Split) -> Source:
    """A split of a task, with what the job holds back of it or leaves out.

    Raises:
        JobError: the split is not there; while it is read, that it is malformed.
    """
    share = task.dev_fraction if isinstance(task, OwnData) else None
    if share is None or split == "test":
        source = _open(task, split)
    else:
        assert isinstance(task, OwnData)
        source = held_back(_open(task, "train"), share, task.dev_seed, taken=split == "valid")
    if split == "train" and task.train_examples is not None:
        source = drawn(source, task.train_examples, task.train_examples_seed)
    return source


def _open(task: SingleTask, split: Split) -> Source:
    match task:
        case E2E():
            return open_e2e(task, split)
        case WebNlg():
            return open_webnlg(task, split)
        case Dart():
            return open_dart(task, split)
        case SamSum():
            return open_samsum(task, split)
        case WikiSql():
            return open_wikisql(task, split)
        case Glue():
            return open_glue(task, split)
        case _:
            return open_own(task, split)


def sources_of(task: Task) -> tuple[SingleTask, ...]:
    """The task itself, or those of a mix."""
    return task.sources if isinstance(task, Mix) else (task,)


def content_keys(task: SingleTask) -> dict[str, object]:
    """What decides a split's examples beside the files themselves."""
    return task.model_dump(exclude={"data", "valid", "test", "title", "weight", "too_long", "separator"})


def read_examples(task: SingleTask, split: Split) -> list[Example]:
    """All examples of a split, in file order.

    Raises:
        JobError: the split is not there, is malformed or empty.
    """
    examples = [found for found in open_split(task, split).read() if not isinstance(found, Dropped)]
    if not examples:
        raise JobError(f"{named_split(task, split)} has no examples. Give it at least one.")
    return examples


def named_split(task: SingleTask, split: Split) -> str:
    """For messages."""
    return f"task.data = {task.data or '(the hub)'}: the {split} split"


def separator_text(task: SingleTask, end_token: str) -> str:
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
        case _ if task.kind in ("glue", "classification", "regression"):
            return "\n"
        case _:
            return ""


def has_split(task: SingleTask, split: Split) -> bool:
    """Whether the task has this split; your own data may lack some."""
    if not isinstance(task, OwnData) or (split == "valid" and task.dev_fraction is not None):
        return True
    return bool(split_files(task, split))
