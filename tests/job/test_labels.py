"""The labels of each kind of task."""

from __future__ import annotations

from typing import get_args

import pytest

from pipeline.job.labels import labels_of
from pipeline.job.task import E2E, Classification, Glue, Pairs, Regression

# The features of the hub's copy (nyu-mll/glue), which transformers' run_glue trains on.
HUB = {
    "cola": ("unacceptable", "acceptable"),
    "sst2": ("negative", "positive"),
    "mrpc": ("not_equivalent", "equivalent"),
    "stsb": None,
    "qqp": ("not_duplicate", "duplicate"),
    "mnli": ("entailment", "neutral", "contradiction"),
    "qnli": ("entailment", "not_entailment"),
    "rte": ("entailment", "not_entailment"),
}


@pytest.mark.parametrize("name", HUB)
def test_glue_has_the_labels_of_the_hubs_copy_in_its_order(name):
    assert labels_of(Glue(kind="glue", name=name)) == HUB[name]


def test_every_task_of_glue_is_there():
    assert set(HUB) == set(get_args(Glue.model_fields["name"].annotation))


def test_your_own_labels_are_those_of_the_job():
    assert labels_of(Classification(kind="classification", data="d", labels=("b", "a"))) == ("b", "a")
    assert labels_of(Regression(kind="regression", data="d")) is None


@pytest.mark.parametrize("task", [E2E(kind="e2e"), Pairs(kind="csv", data="d")])
def test_a_task_of_texts_has_no_labels(task):
    assert labels_of(task) == ()


@pytest.mark.parametrize("labels", [(), ("a",), ("a", "b", "a")])
def test_labels_are_at_least_two_each_once(labels):
    with pytest.raises(ValueError, match="Name at least two classes, each once"):
        Classification(kind="classification", data="d", labels=labels)
