"""The end of a batch script: runs the ranks' step, passes the warning on, writes down how it ended, and comes back where that helps.

Ranks tell why they end in files of the run folder; srun's own exit code is the largest of all, which is rarely the cause.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.cluster import queue
from pipeline.cluster.failures import REPORTS, cause, reported
from pipeline.cluster.record import Began, Cancelled, Ended, Event, Refused, Then, events, newest_step, note
from pipeline.cluster.stop import STOPPED
from pipeline.cluster.watchdog import RANK_FAILED
from pipeline.job.errors import JobError

IN_A_ROW = {RANK_FAILED: 3, STOPPED: 10}
"""So many ends of that kind in a row without a newer saved state are the last: the job would go round for ever."""
WARNING = signal.SIGUSR1
_SIGNALLED = 128


@dataclass(frozen=True)
class End:
    exit_code: int
    why: str


def attend(run: Path, command: list[str]) -> int:
    """Runs a command, srun with all ranks, inside a Slurm job. Returns the exit code for the batch script.

    Args:
        run: the run folder, where the record is.
    """
    job, restart = _job(), int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    if job is None:
        raise JobError("zlora batch: is what a batch script ends with, and this is no Slurm job. Use zlora submit, or zlora train here.")
    if not run.is_dir():
        raise JobError(f"{run}: this node does not see the run folder. Put it on a file system that all nodes share.")
    if Cancelled(job) in events(run):
        _say(f"job {job}: was cancelled.")
        return STOPPED
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    note(run, Began(job, restart, nodes))
    _say(f"job {job}{f', started again ({restart})' if restart else ''}, on {nodes}")
    reports = run / "slurm" / f".reports-{job}-{restart}"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir(parents=True)
    try:
        code, came = _watch(command, {**os.environ, REPORTS: str(reports)})
        told = reported(reports)
    finally:
        shutil.rmtree(reports, ignore_errors=True)
    first = cause(list(told.values())) if told else None
    end = judged(code, came[WARNING], End(first.exit_code, first.message) if first else None)
    known = queue.queued(job) if came[signal.SIGTERM] else None
    ended = Ended(job, restart, end.exit_code, end.why, newest_step(run), "done")
    then, more = next_of(ended, events(run), known)
    why = f"{end.why.rstrip('.')}.{more}"
    note(run, replace(ended, why=why, then=then))
    _say(f"{why} Exit code {end.exit_code}: {then}.")
    # Slurm may have begun to end the job meanwhile, and asks nobody then.
    if then == "requeued" and (refused := queue.requeue(job)) and not came[signal.SIGTERM]:
        note(run, Refused(job, refused))
        _say(f"it is not requeued: {refused}")
    return end.exit_code


def _job() -> str | None:
    """As Slurm's commands take it: of an array's job the array's number and its own in it."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def judged(code: int, warned: bool, told: End | None) -> End:
    """How a step ended.

    Args:
        code: srun's.
        warned: the ranks were asked to leave.
        told: what the ranks gave as the cause, if any did.
    """
    if told:
        return told
    if code == 0:
        return End(0, "Done.")
    if code > _SIGNALLED and warned:
        return End(STOPPED, "Asked to leave while it started; nothing is lost.")
    if code > _SIGNALLED:
        return End(RANK_FAILED, _lost(code))
    return End(code, "The ranks said no more than their log does." if code != STOPPED else "Stopped on request; everything is saved.")


def next_of(ended: Ended, before: list[Event], known: queue.Queued | None) -> tuple[Then, str]:
    """What becomes of the job, and what a person should know about it.

    Args:
        before: the run's record so far.
        known: how Slurm sees it, where Slurm ends the job itself: it was cancelled, preempted, out of time, or lost a node.
    """
    if ended.exit_code == 0:
        return "done", ""
    # Out of time: the warning came too late, or was not answered in time.
    late = known is not None and known.reason == "TimeLimit"
    kind = RANK_FAILED if late else ended.exit_code
    if known and not late:
        return "left to Slurm", " Slurm ended the job."
    if Cancelled(ended.job) in before:
        return "not requeued", " The job was cancelled."
    if kind not in IN_A_ROW:
        return "not requeued", ""
    times = 1
    for event in reversed(before):
        # Other jobs, what comes after training, write into the same record.
        if isinstance(event, Ended) and event.job == ended.job:
            if (event.exit_code, event.step) != (ended.exit_code, ended.step):
                break
            times += 1
    if times >= IN_A_ROW[kind]:
        return "not requeued", f" So it ended {times} times in a row without a newer saved state."
    return "requeued", ""


def _watch(command: list[str], environment: dict[str, str]) -> tuple[int, dict[int, bool]]:
    """The command's exit code as a shell has it, and which signals have come so far: the warning, and the one by which Slurm ends a job."""
    came: dict[int, bool] = {WARNING: False, signal.SIGTERM: False}
    started: list[subprocess.Popen[bytes]] = []

    def on_signal(number: int, _: object) -> None:
        came[number] = True
        if number == WARNING and started and started[0].poll() is None:
            # srun hands it to all ranks. Slurm itself sends them the SIGTERM.
            started[0].send_signal(WARNING)

    for number in came:
        signal.signal(number, on_signal)
    try:
        started.append(subprocess.Popen(command, env=environment))
    except OSError as error:
        raise JobError(f"{command[0]}: {error.strerror}. A batch script runs its ranks by srun.") from None
    if came[WARNING]:
        started[0].send_signal(WARNING)
    code = started[0].wait()
    return code if code >= 0 else _SIGNALLED - code, came


def _lost(code: int) -> str:
    try:
        name = signal.Signals(code - _SIGNALLED).name
    except ValueError:
        return f"srun could not start or keep all ranks (its exit code {code}; it says why above)."
    return f"A rank was ended by {name}.{' Out of memory is the usual cause.' if name == 'SIGKILL' else ''}"


def _say(text: str) -> None:
    print(f"zlora {time.strftime('%Y-%m-%d %H:%M:%S')}: {text}", flush=True)
