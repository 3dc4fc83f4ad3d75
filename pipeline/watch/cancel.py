"""`zlora cancel`: ends a run's job for good, its state saved first. The batch script is signalled as before a time limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.cluster import queue
from pipeline.cluster.record import Cancelled, Submitted, events, newest_step, note
from pipeline.cluster.scripts import FOLDER
from pipeline.job.cluster import WARN_S
from pipeline.job.errors import JobError
from pipeline.job.read import read_resolved

_POLL_S = 1.0
_AGAIN_S = 15.0
"""A batch script that has only just begun does not hear the first signal."""
_LAST_S = 60.0
"""For Slurm to end a job that it was told to end (KillWait)."""
_ALIVE = ("RUNNING", "SUSPENDED")


def cancel(runs: Sequence[Path], now: bool, say: Callable[[str], None]) -> list[str]:
    """Ends every job of the runs that is in the queue. Returns what became of each, in words.

    Args:
        now: without saving.

    Raises:
        JobError: nothing was ever submitted of a run, or Slurm refuses.
    """
    submitted = {run: [event for event in events(run) if isinstance(event, Submitted)] for run in runs}
    if never := next((run for run, own in submitted.items() if not own), None):
        here = "A training on this machine is stopped by Ctrl-C, or kill -TERM of its process."
        raise JobError(f"{never}: nothing of it was submitted. {here}")
    known = queue.listed(event.job for own in submitted.values() for event in own)
    jobs = [(run, event) for run, own in submitted.items() for event in own if event.job in known and not known[event.job].over]
    told = [f"{run}: no job of it is in the queue" for run in runs if run not in dict(jobs)]
    for run, event in jobs:
        note(run, Cancelled(event.job))
    asked = {}
    # First what waits, and what comes after training: it must not begin meanwhile.
    for run, event in sorted(jobs, key=lambda job: known[job[1].job].state in _ALIVE):
        if now or event.kind != "train" or known[event.job].state not in _ALIVE:
            queue.cancel(event.job)
            told.append(f"{run}: job {event.job} ({event.kind}) cancelled")
        else:
            asked[event.job] = Asked(run, _patience_s(run, event), newest_step(run))
            say(f"{run}: job {event.job} is asked to save, and has {asked[event.job].patience_s} s for it")
    return [*told, *_save_and_end(asked)]


@dataclass(frozen=True)
class Asked:
    run: Path
    patience_s: int
    step: int
    """Of the newest state when it was asked."""


def _patience_s(run: Path, event: Submitted) -> int:
    script = run / event.script
    # Of a sweep's member the script is the sweep's, and the job its own.
    frozen = read_resolved(script.with_suffix(".toml")) or read_resolved(run / FOLDER / f"sweep-{script.stem}.toml")
    return frozen.cluster.warn_s if frozen else WARN_S


def _save_and_end(asked: dict[str, Asked]) -> Iterator[str]:
    """Signals the jobs and waits for their end, of all at once."""
    begun, last = time.monotonic(), -_AGAIN_S
    left = dict(asked)
    while left:
        known = queue.listed(left)
        spent = time.monotonic() - begun
        again = spent - last >= _AGAIN_S
        last = spent if again else last
        for job, about in list(left.items()):
            state = known[job].state if job in known and not known[job].over else None
            # One that waits was on its way back when it was asked.
            if state == "PENDING" or (state and spent > about.patience_s):
                queue.cancel(job)
            elif state in _ALIVE and again:
                queue.ask_to_save(job)
            if state is None:
                del left[job]
                yield f"{about.run}: job {job} cancelled; {_saved(about.run, about.step)}"
            elif spent > about.patience_s + _LAST_S:
                del left[job]
                yield f"{about.run}: job {job} is cancelled, and still {state}"
        if left:
            time.sleep(_POLL_S)


def _saved(run: Path, before: int) -> str:
    step = newest_step(run)
    if step > before:
        return f"saved at step {step:,}"
    return f"nothing newer than step {step:,} was saved" if step else "nothing is saved"
