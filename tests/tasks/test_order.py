"""The order of examples: a pure function of (seed, epoch, position), for one source or several with weights."""

from __future__ import annotations

from collections import Counter

import pytest

from pipeline.tasks.order import Stream, permutation


def test_a_part_of_the_stream_is_the_same_whatever_was_asked_before():
    stream = Stream((50,), 3)
    forward = [stream.examples(first, 7) for first in range(0, 210, 7)]
    backward = [stream.examples(first, 7) for first in reversed(range(0, 210, 7))][::-1]
    assert forward == backward
    assert forward[20] == [permutation(50, "3", position // 50)[position % 50] for position in range(140, 147)]


@pytest.mark.parametrize(("examples", "epochs"), [(20, 3), (7, 5), (1, 2), (13, 1)])
def test_every_epoch_has_every_example_once(examples, epochs):
    for epoch in range(epochs):
        assert sorted(Stream((examples,), 1).examples(epoch * examples, examples)) == list(range(examples))


def test_epochs_and_seeds_have_different_orders():
    orders = {tuple(Stream((40,), seed).examples(epoch * 40, 40)) for epoch in range(3) for seed in range(3)}
    assert len(orders) == 9
    assert tuple(range(40)) not in orders


def test_the_largest_seed_works():
    assert sorted(Stream((5,), 2**32 - 1).examples(0, 5)) == [0, 1, 2, 3, 4]


def test_part_of_an_epoch_is_never_nothing():
    assert [Stream((100,), 1).end(epochs) for epochs in (0.5, 1.25, 0.001)] == [50, 125, 1]


def test_sources_of_weight_one_are_as_one_source():
    together, parts = Stream((10,), 4), Stream((3, 7), 4, (1.0, 1.0))
    assert parts.examples(0, 30) == together.examples(0, 30)


def test_a_weight_says_how_often_a_sources_examples_come_in_an_epoch():
    stream = Stream((10, 4, 6), 4, (1.0, 3.0, 0.5))
    assert stream.epoch == 10 + 12 + 3
    first, second = (Counter(stream.examples(epoch * 25, 25)) for epoch in range(2))
    assert all(first[index] == 1 for index in range(10))
    assert all(first[index] == 3 for index in range(10, 14))
    # The halves of the last source take turns.
    halves = [{index for index in taken if index >= 14} for taken in (first, second)]
    assert [len(half) for half in halves] == [3, 3]
    assert halves[0] | halves[1] == set(range(14, 20))


def test_weighted_sources_are_shuffled_together():
    stream = Stream((100, 100), 1, (1.0, 2.0))
    quarters = [sum(index >= 100 for index in stream.examples(first, 75)) for first in range(0, 300, 75)]
    assert all(35 <= count <= 65 for count in quarters), quarters


def test_however_many_sources_each_order_is_drawn_once(monkeypatch):
    from pipeline.tasks import order

    drawn = []
    monkeypatch.setattr(order, "permutation", lambda *asked: drawn.append(asked) or permutation(*asked))
    stream = Stream((50,) * 9, 1, (2.5, 0.3, 1.5, 0.7, 3.0, 1.0, 0.2, 1.2, 2.0))
    stream.examples(0, 2 * stream.epoch)
    assert len(drawn) == len(set(drawn)) > 20
