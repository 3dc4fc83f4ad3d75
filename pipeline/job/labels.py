"""The labels of a task, where it has some: what a head on the base puts out.

In: a task's section. Out: names, in the order of the head's outputs.
"""

from __future__ import annotations

from pipeline.job.task import Classification, Glue, Regression, SingleTask


def labels_of(task: SingleTask) -> tuple[str, ...] | None:
    """Names of the classes. None: the label is a number. Nothing, (): the task has no labels, texts are what it learns."""
    match task:
        case Glue(name=name, form="label"):
            return glue_labels(name)
        case Classification(labels=labels):
            return labels
        case Regression():
            return None
        case _:
            return ()


def glue_labels(name: str) -> tuple[str, ...] | None:
    """In the order of the hub's copy, which is that of transformers' run_glue and so of the paper's checkpoints."""
    match name:
        case "cola":
            return "unacceptable", "acceptable"
        case "sst2":
            return "negative", "positive"
        case "mrpc":
            return "not_equivalent", "equivalent"
        case "qqp":
            return "not_duplicate", "duplicate"
        case "mnli":
            return "entailment", "neutral", "contradiction"
        case "qnli" | "rte":
            return "entailment", "not_entailment"
        case _:
            return None
