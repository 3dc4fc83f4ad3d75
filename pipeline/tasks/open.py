"""Task section -> a split's examples, and how they are tokenised."""

from __future__ import annotations

from pipeline.job.errors import JobError
from pipeline.job.section import Split
from pipeline.job.task import E2E, Conversations, Dart, Glue, Mix, OwnData, SamSum, SingleTask, Task, WebNlg, WikiSql
from pipeline.tasks.dart import HUB as DART_HUB
from pipeline.tasks.dart import open_dart
from pipeline.tasks.draw import drawn, held_back
from pipeline.tasks.e2e import HUB as E2E_HUB
from pipeline.tasks.e2e import open_e2e
from pipeline.tasks.example import Source
from pipeline.tasks.glue import as_text, glue_copies, open_glue
from pipeline.tasks.hub import HubCopy
from pipeline.tasks.own import open_own, split_files
from pipeline.tasks.samsum import HUB as SAMSUM_HUB
from pipeline.tasks.samsum import open_samsum
from pipeline.tasks.webnlg import HUB as WEBNLG_HUB
from pipeline.tasks.webnlg import open_webnlg
from pipeline.tasks.wikisql import HUB as WIKISQL_HUB
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
        if own := split_files(task, "valid"):
            raise JobError(f"task.dev_fraction = {share}: there is a validation split already, {own[0]}. Keep one of them.")
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
            source = open_glue(task, split)
            return source if task.form == "label" else as_text(task, source)
        case _:
            return open_own(task, split)


def sources_of(task: Task) -> tuple[SingleTask, ...]:
    """The task itself, or those of a mix."""
    return task.sources if isinstance(task, Mix) else (task,)


def content_keys(task: SingleTask) -> dict[str, object]:
    """What decides a split's examples beside the files themselves."""
    return task.model_dump(exclude={"data", "valid", "test", "title", "weight", "too_long", "separator"})


def named_split(task: SingleTask, split: Split) -> str:
    """For messages."""
    return f"task.data = {task.data or '(the hub)'}: the {split} split"


def separator_text(task: SingleTask, end_token: str, encoder: bool = False) -> str | None:
    """What stands between prompt and completion: each task's own, nothing for your own texts. None: an encoder's own form of texts."""
    if task.separator is not None or encoder:
        return task.separator
    match task:
        case E2E() | WebNlg() | Dart():
            return end_token
        case SamSum():
            return "\n\n"
        case WikiSql():
            return "\nA:"
        case Glue(form="text"):
            return "\nanswer:"
        case _ if task.kind in ("glue", "classification", "regression"):
            return "\n"
        case _:
            return ""


def prompt_form(task: Task, end_token: str) -> tuple[str | None, bool]:
    """What makes a prompt as in training: its separator, None where a mix has several; and whether it is in the base's chat template."""
    separators = {separator_text(source, end_token) for source in sources_of(task)}
    chats = {isinstance(source, Conversations) for source in sources_of(task)}
    return (separators.pop() if len(separators) == 1 and len(chats) == 1 else None), chats == {True}


def has_split(task: SingleTask, split: Split) -> bool:
    """Whether the task has this split; your own data may lack some."""
    if not isinstance(task, OwnData) or (split == "valid" and task.dev_fraction is not None):
        return True
    return bool(split_files(task, split))


def hub_copies(task: SingleTask) -> tuple[HubCopy, ...]:
    """Where the data of a task comes from that names no folder; none where it names one."""
    if task.data is not None:
        return ()
    match task:
        case E2E():
            return (E2E_HUB,)
        case WebNlg():
            return (WEBNLG_HUB,)
        case Dart():
            return (DART_HUB,)
        case SamSum():
            return (SAMSUM_HUB,)
        case WikiSql():
            return (WIKISQL_HUB,)
        case Glue():
            return glue_copies(task)
        case _:
            return ()
