"""Which metrics each task has, under the names of its official script; which way each is better; how many digits are shown.

Names only, so that a job can be checked where nothing is installed. The counting is in `evaluate/metrics/`.
"""

from __future__ import annotations

from typing import Literal

from pipeline.job.labels import labels_of
from pipeline.job.task import Conversations, Glue, Mix, Pairs, SingleTask, Task, titled

Script = Literal["mteval", "pymteval", "generation_eval", "challenge"]
SCRIPTS: dict[str, tuple[str, ...]] = {
    "e2e": ("mteval", "pymteval"),
    "webnlg": ("generation_eval", "challenge"),
    "dart": ("generation_eval", "challenge"),
}
"""The first is the default. Tasks that are not here have one script only."""
METRICS: dict[str, tuple[str, ...]] = {
    "e2e": ("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr"),
    "webnlg": ("BLEU", "METEOR", "TER"),
    "dart": ("BLEU", "METEOR", "TER"),
    "samsum": ("ROUGE_1", "ROUGE_2", "ROUGE_L"),
    "wikisql": ("lf_accuracy",),
    "cola": ("matthews", "accuracy"),
    "sst2": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("pearson", "spearman"),
    "mnli": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "texts": ("BLEU", "exact_match"),
    "classification": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman", "rmse"),
}
"""The last three: your own prompts and completions or conversations, and your own labels."""
_LOWER_IS_BETTER = ("loss", "perplexity", "TER", "rmse")
_OF_HUNDRED = {("webnlg", "BLEU"), ("dart", "BLEU"), ("texts", "BLEU")}


def scored_as(task: SingleTask) -> str:
    """Whose metrics a task has."""
    match task:
        case Glue(name=name):
            return name
        case Pairs() | Conversations():
            return "texts"
        case _:
            return task.kind


def names_of(task: Task) -> tuple[str, ...]:
    """All metrics of a task that is trained; in a mix, each task's under its title, and the loss over all."""
    if isinstance(task, Mix):
        return (*(f"{titled(source)}/{name}" for source in task.sources for name in names_of(source)), "loss")
    return (*METRICS.get(scored_as(task), ()), "loss", *(("perplexity",) if labels_of(task) == () else ()))


def unknown_script(kind: str, script: str | None) -> str | None:
    """What is wrong with a script for a task, as the end of a message; None where it is right."""
    known = SCRIPTS.get(kind, ())
    if script is None or script in known:
        return None
    return f'"{script}": {kind} has {" or ".join(known) or "one script only"}. Correct or leave it out.'


def unknown_metric(task: Task, metric: str) -> str | None:
    """What is wrong with a metric's name for a task, as the end of a message; None where it is right."""
    known = names_of(task)
    return None if metric in known else f'"{metric}": is not a metric of {task.kind}. It has {", ".join(known)}.'


def better(metric: str, value: float, than: float) -> bool:
    return value < than if metric.rpartition("/")[2] in _LOWER_IS_BETTER else value > than


def shown(kind: str, metric: str, value: float | None) -> str:
    """A value for people: two digits on a scale of 0 to 100 and for perplexity, else four."""
    if value is None:
        return "not finite"
    return f"{value:.{2 if metric == 'perplexity' or (kind, metric) in _OF_HUNDRED else 4}f}"
