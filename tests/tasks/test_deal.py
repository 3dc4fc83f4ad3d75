"""Dealing a step's examples to ranks and micro-batches: every one once, the same number of rounds on every rank, within the limit."""

from __future__ import annotations

import random

import pytest

from pipeline.tasks.order import deal


def cost(chosen, lengths, packed):
    """What a micro-batch computes: all its tokens, and its padding where there is some."""
    sizes = [lengths[index] for index in chosen]
    return sum(sizes) if packed else len(sizes) * max(sizes, default=0)


def cases():
    rng = random.Random(0)
    for ranks in (1, 2, 3, 16):
        for count in (1, 2, 7, 20, 64):
            lengths = [rng.choice([1, 5, 30, rng.randint(1, 100)]) for _ in range(count)]
            for limit in (100, 137, 400, 4096):
                yield lengths, ranks, limit


@pytest.mark.parametrize("packed", [True, False])
def test_every_example_is_dealt_once_and_every_rank_goes_the_same_number_of_rounds(packed):
    seen = 0
    for lengths, ranks, limit in cases():
        dealt = deal(lengths, ranks, limit, packed)
        assert sorted(index for rank in dealt for chosen in rank for index in chosen) == list(range(len(lengths)))
        assert len(dealt) == ranks
        assert len({len(rank) for rank in dealt}) == 1
        seen += 1
    assert seen == 80


@pytest.mark.parametrize("packed", [True, False])
def test_no_micro_batch_is_over_the_limit(packed):
    for lengths, ranks, limit in cases():
        dealt = deal(lengths, ranks, limit, packed)
        assert max(cost(chosen, lengths, packed) for rank in dealt for chosen in rank) <= limit


def test_twenty_examples_on_sixteen_ranks_leave_none_with_more_than_two():
    dealt = deal([10] * 20, 16, 100, True)
    assert sorted(sum(map(len, rank)) for rank in dealt) == [1] * 12 + [2] * 4


def test_one_example_on_three_ranks_leaves_two_with_an_empty_micro_batch():
    assert sorted(deal([10], 3, 100, True)) == [[[]], [[]], [[0]]]


def test_what_fits_at_once_is_dealt_in_one_round():
    assert [len(rank) for rank in deal([10, 20, 30, 40], 2, 50, True)] == [1, 1]
    assert [len(rank) for rank in deal([10, 20, 30, 41], 2, 50, True)] == [2, 2]


def test_padding_counts_against_the_limit():
    lengths = [50, 1, 1, 1]
    assert len(deal(lengths, 1, 53, True)[0]) == 1
    assert len(deal(lengths, 1, 53, False)[0]) > 1


@pytest.mark.parametrize("packed", [True, False])
def test_one_example_over_the_limit_does_not_scatter_the_others(packed):
    lengths = [500] + [10] * 400
    dealt = deal(lengths, 2, 100, packed)
    assert sorted(index for rank in dealt for chosen in rank for index in chosen) == list(range(401))
    assert len(dealt[0]) <= 8
    assert max(cost(chosen, lengths, packed) for rank in dealt for chosen in rank) == 500


def test_ranks_carry_nearly_the_same_load():
    lengths = [random.Random(1).randint(1, 60) for _ in range(64)]
    loads = [sum(lengths[index] for chosen in rank for index in chosen) for rank in deal(lengths, 4, 4096, True)]
    # Any list schedule stays within the mean plus one item; longest first does far better.
    assert max(loads) - min(loads) <= max(lengths)


def test_the_deal_is_the_same_on_every_rank():
    lengths = [random.Random(2).randint(1, 60) for _ in range(64)]
    assert deal(lengths, 3, 200, True) == deal(list(lengths), 3, 200, True)
