"""Examples longer than the limit: refused with counts, truncated from the prompt's left, or dropped."""

from __future__ import annotations

import pytest

from pipeline.job.errors import JobError
from pipeline.tasks.example import Example, Sequence
from pipeline.tasks.tokens import fit


def make(*shapes):
    """Sequences of (prompt tokens, target tokens) with tokens that tell their place."""
    sequences = [Sequence(tuple(range(100 * n, 100 * n + p + t)), p) for n, (p, t) in enumerate(shapes)]
    return [Example(f"p{n}", f"c{n}", f"own.jsonl:{n + 1}") for n in range(len(shapes))], sequences


@pytest.mark.parametrize("rule", ["refuse", "truncate", "drop"])
def test_what_fits_stays_as_it_is(rule):
    examples, sequences = make((3, 2), (1, 4))
    assert fit(examples, sequences, 5, rule) == (examples, sequences, 0)


def test_refusal_names_the_first_and_the_worst_and_counts_them():
    examples, sequences = make((3, 2), (4, 2), (9, 3), (1, 1), (5, 2))
    with pytest.raises(JobError) as caught:
        fit(examples, sequences, 5, "refuse")
    message = str(caught.value)
    assert message.startswith("own.jsonl:2: 6 tokens, more than the 5 that fit")
    assert "3 of 5 examples are too long, the longest 12 (own.jsonl:3)" in message
    assert '"truncate" or "drop"' in message


def test_truncation_keeps_the_end_of_the_prompt_and_the_whole_completion():
    examples, sequences = make((6, 3), (2, 2))
    kept, cut, count = fit(examples, sequences, 5, "truncate")
    assert (kept, count) == (examples, 1)
    assert cut == [Sequence((4, 5, 6, 7, 8), 2), sequences[1]]


def test_a_completion_that_alone_is_too_long_loses_its_end_and_keeps_a_prompt_token():
    examples, sequences = make((4, 9))
    _, (cut,), _ = fit(examples, sequences, 5, "truncate")
    assert cut == Sequence((3, 4, 5, 6, 7), 1)


@pytest.mark.parametrize("limit", range(2, 9))
@pytest.mark.parametrize("shape", [(1, 8), (8, 1), (4, 4), (7, 6)])
def test_a_truncated_example_fits_and_has_a_prompt_and_a_target(limit, shape):
    examples, sequences = make(shape)
    _, (cut,), _ = fit(examples, sequences, limit, "truncate")
    assert len(cut) == min(limit, sum(shape))
    assert cut.target_start >= 1
    assert cut.target_tokens >= 1
    boundary = sequences[0].tokens[shape[0]]
    assert cut.tokens[cut.target_start] == boundary


def test_dropping_removes_examples_and_sequences_together():
    examples, sequences = make((3, 2), (4, 2), (1, 1))
    kept, left, count = fit(examples, sequences, 5, "drop")
    assert kept == [examples[0], examples[2]]
    assert left == [sequences[0], sequences[2]]
    assert count == 1


def test_dropping_everything_is_refused():
    examples, sequences = make((4, 2), (9, 9))
    with pytest.raises(JobError, match=r"own\.jsonl:1: every example is longer than the 5 tokens"):
        fit(examples, sequences, 5, "drop")
