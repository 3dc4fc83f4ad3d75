"""A run's record, and what the queue says of its newest job -> how the run stands, in words. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from pipeline.cluster.failures import DIVERGED, JOB_ERROR
from pipeline.cluster.queue import Listed
from pipeline.cluster.record import Began, Cancelled, Cause, Ended, Event, Refused, Submitted, Told
from pipeline.cluster.stop import STOPPED
from pipeline.cluster.watchdog import RANK_FAILED

E = TypeVar("E")
_AGAIN = "Submit it again, and it goes on."
State = Literal["waiting", "running", "finished", "stopped", "failed", "cancelled", "not begun"]
_WAITS = {
    "None": "for its turn",
    "Resources": "for resources",
    "Priority": "behind jobs of higher priority",
    "Dependency": "for the job before it",
    "DependencyNeverSatisfied": "for a job that has failed",
    "BeginTime": "a moment, to start again",
    "JobHeldUser": "since the user holds it (scontrol release)",
    "JobHeldAdmin": "since an administrator holds it",
    "JobArrayTaskLimit": "for another member of the sweep",
    "Reservation": "for its reservation",
    "PartitionDown": "for the partition, which is down",
    "PartitionInactive": "for the partition, which is inactive",
    "PartitionTimeLimit": "in vain: its time is above the partition's limit",
    "PartitionNodeLimit": "in vain: it asks for more nodes than the partition gives",
    "BadConstraints": "in vain: no node is as it asks",
}
_ASKED: dict[Cause, str] = {
    "time limit": "out of time",
    "preempted": "preempted",
    "requeued": "preempted, or a node failed",
    "cancelled": "cancelled by the user",
}
_ENDS = {
    "TIMEOUT": "out of time",
    "DEADLINE": "out of time (deadline)",
    "NODE_FAIL": "a node failed",
    "BOOT_FAIL": "a node did not start",
    "OUT_OF_MEMORY": "out of memory",
    "PREEMPTED": "preempted",
    "CANCELLED": "cancelled by the user",
}


@dataclass(frozen=True)
class Standing:
    state: State
    words: str
    """Short, for a table."""
    why: str | None = None
    """What was said at the end of the last allocation, whole."""


def newest(events: Sequence[Event], kind: str = "train") -> Submitted | None:
    """The last submission of that kind."""
    return next((event for event in reversed(events) if isinstance(event, Submitted) and event.kind == kind), None)


def restarts(events: Sequence[Event]) -> int:
    """How often training began again in an allocation."""
    jobs = {event.job for event in events if isinstance(event, Submitted) and event.kind == "train"}
    return max(0, sum(isinstance(event, Began) and (event.job in jobs or not jobs) for event in events) - 1)


def standing(events: Sequence[Event], known: Listed | None, kind: str = "train") -> Standing | None:
    """How the newest job of that kind stands; None: there never was one.

    Args:
        known: what squeue says of it; None: it is not in the queue any more, or there is no asking.
    """
    job = newest_job(events, kind)
    if job is None:
        return None
    own = [event for event in events if event.job == job]
    began, ended = _last(own, Began), _last(own, Ended)
    cut = began is not None and (ended is None or ended.restart < began.restart)
    told = None if ended is None or cut else ended
    asked = next((event.cause for event in reversed(own) if isinstance(event, Told) and began and event.restart == began.restart), None)
    why = f"The allocation before it {_unsaid(asked)}." if cut else _why(told)
    if known and not known.over:
        return _alive(known, _back(told, asked) if began else None, why)
    if Cancelled(job) in own:
        return Standing("cancelled", "cancelled by the user", _why(told))
    if told and told.exit_code == 0:
        return Standing("finished", "finished")
    if known and known.state in _ENDS:
        words = "the job before it has failed" if known.reason == "DependencyNeverSatisfied" else _ENDS[known.state]
        return Standing("cancelled" if known.state == "CANCELLED" else "stopped", words, _why(told))
    if told:
        refused = _last(own, Refused)
        return Standing(*_end_in_words(told), f"{told.why} Slurm did not take it back: {refused.why}" if refused else told.why)
    if began is None and kind != "train" and (before := standing(events, None)) and before.state in ("failed", "cancelled"):
        return Standing("cancelled", "the job before it has failed")
    if began is None and known is None:
        return Standing("stopped", "not in the queue any more", "It was cancelled before it began, or Slurm does not answer.")
    words = _ASKED[asked] if asked else "lost with a node"
    return Standing("cancelled" if asked == "cancelled" else "stopped", words, f"Its last allocation {_unsaid(asked)}. {_AGAIN}")


def waits(reason: str) -> str:
    """Slurm's reason for waiting, in words."""
    if reason in _WAITS:
        return _WAITS[reason]
    if reason.startswith("ReqNodeNotAvail"):
        return "for nodes that are not available"
    if reason.startswith(("QOS", "Assoc")):
        return f"at a limit of your account ({reason})"
    return f"({reason})"


def newest_job(events: Sequence[Event], kind: str = "train") -> str | None:
    """Its id in the queue."""
    if found := newest(events, kind):
        return found.job
    # A script of one's own has no submission that zlora knows of.
    return None if kind != "train" else next((event.job for event in reversed(events) if isinstance(event, Began)), None)


def _unsaid(asked: Cause | None) -> str:
    return "began, and has no end" if asked is None else "was ended before it could say more"


def _back(told: Ended | None, asked: Cause | None) -> str:
    """Why a job that had begun waits again."""
    found = told.cause if told else asked
    if told is None or found == "requeued":
        return _ASKED[found] if found else "a node failed"
    if told.exit_code == STOPPED or found:
        return found or "asked to leave"
    return _end_in_words(told)[1]


def _alive(known: Listed, back: str | None, why: str | None) -> Standing:
    match known.state:
        case "PENDING":
            return Standing("waiting", f"waits {f'to go on ({back}) ' if back else ''}{waits(known.reason)}", why)
        case "CONFIGURING":
            return Standing("running", "nodes start")
        case "SUSPENDED":
            return Standing("waiting", "suspended")
        case "COMPLETING":
            return Standing("running", "ending")
        case _:
            return Standing("running", "running")


def _end_in_words(ended: Ended) -> tuple[State, str]:
    """Where Slurm has forgotten the job, or says no more than that it failed."""
    match ended.exit_code:
        case code if code == DIVERGED:
            return "failed", "diverged"
        case code if code == JOB_ERROR:
            return "failed", "a mistake in the job"
        case code if ended.cause == "cancelled":
            return "cancelled", _ASKED["cancelled"]
        case code if ended.then == "left to Slurm" and ended.cause:
            return "stopped", _ASKED[ended.cause]
        case code if code == STOPPED:
            return "stopped", "stopped, saved"
        case code if "OutOfMemory" in ended.why or "out of memory" in ended.why:
            return "failed", "out of memory"
        case code if code == RANK_FAILED:
            return "failed", "a rank was killed, lost or hung"
        case _:
            return "failed", "a fault of zlora's"


def _last(events: Sequence[Event], kind: type[E]) -> E | None:
    return next((event for event in reversed(events) if isinstance(event, kind)), None)


def _why(told: Ended | None) -> str | None:
    return told.why if told else None
