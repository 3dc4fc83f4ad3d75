"""The order of examples: a pure function of (seed, epoch, position), each epoch a permutation, nothing twice or skipped."""

from __future__ import annotations

import pytest

from pipeline.tasks.order import example_at, step_examples, total_steps


def whole_training(examples, batch, epochs, seed=1):
    steps = total_steps(examples, batch, epochs, None)
    return [step_examples(step, batch, examples, seed, epochs) for step in range(steps)]


def test_a_step_is_the_same_whatever_was_asked_before():
    forward = [step_examples(step, 7, 50, 3, None) for step in range(30)]
    backward = [step_examples(step, 7, 50, 3, None) for step in reversed(range(30))][::-1]
    assert forward == backward
    assert forward[20] == [example_at(position, 50, 3) for position in range(140, 147)]


@pytest.mark.parametrize(("examples", "batch", "epochs"), [(20, 8, 3), (20, 20, 2), (7, 16, 5), (1, 3, 2), (13, 1, 1)])
def test_every_epoch_has_every_example_once(examples, batch, epochs):
    stream = [index for step in whole_training(examples, batch, epochs) for index in step]
    assert len(stream) == examples * epochs
    for epoch in range(epochs):
        assert sorted(stream[epoch * examples : (epoch + 1) * examples]) == list(range(examples))


def test_epochs_run_into_one_another_so_that_only_the_last_step_is_smaller():
    sizes = [len(step) for step in whole_training(20, 8, 3)]
    assert sizes == [8] * 7 + [4]


def test_epochs_and_seeds_have_different_orders():
    orders = {tuple(example_at(epoch * 40 + place, 40, seed) for place in range(40)) for epoch in range(3) for seed in range(3)}
    assert len(orders) == 9
    assert tuple(range(40)) not in orders


def test_the_largest_seed_works():
    assert sorted(step_examples(0, 5, 5, 2**32 - 1, None)) == [0, 1, 2, 3, 4]


def test_a_training_by_steps_goes_round_as_often_as_needed():
    stream = [index for step in range(total_steps(5, 4, None, 10)) for index in step_examples(step, 4, 5, 1, None)]
    assert len(stream) == 40
    assert all(sorted(stream[start : start + 5]) == list(range(5)) for start in range(0, 40, 5))


def test_e2e_has_the_papers_number_of_steps():
    # 42,061 examples, batches of 8, 5 epochs (Hu et al. 2021, table 11; the authors' published log ends at step 26,289).
    assert total_steps(42_061, 8, 5.0, None) == 26_289
    assert len(step_examples(26_288, 8, 42_061, 1, 5.0)) == 42_061 * 5 - 26_288 * 8


def test_part_of_an_epoch_is_trained_and_never_nothing():
    assert sum(map(len, whole_training(100, 8, 0.5))) == 50
    assert sum(map(len, whole_training(100, 8, 1.25))) == 125
    assert sum(map(len, whole_training(100, 8, 0.001))) == 1


def test_the_default_is_one_epoch():
    assert total_steps(20, 8, None, None) == 3
