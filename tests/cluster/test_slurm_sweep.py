"""Sweeps and what comes after training, on a real Slurm."""

from __future__ import annotations

import json

import pytest

from pipeline.cluster.record import Began, Ended, Submitted, events
from pipeline.cluster.standing import standing
from pipeline.compare.collect import collect
from pipeline.compare.group import compare
from pipeline.job.errors import JobError
from pipeline.job.read import read_job
from pipeline.submit.job import Asked
from pipeline.submit.sweep import submit_sweep
from pipeline.sweeping import runs_of
from pipeline.watch.cancel import cancel
from pipeline.watch.logs import logs_of, text_of
from pipeline.watch.status import find_runs, statuses
from tests.cluster.submitting import SLOW, ended, instead, log, steps_taken, submitted, wait_for
from tests.training import delta_bytes, rows, trained, write_job

MEMBERS = ["rank=1,seed=1", "rank=1,seed=2", "rank=2,seed=1", "rank=2,seed=2"]
CLUSTER = '[cluster]\nranks_per_node = 1\nenvironment.OMP_NUM_THREADS = "1"\n'
SWEEP = f'{CLUSTER}[sweep]\nmax_parallel = 2\n[sweep.grid]\n"methods.0.rank" = [1, 2]\n"train.seed" = [1, 2]\n'
ROUND = """sh -c 'if [ "$SLURM_RESTART_COUNT" ]; then exec "$@"; fi; exit 75' -"""
"""In its first sitting it leaves as one that was preempted; in its second it does what it should."""


@pytest.fixture(scope="module")
def place(slurm, gpt2_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    job = write_job(folder, gpt2_base)
    (folder / "valid.jsonl").write_text((folder / "train.jsonl").read_text())
    task = f'valid = "{folder / "valid.jsonl"}"\n[train]'
    job.write_text(job.read_text().replace("[train]", task) + "[evaluate]\nmax_new_tokens = 2\nmax_prompts = 4\n")
    return folder


def swept(place, name, *overrides, **options):
    job = place / "sweep.toml"
    job.write_text((place / "job.toml").read_text() + SWEEP)
    asked = Asked(job, place / name, ("zlora", "submit", "sweep.toml"), **options)
    return submit_sweep(read_job(job, overrides), runs_of(job, place / name, overrides), asked)


def seen(run):
    return {status.run.rpartition("/")[2]: status.words for status in statuses(find_runs([run]))[0]}


def status_of(run):
    (found,), _ = statuses([run])
    return found


def sittings(run):
    return [(event.exit_code, event.then) for event in events(run) if isinstance(event, Ended)]


@pytest.fixture(scope="module", autouse=True)
def then_job(slurm, place):
    """What is looked at last, and has to wait for Slurm most."""
    course = ("cluster.ranks_per_node=1", "train.steps=2", instead(place, ROUND))
    return submitted(place, "then", *course, then=("evaluate", "merge"))


def test_a_sweep_is_one_array_and_what_is_not_finished_is_submitted_alone(slurm, place, ranks1):
    run = place / "study"
    shown = swept(place, "study", dry_run=True)
    assert shown["members"] == MEMBERS
    assert not run.exists()
    spoiled = run / "rank=1,seed=2" / "delta"
    spoiled.parent.mkdir(parents=True)
    found = swept(place, "study", "train.steps=3", instead(place, ROUND), then=("merge",))
    array = found["job"]
    assert found["members"] == MEMBERS
    spoiled.touch()  # this member's own mistake: a file that no run wrote
    assert swept(place, "study", "train.steps=3")["notes"] == ["4 of 4 members are in the queue already"]
    for number in range(4):
        ended(slurm, f"{array}_{number}")
    assert [slurm.state(f"{array}_{number}")["JobState"] for number in range(4)] == ["COMPLETED", "FAILED", "COMPLETED", "COMPLETED"]
    for name in MEMBERS:
        failed = name == "rank=1,seed=2"
        own = [event for event in events(run / name) if isinstance(event, Ended) and event.job.startswith(f"{array}_")]
        assert [(event.exit_code, event.then) for event in own] == [(75, "requeued"), (2, "not requeued") if failed else (0, "done")]
    (merged,) = (each["job"] for each in found["then"])
    for number in (0, 2, 3):
        assert ended(slurm, f"{merged}_{number}") == "COMPLETED", log(run)
    assert ended(slurm, f"{merged}_1") == "CANCELLED"
    assert status_of(run / MEMBERS[1]).then == {"merge": "the job before it has failed"}
    assert standing(events(run / MEMBERS[1]), None, "merge").words == "the job before it has failed", "also when Slurm has forgotten it"
    words = seen(run)
    assert words.pop("rank=1,seed=2") == "a mistake in the job"
    assert set(words.values()) == {"finished"}
    (text,) = (b"".join(text_of(each)) for each in logs_of(run / MEMBERS[1], None)[:1])
    assert "is not a run folder, but has a delta" in text.decode()
    spoiled.unlink()
    again = swept(place, "study", "train.steps=3")
    assert again["members"] == ["rank=1,seed=2"]
    assert again["notes"] == ["3 of 4 members are finished"]
    assert ended(slurm, f"{again['job']}_1") == "COMPLETED", log(run)
    assert swept(place, "study", "train.steps=3")["members"] == []
    for name, settings in {MEMBERS[1]: ("methods.0.rank=1", "train.seed=2"), MEMBERS[2]: ("methods.0.rank=2", "train.seed=1")}.items():
        trained(ranks1, place / "job.toml", place / "alone" / name, "train.steps=3", *settings)
        assert rows(run / name) == rows(place / "alone" / name), "to the last bit"
        assert delta_bytes(run / name) == delta_bytes(place / "alone" / name)
    assert (run / MEMBERS[3] / "merged" / "merge.json").is_file()
    table = compare(collect([run]))
    assert table.differ == ("methods[0].rank", "train.seed")
    assert [(len(row.runs), row.left_out) for row in table.rows] == [(2, {}), (2, {})]


def test_a_member_of_a_sweep_is_cancelled_with_its_state_saved(slurm, place):
    slow = (f'cluster.environment.PYTHONPATH="{SLOW}:{SLOW.parents[2]}"', 'cluster.environment.ZLORA_TEST_STEP_S="0.2"')
    found = swept(place, "cancelled", "train.steps=300", "train.save_every_steps=300", *slow)
    run = place / "cancelled" / MEMBERS[0]
    wait_for(lambda: steps_taken(run) > 2, "steps")
    (told,) = cancel([run], False, print)
    assert "saved at step" in told
    assert sittings(run) == [(75, "not requeued")]
    assert statuses([run])[0][0].words == "cancelled by the user"
    cancel([place / "cancelled" / name for name in MEMBERS[1:]], True, print)
    for number in range(1, 4):
        assert ended(slurm, f"{found['job']}_{number}") == "CANCELLED"


def test_what_comes_after_training_waits_for_it_across_requeues(slurm, place, then_job):
    run, job = place / "then", then_job
    assert ended(slurm, job) == "COMPLETED", log(run)
    assert set(status_of(run).then) == {"evaluate", "merge"}
    noted = {event.kind: event.job for event in events(run) if isinstance(event, Submitted)}
    assert list(noted) == ["train", "evaluate", "merge"]
    for kind in ("evaluate", "merge"):
        assert ended(slurm, noted[kind]) == "COMPLETED", log(run)
    assert len([json.loads(line) for line in (run / "predictions" / "valid.jsonl").read_text().splitlines()]) == 4
    assert (run / "merged" / "config.json").is_file()
    assert status_of(run).then == {"evaluate": "finished", "merge": "finished"}
    began = [event.job for event in events(run) if isinstance(event, Began)]
    assert sorted(began) == sorted([job] * 2 + [noted["evaluate"]] * 2 + [noted["merge"]] * 2), "each came back once"
    with pytest.raises(JobError, match="merged: is there already, and merging writes over nothing"):
        submitted(place, "then", "cluster.ranks_per_node=1", "train.steps=2", then=("merge",))


def test_what_can_only_fail_after_training_is_refused_before(place):
    with pytest.raises(JobError, match="--then merge: these methods cannot be merged"):
        submitted(place, "refused", "cluster.ranks_per_node=1", 'methods=[{kind="adapter"}]', then=("merge",), dry_run=True)
    job = place / "bases.toml"
    text = '[[sweep.settings]]\nevaluate = {best_metric = "loss", every_steps = 1}\n[[sweep.settings]]\ntrain.seed = 2\n'
    job.write_text(f"{(place / 'job.toml').read_text()}[cluster]\nranks_per_node = 1\n{text}")
    asked = Asked(job, place / "bases", (), then=("merge",), dry_run=True)
    with pytest.raises(JobError, match="the members of the sweep differ in what merge is told"):
        submit_sweep(read_job(job), runs_of(job, place / "bases"), asked)
    assert not (place / "bases").exists()
