"""What the tests of tasks share: reading a split, what is said when it is refused, and a hub that is a list of rows."""

from __future__ import annotations

import pytest

from pipeline.job.errors import JobError
from pipeline.job.section import Split
from pipeline.job.task import SingleTask
from pipeline.tasks import hub
from pipeline.tasks.example import Dropped, Example, Reason, Source, count, none_left
from pipeline.tasks.open import named_split, open_split


def read_examples(task: SingleTask, split: Split) -> list[Example]:
    """All examples of a split, in file order.

    Raises:
        JobError: the split is not there, is malformed or empty.
    """
    return all_examples(open_split(task, split), named_split(task, split))[0]


def all_examples(source: Source, what: str) -> tuple[list[Example], tuple[Reason, ...]]:
    """All examples of a source, in file order, and what was left out.

    Args:
        what: the split, for messages.
    """
    examples: list[Example] = []
    reasons: dict[str, Reason] = {}
    for found in source.read():
        if isinstance(found, Dropped):
            count(reasons, found)
        else:
            examples.append(found)
    if not examples:
        raise none_left(what, reasons)
    return examples, tuple(reasons.values())


def refused(task, split="train"):
    """The one line that reading this split ends with."""
    with pytest.raises(JobError) as caught:
        read_examples(task, split)
    message = str(caught.value)
    assert "\n" not in message
    return message


def pairs(examples):
    return [(example.prompt, example.completion) for example in examples]


def stub_hub(monkeypatch, rows):
    """The hub gives these rows for whatever is asked, which is returned."""
    import datasets

    asked = {}

    def load(name, **kwargs):
        asked.update(name=name, **kwargs)
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(hub, "load", load)
    return asked
