"""What the tests of tasks share: reading a split, what is said when it is refused, and a hub that is a list of rows."""

from __future__ import annotations

import pytest

from pipeline.job.errors import JobError
from pipeline.tasks import hub
from pipeline.tasks.open import read_examples


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
