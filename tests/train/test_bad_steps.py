"""Steps whose loss is not finite change nothing, are counted, and end the run when they do not end themselves."""

from __future__ import annotations

import json
import re

import pytest

from pipeline.job.errors import Diverged
from pipeline.tasks.order import Stream
from tests.training import read_run, train_here


@pytest.fixture(scope="module")
def job(long_job):
    return long_job


def train_with_poison(ranks, job, run, overrides, poisoned):
    """The named examples have a loss that is not a number."""
    from pipeline.model.causal import Causal
    from pipeline.train import loop

    collate, forward, bad = loop.collate, Causal.forward, []

    def collated(sequences, ids, *others):
        batch = collate(sequences, ids, *others)
        if sequences and set(ids) & set(poisoned):
            bad.append(batch)
        return batch

    def poisoning(self, batch=None, **named):
        loss, plain = forward(self, batch=batch, **named)
        return (loss * float("nan") if any(batch is other for other in bad) else loss), plain

    loop.collate, Causal.forward = collated, poisoning
    try:
        train_here(ranks, job, run, overrides)
    except Diverged as error:
        return str(error)
    finally:
        loop.collate, Causal.forward = collate, forward
    return ""


def test_a_loss_that_is_not_finite_several_times_in_a_row_ends_the_run_and_names_the_examples(job, ranks2, tmp_path):
    settings = (
        "train.steps=12",
        "train.batch_examples=4",
        "train.save_every_steps=1",
        "train.stop_after_bad_steps=2",
        "train.keep_states=20",
    )
    examples = Stream((24,), 1).examples(12, 8)  # of the fourth and the fifth step
    poisoned = [examples[0], examples[5]]
    said, other = ranks2.run(train_with_poison, str(job), str(tmp_path / "run"), settings, poisoned)
    assert said == other
    assert "step 5: the loss is nan; so it was first in step 4 (" in said
    assert "--accept-changes" in said
    named = {int(number) - 1 for number in re.findall(r"train\.jsonl:(\d+)", said)}
    assert poisoned[0] in named
    assert named < set(examples[:4]), "the rank whose loss is good is not suspected"
    assert max(p.name for p in (tmp_path / "run" / "state").iterdir()) == "step-00000003", "the state before it is the newest"


def test_steps_since_the_last_save_are_not_lost_to_bad_ones(job, ranks2, tmp_path):
    settings = ("train.steps=12", "train.batch_examples=4", "train.save_every_steps=5", "train.stop_after_bad_steps=2")
    said = ranks2.run(train_with_poison, str(job), str(tmp_path / "run"), settings, Stream((24,), 1).examples(12, 8))[0]
    assert "step 5: the loss is nan" in said
    assert [p.name for p in (tmp_path / "run" / "state").iterdir()] == ["step-00000003"]
    assert json.loads((tmp_path / "run" / "delta" / "manifest.json").read_text())["step"] == 3


def test_a_bad_last_step_is_a_result_too(job, ranks2, tmp_path):
    settings = ("train.steps=4", "train.batch_examples=4")
    ranks2.run(train_with_poison, str(job), str(tmp_path / "run"), settings, Stream((24,), 1).examples(12, 4))
    assert '"loss": null' in (tmp_path / "run" / "result.json").read_text()
    (tmp_path / "run" / "result.json").unlink()
    shown = ranks2.run(train_here, str(job), str(tmp_path / "run"), settings)[0]
    assert "not finite at the last step" in shown


def test_single_bad_steps_are_skipped_and_counted(job, ranks2, tmp_path):
    settings = ("train.steps=6", "train.batch_examples=4", "train.save_every_steps=1")
    ranks2.run(train_with_poison, str(job), str(tmp_path / "run"), settings, Stream((24,), 1).examples(8, 1))
    steps = read_run(tmp_path / "run").steps
    assert [row["skipped_steps"] for row in steps] == [0, 0, 1, 1, 1, 1]
    assert [row["loss"] is None for row in steps] == [False, False, True, False, False, False]
    record = json.loads((tmp_path / "run" / "state" / "step-00000006" / "state.json").read_text())
    assert (record["progress"]["optimizer_steps"], record["progress"]["skipped_steps"]) == (5, 1)
