"""Examples longer than the limit: refused with counts, truncated, or dropped."""

from __future__ import annotations

import pytest

from pipeline.job.errors import JobError
from pipeline.tasks.example import Sequence
from pipeline.tasks.sequences import Joined, fit
from tests.tasks.making import Listed, learnt_from, start_of


def make(*shapes):
    """Sequences of (prompt tokens, target tokens) with tokens that tell their place."""
    sequences = [learnt_from(range(100 * n, 100 * n + p + t), p) for n, (p, t) in enumerate(shapes)]
    return Listed(sequences, [f"own.jsonl:{n + 1}" for n in range(len(shapes))])


def all_of(data):
    """What is said of each sequence without its tokens is true of its tokens."""
    sequences = [data[index] for index in range(len(data))]
    assert [data.tokens(index) for index in range(len(data))] == [len(s) for s in sequences]
    assert [data.targets(index) for index in range(len(data))] == [s.targets for s in sequences]
    assert data.lengths().tolist() == [len(s) for s in sequences]
    assert data.longest == max(map(len, sequences))
    return sequences


@pytest.mark.parametrize("rule", ["refuse", "truncate", "drop"])
def test_what_fits_stays_as_it_is(rule):
    data = make((3, 2), (1, 4))
    assert fit(data, 5, rule) == (data, 0)


def test_refusal_names_the_first_and_the_worst_and_counts_them():
    with pytest.raises(JobError) as caught:
        fit(make((3, 2), (4, 2), (9, 3), (1, 1), (5, 2)), 5, "refuse")
    message = str(caught.value)
    assert message.startswith("own.jsonl:2: 6 tokens, more than the 5 that fit")
    assert "3 of 5 examples are too long, the longest 12 (own.jsonl:3)" in message
    assert '"truncate" or "drop"' in message


def test_truncation_keeps_the_end_of_the_prompt_and_the_whole_completion():
    data = make((6, 3), (2, 2))
    cut, count = fit(data, 5, "truncate")
    assert count == 1
    assert all_of(cut) == [learnt_from((4, 5, 6, 7, 8), 2), data[1]]
    assert [cut.source(index) for index in range(2)] == ["own.jsonl:1", "own.jsonl:2"]


def test_a_completion_that_alone_is_too_long_loses_its_end_and_keeps_a_prompt_token():
    cut, _ = fit(make((4, 9)), 5, "truncate")
    assert all_of(cut) == [learnt_from((3, 4, 5, 6, 7), 1)]


@pytest.mark.parametrize("limit", range(2, 9))
@pytest.mark.parametrize("shape", [(1, 8), (8, 1), (4, 4), (7, 6)])
def test_a_truncated_example_fits_and_has_a_prompt_and_a_target(limit, shape):
    data = make(shape)
    (cut,) = all_of(fit(data, limit, "truncate")[0])
    assert len(cut) == min(limit, sum(shape))
    assert start_of(cut) >= 1
    assert cut.targets >= 1
    assert cut.tokens[start_of(cut)] == data[0].tokens[shape[0]]


def test_a_conversation_loses_its_beginning_and_keeps_its_last_answer():
    turns = Listed([Sequence(tuple(range(12)), ((2, 5), (9, 12)))], ["chat.jsonl:1"])
    assert all_of(fit(turns, 9, "truncate")[0]) == [Sequence(tuple(range(3, 12)), ((1, 2), (6, 9)))]
    assert all_of(fit(turns, 6, "truncate")[0]) == [Sequence(tuple(range(6, 12)), ((3, 6),))]


@pytest.mark.parametrize("label", [1.0, None])
def test_a_text_with_a_label_loses_its_end(label):
    texts = Listed([Sequence(tuple(range(8)), (), label)], ["texts.csv:2"])
    assert all_of(fit(texts, 5, "truncate")[0]) == [Sequence((0, 1, 2, 3, 4), (), label)]


def test_dropping_removes_an_example_and_its_source():
    data = make((3, 2), (4, 2), (1, 1))
    left, count = fit(data, 5, "drop")
    assert all_of(left) == [data[0], data[2]]
    assert [left.source(index) for index in range(2)] == ["own.jsonl:1", "own.jsonl:3"]
    assert count == 1


def test_dropping_everything_is_refused():
    with pytest.raises(JobError, match=r"own\.jsonl:1: every example is longer than the 5 tokens"):
        fit(make((4, 2), (9, 9)), 5, "drop")


def test_several_sources_lie_one_behind_the_other():
    one, two = make((3, 2), (4, 2)), make((1, 1), (2, 6), (1, 3))
    joined = Joined([one, two])
    assert all_of(joined) == [*one.sequences, *two.sequences]
    assert [joined.source(index) for index in range(5)] == [*one.sources, *two.sources]
