"""Watching and cancelling jobs of a real Slurm."""

from __future__ import annotations

import threading
import time

import pytest

from pipeline.cluster.record import Ended, Submitted, events, newest_step
from pipeline.commands import watch as door
from pipeline.watch import cancel as cancel_module
from pipeline.watch import logs as logs_module
from pipeline.watch.cancel import cancel
from pipeline.watch.logs import follow, logs_of
from pipeline.watch.status import statuses
from tests.cluster.submitting import ended, instead, log, steps_taken, submitted, wait_for
from tests.training import write_job

COURSE = ("train.steps=400", "train.save_every_steps=100")


@pytest.fixture(scope="module")
def place(slurm, gpt2_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    write_job(folder, gpt2_base)
    return folder


def status(run):
    (found,), notes = statuses([run])
    assert notes == []
    return found


def test_a_job_is_seen_waiting_running_and_cancelled_with_its_state_saved(slurm, place, monkeypatch):
    run = place / "watched"
    job = submitted(place, "watched", "cluster.ranks_per_node=1", *COURSE, nodes="node1", step_s=0.1, hold=True)
    found = status(run)
    assert (found.state, found.words, found.job, found.step) == ("waiting", "waits since the user holds it (scontrol release)", job, 0)
    slurm.run("scontrol", "release", job)
    for name in ("_POLL_S", "_ASK_S"):
        monkeypatch.setattr(logs_module, name, 0.2)
    followed = []
    reader = threading.Thread(target=lambda: followed.extend(follow(logs_of(run, None)[0])))
    reader.start()
    wait_for(lambda: steps_taken(run) > 5, "steps")
    wait_for(lambda: status(run).steps == 400, "the number of steps", 20)
    found = status(run)
    assert (found.state, found.nodes, found.restarts) == ("running", "node1", 0)
    assert found.left_s > 1
    said = []
    (told,) = cancel([run], False, said.append)
    step = newest_step(run)
    assert told == f"{run}: job {job} cancelled; saved at step {step}"
    assert step % 100, "saved for this"
    assert step == steps_taken(run)
    assert said == [f"{run}: job {job} is asked to save, and has 120 s for it"]
    assert [event.then for event in events(run) if isinstance(event, Ended)] == ["not requeued"]
    assert ended(slurm, job) in ("FAILED", "CANCELLED")
    assert slurm.state(job)["Restarts"] == "0"
    found = status(run)
    assert (found.state, found.words, found.saved_step) == ("cancelled", "cancelled by the user", step)
    assert found.why == f"Stopped by SIGUSR1 after step {step} of 400; everything is saved. It was cancelled. Submitted again, it goes on."
    reader.join(20)
    assert not reader.is_alive()
    assert b"".join(followed).decode() == log(run)
    assert cancel([run], False, said.append) == [f"{run}: no job of it is in the queue"]
    again = submitted(place, "watched", "cluster.ranks_per_node=1", *COURSE[1:], f"train.steps={step + 3}", nodes="node1")
    assert ended(slurm, again) == "COMPLETED", log(run)
    assert status(run).words == "finished"


def test_what_waits_is_taken_out_and_now_does_not_wait(slurm, place):
    run = place / "waiting"
    job = submitted(place, "waiting", "cluster.ranks_per_node=1", *COURSE, hold=True)
    assert cancel([run], False, print) == [f"{run}: job {job} (train) cancelled"]
    assert ended(slurm, job) == "CANCELLED"
    assert status(run).state == "cancelled"
    run = place / "now"
    job = submitted(place, "now", "cluster.ranks_per_node=1", instead(place, "sleep 60"), nodes="node2")
    wait_for(lambda: status(run).state == "running", "its start")
    begun = time.monotonic()
    cancel([run], True, print)
    assert ended(slurm, job) == "CANCELLED"
    assert time.monotonic() - begun < 15
    assert status(run).words == "cancelled by the user"


def test_who_does_not_answer_is_cancelled_all_the_same(slurm, place, monkeypatch, capsys):
    run, up = place / "deaf", place / "up"
    deaf = instead(place, f"""sh -c 'trap "" USR1; touch {up}; sleep 90'""")
    job = submitted(place, "deaf", "cluster.ranks_per_node=1", "cluster.warn_s=60", deaf, nodes="node2")
    (submission,) = (event for event in events(run) if isinstance(event, Submitted))
    assert cancel_module._patience_s(run, submission) == 60
    wait_for(up.exists, "its start")
    monkeypatch.setattr(cancel_module, "_patience_s", lambda *_: 3)
    door.cancel([run])
    shown = capsys.readouterr()
    assert "is asked to save, and has 3 s for it" in shown.err
    assert "nothing is saved" in shown.out
    assert ended(slurm, job) == "CANCELLED"
    assert status(run).words == "cancelled by the user"
