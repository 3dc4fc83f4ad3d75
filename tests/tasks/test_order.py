"""The order of examples: a pure function of (seed, epoch, position)."""

from __future__ import annotations

import pytest

from pipeline.tasks.order import example_at, stream_end, stream_examples


def test_a_part_of_the_stream_is_the_same_whatever_was_asked_before():
    forward = [stream_examples(first, 7, 50, 3) for first in range(0, 210, 7)]
    backward = [stream_examples(first, 7, 50, 3) for first in reversed(range(0, 210, 7))][::-1]
    assert forward == backward
    assert forward[20] == [example_at(position, 50, 3) for position in range(140, 147)]


@pytest.mark.parametrize(("examples", "epochs"), [(20, 3), (7, 5), (1, 2), (13, 1)])
def test_every_epoch_has_every_example_once(examples, epochs):
    for epoch in range(epochs):
        assert sorted(stream_examples(epoch * examples, examples, examples, 1)) == list(range(examples))


def test_epochs_and_seeds_have_different_orders():
    orders = {tuple(stream_examples(epoch * 40, 40, 40, seed)) for epoch in range(3) for seed in range(3)}
    assert len(orders) == 9
    assert tuple(range(40)) not in orders


def test_the_largest_seed_works():
    assert sorted(stream_examples(0, 5, 5, 2**32 - 1)) == [0, 1, 2, 3, 4]


def test_part_of_an_epoch_is_never_nothing():
    assert [stream_end(100, epochs) for epochs in (0.5, 1.25, 0.001)] == [50, 125, 1]
