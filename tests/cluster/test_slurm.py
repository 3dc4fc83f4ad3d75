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

from pipeline.cluster.record import Began, Ended, Submitted, Told, events
from pipeline.cluster.standing import standing
from pipeline.job.errors import JobError
from pipeline.job.read import read_job
from pipeline.submit.job import Asked, submit
from tests.cluster.slurm import Slurm, missing
from tests.cluster.submitting import ended, instead, log, settings_of, steps_taken, submitted, wait_for
from tests.training import LORA_DROPOUT, delta_bytes, rows, trained, write_job

COURSE = ("train.steps=48", LORA_DROPOUT, "train.warmup_steps=3", "train.save_every_steps=10")
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


CODES = (0, 1, 2, 4, 76)


@pytest.fixture(scope="module", autouse=True)
def slow_jobs(slurm, place):
    """What is looked at last, by name, and its accidents."""
    two = ("cluster.nodes=2", "cluster.ranks_per_node=1", *COURSE)
    times = ("cluster.ranks_per_node=1", 'cluster.time="2"', "cluster.warn_s=60", 'cluster.environment.OMP_NUM_THREADS="1"')
    found = {"limit": submitted(place, "limit", *times, 'cluster.partition="low"', *COURSE, nodes="node4", step_s=1.4)}
    found["unlucky"] = submitted(place, "unlucky", *two, nodes="node[5-6]", step_s=0.3)
    if slurm.isolated:
        slurm.pull_the_plug("node8")
    arrived = instead(place, "sh -c true")
    found["late"] = submitted(place, "late", "cluster.nodes=2", "cluster.ranks_per_node=1", arrived, nodes="node[7-8]")
    for code in CODES:
        ends = instead(place, f"sh -c 'exit {code}'")
        found[code] = submitted(place, f"code {code}", "cluster.ranks_per_node=1", ends, nodes="node3")

    stubborn = """sh -c 'trap "" USR1; trap "exit 75" TERM; [ $SLURM_RESTART_COUNT ] || for i in $(seq 1000); do sleep 0.2; done' """
    found["overdue"] = submitted(place, "overdue", "cluster.ranks_per_node=1", instead(place, stubborn), nodes="node7")
    slurm.run("scontrol", "update", f"JobId={found['overdue']}", "TimeLimit=1")

    def accidents():
        run = place / "unlucky"
        if slurm.isolated:
            wait_for(lambda: sittings(place / "late"), "the absent node")
            slurm.boot("node8")
        wait_for(lambda: steps_taken(run) >= 12, "steps")
        (rank,) = processes(run, 1)
        os.kill(rank, signal.SIGKILL)
        wait_for(lambda: sittings(run), "the record")
        goes_on(run)
        if slurm.isolated:
            slurm.pull_the_plug("node6")
            wait_for(lambda: slurm.state(found["unlucky"])["JobState"] == "PENDING", "Slurm's own requeue")
            slurm.boot("node6")
            goes_on(run)
        slurm.run("scancel", found["unlucky"])
        ended(slurm, found["unlucky"])
        found["again"] = submitted(place, "unlucky", *two, nodes="node[5-6]")
        over.wait()  # nodes end with the thread that booted them

    over = threading.Event()
    threading.Thread(target=accidents, daemon=True).start()
    yield found
    over.set()


def goes_on(run):
    seen = steps_taken(run)
    wait_for(lambda: steps_taken(run) > seen + 2, "going on")


def sittings(run):
    return [(event.exit_code, event.then) for event in events(run) if isinstance(event, Ended)]


def begun(run):
    return [event.restart for event in events(run) if isinstance(event, Began)]


def resumed(run):
    """How often it has gone on from a state, as training says itself."""
    return len(re.findall(r"^ *goes on +after step", log(run), re.MULTILINE))


def processes(run, rank):
    """The rank's of that run, as this machine numbers them."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except OSError:
            continue
        if b"\0train\0" in command and str(run).encode() in command and f"\0SLURM_PROCID={rank}\0".encode() in environment:
            yield int(folder.name)


def test_a_run_is_not_submitted_twice(place, slow_jobs):
    with pytest.raises(JobError, match=f"job {slow_jobs['limit']} works on it already .*--after {slow_jobs['limit']}"):
        submitted(place, "limit", "cluster.ranks_per_node=1", *COURSE)


def test_a_job_that_needs_three_allocations_ends_as_an_uninterrupted_one_does(slurm, place, ranks1, slow_jobs):
    """The first ends by Slurm's own warning, the next by a job of higher priority; on a slow machine the limit may come more often."""
    run, job = place / "limit", slow_jobs["limit"]
    wait_for(lambda: resumed(run), "the second allocation, after Slurm's own warning")
    slurm.run("sbatch", "--partition=high", "--nodes=1", "--nodelist=node4", "--ntasks=4", f"--output={place}/high.txt", "--wrap=true")
    wait_for(lambda: any(isinstance(event, Ended) and event.cause == "preempted" for event in events(run)), "the preemption")
    wait_for(lambda: slurm.state(job)["JobState"] == "PENDING", "its way back")
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    assert ended(slurm, job) == "COMPLETED", log(run)
    *before, last = [event for event in events(run) if isinstance(event, Ended)]
    assert {(event.exit_code, event.then) for event in before} == {(75, "requeued")}
    causes = [event.cause for event in before]
    assert (causes[0], set(causes), causes.count("preempted")) == ("time limit", {"time limit", "preempted"}, 1)
    said = r"Stopped by SIG(USR1|TERM) (after step \d+ of 48; everything is saved|before the first step; nothing is lost)\."
    assert all(re.fullmatch(said, event.why) for event in before), before
    assert log(run).count("it goes back into the queue, and goes on.") == len(before)
    assert "To go on: " not in log(run)
    assert (last.exit_code, last.then) == (0, "done")
    assert begun(run) == list(range(len(before) + 1))
    trained(ranks1, place / "job.toml", place / "limit-here", *COURSE)
    assert rows(run) == rows(place / "limit-here")
    assert delta_bytes(run) == delta_bytes(place / "limit-here")


def test_two_and_four_nodes_train_the_e2e_task_as_one_machine_with_as_many_ranks_does(slurm, place, ranks4, shared_data):
    folder = place / "e2e"
    folder.mkdir()
    text = (place / "job.toml").read_text()
    own = text[text.index("[task]") : text.index("[train]")]
    job = f'[task]\nkind = "e2e"\ndata = "{shared_data / "e2e"}"\ntoo_long = "truncate"\n'
    scoring = "[evaluate]\nmax_prompts = 8\nmax_new_tokens = 8\n"
    (folder / "job.toml").write_text(text.replace(own, job) + scoring)
    course = ("train.steps=4", LORA_DROPOUT)
    four = submitted(folder, "four", "cluster.nodes=4", "cluster.ranks_per_node=1", *course, nodes="node[1-3,7]")
    trained(ranks4, folder / "job.toml", folder / "here", *course)
    ended(slurm, four)
    two = submitted(folder, "two", "cluster.nodes=2", "cluster.ranks_per_node=2", *course, nodes="node[1-2]")
    for name, queued in (("four", four), ("two", two)):
        assert ended(slurm, queued) == "COMPLETED", log(folder / name)
        assert rows(folder / name) == rows(folder / "here"), "to the last bit"
        assert delta_bytes(folder / name) == delta_bytes(folder / "here")
        assert sittings(folder / name) == [(0, "done")]


@pytest.mark.parametrize("code", CODES)
def test_only_failures_that_another_start_helps_come_back_and_not_for_ever(code, slurm, place, slow_jobs):
    run, job = place / f"code {code}", slow_jobs[code]
    assert ended(slurm, job) == ("FAILED" if code else "COMPLETED")
    *before, last = [event for event in events(run) if isinstance(event, Ended)]
    assert (last.exit_code, last.then) == (code, "not requeued" if code else "done")
    assert {(event.exit_code, event.then) for event in before} == ({(76, "requeued")} if code == 76 else set())
    assert slurm.state(job)["ExitCode"] == f"{code}:0"
    if code == 76:
        assert 2 <= len(before) < 10
        assert last.at_s - before[0].at_s >= 50, "twice as long as Slurm takes to find that a node is lost (SlurmdTimeout)"
        assert f"So it ended {len(before) + 1} times in a row without a newer saved state. Exit code 76: not requeued." in log(run)


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


def test_a_node_that_comes_up_late_costs_time_only(slurm, place, slow_jobs):
    assert ended(slurm, slow_jobs["late"]) == "COMPLETED", log(place / "late")
    assert sittings(place / "late")[-1] == (0, "done")
    if slurm.isolated:
        assert sittings(place / "late")[0] == (76, "requeued")


def test_a_killed_rank_a_lost_node_and_a_cancelled_job_lose_nothing(slurm, place, ranks2, slow_jobs):
    run, job = place / "unlucky", slow_jobs["unlucky"]
    trained(ranks2, place / "job.toml", place / "here", *COURSE)
    wait_for(lambda: "again" in slow_jobs, "all accidents")
    assert ended(slurm, slow_jobs["again"]) == "COMPLETED", log(run)
    assert rows(run) == rows(place / "here"), "to the last bit"
    assert delta_bytes(run) == delta_bytes(place / "here")
    assert [event.job for event in events(run) if isinstance(event, Submitted)] == [job, slow_jobs["again"]]
    assert sittings(run)[0] == (76, "requeued")
    assert sittings(run)[-1] == (0, "done")
    asked = [(event.signal, event.cause) for event in events(run) if isinstance(event, Told)]
    assert asked == [("SIGTERM", "requeued")] * slurm.isolated + [("SIGTERM", "cancelled")]
    before = [event for event in events(run) if getattr(event, "job", None) == job]
    forgotten = standing(before, None)
    assert (forgotten.state, forgotten.words) == ("cancelled", "cancelled by the user"), "also when Slurm has forgotten it"
    cut = before[: next(place for place, event in enumerate(before) if isinstance(event, Told))]
    assert standing(cut, None).words == "lost with a node"
    assert resumed(run) == 2 + slurm.isolated
