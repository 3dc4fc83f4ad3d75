"""Which metrics each task has, under the names of its official script; which way each is better; how many digits are shown.

Names only, so that a job can be checked where nothing is installed. The counting is in `evaluate/metrics/`.
"""

from __future__ import annotations

from typing import Literal

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
    "jsonl": ("BLEU", "exact_match"),
}
OF_TOKENS = ("loss", "perplexity")
"""Of the model's probabilities: every task that is trained has them."""
_LOWER_IS_BETTER = (*OF_TOKENS, "TER")
_OF_HUNDRED = {("webnlg", "BLEU"), ("dart", "BLEU"), ("jsonl", "BLEU")}


def unknown_script(kind: str, script: str | None) -> str | None:
    """What is wrong with a script for a task, as the end of a message; None where it is right."""
    known = SCRIPTS.get(kind, ())
    if script is None or script in known:
        return None
    return f'"{script}": {kind} has {" or ".join(known) or "one script only"}. Correct or leave it out.'


def unknown_metric(kind: str, metric: str) -> str | None:
    """What is wrong with a metric's name for a task, as the end of a message; None where it is right."""
    known = (*METRICS[kind], *OF_TOKENS)
    return None if metric in known else f'"{metric}": is not a metric of {kind}. It has {", ".join(known)}.'


def better(metric: str, value: float, than: float) -> bool:
    return value < than if metric in _LOWER_IS_BETTER else value > than


def shown(kind: str, metric: str, value: float | None) -> str:
    """A value for people: two digits on a scale of 0 to 100 and for perplexity, else four."""
    if value is None:
        return "not finite"
    return f"{value:.{2 if metric == 'perplexity' or (kind, metric) in _OF_HUNDRED else 4}f}"
