"""The end of a batch script: runs the ranks' step, passes the warning on, writes down how it ended, and comes back where that helps.

Ranks tell why they end in files of the run folder; srun's own exit code is the largest of all, which is rarely the cause.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.cluster import queue
from pipeline.cluster.failures import ATTENDED, REPORTS, cause, reported
from pipeline.cluster.record import Began, Cancelled, Cause, Ended, Event, Refused, Submitted, Then, Told, events, newest_step, note
from pipeline.cluster.stop import STOPPED
from pipeline.cluster.watchdog import RANK_FAILED
from pipeline.job.errors import JobError

IN_A_ROW = {RANK_FAILED: 3, STOPPED: 10}
"""So many ends of that kind in a row without a newer saved state are the last: the job would go round for ever."""
MOST_IN_A_ROW = 10
"""Quick failures may be more: until Slurm has had the time to take a node out that does not answer."""
_NOTICED_S = 30.0
"""It looks for such nodes no oftener, however short its patience is."""
WARNING = signal.SIGUSR1
_SIGNALLED = 128
_POLL_S = 1.0
_THEN: dict[Then, str] = {"requeued": "it goes back into the queue, and goes on"}
_BY_SLURM: dict[Cause, str] = {
    "preempted": "Another job takes its place.",
    "requeued": "Slurm starts it again.",
    "cancelled": "It was cancelled.",
}


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
    environment, came = {**os.environ, REPORTS: str(reports), ATTENDED: job}, list[int]()
    try:
        code, causes = _watch(command, environment, came, lambda number: asked(run, job, restart, number))
        told = reported(reports)
    finally:
        shutil.rmtree(reports, ignore_errors=True)
    first = cause(list(told.values())) if told else None
    by = causes.get(signal.SIGTERM) or causes.get(WARNING) or ""
    # Where a preemption has a GraceTime, Slurm asks the ranks alone.
    if code and not causes and (known := _known(job)) and known.preempted:
        by = "preempted"
    end = judged(code, bool(by), End(first.exit_code, first.message) if first else None)
    ended = Ended(job, restart, end.exit_code, end.why, newest_step(run), "done", by, time.time())
    patience_s = queue.patience_s() if end.exit_code == RANK_FAILED else 0.0
    then, more = next_of(ended, events(run), bool(causes.get(signal.SIGTERM)), patience_s)
    why = f"{end.why.rstrip('.')}.{more}"
    note(run, replace(ended, why=why, then=then))
    _say(f"{why} Exit code {end.exit_code}: {_THEN.get(then, then)}.")
    # Slurm may have begun to end the job meanwhile, and asks nobody then.
    if then == "requeued" and (refused := queue.requeue(job)) and signal.SIGTERM not in came:
        note(run, Refused(job, refused))
        _say(f"it is not requeued: {refused}")
    return end.exit_code


def _job() -> str | None:
    """As Slurm's commands take it: of an array's job the array's number and its own in it."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def asked(run: Path, job: str, restart: int, number: int) -> Cause:
    """Why that signal has come, as Slurm has it now. Written down at once: the script may be killed before it can say more."""
    found = why_asked(number, _known(job), restart, Cancelled(job) in events(run))
    with suppress(OSError):  # the ranks save meanwhile, and that counts
        note(run, Told(job, restart, signal.Signals(number).name, found))
    return found


def _known(job: str) -> queue.Shown | None:
    with suppress(JobError):
        return queue.queued(job)
    return None


def why_asked(number: int, known: queue.Shown | None, restart: int, cancelled: bool) -> Cause:
    """Why Slurm asks a sitting to end.

    Args:
        number: the warning, or the signal by which Slurm ends a job.
        known: the job as Slurm has it; None: it does not answer.
        restart: of the sitting.
        cancelled: by `zlora cancel`, which sends the warning.
    """
    if cancelled:
        return "cancelled"
    if known and known.preempted:
        return "preempted"
    if number == WARNING or (known and known.reason == "TimeLimit"):
        return "time limit"
    if known is None:
        return ""
    return "requeued" if known.restarts > restart else "cancelled"


def judged(code: int, asked: bool, told: End | None) -> End:
    """How a step ended.

    Args:
        code: srun's.
        asked: the ranks were asked to leave.
        told: what the ranks gave as the cause, if any did.
    """
    if told:
        return told
    if code == 0:
        return End(0, "Done.")
    if code > _SIGNALLED and asked:
        return End(STOPPED, "Asked to leave before it had anything to save; what was saved stays.")
    if code > _SIGNALLED:
        return End(RANK_FAILED, _lost(code))
    return End(code, "The ranks said no more than their log does." if code != STOPPED else "Stopped on request; everything is saved.")


def next_of(ended: Ended, before: list[Event], ending: bool, patience_s: float) -> tuple[Then, str]:
    """What becomes of the job, and what a person should know about it.

    Args:
        before: the run's record so far.
        ending: Slurm has ended the job, rather than warned it.
        patience_s: after so long Slurm takes a node out of service that does not answer.
    """
    if ended.exit_code == 0:
        return "done", ""
    if ending and ended.cause in _BY_SLURM:
        return "left to Slurm", f" {_BY_SLURM[ended.cause]}"
    if Cancelled(ended.job) in before:
        return "not requeued", " It was cancelled. Submitted again, it goes on."
    # Ended at its limit, it was warned too late, or did not answer in time.
    kind = RANK_FAILED if ending and ended.cause == "time limit" else ended.exit_code
    if kind not in IN_A_ROW:
        return "not requeued", ""
    if ended.cause == "time limit" and _kind(ended.job, before) == "evaluate":
        return "not requeued", " It begins anew each time, so its time would not do again. Submit it with more (cluster.time)."
    times, first_s = 1, ended.at_s
    for event in reversed(before):
        # Other jobs, what comes after training, write into the same record.
        if isinstance(event, Ended) and event.job == ended.job:
            if (event.exit_code, event.step) != (ended.exit_code, ended.step):
                break
            times, first_s = times + 1, event.at_s
    # A lost node may be handed out again until Slurm has noticed.
    soon = kind == RANK_FAILED and ended.at_s - first_s < 2 * patience_s + _NOTICED_S and times < MOST_IN_A_ROW
    if times >= IN_A_ROW[kind] and not soon:
        return "not requeued", f" So it ended {times} times in a row without a newer saved state."
    return "requeued", ""


def _kind(job: str, before: list[Event]) -> str:
    """What the job does: train, evaluate, merge."""
    return next((event.kind for event in before if isinstance(event, Submitted) and event.job == job), "train")


def _watch(command: list[str], environment: dict[str, str], came: list[int], asked: Callable[[int], Cause]) -> tuple[int, dict[int, Cause]]:
    """The command's exit code as a shell has it; and why signals came: the warning, and the one by which Slurm ends a job.

    Args:
        came: takes these signals, also those that come later.
        asked: is told of each once, and says why it came.
    """
    known: dict[int, Cause] = {}
    started: list[subprocess.Popen[bytes]] = []

    def on_signal(number: int, _: object) -> None:
        came.append(number)
        if number == WARNING and started and started[0].poll() is None:
            # srun hands it to all ranks. Slurm itself sends them the SIGTERM.
            started[0].send_signal(WARNING)

    for number in (WARNING, signal.SIGTERM):
        signal.signal(number, on_signal)
    try:
        started.append(subprocess.Popen(command, env=environment))
    except OSError as error:
        raise JobError(f"{command[0]}: {error.strerror}. A batch script runs its ranks by srun.") from None
    if WARNING in came:
        started[0].send_signal(WARNING)
    code = None
    while code is None:
        with suppress(subprocess.TimeoutExpired):
            code = started[0].wait(_POLL_S)
        for new in [number for number in came if number not in known]:
            known[new] = asked(new)
    return code if code >= 0 else _SIGNALLED - code, known


def _lost(code: int) -> str:
    try:
        name = signal.Signals(code - _SIGNALLED).name
    except ValueError:
        return f"srun could not start or keep all ranks (its exit code {code}; it says why above)."
    return f"A rank was ended by {name}.{' Out of memory is the usual cause.' if name == 'SIGKILL' else ''}"


def _say(text: str) -> None:
    print(f"zlora {time.strftime('%Y-%m-%d %H:%M:%S')}: {text}", flush=True)
