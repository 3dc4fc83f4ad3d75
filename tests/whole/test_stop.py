"""Requests to stop, a hung rank, two trainings in one folder, a full disk: with real processes, signals and file systems."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.lives import Life
from tests.training import read_run, trained, write_examples, write_job
from tests.whole.test_commands import ENVIRONMENT, NOISE
from tests.whole.test_kill import steps_done, wait_until

LONG = ("train.steps=100000", "train.save_every_steps=100000")


@pytest.fixture
def job(gpt2_base, tmp_path):
    return write_job(tmp_path, gpt2_base)


def states(run):
    return sorted(int(p.name[5:]) for p in (run / "state").glob("step-*"))


def began(job, run, steps=3, overrides=LONG, **options):
    """A life that has taken some steps."""
    life = Life(job, run, overrides, **options)
    wait_until(lambda: steps_done(run) >= steps, life)
    return life


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_to_any_one_rank_stops_all_within_a_step_and_saves(name, rank, job, tmp_path):
    run = tmp_path / "run"
    life = began(job, run)
    seen = steps_done(run)
    life.signal(rank, signal.Signals[name])
    assert life.end(20) == [75, 75]
    said = life.said.read_text()
    last = read_run_steps(run)
    # One step may be written down between looking and the signal's arrival.
    assert last - seen <= 3
    assert states(run) == [last]
    by = {"SIGINT": " by Ctrl-C"}.get(name, f" by {name}") if rank == 0 else ""
    assert said.count("everything is saved") == 1, "one rank says it"
    assert f"Stopped{by} after step {last:,} of 100,000; everything is saved. To go on: the same command again, without --fresh" in said
    assert json.loads((run / "delta" / "manifest.json").read_text())["step"] == last


def read_run_steps(run):
    return [row["step"] for row in read_run(run).steps][-1]


def test_signals_in_quick_succession_do_no_harm(job, tmp_path):
    run = tmp_path / "run"
    life = began(job, run, slow_disk_s=0.05)
    for _ in range(20):
        for rank in (0, 1):
            for name in (signal.SIGTERM, signal.SIGUSR1):
                if life.ranks[rank].is_alive():
                    life.signal(rank, name)
        time.sleep(0.02)
    assert life.end(20) == [75, 75]
    assert states(run) == [read_run_steps(run)]
    life = began(job, run, steps=read_run_steps(run) + 2)
    life.signal(0, signal.SIGTERM)
    assert life.end(20) == [75, 75]


def test_the_signals_are_the_jobs(job, tmp_path):
    run = tmp_path / "run"
    life = began(job, run, overrides=(*LONG, 'train.stop_signals=["SIGUSR2"]'))
    life.signal(1, signal.SIGUSR2)
    assert life.end(20) == [75, 75]
    life = began(job, run, steps=steps_done(run) + 2, overrides=(*LONG, 'train.stop_signals=["SIGUSR2"]'))
    life.signal(1, signal.SIGTERM)  # has its usual meaning now
    assert life.end(20)[1] == -signal.SIGTERM


def test_a_request_before_the_first_step_ends_it_at_once(job, tmp_path):
    life = Life(job, tmp_path / "run", LONG)
    wait_until(lambda: len(list((tmp_path / "run" / "logs").glob("rank*.txt"))) == 2, life)
    for rank in (0, 1):
        life.signal(rank, signal.SIGTERM)
    assert life.end(20) == [75, 75]
    assert re.search("Stopped by SIGTERM (before the first step; nothing is lost|after step)", life.said.read_text())


def test_a_hung_rank_ends_the_run_and_every_ranks_place_is_told(job, tmp_path):
    run = tmp_path / "run"
    life = began(job, run, overrides=(*LONG, "train.timeout_s=2"), count=3)
    life.signal(1, signal.SIGSTOP)
    start = time.monotonic()
    while life.ranks[0].is_alive() and time.monotonic() - start < 30:
        time.sleep(0.1)
    assert time.monotonic() - start < 20
    codes = life.end(1)
    assert codes[0] == codes[2] == 76
    said = life.said.read_text()
    step = steps_done(run)
    assert "no progress for 2 s on rank " in said
    for rank in (0, 1, 2):
        place = re.search(rf"rank {rank} on \S+: step (\d+), ([a-z- 0-9]+), for \d+ s", said)
        assert place, said
        # What a rank that cannot speak has said last is a beat old.
        assert int(place[1]) in ((step, step + 1) if rank != 1 else range(step + 2))
    assert "Thread 0x" in (run / "logs" / "rank0.txt").read_text(), "what each was executing is in the logs"
    shutil.rmtree(run)
    life = began(job, run)
    life.signal(0, signal.SIGTERM)
    assert life.end(20) == [75, 75]


def test_a_suspended_run_goes_on_when_it_is_resumed(job, tmp_path):
    run = tmp_path / "run"
    life = began(job, run, overrides=(*LONG, "train.timeout_s=2"))
    for rank in (0, 1):
        life.signal(rank, signal.SIGSTOP)
    time.sleep(5)
    for rank in (0, 1):
        life.signal(rank, signal.SIGCONT)
    seen = steps_done(run)
    wait_until(lambda: steps_done(run) > seen + 100, life)
    life.signal(0, signal.SIGTERM)
    assert life.end(20) == [75, 75]


def test_the_watchdog_does_not_wait_for_a_dead_file_system(job, tmp_path):
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    for rank in (0, 1):
        os.mkfifo(run / "logs" / f"rank{rank}.json")  # nobody reads: whoever opens it to write waits for ever
    life = began(job, run, overrides=(*LONG, "train.timeout_s=2"))
    life.signal(1, signal.SIGSTOP)
    life.ranks[0].join(25)
    assert life.ranks[0].exitcode == 76
    life.end(0)


def test_a_run_that_diverges_tells_it_when_everything_is_saved(job, tmp_path):
    run = tmp_path / "run"
    settings = ("train.steps=50", "train.save_every_steps=1", "train.learning_rate=1e38", "train.clip_norm=0")
    life = Life(job, run, settings, slow_disk_s=0.3)
    assert life.end(60) == [4, 4]
    said = life.said.read_text()
    assert said.count("diverged: step ") == 1
    assert "it was first in step " in said
    assert states(run)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_a_run_may_be_ended_while_it_ends(name, job, ranks2, tmp_path):
    """After the last step, while it is being scored, saved and concluded."""
    write_examples(tmp_path / "valid.jsonl", 8)
    job.write_text(job.read_text().replace("[train]", f'valid = "{tmp_path / "valid.jsonl"}"\n[train]'))
    run, settings = tmp_path / "run", ("train.steps=4", "evaluate.max_new_tokens=20")
    codes = []
    for pause in range(9):
        life = Life(job, run, settings, slow_disk_s=0.02)
        while life.alive and steps_done(run) < 4:
            time.sleep(0.002)
        time.sleep(0.04 * pause)
        for rank in (0, 1):
            if life.ranks[rank].is_alive():
                life.signal(rank, signal.Signals[name])
        codes += life.end(20)
    assert set(codes) <= {0, 75, 76, -signal.Signals[name]}, codes
    assert Life(job, run, settings).end(60) == [0, 0]
    trained(ranks2, job, tmp_path / "whole", *settings)
    for file in (tmp_path / "whole" / "delta").iterdir():
        assert (run / "delta" / file.name).read_bytes() == file.read_bytes()
    ours, theirs = (json.loads((folder / "result.json").read_text()) for folder in (run, tmp_path / "whole"))
    assert ours["valid"] == theirs["valid"]


def test_a_second_training_in_a_folder_is_refused_and_a_dead_ones_lock_is_taken_over(job, tmp_path):
    run = tmp_path / "run"
    first = began(job, run)
    before = {p.name for p in run.iterdir()}
    second = Life(job, run, LONG)
    second.ranks[0].join(20)
    assert second.ranks[0].exitcode == 2
    assert re.search(rf"run: process {first.ranks[0].pid} on \S+ has been training here since 2.*--run", second.said.read_text())
    second.end(0)
    assert {p.name for p in run.iterdir()} == before
    first.kill(0)
    first.end(20)
    third = began(job, run, steps=steps_done(run) + 2)
    third.signal(0, signal.SIGTERM)
    assert third.end(20) == [75, 75]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 2 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_ends_the_run_in_a_line_and_it_goes_on_when_there_is_room(job, ranks2, small_disk, tmp_path):
    run, settings = small_disk / "run", ("train.steps=120", "train.save_every_steps=5")
    life = began(job, run, steps=20, overrides=settings)
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError:
            pass
    life.ranks[0].join(30)
    assert life.ranks[0].exitcode == 2, life.said.read_text()
    life.end(5)
    said = [line for line in life.said.read_text().splitlines() if line.startswith("error:")]
    assert len(said) == 1
    assert re.fullmatch(r"error: \S+: No space left on device. Make room or choose another place, then run again.", said[0]), said
    kept = states(run)
    assert kept
    ballast.unlink()
    assert Life(job, run, settings).end(60) == [0, 0]
    assert [row["step"] for row in read_run(run).steps] == list(range(1, 121))
    theirs = trained(ranks2, job, tmp_path / "whole", *settings)
    assert read_run(run).losses == theirs.losses


def test_a_folder_that_cannot_be_written_is_one_line(job, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    done = zlora("train", job, "--run", small_disk / "run", cwd=small_disk.parent)
    assert done.returncode == 2
    assert re.fullmatch(r"error: \S+run\S*: Read-only file system. .*\n", done.stderr), done.stderr


def zlora(*arguments, cwd, **options):
    command = [sys.executable, "-m", "pipeline", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, env=ENVIRONMENT, check=False, **options)


def started(job, run, *arguments):
    """The program as a person starts it, from a launcher with two ranks."""
    command = [sys.executable, "-m", "pipeline", "train", str(job), "--run", str(run), "--ranks", "2", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    deadline = time.monotonic() + 240
    while steps_done(run) < 2:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def test_ctrl_c_saves_whatever_signals_the_job_names(job, tmp_path):
    process = started(job, tmp_path / "run", "--set", "train.steps=100000", "--set", "train.stop_signals=[]")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert states(tmp_path / "run") == [read_run_steps(tmp_path / "run")]


def test_a_request_to_one_rank_while_it_starts_ends_all_with_75(job, tmp_path):
    command = [sys.executable, "-m", "pipeline", "train", str(job), "--run", str(tmp_path / "run"), "--ranks", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    deadline = time.monotonic() + 240
    while not (tmp_path / "run" / "logs" / "rank1.txt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(children[1]), signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "asked to stop" in errors or "Stopped" in errors


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"])
def test_the_launcher_passes_a_request_on_and_waits_for_the_save(name, job, tmp_path):
    process = started(job, tmp_path / "run", "--set", "train.steps=100000", "--fresh")
    process.send_signal(signal.Signals[name])
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    last = read_run_steps(tmp_path / "run")
    assert states(tmp_path / "run") == [last]
    lines = errors.strip().splitlines()
    assert lines[-1].startswith("Stopped")
    assert f"after step {last:,} of 100,000; everything is saved." in lines[-1]
    assert lines[-1].endswith(f"To go on: zlora train {job} --run {tmp_path / 'run'} --ranks 2 --set train.steps=100000"), "without --fresh"
    assert ("Ctrl-C once more" in errors) == (name == "SIGINT")
    assert not NOISE.search(errors), errors


def test_a_second_ctrl_c_ends_it_at_once(job, tmp_path):
    process = started(job, tmp_path / "run", "--set", "train.steps=100000")
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    for child in children:
        os.kill(int(child), signal.SIGSTOP)  # a step that takes for ever
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Stopped at once." in errors


def test_a_requeued_command_goes_on_with_its_own_run_even_with_fresh(job, ranks1, tmp_path, monkeypatch):
    def train(steps):
        done = zlora("train", job, "--set", f"train.steps={steps}", "--fresh", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    trained(ranks1, job, tmp_path / "runs" / "job", "train.steps=3")
    monkeypatch.setitem(ENVIRONMENT, "SLURM_JOB_ID", "4711")
    monkeypatch.setitem(ENVIRONMENT, "SLURM_RESTART_COUNT", "1")
    assert "goes on" not in train(4), "the run that is there is not this job's: it was stopped before it replaced it"
    assert "after step 4" in train(5)
    assert [row["step"] for row in read_run(tmp_path / "runs" / "job").steps] == [1, 2, 3, 4, 5]
