"""What a save moves, holds up and contains."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training import LONG, delta_bytes, train_here, train_until, trained


@pytest.fixture(scope="module")
def job(long_job):
    return long_job


def counted(ranks, job):
    """Elements through collectives while a state is taken, and while it is put back."""
    import io

    import torch.distributed as dist

    from pipeline.job.read import read_job
    from pipeline.runs.session import open_session
    from pipeline.screen import Screen
    from pipeline.train.step import Stepper
    from pipeline.weights.state import Progress
    from tests.train.test_memory import COLLECTIVES

    asked = read_job(Path(job))
    session = open_session(asked, ranks, Screen(io.StringIO(), shown=False))
    stepper = Stepper(session.engine, session.root, session.delta, asked.train, ranks, fp16=False)
    moved = []
    kept = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name):
        def call(*arguments, **named):
            moved.append((name, sum(a.numel() for a in arguments if isinstance(a, torch.Tensor))))
            return kept[name](*arguments, **named)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counting(name))
    try:
        tensors = stepper.capture()
        taking = list(moved)
        moved.clear()
        stepper.restore(tensors if ranks.first else None, Progress())
        return taking, moved, sum(t.numel() for t in tensors.values()), session.delta.parameters
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)


def test_only_trained_elements_are_moved(job, ranks2):
    for rank, (taking, putting, copied, trained_elements) in enumerate(ranks2.run(counted, str(job))):
        assert taking == []
        assert copied == (0 if rank else 3 * trained_elements)
        assert putting == [("broadcast", trained_elements)] * 3


def slow_writer(ranks, job, run, overrides):
    """Trains while the first state's write waits for the fourth step; returns steps seen done before it was over, in order."""
    from pipeline.runs import writer

    real, reached, order = writer.write_state, threading.Event(), []

    def write_state(folder, state, keep):
        if state.record.progress.step == 2:
            assert reached.wait(60), "training did not go on during the write"
        order.append(("written", state.record.progress.step))
        return real(folder, state, keep)

    took = writer.Writer.took

    def watched(self, taken):
        took(self, taken)
        order.append(("step", taken.progress.step))
        if taken.progress.step == 4:
            reached.set()

    writer.write_state, writer.Writer.took = write_state, watched
    try:
        train_here(ranks, job, run, overrides)
    finally:
        writer.write_state, writer.Writer.took = real, took
    return order


def test_files_are_written_behind_training_from_what_was_at_the_step(job, ranks2, tmp_path):
    settings = ("train.steps=6", "train.save_every_steps=2", "train.keep_states=9")
    # The write of step 2 can only end when step 4 is done, and the save of step 4 waits for it.
    order = ranks2.run(slow_writer, str(job), str(tmp_path / "run"), settings)[0]
    assert order.index(("step", 3)) < order.index(("written", 2)) < order.index(("written", 4))
    trained(ranks2, job, tmp_path / "whole", *settings)
    for step in (2, 4, 6):
        ours, theirs = (load_file(tmp_path / name / "state" / f"step-{step:08d}" / "tensors.safetensors") for name in ("run", "whole"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    stalls = [row for row in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) if "save_stall_s" in row]
    assert [row["step"] for row in stalls] == [2, 4, 6]
    assert all(row["save_stall_s"] >= row["save_waited_s"] for row in stalls)


def test_the_state_says_what_resuming_needs(whole):
    record = json.loads((whole / "state" / "step-00000010" / "state.json").read_text())
    assert record["progress"] | {"seconds": 0} == {
        "step": 10, "position_examples": 60, "optimizer_steps": 10, "skipped_steps": 0, "loss_scale": None, "good_steps": 10,
        "bad_steps": 0, "seconds": 0,
    }  # fmt: skip
    assert (record["seed"], record["ranks"], record["total_steps"]) == (1, 2, 12)
    assert record["job"]["train"]["schedule"] == "linear"
    assert [file["examples"] for file in record["data"]] == [24]
    manifest = json.loads((whole / "delta" / "manifest.json").read_text())
    assert record["base_digest"] == manifest["base_digest"]
    tensors = load_file(whole / "state" / "step-00000010" / "tensors.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert sum(t.numel() for t in tensors.values()) == 3 * manifest["parameters"]


def hashing_slowly(ranks, job, run, overrides, stop_at):
    """The base is not hashed before training is over."""
    from pipeline.runs import session

    real, hashed = session.file_digests, threading.Event()

    def file_digests(files):
        assert hashed.wait(60)
        return real(files)

    session.file_digests = file_digests
    try:
        if stop_at:
            return train_until(ranks, job, run, overrides, stop_at)
        threading.Timer(3.0, hashed.set).start()
        return train_here(ranks, job, run, overrides)
    finally:
        hashed.set()
        session.file_digests = real


def test_no_state_waits_for_the_base_to_be_hashed(job, whole, ranks2, tmp_path):
    run = tmp_path / "run"
    ranks2.run(hashing_slowly, str(job), str(run), LONG, 8)
    assert sorted(p.name for p in (run / "state").iterdir()) == ["step-00000005", "step-00000008"]
    assert not (run / "delta").exists(), "a delta says which base it belongs to"
    ranks2.run(hashing_slowly, str(job), str(run), LONG, None)
    assert delta_bytes(run) == delta_bytes(whole)
    assert json.loads((run / "state" / "step-00000012" / "state.json").read_text())["base_digest"] is None
