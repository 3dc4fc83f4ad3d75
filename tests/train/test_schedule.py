"""The learning rate is transformers' own curve."""

from __future__ import annotations

import pytest
import torch
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from pipeline.job.spec import Train
from pipeline.train.schedule import learning_rate, warmup_steps

THEIRS = {
    "linear": get_linear_schedule_with_warmup,
    "cosine": get_cosine_schedule_with_warmup,
    "constant": lambda optimizer, warmup, total: get_constant_schedule_with_warmup(optimizer, warmup),
}


@pytest.mark.parametrize("schedule", sorted(THEIRS))
@pytest.mark.parametrize("warmup", [0, 1, 7, 30])
def test_every_step_equals_transformers(schedule, warmup):
    train = Train(schedule=schedule, warmup_steps=warmup, learning_rate=0.3)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    reference = THEIRS[schedule](optimizer, warmup, 30)
    for step in range(30):
        assert learning_rate(train, step, 30) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12), step
        optimizer.step()
        reference.step()


def test_a_ratio_is_rounded_up():
    assert warmup_steps(Train(warmup_ratio=0.06), 101) == 7
