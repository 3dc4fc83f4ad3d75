"""How a run stands, from records and squeue's answers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.cluster import queue
from pipeline.cluster.queue import Listed, listed
from pipeline.cluster.record import Began, Cancelled, Ended, Refused, Submitted, Told
from pipeline.cluster.standing import restarts, standing
from pipeline.job.errors import JobError

SUBMITTED = Submitted("7", "slurm/1.sbatch", "t", "0", "0", 1, 1, ())
BEGAN = Began("7", 0, "node1")
ANSWER = """7|RUNNING|node[1,3-5]|1-02:03:04|None
8|PENDING||4:00:00|ReqNodeNotAvail, UnavailableNodes:node7
9_0|COMPLETED|node2|0:00|None
9_1|CANCELLED||4:00|DependencyNeverSatisfied
"""


def end(code, why="", then="not requeued", restart=0, cause=""):
    return Ended("7", restart, code, why, 5, then, cause)


def known(state, reason="None"):
    return Listed("7", state, reason, "node1", "1:00")


@pytest.mark.parametrize(
    ("record", "queue", "state", "words"),
    [
        ([SUBMITTED], known("PENDING", "Resources"), "waiting", "waits for resources"),
        ([SUBMITTED], known("PENDING", "QOSMaxGRESPerUser"), "waiting", "waits at a limit of your account (QOSMaxGRESPerUser)"),
        ([SUBMITTED], known("PENDING", "SomethingNew"), "waiting", "waits (SomethingNew)"),
        ([SUBMITTED, BEGAN], known("RUNNING"), "running", "running"),
        (
            [SUBMITTED, BEGAN, end(75, "Stopped by SIGUSR1 after step 5.", "requeued", cause="time limit")],
            known("PENDING", "BeginTime"),
            "waiting",
            "waits to go on (time limit) a moment, to start again",
        ),
        (
            [SUBMITTED, BEGAN, end(75, "Stopped by SIGTERM after step 5.", "left to Slurm", cause="preempted")],
            known("PENDING", "Priority"),
            "waiting",
            "waits to go on (preempted) behind jobs of higher priority",
        ),
        ([SUBMITTED, BEGAN], known("PENDING", "Resources"), "waiting", "waits to go on (a node failed) for resources"),
        ([SUBMITTED, BEGAN], known("NODE_FAIL"), "stopped", "a node failed"),
        ([SUBMITTED, BEGAN], known("OUT_OF_MEMORY"), "stopped", "out of memory"),
        ([SUBMITTED, BEGAN], known("PREEMPTED"), "stopped", "preempted"),
        ([SUBMITTED, BEGAN], known("TIMEOUT"), "stopped", "out of time"),
        ([SUBMITTED], known("CANCELLED", "DependencyNeverSatisfied"), "cancelled", "the job before it has failed"),
        ([SUBMITTED, BEGAN, end(75, "Stopped by SIGTERM", "left to Slurm")], known("CANCELLED"), "cancelled", "cancelled by the user"),
        ([SUBMITTED, BEGAN, Cancelled("7"), end(75)], known("FAILED"), "cancelled", "cancelled by the user"),
        ([SUBMITTED, BEGAN, end(0, "Done.", "done")], None, "finished", "finished"),
        ([SUBMITTED, BEGAN, end(4, "diverged: loss nan")], known("FAILED", "NonZeroExitCode"), "failed", "diverged"),
        ([SUBMITTED, BEGAN, end(2, "error: no such file")], None, "failed", "a mistake in the job"),
        ([SUBMITTED, BEGAN, end(1, "rank 0 failed: OutOfMemoryError('CUDA out of memory')")], None, "failed", "out of memory"),
        ([SUBMITTED, BEGAN, end(76, "A rank was ended by SIGBUS.")], None, "failed", "a rank was killed, lost or hung"),
        ([SUBMITTED, BEGAN, end(75, "x", "requeued"), Began("7", 1, "node2")], None, "stopped", "lost with a node"),
        ([SUBMITTED, BEGAN, Told("7", 0, "SIGTERM", "cancelled")], None, "cancelled", "cancelled by the user"),
        ([SUBMITTED, BEGAN, Told("7", 0, "SIGTERM", "preempted")], None, "stopped", "preempted"),
        ([SUBMITTED, BEGAN, Told("7", 0, "SIGTERM", "preempted"), Began("7", 1, "node2")], None, "stopped", "lost with a node"),
        ([SUBMITTED, BEGAN, end(75, "x", "left to Slurm", cause="cancelled")], None, "cancelled", "cancelled by the user"),
        ([SUBMITTED, BEGAN, end(76, "x", "left to Slurm", cause="requeued")], None, "stopped", "preempted, or a node failed"),
        (
            [SUBMITTED, BEGAN, end(76, "Lost.", "left to Slurm", cause="requeued")],
            known("PENDING", "BeginTime"),
            "waiting",
            "waits to go on (preempted, or a node failed) a moment, to start again",
        ),
        ([SUBMITTED], None, "stopped", "not in the queue any more"),
        ([BEGAN], known("RUNNING"), "running", "running"),
    ],
)
def test_what_happened_is_said_in_words(record, queue, state, words):
    found = standing(record, queue)
    assert (found.state, found.words) == (state, words)


def test_only_training_counts_and_the_newest_of_it():
    assert standing([], None) is None
    after = Submitted("8", "slurm/1.evaluate.sbatch", "t", "0", "0", 1, 1, (), kind="evaluate")
    record = [SUBMITTED, BEGAN, end(0), after, Began("8", 0, "node1"), Ended("8", 0, 2, "no test split", 5, "not requeued")]
    assert standing(record, None).state == "finished"
    assert restarts(record) == 0
    assert standing(record, None, "evaluate").words == "a mistake in the job"
    assert standing(record, None, "merge") is None
    # It was taken out of the queue when training had failed, and Slurm has forgotten both.
    gone = [SUBMITTED, replace(SUBMITTED, job="8", kind="merge"), BEGAN, end(4, "diverged")]
    assert standing(gone, None, "merge").words == "the job before it has failed"
    again = Submitted("9", "slurm/2.sbatch", "t", "0", "0", 1, 1, ())
    assert standing([*record, again], Listed("9", "PENDING", "Priority", "", "")).state == "waiting"
    assert restarts([*record, again, Began("9", 0, "a"), Began("9", 1, "a")]) == 2
    refused = [SUBMITTED, BEGAN, end(76, "Lost.", "requeued"), Refused("7", "Requested operation is disabled")]
    assert standing(refused, known("FAILED")).why == "Lost. Slurm did not take it back: Requested operation is disabled"


def commands(folder, monkeypatch, text):
    (folder / "squeue").write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\n{text}\n')
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_one_call_asks_for_all(tmp_path, monkeypatch):
    (tmp_path / "answer").write_text(ANSWER)
    commands(tmp_path, monkeypatch, f"cat {tmp_path}/answer")
    found = listed(["9_1", "7", "8", "9_0", "7"])
    assert found["7"] == Listed("7", "RUNNING", "None", "node[1,3-5]", "1-02:03:04")
    assert found["8"].reason == "ReqNodeNotAvail, UnavailableNodes:node7"
    assert [job for job, each in found.items() if each.over] == ["9_0", "9_1"]
    (asked,) = (tmp_path / "asked").read_text().splitlines()
    assert "--jobs=7,8,9_0,9_1" in asked
    assert listed([]) == {}


def test_a_job_that_slurm_has_forgotten_is_not_known_and_no_answer_is_an_error(tmp_path, monkeypatch):
    commands(tmp_path, monkeypatch, 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')
    assert listed(["7"]) == {}
    commands(tmp_path, monkeypatch, 'echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1')
    with pytest.raises(JobError, match="Unable to contact slurm controller"):
        listed(["7"])
    monkeypatch.setattr(queue, "_PATIENCE_S", 0.2)
    commands(tmp_path, monkeypatch, "exec sleep 5")
    with pytest.raises(JobError, match=r"no answer within 0.2 s"):
        listed(["7"])


def test_a_job_that_has_just_ended_may_be_cancelled(tmp_path, monkeypatch):
    for text in ("exit 229", 'echo "scancel: error: Kill job error on job id 7: Job/step already completing or completed" >&2; exit 1'):
        (tmp_path / "scancel").write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "scancel").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        queue.cancel("7")
        queue.ask_to_save("7")
    (tmp_path / "scancel").write_text('#!/bin/sh\necho "scancel: error: Kill job error on job id 7: Access denied" >&2; exit 1\n')
    with pytest.raises(JobError, match="Access denied"):
        queue.cancel("7")
