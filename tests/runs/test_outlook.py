"""An ordinary run says nothing of the plan; one whose memory leaves it says so, wherever it is looked for."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.plan_rank import views_of
from pipeline.runs import outlook
from pipeline.tasks.batch import alike
from tests.ranks import Ranks
from tests.training import train_here, write_job

COURSE = ("train.steps=14", "train.save_every_steps=4")
LEAK = 700 << 20


def with_leaks(ranks, job, run, leaks, overrides):
    """At some steps the first rank takes so much beside training, and keeps it."""
    from pipeline.train import step as steps

    real, kept = steps.Stepper.__call__, []

    def leaking(self, number, *arguments):
        if number + 1 in leaks and ranks.first:
            kept.append(np.ones(LEAK, dtype=np.uint8))
        return real(self, number, *arguments)

    steps.Stepper.__call__ = leaking
    try:
        return train_here(ranks, job, run, overrides)
    finally:
        steps.Stepper.__call__ = real


def warnings(run):
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["warning"]) for row in rows if "warning" in row]


@pytest.fixture(scope="module")
def job(gpt2_base, tmp_path_factory):
    return write_job(tmp_path_factory.mktemp("outlook"), gpt2_base)


def test_an_ordinary_run_says_nothing(job, ranks2, tmp_path):
    shown, _ = ranks2.run(train_here, str(job), str(tmp_path / "run"), COURSE)
    assert warnings(tmp_path / "run") == []
    assert "Likeliest" not in shown


def test_memory_that_the_plan_does_not_know_of_is_told_once(job, tmp_path):
    """At the first look, and when it has grown again; by ranks of their own, whose peak nothing before has raised."""
    ranks, run = Ranks(1), tmp_path / "run"
    try:
        (shown,) = ranks.run(with_leaks, str(job), str(run), (3, 12), COURSE)
    finally:
        ranks.stop()
    told = warnings(run)
    assert [step for step, _ in told] == [10, 12]
    for count, (step, line) in enumerate(told, 1):
        size, unit = line.removeprefix("memory: ").split()[:2]
        assert float(size) * {"MiB": 1, "GiB": 1024}[unit] > count * LEAK / 2**20
        # The pool's ranks are started without what `zlora train` sets.
        assert "MALLOC_MMAP_THRESHOLD_" in line
        assert f"step {step}: {line}" in " ".join(shown.split())
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    texts = events.Tensors("run/warnings/text_summary")
    assert [(text.step, text.tensor_proto.string_val[0].decode()) for text in texts] == told


def test_micro_batches_are_counted_as_the_plan_s_measurement_counts_them():
    lengths = [37, 300, 200, 36, 12, 150, 149]
    assert [[lengths[i] for i in group] for group in alike(lengths)] == views_of(lengths)
    batch = outlook._batch(lengths, 40, packed=True)
    assert (batch.tokens, batch.padded_tokens, batch.label_tokens) == (sum(lengths), 300 * 3 + 149 + 37 * 2 + 12, 40)
    padded = outlook._batch(lengths, 40, packed=False)
    assert (padded.tokens, padded.padded_tokens, padded.pairs) == (2100, 2100, 7 * 300**2)
