"""What a run does not go on with: another job, base or data; and what it does not need, a whole delta or the newest state."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from pipeline.job.errors import JobError
from pipeline.weights.state import State, newest_state, write_state
from tests.bases import make_gpt2
from tests.training import LONG, delta_bytes, read_run, rows, train_here, train_until, write_examples, write_job


@pytest.fixture(scope="module")
def job(long_job):
    return long_job


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


def test_the_job_of_another_version_is_one_line(job, whole, ranks1, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    state = newest_state(run / "state", print)
    changed = state.record.model_copy(update={"job": {**state.record.job, "of_tomorrow": {}}})
    write_state(run / "state", State(changed, state.tensors), keep=2)
    assert "state: its job has a of_tomorrow that this version of zlora does not know" in refusal(ranks1, job, run, *LONG)


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
