"""A run that was stopped goes on as if it had not been: the same losses and bytes on the same ranks, to rounding on others."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from tests.training import LONG, LORA_DROPOUT, delta_bytes, read_run, rows, train_here, train_until, trained, write_examples, write_job


@pytest.fixture(scope="module")
def job(long_job):
    return long_job


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
    import pipeline.run
    from pipeline.train import loop

    real, seen = loop.collate, []

    def collate(sequences, ids, *others):
        seen.extend(ids)
        return real(sequences, ids, *others)

    # Without the rehearsal, which is no step.
    rehearse, pipeline.run.rehearse = pipeline.run.rehearse, lambda *_: None
    loop.collate = collate
    try:
        if stop_at:
            train_until(ranks, job, run, overrides, stop_at)
        else:
            train_here(ranks, job, run, overrides)
    finally:
        loop.collate, pipeline.run.rehearse = real, rehearse
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
    scores = lambda: [r["step"] for r in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) if "BLEU" in r]  # noqa: E731
    assert scores() == [2], "a request to stop comes before scoring"
    ranks2.run(train_here, str(job), str(tmp_path / "run"), ("train.steps=6",))
    assert scores() == [2, 4, 6]
    assert "BLEU" in json.loads((tmp_path / "run" / "result.json").read_text())["valid"]
    trained(ranks2, job, tmp_path / "whole", "train.steps=6")
    assert delta_bytes(tmp_path / "run") == delta_bytes(tmp_path / "whole")


def test_scores_of_the_beginning_are_not_made_twice(gpt2_base, ranks1, tmp_path):
    job = write_job(tmp_path, gpt2_base)
    write_examples(tmp_path / "valid.jsonl", 6)
    job.write_text(job.read_text().replace("[train]", f'valid = "{tmp_path / "valid.jsonl"}"\n[train]') + "[evaluate]\nat_start = true\n")
    ranks1.run(train_until, str(job), str(tmp_path / "run"), ("train.steps=6", "train.save_every_steps=9"), 2)
    shutil.rmtree(tmp_path / "run" / "state")  # as if it had been killed before
    ranks1.run(train_here, str(job), str(tmp_path / "run"), ("train.steps=6", "train.save_every_steps=9"))
    scored = [row["step"] for row in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) if "BLEU" in row]
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
    assert '"BLEU"' not in (tmp_path / "run" / "metrics.jsonl").read_text()


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
