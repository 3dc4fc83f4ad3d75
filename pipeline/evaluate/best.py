"""Which delta has scored best, and whether it is time to end: a function of the scores so far, so the same on every rank.

What is decided is part of the state, the weights of the best delta included: a run that goes on decides as if it had never ended.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from pipeline.evaluate.metrics.meteor import meteor_missing
from pipeline.job.errors import JobError
from pipeline.job.metrics import better
from pipeline.job.spec import Evaluate, Job
from pipeline.tasks.open import has_split, sources_of
from pipeline.weights.state import Best

_PREFIX = "best/"
SCORE = "score.json"
"""In the folder `best/`, beside the delta's own files."""


def refuse_unscorable(job: Job, first: bool) -> None:
    """Before anything is loaded. What is wrong with the name of the metric has been said when the job was read.

    Args:
        first: this is the first rank, which computes the metrics.

    Raises:
        JobError: the best delta is asked for, and nothing could be scored by it.
    """
    evaluate = job.evaluate
    if evaluate.best_metric is None:
        return
    where = f'evaluate.best_metric = "{evaluate.best_metric}"'
    if not any(has_split(task, evaluate.split) for task in sources_of(job.task)):
        raise JobError(f"{where}: there is no {evaluate.split} split to score. Name its file, or leave best_metric out.", everywhere=True)
    if first and evaluate.best_metric.rpartition("/")[2] == "METEOR" and (missing := meteor_missing()):
        raise JobError(f"{where}: {missing.removeprefix('METEOR: left out: ')}")


class BestDelta:
    """Takes every scoring; knows the best so far, and its weights on the first rank.

    Args:
        best, weights: of the state that the run goes on from.
    """

    def __init__(self, asked: Evaluate, best: Best | None, weights: dict[str, torch.Tensor] | None) -> None:
        self._patience = asked.patience
        self.best = Best(metric=asked.best_metric, split=asked.split) if asked.best_metric and best is None else best
        """None where nobody asks for it."""
        self.weights = weights or {}
        """Of the best delta's tensors, by name, in main memory."""

    def take(self, step: int, metrics: dict[str, float | None], capture: Callable[[], dict[str, torch.Tensor]]) -> None:
        """Counts the scores of a step, once.

        Args:
            metrics: of `evaluate.split`. One that is missing, or not finite, is no better than any.
            capture: copies the weights of that step.
        """
        best = self.best
        if best is None or best.scored_step == step:
            return
        value = metrics.get(best.metric)
        if value is not None and math.isfinite(value) and (best.value is None or better(best.metric, value, best.value)):
            self.best = best.model_copy(update={"step": step, "value": value, "scored_step": step, "scorings_since": 0})
            self.weights = capture()
        else:
            self.best = best.model_copy(update={"scored_step": step, "scorings_since": best.scorings_since + 1})

    @property
    def patience_is_over(self) -> bool:
        return self._patience is not None and self.best is not None and self.best.scorings_since >= self._patience

    def tensors(self) -> dict[str, torch.Tensor]:
        """For the state."""
        return {f"{_PREFIX}{name}": tensor for name, tensor in self.weights.items()}


def weights_in(tensors: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """The best delta's weights among a state's tensors."""
    return {name.removeprefix(_PREFIX): tensor for name, tensor in (tensors or {}).items() if name.startswith(_PREFIX)}
