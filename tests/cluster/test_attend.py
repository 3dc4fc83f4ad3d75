"""How a step ended and what becomes of the job: decided from codes, words and the record; and by a process that gets signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from pipeline.cluster.attend import End, judged, next_of
from pipeline.cluster.queue import Queued
from pipeline.cluster.record import FILE, Began, Ended, events, note

SCONTROL = """#!/bin/sh
echo "$*" >> "{folder}/asked"
[ "$1" = requeue ] && [ -e "{folder}/refuse" ] && {{ echo "slurm_suspend error: Job is disabled" >&2; exit 1; }}
[ "$1" = requeue ] || echo "JobId=7 JobState=$(cat {folder}/state) Reason=None"
"""


def end(code, step=0, job="7"):
    return Ended(job, 0, code, "", step, "done")


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
    ("code", "then"), [(0, "done"), (75, "requeued"), (76, "requeued"), (1, "not requeued"), (2, "not requeued"), (4, "not requeued")]
)
def test_only_what_another_start_helps_is_requeued(code, then):
    assert next_of(end(code), [Began("7", 0, "a")], None)[0] == then


def test_failures_without_a_newer_state_are_counted():
    before = [end(76, 5), Began("7", 1, "a"), end(76, 5)]
    assert next_of(end(76, 5), before, None) == ("not requeued", " So it ended 3 times in a row without a newer saved state.")
    for other in ([end(76, 4), end(76, 5)], [end(76, 5), end(75, 5), end(76, 5)], [end(76, 5, "6"), end(76, 5)], []):
        assert next_of(end(76, 5), other, None)[0] == "requeued"
    assert next_of(end(75, 5), [end(75, 5)] * 8, None)[0] == "requeued"
    assert next_of(end(75, 5), [end(75, 5)] * 9, None)[0] == "not requeued"


def test_what_slurm_ends_is_left_to_it_but_for_the_limit():
    cancelled, late = Queued("7", "COMPLETING", "None"), Queued("7", "COMPLETING", "TimeLimit")
    assert next_of(end(75, 5), [], cancelled) == ("left to Slurm", " Slurm ended the job.")
    assert next_of(end(75, 5), [], late)[0] == "requeued"
    assert next_of(end(75, 5), [end(75, 5)] * 2, late)[0] == "not requeued"
    assert next_of(end(0, 5), [], late)[0] == "done"


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
    (tmp_path / "state").write_text("RUNNING")
    (tmp_path / "run").mkdir()
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1"}

    def start(text):
        words = [sys.executable, "-m", "pipeline", "batch", str(tmp_path / "run"), "--", "sh", "-c", text]
        return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def told(tmp_path):
    asked = tmp_path / "asked"
    return events(tmp_path / "run")[-1], asked.read_text() if asked.exists() else ""


def test_a_rank_s_own_words_are_the_log_s_last(attend, tmp_path):
    failure = '{"rank": 1, "exit_code": 2, "message": "error: data.jsonl:3: not JSON.", "time": 1.0, "echo": false}'
    process = attend(f"echo '{failure}' > $ZLORA_REPORTS/failure.1; exit 137")
    out, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (2, "")
    assert out.splitlines()[-1].endswith("error: data.jsonl:3: not JSON. Exit code 2: not requeued.")
    assert told(tmp_path) == (Ended("7", 0, 2, "error: data.jsonl:3: not JSON.", 0, "not requeued"), "")


def test_the_warning_is_passed_on_and_the_job_goes_back(attend, tmp_path):
    (tmp_path / "run" / "state" / "step-12").mkdir(parents=True)
    process = attend(f"trap 'exit 75' USR1; touch {tmp_path}/up; while :; do sleep 0.05; done")
    while not (tmp_path / "up").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert told(tmp_path) == (Ended("7", 0, 75, "Stopped on request; everything is saved.", 12, "requeued"), "requeue 7\n")


def test_a_cancelled_job_does_not_go_back(attend, tmp_path):
    process = attend(f"trap 'exit 75' TERM; touch {tmp_path}/up; while :; do sleep 0.05; done")
    while not (tmp_path / "up").exists():
        time.sleep(0.02)
    (tmp_path / "state").write_text("CANCELLED")
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
