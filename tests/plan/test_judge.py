"""What leaves the plan is told with the cause that speaks for it, and nothing else is: made-up measurements."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.plan.hardware import GIB
from pipeline.plan.judge import Footprint, OwnBest, Pace, Promise, judge_decline, judge_memory, judge_promise, middle

SAID = Footprint(said=10 * GIB, measured=11 * GIB, spare=GIB // 4, capacity=80 * GIB)
OVER = replace(SAID, measured=13 * GIB)


def test_memory_within_the_margin_is_not_told():
    assert judge_memory(SAID) is None
    assert judge_memory(replace(SAID, measured=5 * GIB)) is None, "less does no harm"
    assert judge_memory(replace(SAID, said=GIB // 10, measured=GIB // 5)) is None, "twice as much, but of what the plan does not count"


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({}, "nothing that is measured here"),
        ({"returns": False}, "MALLOC_MMAP_THRESHOLD_"),
        ({"guess": "a mixture's experts"}, "a mixture's experts"),
        ({"scoring": True}, "evaluate.batch_tokens"),
        ({"ungathered": 4 * GIB}, "stage3_max_live_parameters"),
        ({"ungathered": 40 * GIB}, "nothing that is measured here"),
        ({"views": 1.6}, "attention pads them by 60 %"),
    ],
)
def test_memory_above_the_plan_s_is_told_with_its_cause(change, cause):
    line = judge_memory(replace(OVER, **change))
    assert "13.00 GiB" in line
    assert "30 % above the plan's 10.00 GiB" in line
    assert cause in line.partition("Likeliest cause: ")[2]


def test_fragmentation_is_told_where_it_fills_the_gpu():
    held = replace(SAID, said=50 * GIB, measured=52 * GIB)
    assert judge_memory(replace(held, reserved=65 * GIB)) is None, "there is room"
    assert "expandable_segments" in judge_memory(replace(held, reserved=72 * GIB))


PROMISE = Promise(tokens_per_s=1000.0, tokens_to_hide=0, micro_batch_s=1.0, layers=12, attained=0.4)
PACE = Pace(step=15, tokens_per_s=500.0, tokens=2000.0, cores=16)


@pytest.mark.parametrize(
    ("promise", "pace", "cause"),
    [
        ({}, {}, "40 % of the GPU's peak rate"),
        ({}, {"data_share": 0.3}, "30 % of a step go to dealing"),
        ({}, {"runnable": 40.0}, "40.0 processes want the 16 cores"),
        ({"tokens_to_hide": 3000}, {}, "has 2,000 tokens and needs 3,000"),
        ({"micro_batch_s": 0.001}, {}, "too small to keep the GPU busy"),
        ({}, {"padding_share": 0.4}, "40 % of what is computed is padding"),
    ],
)
def test_throughput_below_the_plan_s_is_told_with_its_cause(promise, pace, cause):
    line = judge_promise(replace(PROMISE, **promise), replace(PACE, **pace))
    assert "500 tokens/s, 50 % below the plan's 1,000" in line
    assert cause in line.partition("Likeliest cause: ")[2]


def test_throughput_near_or_above_the_plan_s_is_not_told():
    assert judge_promise(PROMISE, replace(PACE, tokens_per_s=860.0, data_share=0.9)) is None
    assert judge_promise(PROMISE, replace(PACE, tokens_per_s=2000.0)) is None


BEST = Pace(step=40, tokens_per_s=1000.0, tokens=2000.0, processor_s=1.0, runnable=2.0, cores=2)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({}, "the first rank waits"),
        ({"data_share": 0.2}, "20 % of a step go to dealing and collating examples, 0 % then"),
        ({"runnable": 6.0, "processor_s": 1.3}, "6.0 processes want the 2 cores"),
        ({"padding_share": 0.3}, "30 % of what is computed is padding, 0 % then"),
        ({"tokens": 900.0}, "smaller micro-batches: 900 tokens, 2,000 then"),
        ({"processor_s": 1.5}, "the cores are slower"),
    ],
)
def test_throughput_that_has_fallen_is_told_with_its_cause(change, cause):
    line = judge_decline(BEST, replace(BEST, step=80, tokens_per_s=700.0, **change))
    assert "700 tokens/s, 30 % below the 1,000 up to step 40" in line
    assert cause in line.partition("Likeliest cause: ")[2]


def test_throughput_that_has_not_fallen_is_not_told():
    assert judge_decline(BEST, replace(BEST, tokens_per_s=860.0)) is None


def test_throughput_is_held_to_the_run_s_own_best_and_no_flood_comes_of_it():
    def told(rates, step_s=4.0):
        own = OwnBest()
        lines = [(step, own.took(replace(BEST, step=step, tokens_per_s=rate), step_s)) for step, rate in enumerate(rates, 1)]
        return [(step, line.partition(". ")[0]) for step, line in lines if line]

    assert told([100.0, 104.0, 96.0, 10.0] * 20) == [], "single slow steps"
    assert told([50.0] * 20 + [100.0] * 20 + [70.0] * 60) == [(60, "throughput: 70 tokens/s, 30 % below the 100 up to step 40")]
    assert len(told(([100.0] * 20 + [50.0] * 20) * 8)) == 3
    assert told([100.0] * 60 + [10.0] * 14 + [100.0] * 46, step_s=1.0) == [], "over in less than a minute"
    assert told([10.0] * 60 + [100.0] * 60, step_s=1.0) == [], "a slow start"


def test_a_window_is_its_median_so_one_slow_step_says_nothing():
    steps = [replace(BEST, step=step, tokens_per_s=rate) for step, rate in enumerate((990.0, 1.0, 1000.0, 1010.0, 3000.0))]
    assert middle(steps) == replace(BEST, step=4)
