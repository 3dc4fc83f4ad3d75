"""The course: how many steps a job makes, and which examples each has; from the beginning or going on from anywhere."""

from __future__ import annotations

import pytest

from pipeline.job.errors import JobError
from pipeline.job.spec import Train
from pipeline.tasks.order import Stream
from pipeline.train.loop import Course
from pipeline.weights.state import Progress
from tests.tasks.making import Listed, learnt_from


def course(examples, batch=8, start=(0, 0), **train):
    step, position = start
    return Course(
        Listed([learnt_from((1, 2), 1)] * examples, [f"file:{n}" for n in range(examples)]),
        Stream((examples,), 1),
        Train(batch_examples=batch, **train),
        Progress(step=step, position_examples=position),
    )


def stream(made):
    return [index for step in range(made.start.step, made.steps) for index in made.examples(step)]


@pytest.mark.parametrize(("examples", "batch", "epochs"), [(20, 8, 3.0), (20, 20, 2.0), (7, 16, 5.0), (1, 3, 2.0), (13, 1, 1.0)])
def test_every_epoch_has_every_example_once(examples, batch, epochs):
    taken = stream(course(examples, batch, epochs=epochs))
    assert len(taken) == examples * epochs
    for epoch in range(int(epochs)):
        assert sorted(taken[epoch * examples : (epoch + 1) * examples]) == list(range(examples))


def test_epochs_run_into_one_another_so_that_only_the_last_step_is_smaller():
    made = course(20, 8, epochs=3.0)
    assert [len(made.examples(step)) for step in range(made.steps)] == [8] * 7 + [4]


def test_a_training_by_steps_goes_round_as_often_as_needed():
    taken = stream(course(5, 4, steps=10))
    assert len(taken) == 40
    assert all(sorted(taken[start : start + 5]) == list(range(5)) for start in range(0, 40, 5))


def test_e2e_has_the_papers_number_of_steps():
    # 42,061 examples, batches of 8, 5 epochs (Hu et al. 2021, table 11; the authors' published log ends at step 26,289).
    made = course(42_061, epochs=5.0)
    assert made.steps == 26_289
    assert len(made.examples(26_288)) == 42_061 * 5 - 26_288 * 8


def test_the_default_is_one_epoch():
    assert course(20).steps == 3


@pytest.mark.parametrize("length", [{"epochs": 3.0}, {"steps": 9}])
def test_going_on_anywhere_takes_the_same_examples(length):
    whole = course(20, **length)
    for step in range(whole.steps + 1):
        later = course(20, start=(step, min(step * 8, whole.end or step * 8)), **length)
        assert later.steps == whole.steps
        assert [later.examples(s) for s in range(step, later.steps)] == [whole.examples(s) for s in range(step, whole.steps)]


def test_more_epochs_after_a_smaller_last_step_skip_and_repeat_nothing():
    first = course(20, epochs=1.0)
    assert first.steps == 3
    more = course(20, epochs=2.0, start=(3, 20))
    assert more.steps == 6
    taken = stream(first) + stream(more)
    assert sorted(taken[:20]) == sorted(taken[20:]) == list(range(20))


def test_a_shorter_training_than_was_done_is_refused():
    with pytest.raises(JobError, match=r"train.steps = 2: makes 2 steps, and the run has taken 3. Set it higher"):
        course(20, steps=2, start=(3, 24)).refuse_impossible()
    with pytest.raises(JobError, match=r"train.epochs = 0.5"):
        course(20, epochs=0.5, start=(3, 24)).refuse_impossible()
    course(20, epochs=1.0, start=(3, 20)).refuse_impossible()
