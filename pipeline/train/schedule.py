"""Step -> learning rate, as a pure function; the curves are transformers' `get_*_schedule_with_warmup`."""

from __future__ import annotations

import math

from pipeline.job.spec import Train


def warmup_steps(train: Train, total_steps: int) -> int:
    """Steps of rising learning rate; a ratio is rounded up, as in transformers."""
    if train.warmup_ratio is not None:
        return math.ceil(train.warmup_ratio * total_steps)
    return train.warmup_steps or 0


def learning_rate(train: Train, step: int, total_steps: int) -> float:
    """For a step counted from 0."""
    warmup = warmup_steps(train, total_steps)
    if step < warmup:
        return train.learning_rate * step / max(1, warmup)
    done = (step - warmup) / max(1, total_steps - warmup)
    match train.schedule:
        case "linear":
            return train.learning_rate * max(0.0, 1.0 - done)
        case "cosine":
            return train.learning_rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))
        case "constant":
            return train.learning_rate
