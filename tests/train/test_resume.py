"""A run that was stopped goes on as if it had not been: the same losses and bytes on the same ranks, to rounding on others."""

from __future__ import annotations

import json
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.job.errors import Diverged
from pipeline.tasks.order import stream_examples
from pipeline.weights.state import State, newest_state, write_state
from tests.bases import make_gpt2
from tests.training import read_run, train_here, train_until, trained, write_examples, write_job

TIMES = {"target_tokens_per_s", "examples_per_s", "step_s", "seconds", "peak_memory_bytes"}
LORA_DROPOUT = "methods.0.dropout=0.2"
LONG = ("train.steps=12", LORA_DROPOUT, "train.warmup_steps=3", "train.save_every_steps=5")


@pytest.fixture(scope="module")
def job(gpt2_base, tmp_path_factory):
    return write_job(tmp_path_factory.mktemp("resume"), gpt2_base)


@pytest.fixture(scope="module")
def whole(job, ranks2, tmp_path_factory):
    """Uninterrupted, on two ranks."""
    run = tmp_path_factory.mktemp("whole") / "run"
    trained(ranks2, job, run, *LONG)
    return run


def rows(run):
    """Of steps, without what the clock says."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_run(run).steps]


def delta_bytes(run):
    return {path.name: path.read_bytes() for path in (run / "delta").iterdir()}


def stop_and_go_on(before, after, job, run, step, first=LONG, then=LONG, **options):
    before.run(train_until, str(job), str(run), first, step)
    return after.run(train_here, str(job), str(run), then)[0]


@pytest.mark.parametrize("step", [1, 4, 5, 11])
def test_on_the_same_ranks_every_bit_is_the_same(step, job, whole, ranks2, tmp_path):
    stop_and_go_on(ranks2, ranks2, job, tmp_path / "run", step)
    assert rows(tmp_path / "run") == rows(whole)
    assert delta_bytes(tmp_path / "run") == delta_bytes(whole)
    last = "step-00000012/tensors.safetensors"
    assert (tmp_path / "run" / "state" / last).read_bytes() == (whole / "state" / last).read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        ("train.steps=8", "train.dropout=0.1"),
        ("train.steps=8", 'base.dtype="bf16"', "memory.gradient_checkpointing=true"),
        ("train.steps=8", 'base.dtype="fp16"', "train.weight_decay=0.1"),
        ("train.steps=8", "train.packing=false", "train.micro_batch_tokens=62", 'train.schedule="cosine"', "train.clip_norm=0"),
        ("train.batch_examples=5", "train.epochs=1.5"),
    ],
    ids=["the base's dropout", "bf16", "fp16", "padded", "epochs"],
)
def test_every_bit_is_the_same_whatever_the_settings(settings, job, ranks2, tmp_path):
    settings = (LORA_DROPOUT, *settings)
    trained(ranks2, job, tmp_path / "whole", *settings)
    stop_and_go_on(ranks2, ranks2, job, tmp_path / "run", 3, settings, settings)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert delta_bytes(tmp_path / "run") == delta_bytes(tmp_path / "whole")


def test_llama_too(llama_base, ranks2, tmp_path):
    job = write_job(tmp_path, llama_base)
    trained(ranks2, job, tmp_path / "whole", *LONG)
    stop_and_go_on(ranks2, ranks2, job, tmp_path / "run", 7)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert delta_bytes(tmp_path / "run") == delta_bytes(tmp_path / "whole")


@pytest.mark.parametrize(("before", "after"), [("ranks2", "ranks1"), ("ranks1", "ranks2"), ("ranks2", "ranks4"), ("ranks3", "ranks2")])
def test_on_other_ranks_the_trajectory_is_the_same_to_rounding(before, after, job, whole, request, tmp_path):
    shown = stop_and_go_on(request.getfixturevalue(before), request.getfixturevalue(after), job, tmp_path / "run", 5)
    close(tmp_path / "run", whole)
    assert f"ranks {before[-1]} -> {after[-1]}" in shown
    assert "after step 5" in shown


@pytest.mark.parametrize(
    "changed",
    [("train.micro_batch_tokens=62",), ("train.packing=false",), ('memory.config="zero0.json"',), ("memory.gradient_checkpointing=true",)],
    ids=["accumulation", "padded", "ZeRO 0", "checkpointing"],
)
def test_with_other_accumulation_layout_or_memory_too(changed, job, whole, ranks2, tmp_path):
    shown = stop_and_go_on(ranks2, ranks2, job, tmp_path / "run", 5, then=(*LONG, *changed))
    close(tmp_path / "run", whole)
    key = changed[0].partition("=")[0]
    assert key in shown, "an allowed change is listed"


def close(run, whole):
    ours, theirs = read_run(run), read_run(whole)
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=2e-5)
    for name, tensor in theirs.tensors.items():
        # Adam divides by the size of the gradient: where that is nearly nothing, rounding is a share of a step.
        np.testing.assert_allclose(ours.tensors[name], tensor, rtol=1e-3, atol=2e-4)


def test_with_the_bases_dropout_other_ranks_are_no_promise_and_it_says_so(job, ranks1, ranks2, tmp_path):
    settings = ("train.steps=6", "train.dropout=0.1")
    shown = stop_and_go_on(ranks2, ranks1, job, tmp_path / "run", 3, settings, settings)
    assert "other ranks draw other masks" in shown
    assert len(rows(tmp_path / "run")) == 6


def seen_examples(ranks, job, run, overrides, stop_at):
    """The ids of the examples this rank computed."""
    from pipeline.train import loop

    real, seen = loop.collate, []

    def collate(sequences, ids, *others):
        seen.extend(ids)
        return real(sequences, ids, *others)

    loop.collate = collate
    try:
        if stop_at:
            train_until(ranks, job, run, overrides, stop_at)
        else:
            train_here(ranks, job, run, overrides)
    finally:
        loop.collate = real
    return seen


def test_no_example_is_skipped_or_seen_twice_in_an_epoch(job, ranks1, ranks2, tmp_path):
    settings = ("train.epochs=3", "train.batch_examples=7")
    parts = []
    for pool, stop_at in ((ranks2, 2), (ranks1, 5), (ranks2, 9), (ranks2, None)):
        parts += [index for own in pool.run(seen_examples, str(job), str(tmp_path / "run"), settings, stop_at) for index in own]
    assert len(parts) == 72
    assert sorted(parts) == sorted(list(range(24)) * 3)


def test_more_epochs_continue_a_finished_run(job, ranks2, tmp_path):
    settings = ("train.batch_examples=7", 'train.schedule="constant"')
    shown = [ranks2.run(train_here, str(job), str(tmp_path / "run"), (*settings, f"train.epochs={epochs}"))[0] for epochs in (1, 1, 2)]
    assert "this run is finished" in shown[1]
    assert "train.epochs 1.0 -> 2.0" in shown[2]
    steps = read_run(tmp_path / "run").steps
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert [row["examples"] for row in steps] == [7, 7, 7, 3, 7, 7, 7, 3]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 8


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ("methods.0.rank=4", r"methods\[0\].rank 3 -> 4"),
        ("methods.0.alpha=24.0", r"methods\[0\].alpha 12.0 -> 24.0"),
        ('methods.0.targets=["q"]', r"methods\[0\].targets \['q', 'v'\] -> \['q'\]"),
        ("train.seed=2", "train.seed 1 -> 2"),
        ("train.batch_examples=8", "train.batch_examples 6 -> 8"),
        ('task.separator=" =>"', "task.separator  -> -> +=>"),
    ],
)
def test_another_job_is_refused_with_the_keys_that_differ(changed, key, job, whole, ranks1):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert re.search(rf"holds a run of another job: {key}\. .*--fresh", refusal(ranks1, job, whole, *LONG, changed))
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_another_course_needs_to_be_meant(job, ranks1, tmp_path):
    run, lower = tmp_path / "run", (*LONG, "train.learning_rate=0.001", "train.clip_norm=0.5")
    ranks1.run(train_until, str(job), str(run), LONG, 4)
    listed = r"train.learning_rate 0.01 -> 0.001; train.clip_norm 1.0 -> 0.5.*--accept-changes"
    assert re.search(listed, refusal(ranks1, job, run, *lower))
    shown = ranks1.run(accepting, str(job), str(run), lower)[0]
    assert "train.learning_rate 0.01 -> 0.001" in shown
    rates = [row["learning_rate"] for row in read_run(run).steps]
    assert rates[4] < rates[3] / 5


def refused(ranks, job, run, overrides):
    from pipeline.job.errors import JobError

    try:
        train_here(ranks, job, run, overrides)
    except JobError as error:
        return str(error)
    raise AssertionError("it was not refused")


def refusal(alone, job, run, *overrides):
    """What one rank alone says: with more, the others would wait for it until the launcher ends them."""
    return alone.run(refused, str(job), str(run), overrides)[0]


def accepting(ranks, job, run, overrides):
    return train_here(ranks, job, run, overrides, accept_changes=True)


def test_data_that_changed_is_refused_by_file(gpt2_base, ranks1, tmp_path):
    job = write_job(tmp_path, gpt2_base)
    ranks1.run(train_until, str(job), str(tmp_path / "run"), LONG, 4)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    file = tmp_path / "train.jsonl"
    kept = file.read_text()
    file.write_text(kept.replace("Eagle", "Mill", 1))
    said = refusal(ranks1, job, tmp_path / "run", *LONG)
    assert "train.jsonl: its examples are not those that the run began with. Put back the file" in said
    write_examples(file, 25)
    assert "began with (24 then, 25 now)" in refusal(ranks1, job, tmp_path / "run", *LONG)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    # Where it lies does not matter, nor does the time of its last change.
    file.unlink()
    (tmp_path / "moved.jsonl").write_text(kept)
    shown = ranks1.run(train_here, str(job), str(tmp_path / "run"), (*LONG, f'task.data="{tmp_path / "moved.jsonl"}"'))[0]
    assert "task.data" in shown


def test_another_base_is_refused_by_its_digest_not_its_place(gpt2_base, ranks1, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(gpt2_base, base)
    job = write_job(tmp_path, base)
    ranks1.run(train_until, str(job), str(tmp_path / "run"), LONG, 4)
    shutil.rmtree(base)
    make_gpt2(base, seed=9)
    before = sorted((tmp_path / "run" / "state").iterdir())
    assert "base: is another base than the run's" in refusal(ranks1, job, tmp_path / "run", *LONG)
    assert sorted((tmp_path / "run" / "state").iterdir()) == before
    ranks1.run(train_here, str(job), str(tmp_path / "run"), (*LONG, f'base.model="{gpt2_base}"'))


@pytest.mark.parametrize(("key", "value"), [("n_head", 2), ("layer_norm_epsilon", 0.1)])
def test_a_base_with_another_configuration_is_refused(key, value, gpt2_base, ranks1, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(gpt2_base, base)
    job = write_job(tmp_path, base)
    ranks1.run(train_until, str(job), str(tmp_path / "run"), LONG, 4)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, key: value}))
    assert "base: its config.json is not the one that the run began with" in refusal(ranks1, job, tmp_path / "run", *LONG)


@pytest.mark.parametrize("damage", ["byte", "manifest", "all"])
def test_a_damaged_delta_of_a_finished_run_is_written_again_from_the_state(damage, job, whole, ranks2, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    match damage:
        case "byte":
            content = bytearray((run / "delta" / "adapter_model.safetensors").read_bytes())
            content[-7] ^= 1
            (run / "delta" / "adapter_model.safetensors").write_bytes(content)
        case "manifest":
            (run / "delta" / "manifest.json").unlink()
        case _:
            shutil.rmtree(run / "delta")
    ranks2.run(train_here, str(job), str(run), LONG)
    assert delta_bytes(run) == delta_bytes(whole)
    assert rows(run) == rows(whole)


def test_the_job_of_another_version_is_one_line(job, whole, ranks1, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    state = newest_state(run / "state", print)
    changed = state.record.model_copy(update={"job": {**state.record.job, "of_tomorrow": {}}})
    write_state(run / "state", State(changed, state.tensors), keep=2)
    assert "state: its job has a of_tomorrow that this version of zlora does not know" in refusal(ranks1, job, run, *LONG)


def hashing_slowly(ranks, job, run, overrides, stop_at):
    """The base is not hashed before training is over."""
    from pipeline import session

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


def test_a_damaged_state_is_passed_over_and_the_end_is_the_same(job, whole, ranks2, tmp_path):
    run = tmp_path / "run"
    ranks2.run(train_until, str(job), str(run), LONG, 8)
    newest = run / "state" / "step-00000008" / "tensors.safetensors"
    content = bytearray(newest.read_bytes())
    content[1000] ^= 4
    newest.write_bytes(content)
    shown = ranks2.run(train_here, str(job), str(run), LONG)[0]
    assert "step-00000008/tensors.safetensors: its sha256 is not the one in SHA256SUMS" in shown
    assert "after step 5" in shown
    assert rows(run) == rows(whole)
    assert delta_bytes(run) == delta_bytes(whole)
    assert sorted(p.name for p in (run / "state").iterdir()) == ["damaged-step-00000008", "step-00000010", "step-00000012"]


def test_metrics_and_tensorboard_have_every_step_once(job, ranks2, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    ranks2.run(train_until, str(job), str(run), LONG, 8)
    # Killed after more steps, in the middle of a row, and with the state of step 8 gone.
    shutil.rmtree(run / "state" / "step-00000008")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    ranks2.run(train_here, str(job), str(run), LONG)
    assert [row["step"] for row in read_run(run).steps] == list(range(1, 13))
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 13))


def counted(ranks, job):
    """Elements through collectives while a state is taken, and while it is put back."""
    import io

    import torch.distributed as dist

    from pipeline.job.read import read_job
    from pipeline.screen import Screen
    from pipeline.session import open_session
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
    for taking, putting, copied, trained_elements in ranks2.run(counted, str(job)):
        assert taking == []
        assert copied == 3 * trained_elements
        assert putting == [("broadcast", trained_elements)] * 3


def slow_writer(ranks, job, run, overrides):
    """Trains while the first state's write waits for the fourth step; returns steps seen done before it was over, in order."""
    from pipeline import writer

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


def test_a_vote_of_any_rank_stops_all_at_the_same_step(job, ranks3, tmp_path):
    messages = ranks3.run(train_until, str(job), str(tmp_path / "run"), LONG, 4, 2)
    assert all("after step 4 of 12; everything is saved. To go on: the same command again" in message for message in messages)
    assert [p.name for p in (tmp_path / "run" / "state").iterdir()] == ["step-00000004"]


def test_the_scores_due_when_it_was_stopped_are_made_up_for(gpt2_base, ranks2, tmp_path):
    job = write_job(tmp_path, gpt2_base)
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "valid"):
        write_examples(data / f"{split}.jsonl", 12)
    job.write_text(job.read_text().replace(str(tmp_path / "train.jsonl"), str(data)) + "[evaluate]\nevery_steps = 2\nmax_new_tokens = 4\n")
    ranks2.run(train_until, str(job), str(tmp_path / "run"), ("train.steps=6",), 4)
    scores = lambda: [r["step"] for r in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) if "bleu" in r]  # noqa: E731
    assert scores() == [2], "a request to stop comes before scoring"
    ranks2.run(train_here, str(job), str(tmp_path / "run"), ("train.steps=6",))
    assert scores() == [2, 4, 6]
    assert "bleu" in json.loads((tmp_path / "run" / "result.json").read_text())["valid"]
    trained(ranks2, job, tmp_path / "whole", "train.steps=6")
    assert delta_bytes(tmp_path / "run") == delta_bytes(tmp_path / "whole")


def test_scores_of_the_beginning_are_not_made_twice(gpt2_base, ranks1, tmp_path):
    job = write_job(tmp_path, gpt2_base)
    write_examples(tmp_path / "valid.jsonl", 6)
    job.write_text(job.read_text().replace("[train]", f'valid = "{tmp_path / "valid.jsonl"}"\n[train]') + "[evaluate]\nat_start = true\n")
    ranks1.run(train_until, str(job), str(tmp_path / "run"), ("train.steps=6", "train.save_every_steps=9"), 2)
    shutil.rmtree(tmp_path / "run" / "state")  # as if it had been killed before
    ranks1.run(train_here, str(job), str(tmp_path / "run"), ("train.steps=6", "train.save_every_steps=9"))
    scored = [row["step"] for row in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) if "bleu" in row]
    assert scored == [0, 6]
    assert [row["step"] for row in read_run(tmp_path / "run").steps] == [1, 2, 3, 4, 5, 6]


def stopped_while_scoring(ranks, job, run, overrides):
    from pipeline.evaluate import generate
    from pipeline.job.errors import Stopped

    real = generate._run

    def asked(*arguments):
        if ranks.rank == 1:
            ranks.stop.signal = "SIGUSR1"
        return real(*arguments)

    generate._run = asked
    try:
        train_here(ranks, job, run, overrides)
    except Stopped as stopped:
        return str(stopped)
    finally:
        generate._run, ranks.stop.signal = real, None
    raise AssertionError("it was not stopped")


@pytest.mark.parametrize("gather", ["once", "each_pass"])
def test_a_request_while_scoring_is_answered_at_once(gather, gpt2_base, ranks2, tmp_path):
    job = write_job(tmp_path, gpt2_base)
    write_examples(tmp_path / "valid.jsonl", 12)
    job.write_text(job.read_text().replace("[train]", f'valid = "{tmp_path / "valid.jsonl"}"\n[train]') + "[evaluate]\nevery_steps = 3\n")
    settings = ("train.steps=6", f'evaluate.gather="{gather}"')
    messages = ranks2.run(stopped_while_scoring, str(job), str(tmp_path / "run"), settings)
    assert all("after step 3 of 6" in message for message in messages)
    assert [p.name for p in (tmp_path / "run" / "state").iterdir()] == ["step-00000003"]
    assert '"bleu"' not in (tmp_path / "run" / "metrics.jsonl").read_text()


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
    examples = stream_examples(12, 8, 24, 1)  # of the fourth and the fifth step
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
    said = ranks2.run(train_with_poison, str(job), str(tmp_path / "run"), settings, stream_examples(12, 8, 24, 1))[0]
    assert "step 5: the loss is nan" in said
    assert [p.name for p in (tmp_path / "run" / "state").iterdir()] == ["step-00000003"]
    assert json.loads((tmp_path / "run" / "delta" / "manifest.json").read_text())["step"] == 3


def test_a_bad_last_step_is_a_result_too(job, ranks2, tmp_path):
    settings = ("train.steps=4", "train.batch_examples=4")
    ranks2.run(train_with_poison, str(job), str(tmp_path / "run"), settings, stream_examples(12, 4, 24, 1))
    assert '"loss": null' in (tmp_path / "run" / "result.json").read_text()
    (tmp_path / "run" / "result.json").unlink()
    shown = ranks2.run(train_here, str(job), str(tmp_path / "run"), settings)[0]
    assert "not finite at the last step" in shown


def test_single_bad_steps_are_skipped_and_counted(job, ranks2, tmp_path):
    settings = ("train.steps=6", "train.batch_examples=4", "train.save_every_steps=1")
    ranks2.run(train_with_poison, str(job), str(tmp_path / "run"), settings, stream_examples(8, 1, 24, 1))
    steps = read_run(tmp_path / "run").steps
    assert [row["skipped_steps"] for row in steps] == [0, 0, 1, 1, 1, 1]
    assert [row["loss"] is None for row in steps] == [False, False, True, False, False, False]
    record = json.loads((tmp_path / "run" / "state" / "step-00000006" / "state.json").read_text())
    assert (record["progress"]["optimizer_steps"], record["progress"]["skipped_steps"]) == (5, 1)
