"""`zlora cancel`: ends a run's job for good, its state saved first. The batch script is signalled as before a time limit."""

from __future__ import annotations

import time
from collections.abc import Callable
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
_ALIVE = ("RUNNING", "SUSPENDED")


def cancel(run: Path, now: bool, say: Callable[[str], None]) -> list[str]:
    """Ends every job of the run that is in the queue. Returns what became of each, in words.

    Args:
        now: without saving.

    Raises:
        JobError: nothing was ever submitted, or Slurm refuses.
    """
    submitted = [event for event in events(run) if isinstance(event, Submitted)]
    if not submitted:
        raise JobError(
            f"{run}: nothing of it was submitted. A training on this machine is stopped by Ctrl-C, or kill -TERM of its process."
        )
    known = queue.listed(event.job for event in submitted)
    alive = [event for event in submitted if event.job in known and not known[event.job].over]
    if not alive:
        return [f"{run}: no job of it is in the queue"]
    # What comes after training first: it must not begin meanwhile.
    told = []
    for event in sorted(alive, key=lambda event: event.kind == "train"):
        note(run, Cancelled(event.job))
        if now or event.kind != "train" or known[event.job].state not in _ALIVE:
            queue.cancel(event.job)
            told.append(f"{run}: job {event.job} ({event.kind}) cancelled")
        else:
            told.append(_save_and_end(run, event, say))
    return told


def _save_and_end(run: Path, event: Submitted, say: Callable[[str], None]) -> str:
    script = run / event.script
    # Of a sweep's member the script is the sweep's, and the job its own.
    frozen = read_resolved(script.with_suffix(".toml")) or read_resolved(run / FOLDER / f"sweep-{script.stem}.toml")
    patience_s = frozen.cluster.warn_s if frozen else WARN_S
    deadline, asked, before = time.monotonic() + patience_s, 0.0, newest_step(run)
    say(f"{run}: job {event.job} is asked to save, and has {patience_s} s for it")
    while time.monotonic() < deadline:
        known = queue.listed([event.job]).get(event.job)
        if known is None or known.over:
            return f"{run}: job {event.job} cancelled; {_saved(run, before)}"
        if known.state == "PENDING":
            # It was on its way back when it was asked.
            break
        if known.state in _ALIVE and time.monotonic() - asked > _AGAIN_S:
            asked = time.monotonic()
            queue.ask_to_save(event.job)
        time.sleep(_POLL_S)
    queue.cancel(event.job)
    return f"{run}: job {event.job} cancelled; {_saved(run, before)}"


def _saved(run: Path, before: int) -> str:
    step = newest_step(run)
    if step > before:
        return f"saved at step {step:,}"
    return f"nothing newer than step {step:,} was saved" if step else "nothing is saved"
