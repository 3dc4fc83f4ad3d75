"""Submitted jobs on a real Slurm: they run, are preempted, run out of time, lose nodes, and come back.

What takes Slurm long (a limit, a dead node) is begun first, on nodes of its own, and looked at last.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from pathlib import Path

import pytest

from pipeline.cluster.record import Began, Ended, Submitted, events
from pipeline.job.errors import JobError
from pipeline.job.read import read_job
from pipeline.submitting import Asked, submit
from tests.cluster.slurm import Slurm, missing
from tests.cluster.submitting import ended, instead, log, settings_of, steps_taken, submitted, wait_for
from tests.training import LORA_DROPOUT, delta_bytes, rows, trained, write_job

COURSE = ("train.steps=64", LORA_DROPOUT, "train.warmup_steps=3", "train.save_every_steps=10")
TOKEN = "hf_secretsecretsecretsecret"


@pytest.fixture(scope="module")
def slurm():
    """node4 is for the limit; node6 is lost on the way, node8 comes up late."""
    if reason := missing():
        pytest.skip(f"no Slurm here: {reason}")
    with Slurm(8) as cluster, pytest.MonkeyPatch.context() as patch:
        settings_of(cluster, patch)
        patch.setenv("HF_TOKEN", TOKEN)
        yield cluster


@pytest.fixture(scope="module")
def place(slurm, gpt2_base, tmp_path_factory):
    """A folder with a job."""
    folder = tmp_path_factory.mktemp("place")
    write_job(folder, gpt2_base)
    return folder


@pytest.fixture(scope="module", autouse=True)
def slow_jobs(slurm, place):
    """What is looked at last, by name, and its accidents."""
    two = ("cluster.nodes=2", "cluster.ranks_per_node=1", *COURSE)
    limit = ("cluster.ranks_per_node=1", 'cluster.time="2"', "cluster.warn_s=60", 'cluster.environment.OMP_NUM_THREADS="1"', *COURSE)
    found = {"limit": submitted(place, "limit", *limit, nodes="node4", step_s=1.0)}
    found["lost"] = submitted(place, "lost", *two, nodes="node[5-6]", step_s=0.3)
    if slurm.isolated:
        slurm.pull_the_plug("node8")
    found["late"] = submitted(place, "late", *two, nodes="node[7-8]")

    stubborn = """sh -c 'trap "" USR1; trap "exit 75" TERM; [ $SLURM_RESTART_COUNT ] || for i in $(seq 1000); do sleep 0.2; done' """
    found["overdue"] = submitted(place, "overdue", "cluster.ranks_per_node=1", instead(place, stubborn), nodes="node7")
    slurm.run("scontrol", "update", f"JobId={found['overdue']}", "TimeLimit=1")

    def accidents():
        wait_for(lambda: sittings(place / "late"), "the absent node")
        slurm.boot("node8")
        wait_for(lambda: steps_taken(place / "lost") > 12, "steps")
        slurm.pull_the_plug("node6")
        wait_for(lambda: slurm.state(found["lost"])["JobState"] == "PENDING", "Slurm's own requeue")
        slurm.boot("node6")
        over.wait()  # nodes end with the thread that booted them

    over = threading.Event()
    if slurm.isolated:
        threading.Thread(target=accidents, daemon=True).start()
    yield found
    over.set()


def sittings(run):
    return [(event.exit_code, event.then) for event in events(run) if isinstance(event, Ended)]


def begun(run):
    return [event.restart for event in events(run) if isinstance(event, Began)]


def processes(run, rank):
    """The rank's of that run, as this machine numbers them."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except OSError:
            continue
        if b"\0train\0" in command and str(run).encode() in command and f"\0SLURM_PROCID={rank}\0".encode() in environment:
            yield int(folder.name)


@pytest.fixture(scope="module")
def uninterrupted(place, ranks2):
    """A run of `COURSE` on two ranks of this machine."""
    trained(ranks2, place / "job.toml", place / "here", *COURSE)
    return place / "here"


def test_four_nodes_train_as_one_machine_with_four_ranks_does(slurm, place, ranks4):
    course = ("train.steps=6", LORA_DROPOUT)
    job = submitted(place, "four", "cluster.nodes=4", "cluster.ranks_per_node=1", *course, nodes="node[1-3,5]")
    trained(ranks4, place / "job.toml", place / "four-here", *course)
    assert ended(slurm, job) == "COMPLETED", log(place / "four")
    assert rows(place / "four") == rows(place / "four-here"), "to the last bit"
    assert delta_bytes(place / "four") == delta_bytes(place / "four-here")
    assert sittings(place / "four") == [(0, "done")]


def test_two_nodes_of_two_ranks_each_train_the_e2e_task_as_one_machine_does(slurm, place, ranks4, shared_data):
    folder = place / "e2e"
    folder.mkdir()
    text = (place / "job.toml").read_text()
    own = text[text.index("[task]") : text.index("[train]")]
    job = f'[task]\nkind = "e2e"\ndata = "{shared_data / "e2e"}"\ntoo_long = "truncate"\n'
    scoring = "[evaluate]\nmax_prompts = 8\nmax_new_tokens = 8\n"
    (folder / "job.toml").write_text(text.replace(own, job) + scoring)
    course = ("train.steps=4", LORA_DROPOUT)
    queued = submitted(folder, "two", "cluster.nodes=2", "cluster.ranks_per_node=2", *course, nodes="node[1-2]")
    trained(ranks4, folder / "job.toml", folder / "here", *course)
    assert ended(slurm, queued) == "COMPLETED", log(folder / "two")
    assert rows(folder / "two") == rows(folder / "here"), "to the last bit"
    assert delta_bytes(folder / "two") == delta_bytes(folder / "here")


def test_a_killed_rank_and_a_cancelled_job_lose_nothing(slurm, place, uninterrupted):
    run, settings = place / "killed", ("cluster.ranks_per_node=2", *COURSE)
    job = submitted(place, "killed", *settings, nodes="node3", step_s=0.15)
    wait_for(lambda: steps_taken(run) >= 12, "steps")
    (rank,) = processes(run, 1)
    os.kill(rank, signal.SIGKILL)
    wait_for(lambda: sittings(run), "the record")
    assert sittings(run) == [(76, "requeued")]
    with pytest.raises(JobError, match=f"job {job} works on it already .*--after {job}"):
        submitted(place, "killed", *settings)
    seen = steps_taken(run)
    wait_for(lambda: steps_taken(run) > seen + 2, "going on")
    slurm.run("scancel", job)
    assert ended(slurm, job) == "CANCELLED"
    wait_for(lambda: len(sittings(run)) == 2, "the record", 10)
    assert sittings(run)[1][1] == "left to Slurm"
    again = submitted(place, "killed", *settings)
    assert ended(slurm, again) == "COMPLETED", log(run)
    assert [event.job for event in events(run) if isinstance(event, Submitted)] == [job, again]
    assert rows(run) == rows(uninterrupted)
    assert delta_bytes(run) == delta_bytes(uninterrupted)


def test_a_job_that_needs_three_allocations_ends_as_an_uninterrupted_one_does(slurm, place, ranks1, slow_jobs):
    run, job = place / "limit", slow_jobs["limit"]
    wait_for(lambda: "goes on" in log(run), "the second allocation, after Slurm's own warning")
    if len(sittings(run)) == 1:
        slurm.run("scancel", "--batch", "--signal=USR1", job)  # as the warning does
    assert ended(slurm, job) == "COMPLETED", log(run)
    *before, last = sittings(run)
    assert len(before) >= 2
    assert set(before) == {(75, "requeued")}
    assert last == (0, "done")
    assert begun(run) == list(range(len(before) + 1))
    trained(ranks1, place / "job.toml", place / "limit-here", *COURSE)
    assert rows(run) == rows(place / "limit-here")
    assert delta_bytes(run) == delta_bytes(place / "limit-here")


@pytest.mark.parametrize("code", [0, 1, 2, 4, 76])
def test_only_failures_that_another_start_helps_come_back_and_not_for_ever(code, slurm, place):
    run = place / f"code {code}"
    job = submitted(place, run.name, "cluster.ranks_per_node=1", instead(place, f"sh -c 'exit {code}'"))
    assert ended(slurm, job) == ("FAILED" if code else "COMPLETED")
    assert sittings(run) == ([(76, "requeued")] * 2 if code == 76 else []) + [(code, "not requeued" if code else "done")]
    assert slurm.state(job)["ExitCode"] == f"{code}:0"
    if code == 76:
        assert "So it ended 3 times in a row without a newer saved state. Exit code 76: not requeued." in log(run)


def test_names_from_a_job_reach_sbatch_and_the_nodes_as_they_are(slurm, place):
    names = ["a b", "it's", "$(touch pwned)", "x;touch pwned", "-rf", "ünïcödé 名前", "{{run}}", "#SBATCH --nodes=99"]
    jobs = {}
    for name in names:
        folder = place / "names" / name
        folder.mkdir(parents=True)
        job = folder / f"{name}.toml"
        job.write_text((place / "job.toml").read_text())
        settings = ("cluster.ranks_per_node=1", instead(place, """printf '<%s>\\n' "$NAMED" """))
        asked = read_job(job, (*settings, f"cluster.environment.NAMED={json.dumps(name, ensure_ascii=False)}"))
        jobs[name] = submit(asked, Asked(job, folder / name, ("zlora", "submit", str(job))))["job"]
    for name, job in jobs.items():
        run = place / "names" / name / name
        assert ended(slurm, job) == "COMPLETED", log(run)
        assert (run / "slurm" / f"{job}.txt").is_file()
        told = re.findall(r"^<(.*)>$", log(run), re.MULTILINE)
        assert told[0] == name
        assert told[2:] == ["train", str(run / "slurm" / "1.toml"), "--run", str(run)]
    assert not list(place.rglob("pwned"))


def test_a_token_of_the_shell_reaches_the_ranks_and_no_file(slurm, place):
    run, told = place / "token", f"sh -c 'test ${{#HF_TOKEN}} = {len(TOKEN)} && echo it is here'"
    job = submitted(place, "token", "cluster.ranks_per_node=1", instead(place, told))
    assert ended(slurm, job) == "COMPLETED", log(run)
    assert "it is here" in log(run)
    files = [file for file in place.rglob("*") if file.is_file()]
    assert len(files) > 10
    assert not [file for file in files if TOKEN.encode() in file.read_bytes()]
    with pytest.raises(JobError, match="the value of HF_TOKEN is in it"):
        submitted(place, "told", "cluster.ranks_per_node=1", 'train.stop_signals=["SIGUSR1"]', f'cluster.container="/{TOKEN}"')


def test_a_job_may_come_after_another_and_what_sbatch_refuses_leaves_nothing(slurm, place):
    settings = ("cluster.ranks_per_node=1", instead(place, "sh -c 'exit 2'"))
    first = submitted(place, "first", *settings)
    second = submitted(place, "first", *settings, after=first)
    assert [ended(slurm, job) for job in (first, second)] == ["FAILED", "CANCELLED"]
    scripts = sorted(file.name for file in (place / "first" / "slurm").glob("*.sbatch"))
    assert scripts == ["1.sbatch", "2.sbatch"]
    before = {path.name for path in place.iterdir()}
    with pytest.raises(JobError, match=r"sbatch: .*invalid partition specified: nowhere"):
        submitted(place, "refused", *settings, 'cluster.partition="nowhere"')
    assert {path.name for path in place.iterdir()} == before


def test_a_job_that_does_not_answer_the_warning_comes_back_from_its_limit_too(slurm, place, slow_jobs):
    assert ended(slurm, slow_jobs["overdue"]) == "COMPLETED", log(place / "overdue")
    assert sittings(place / "overdue") == [(75, "requeued"), (0, "done")]
    assert "DUE TO TIME LIMIT" in log(place / "overdue")


def test_a_node_that_is_lost_or_late_costs_time_only(slurm, place, uninterrupted, slow_jobs):
    for name in ("late", "lost"):
        assert ended(slurm, slow_jobs[name]) == "COMPLETED", log(place / name)
        assert rows(place / name) == rows(uninterrupted), "on two nodes, to the last bit"
        assert delta_bytes(place / name) == delta_bytes(uninterrupted)
    if slurm.isolated:
        assert sittings(place / "late")[0] == (76, "requeued")
        assert len(begun(place / "lost")) == len(sittings(place / "lost")) + 1, "the allocation that lost its node has no end"
        assert "goes on" in log(place / "lost")
