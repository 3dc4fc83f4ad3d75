"""Who works in a run folder, what gives way to a new run, and what never does."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import threading

import pytest

from pipeline.job.errors import JobError
from pipeline.runs import folder as run_folder
from pipeline.runs.folder import LOCK, WRITTEN, Hold, begun, clear, refuse_foreign, remove_if_empty_handed


@pytest.fixture
def run(tmp_path):
    """An earlier run beside somebody's own file."""
    for name in WRITTEN:
        if "." in name:
            (tmp_path / name).write_text("x")
        else:
            (tmp_path / name).mkdir()
            (tmp_path / name / "file").write_text("x")
    (tmp_path / "logs").mkdir()
    (tmp_path / "thesis.tex").write_text("years of work")
    return tmp_path


def test_a_run_is_known_from_its_first_file_to_its_last(run):
    refuse_foreign(run)
    for name in reversed(WRITTEN):
        assert begun(run)
        path = run / name
        if path.is_dir():
            (path / "file").unlink()
            path.rmdir()
        else:
            path.unlink()
        refuse_foreign(run)
    assert not begun(run)


def test_clearing_leaves_logs_and_foreign_files(run):
    clear(run)
    assert sorted(p.name for p in run.iterdir()) == ["logs", "thesis.tex"]


@pytest.mark.parametrize("name", ["job.toml", "delta", "state"])
def test_files_that_no_run_wrote_are_left_alone(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(JobError, match=rf"is not a run folder, but has a {name} that a run would write over. Use --run"):
        refuse_foreign(tmp_path)


def test_a_file_in_its_place_is_refused(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(JobError, match="run: is a file"):
        refuse_foreign(tmp_path / "run")


def test_a_failed_start_leaves_no_folder_but_keeps_anything_else(tmp_path):
    (tmp_path / "empty" / "logs").mkdir(parents=True)
    (tmp_path / "empty" / LOCK).touch()
    (tmp_path / "full" / "delta").mkdir(parents=True)
    (tmp_path / "mine" / "logs").mkdir(parents=True)
    (tmp_path / "mine" / "logs" / "notes.txt").touch()
    (tmp_path / "mine" / "logs" / "rank0.txt").touch()
    (tmp_path / "held" / "logs").mkdir(parents=True)
    hold = Hold(tmp_path / "held")
    for name in ("empty", "full", "mine", "held", "absent"):
        remove_if_empty_handed(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "held", "mine"]
    assert [p.name for p in (tmp_path / "mine" / "logs").iterdir()] == ["notes.txt"]
    hold.release()


def test_a_held_folder_names_its_holder(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    hold = Hold(tmp_path)
    with pytest.raises(JobError) as refused:
        Hold(tmp_path)
    assert re.search(rf"process {os.getpid()} on \S+ \(Slurm job 4711\) has been training here since 20\d\d-", str(refused.value))
    (tmp_path / LOCK).write_text("{")
    with pytest.raises(JobError, match="another process is training here"):
        Hold(tmp_path)
    hold.release()
    Hold(tmp_path).release()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_lock_that_another_machine_holds_may_be_a_dead_ones(tmp_path, monkeypatch, capsys):
    hold = Hold(tmp_path)
    (tmp_path / LOCK).write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "today", "slurm_job": None}))
    monkeypatch.setattr(run_folder, "_RETRY_S", 0.05)
    with pytest.raises(JobError, match="process 1 on elsewhere"):
        Hold(tmp_path, wait_s=0.2)
    assert "Waiting 0.2 s in case it died there" in capsys.readouterr().err
    threading.Timer(0.3, hold.release).start()
    Hold(tmp_path, wait_s=30).release()


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_again(tmp_path, monkeypatch):
    real, removed = fcntl.flock, []

    def flock(descriptor, how):
        real(descriptor, how)
        if not removed:
            removed.append(1)
            (tmp_path / LOCK).unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    hold = Hold(tmp_path)
    with pytest.raises(JobError, match="has been training here"):
        Hold(tmp_path)
    hold.release()


def test_a_file_system_without_locks_is_worked_on_and_told(tmp_path, monkeypatch):
    def flock(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    hold = Hold(tmp_path)
    assert not hold.shared
    hold.release()
