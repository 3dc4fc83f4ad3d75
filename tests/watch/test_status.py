"""`zlora status` and `zlora logs` without a Slurm: local runs, large files, what a killed process leaves."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.cluster.record import Began, Ended, Submitted, note
from pipeline.job.errors import JobError
from pipeline.runs.folder import LOCK, Hold
from pipeline.watch import logs as logs_module
from pipeline.watch.logs import Log, follow, logs_of
from pipeline.watch.status import find_runs, statuses, tail_rows
from pipeline.watch.table import duration, table
from tests.lives import Life
from tests.training import write_job
from tests.whole.test_kill import wait_until

ROOT = Path(__file__).parents[2]


def place(run, rank=0, phase="backward", step=9, steps=20, since=1000.0):
    (run / "logs").mkdir(parents=True, exist_ok=True)
    values = {"rank": rank, "host": "here", "pid": 1, "step": step, "phase": phase, "since": since, "steps": steps}
    (run / "logs" / f"rank{rank}.json").write_text(json.dumps(values).ljust(256))


def metrics(run, count=8, step_s=0.5):
    rows = [{"step": n + 1, "loss": 2.0 - n / 10, "tokens": 100, "step_s": step_s} for n in range(count)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"step": count, "split": "valid", "loss": 9.0}])) + '\n{"st')


def status(run):
    (found,), notes = statuses([run])
    assert notes == []
    return found


def test_a_training_of_this_machine_from_its_first_to_its_last_word(gpt2_base, tmp_path):
    job, run = write_job(tmp_path, gpt2_base), tmp_path / "runs" / "mine"
    training = Life(job, run, ("train.epochs=100",), count=1)
    wait_until(lambda: tail_rows(run / "metrics.jsonl"), training)
    while not (now := status(run)).left_s:
        time.sleep(0.1)
    assert (now.state, now.steps, now.job, now.restarts) == ("running", 400, None, 0), "of epochs too"
    assert now.words.startswith("running: ")
    assert now.tokens_per_s > 0
    training.signal(0, signal.SIGTERM)
    assert training.end() == [75]
    now = status(run)
    assert (now.state, now.words) == ("stopped", "stopped, saved")
    assert now.saved_step == now.step
    assert now.saved_age_s < 60
    assert Life(job, run, (f"train.steps={now.step}",), count=1).end() == [0]
    assert (status(run).state, status(run).step) == ("finished", now.step)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    command = "import sys; from pipeline.cli import main\ntry: main()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", command, "status"], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stderr.strip()) == (0, "False")
    assert "runs/mine" in done.stdout
    assert f"{now.step} / {now.step}" in done.stdout
    asked = subprocess.run(
        [sys.executable, "-m", "pipeline", "status", "--json"], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    (only,) = json.loads(asked.stdout)["runs"]
    assert (only["run"], only["state"]) == ("runs/mine", "finished")


@pytest.mark.parametrize(
    ("phases", "state", "words"),
    [
        (["ended with exit code 4", "ended with exit code 4"], "failed", "diverged"),
        (["ended with exit code 76", "ended with exit code 2"], "failed", "a mistake in the job"),
        (["ended with exit code 76", "backward"], "failed", "a rank was killed, lost or hung"),
        (["ended with exit code 1"], "failed", "a fault of zlora's"),
        (["backward"], "stopped", "ended without a word: killed, or its machine went down"),
    ],
)
def test_how_a_local_run_ended(phases, state, words, tmp_path):
    for rank, phase in enumerate(phases):
        place(tmp_path, rank, phase)
    metrics(tmp_path)
    found = status(tmp_path)
    assert (found.state, found.words) == (state, words)
    assert (found.step, found.steps, found.loss, found.tokens_per_s, found.left_s) == (8, 20, 1.3, 200.0, None)


def test_somebody_who_looks_does_not_keep_training_away(tmp_path):
    (tmp_path / LOCK).touch()
    looking = os.open(tmp_path / LOCK, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    threading.Timer(0.05, os.close, [looking]).start()
    hold = Hold(tmp_path)
    place(tmp_path)
    assert status(tmp_path).words == "running: backward"
    hold.release()
    assert status(tmp_path).state == "stopped"


def test_only_the_end_of_a_large_file_is_read(tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    row = json.dumps({"step": 1, "loss": 1.0, "tokens": 1, "step_s": 1.0, "more": "x" * 1000}) + "\n"
    with file.open("w") as out:
        out.write(row * 50_000)
        out.write('{"step": 2, "loss": 0.5, "tokens": 1, "step_s": 1.0}\n')
    begun = time.perf_counter()
    rows = tail_rows(file)
    assert time.perf_counter() - begun < 0.1
    assert rows[-1]["loss"] == 0.5
    assert len(rows) < 100
    assert tail_rows(tmp_path / "none") == []


def test_without_slurm_the_record_speaks_and_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    note(tmp_path, Submitted("7", "slurm/1.sbatch", "t", "0", "0", 1, 1, ()))
    note(tmp_path, Began("7", 0, "node[1-2]"))
    note(tmp_path, Ended("7", 0, 4, "diverged: [loss] is nan", 5, "not requeued"))
    (found,), (said,) = statuses([tmp_path])
    assert (found.words, found.why, found.nodes) == ("diverged", "diverged: [loss] is nan", "node[1-2]")
    assert said.startswith("squeue: there is no such program here.")


def test_runs_are_found_and_a_folder_without_any_is_named(tmp_path):
    for name in ("b", "a", "sweep/rank=4", "sweep/rank=8"):
        place(tmp_path / name)
    (tmp_path / "empty").mkdir()
    assert [str(run.relative_to(tmp_path)) for run in find_runs([tmp_path])] == ["a", "b", "sweep/rank=4", "sweep/rank=8"]
    assert find_runs([tmp_path / "a", tmp_path]) == find_runs([tmp_path])
    with pytest.raises(JobError, match=r"empty: there is no run in it. Name a run folder"):
        find_runs([tmp_path / "empty"])


def test_times_are_for_people():
    assert [duration(each) for each in (0.2, 59, 3599, 3600, 90000, 200000)] == [
        "0 s",
        "59 s",
        "59 min",
        "1 h 00 min",
        "1 d 1 h",
        "2 d 7 h",
    ]
    assert table([])


def test_a_log_is_followed_until_the_job_is_over(tmp_path, monkeypatch):
    for name in ("_POLL_S", "_ASK_S"):
        monkeypatch.setattr(logs_module, name, 0.02)
    file, alive = tmp_path / "7.txt", [True]

    def writes():
        time.sleep(0.1)
        file.write_text("one\n")
        time.sleep(0.1)
        with file.open("a") as out:
            out.write("two\n")
        time.sleep(0.1)
        file.write_text("3\n")  # anew
        alive[0] = False

    threading.Thread(target=writes).start()
    assert b"".join(follow(Log(file, lambda: alive[0]))) == b"one\ntwo\n3\n"


def test_which_logs_there_are(tmp_path):
    with pytest.raises(JobError, match="there is no such run folder"):
        logs_of(tmp_path / "none", None)
    with pytest.raises(JobError, match="has no log yet"):
        logs_of(tmp_path, None)
    (tmp_path / "logs").mkdir()
    for rank, text in ((0, "noise"), (1, ""), (10, "noise"), (2, "noise")):
        (tmp_path / "logs" / f"rank{rank}.txt").write_text(text)
    assert [log.file.name for log in logs_of(tmp_path, None)] == ["rank0.txt", "rank2.txt", "rank10.txt"]
    note(tmp_path, Submitted("7", "slurm/1.sbatch", "t", "0", "0", 1, 1, (), log="slurm/7.txt"))
    assert logs_of(tmp_path, None)[0].file == tmp_path / "slurm" / "7.txt"
    assert [log.file.name for log in logs_of(tmp_path, 3)] == ["rank3.txt"]
