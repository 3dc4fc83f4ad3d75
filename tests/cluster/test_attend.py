"""How a step ended and what becomes of the job: decided from codes, words and the record; and by a process that gets signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from pipeline.cluster.attend import End, judged, next_of, why_asked
from pipeline.cluster.queue import Shown
from pipeline.cluster.record import FILE, Began, Cancelled, Ended, Submitted, Told, events, note

SCONTROL = """#!/bin/sh
echo "$*" >> "{folder}/asked"
[ "$1" = requeue ] && [ -e "{folder}/refuse" ] && {{ echo "slurm_suspend error: Job is disabled" >&2; exit 1; }}
[ "$1" = requeue ] || echo "JobId=7 JobState=$(cat {folder}/state)"
"""


def end(code, step=0, job="7", cause="", at_s=0.0):
    return Ended(job, 0, code, "", step, "done", cause, at_s)


def then(ended, before=(), ending=False, patience_s=0.0):
    return next_of(ended, list(before), ending, patience_s)


@pytest.mark.parametrize(
    ("code", "warned", "told", "expected"),
    [
        (0, False, None, 0),
        (75, True, None, 75),
        (138, True, None, 75),
        (137, False, None, 76),
        (137, True, End(2, "error: no such file"), 2),
        (137, False, End(4, "diverged"), 4),
        (1, False, None, 1),
        (127, False, None, 127),
    ],
)
def test_the_cause_is_what_the_ranks_say_else_what_srun_says(code, warned, told, expected):
    assert judged(code, warned, told).exit_code == expected


@pytest.mark.parametrize(
    ("code", "becomes"), [(0, "done"), (75, "requeued"), (76, "requeued"), (1, "not requeued"), (2, "not requeued"), (4, "not requeued")]
)
def test_only_what_another_start_helps_is_requeued(code, becomes):
    assert then(end(code), [Began("7", 0, "a")])[0] == becomes


def test_failures_without_a_newer_state_are_counted():
    before = [end(76, 5), Began("7", 1, "a"), end(76, 5)]
    assert then(end(76, 5, at_s=30.0), before) == ("not requeued", " So it ended 3 times in a row without a newer saved state.")
    for other in ([end(76, 4), end(76, 5)], [end(76, 5), end(75, 5), end(76, 5)], [end(76, 5, "6"), end(76, 5)], []):
        assert then(end(76, 5), other)[0] == "requeued"
    assert then(end(75, 5), [end(75, 5)] * 8)[0] == "requeued"
    assert then(end(75, 5), [end(75, 5)] * 9)[0] == "not requeued"


def test_quick_failures_go_on_until_slurm_has_had_time_to_take_the_node_out():
    """Ends of a job that gets the same broken node again and again, and what its patience of 300 s makes of the next."""

    def after(*ends_s):
        *before, last = (end(76, 5, at_s=at_s) for at_s in ends_s)
        return then(last, before, patience_s=300.0)[0]

    assert after(0, 20, 40) == "requeued"
    assert after(0, 20, 40, 629) == "requeued"
    assert after(0, 20, 40, 630) == "not requeued"
    assert after(0, 700) == "requeued", "three at least"
    assert after(*range(10)) == "not requeued", "and ten at most"


@pytest.mark.parametrize(
    ("number", "known", "cause"),
    [
        (signal.SIGUSR1, {}, "time limit"),
        (signal.SIGUSR1, {"preempted": True}, "preempted"),
        (signal.SIGTERM, {"reason": "TimeLimit"}, "time limit"),
        (signal.SIGTERM, {"preempted": True}, "preempted"),
        (signal.SIGTERM, {"restarts": 2}, "requeued"),
        (signal.SIGTERM, {}, "cancelled"),
        (signal.SIGTERM, None, ""),
        (signal.SIGUSR1, None, "time limit"),
    ],
)
def test_slurm_knows_why_it_asks(number, known, cause):
    job = (
        None
        if known is None
        else Shown(**{"job": "7", "state": "COMPLETING", "reason": "None", "restarts": 1, "preempted": False, **known})
    )
    assert why_asked(number, job, 1, cancelled=False) == cause
    assert why_asked(number, job, 1, cancelled=True) == "cancelled"


def test_what_slurm_ends_is_left_to_it_but_for_the_limit():
    assert then(end(75, 5, cause="cancelled"), ending=True) == ("left to Slurm", " It was cancelled.")
    assert then(end(76, 5, cause="requeued"), ending=True)[0] == "left to Slurm"
    assert then(end(75, 5, cause="preempted"), ending=True)[0] == "left to Slurm"
    assert then(end(75, 5, cause="preempted"))[0] == "requeued", "with a GraceTime Slurm asks first"
    late = end(75, 5, cause="time limit")
    assert then(late, ending=True)[0] == "requeued"
    assert then(replace(late, at_s=120.0), [late] * 2, ending=True)[0] == "not requeued"
    assert then(end(0, 5, cause="time limit"), ending=True)[0] == "done"
    assert then(end(75, 5, cause="cancelled"), [Cancelled("7")]) == ("not requeued", " It was cancelled. Submitted again, it goes on.")


def test_scoring_that_ran_out_of_time_would_do_so_again():
    def scoring(kind):
        return [Submitted("7", "slurm/1.sbatch", "t", "0", "0", 1, 1, (), kind=kind)]

    late = end(75, cause="time limit")
    becomes, more = then(late, scoring("evaluate"))
    assert (becomes, more) == (
        "not requeued",
        " It begins anew each time, so its time would not do again. Submit it with more (cluster.time).",
    )
    for kind, ended in (("merge", late), ("train", late), ("evaluate", end(75, cause="preempted")), ("evaluate", end(76))):
        assert then(ended, scoring(kind))[0] == "requeued"


def test_the_record_outlives_a_line_that_was_cut(tmp_path):
    note(tmp_path, Began("7", 0, "node[1-2]"))
    with (tmp_path / FILE).open("a") as file:
        file.write('{"event": "ended", "jo\n{"event": "of tomorrow"}\n')
    note(tmp_path, end(0, 3))
    assert events(tmp_path) == [Began("7", 0, "node[1-2]"), end(0, 3)]


@pytest.fixture
def attend(tmp_path):
    """Starts `zlora batch` on a shell's text that stands for srun with all ranks."""
    (tmp_path / "scontrol").write_text(SCONTROL.format(folder=tmp_path))
    (tmp_path / "scontrol").chmod(0o755)
    (tmp_path / "state").write_text("RUNNING Reason=None Restarts=0 PreemptTime=None")
    (tmp_path / "run").mkdir()
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1"}

    def start(text):
        words = [sys.executable, "-m", "pipeline", "batch", str(tmp_path / "run"), "--", "sh", "-c", text]
        return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def told(tmp_path):
    asked = tmp_path / "asked"
    return replace(events(tmp_path / "run")[-1], at_s=0.0), asked.read_text() if asked.exists() else ""


def test_a_rank_s_own_words_are_the_log_s_last(attend, tmp_path):
    failure = '{"rank": 1, "exit_code": 2, "message": "error: data.jsonl:3: not JSON.", "time": 1.0, "echo": false}'
    process = attend(f"echo '{failure}' > $ZLORA_REPORTS/failure.1; exit 137")
    out, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (2, "")
    assert out.splitlines()[-1].endswith("error: data.jsonl:3: not JSON. Exit code 2: not requeued.")
    assert told(tmp_path)[0] == Ended("7", 0, 2, "error: data.jsonl:3: not JSON.", 0, "not requeued")
    assert "requeue" not in told(tmp_path)[1]


def test_the_warning_is_passed_on_and_the_job_goes_back(attend, tmp_path):
    (tmp_path / "run" / "state" / "step-12").mkdir(parents=True)
    process = attend(f"trap 'exit 75' USR1; touch {tmp_path}/up; while :; do sleep 0.05; done")
    while not (tmp_path / "up").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    ended, asked = told(tmp_path)
    assert ended == Ended("7", 0, 75, "Stopped on request; everything is saved.", 12, "requeued", "time limit")
    assert Told("7", 0, "SIGUSR1", "time limit") in events(tmp_path / "run")
    assert asked.endswith("requeue 7\n")
    assert out.endswith("Stopped on request; everything is saved. Exit code 75: it goes back into the queue, and goes on.\n")


def test_a_preemption_that_asks_the_ranks_alone_is_told_from_a_limit(attend, tmp_path):
    (tmp_path / "state").write_text("RUNNING Reason=None Restarts=0 PreemptTime=2026-01-02T03:04:05")
    process = attend("exit 143")  # as an evaluation ends by SIGTERM
    process.communicate(timeout=30)
    ended, _ = told(tmp_path)
    assert (ended.exit_code, ended.then, ended.cause) == (75, "requeued", "preempted")


def test_a_script_that_is_killed_before_its_end_has_said_why(attend, tmp_path):
    process = attend(f"trap '' TERM; touch {tmp_path}/up; exec sleep 60")
    while not (tmp_path / "up").exists():
        time.sleep(0.02)
    process.terminate()
    while not (own := [event for event in events(tmp_path / "run") if isinstance(event, Told)]):
        time.sleep(0.02)
    subprocess.run(["pkill", "-KILL", "-P", str(process.pid)], check=True)
    process.kill()
    process.communicate(timeout=30)
    assert own == [Told("7", 0, "SIGTERM", "cancelled")]


def test_a_cancelled_job_does_not_go_back(attend, tmp_path):
    process = attend(f"trap 'exit 75' TERM; touch {tmp_path}/up; while :; do sleep 0.05; done")
    while not (tmp_path / "up").exists():
        time.sleep(0.02)
    (tmp_path / "state").write_text("COMPLETING Reason=None Restarts=0")
    process.terminate()
    subprocess.run(["pkill", "-TERM", "-P", str(process.pid)], check=True)
    process.communicate(timeout=30)
    ended, asked = told(tmp_path)
    assert (ended.exit_code, ended.then) == (75, "left to Slurm")
    assert "requeue" not in asked


def test_a_requeue_that_slurm_refuses_is_told(attend, tmp_path):
    (tmp_path / "refuse").touch()
    process = attend("exit 76")
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 76
    assert "it is not requeued: scontrol: Job is disabled" in out


def test_outside_a_job_it_says_what_to_use(monkeypatch, tmp_path):
    from pipeline.cluster.attend import attend as here
    from pipeline.job.errors import JobError

    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(JobError, match="Use zlora submit, or zlora train"):
        here(tmp_path, ["true"])
