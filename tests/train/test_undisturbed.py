"""Scoring does not disturb training: the same losses and bytes with and without it, and DeepSpeed's trace of the step stays."""

from __future__ import annotations

import pytest

from tests.training import LORA_DROPOUT, delta_bytes, rows, train_here, write_examples, write_job

STEPS = ("train.steps=9", LORA_DROPOUT, "evaluate.max_new_tokens=4")


@pytest.fixture(scope="module")
def job(gpt2_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    job = write_job(folder, gpt2_base)
    write_examples(folder / "valid.jsonl", 6)
    job.write_text(job.read_text().replace("[train]", f'valid = "{folder / "valid.jsonl"}"\n[train]'))
    return job


def traced(ranks, job, run, overrides):
    """Trains; returns in which mode DeepSpeed's trace is at the beginning of each step, and how often it was given up meanwhile."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    from pipeline.train.step import Stepper

    given_up, modes = [], []
    invalidate, step = Coordinator._invalidate_trace, Stepper.__call__

    def counting(self):
        given_up.append(len(modes))
        invalidate(self)

    def watched(self, *arguments):
        modes.append(self._engine._offload.get_param_coordinator().is_complete_trace())
        return step(self, *arguments)

    Coordinator._invalidate_trace, Stepper.__call__ = counting, watched
    try:
        train_here(ranks, job, run, overrides)
    finally:
        Coordinator._invalidate_trace, Stepper.__call__ = invalidate, step
    return modes, given_up


@pytest.fixture(scope="module")
def alone(job, ranks2, tmp_path_factory):
    run = tmp_path_factory.mktemp("alone") / "run"
    return run, ranks2.run(traced, str(job), str(run), STEPS)


@pytest.mark.parametrize("gather", ["once", "each_pass"])
def test_losses_bytes_and_trace_are_those_without_scoring(gather, alone, job, ranks2, tmp_path):
    run, without = alone
    asked = (*STEPS, "evaluate.every_steps=2", 'evaluate.best_metric="BLEU"', f'evaluate.gather="{gather}"')
    found = ranks2.run(traced, str(job), str(tmp_path / "run"), asked)
    assert rows(tmp_path / "run") == rows(run)
    name = "adapter_model.safetensors"
    assert delta_bytes(tmp_path / "run")[name] == delta_bytes(run)[name]
    # Recorded in the first step, since the rehearsal is a pass too, and followed from the second on.
    # A scoring is a pass like the forward half of a step, or without hooks.
    assert found == without == [([False] + [True] * 8, [])] * 2
