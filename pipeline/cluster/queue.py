"""Slurm's commands, called without a shell. What they print becomes values, what they refuse a `JobError`."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.job.errors import JobError

_PATIENCE_S = 120.0
_SLURMD_TIMEOUT_S = 300.0
"""Where a site has not said otherwise."""
_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_DEFAULTS = {"SBATCH_ACCOUNT": "--account", "SBATCH_PARTITION": "--partition", "SBATCH_TIMELIMIT": "--time"}
ENDED = frozenset(
    {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED", "REVOKED"}
)


@dataclass(frozen=True)
class Queued:
    """A job that Slurm knows."""

    job: str
    state: str
    """PENDING, RUNNING, COMPLETING, ..., or one of `ENDED`."""
    reason: str
    """Why it waits, or how it ended, while `state` may still be COMPLETING: TimeLimit, NodeDown, ...; "None": it does not say."""

    @property
    def over(self) -> bool:
        return self.state in ENDED


def sbatch(script: Path, text: str, options: tuple[str, ...] = ()) -> str:
    """Submits a script from its own folder, where its log goes. Returns the job's id.

    Raises:
        JobError: there is no sbatch, or it refuses; in its words.
    """
    words = ["sbatch", "--parsable", *options, f"./{script.name}"]
    return _answer(words, cwd=script.parent, env=_environment(text)).strip().partition(";")[0]


@dataclass(frozen=True)
class Shown(Queued):
    """A job as scontrol has it."""

    restarts: int
    """How often it was put back into the queue, this time too where Slurm ends an allocation to do so."""
    preempted: bool
    """Another job takes its place: it is in its GraceTime, or at the end of it."""


def queued(job: str) -> Shown | None:
    """A job of the queue, also one that has ended lately; None: Slurm does not know it (any more)."""
    done = _run(["scontrol", "--oneliner", "show", "job", job])
    found = dict(re.findall(r"\b(JobState|Reason|Restarts|PreemptTime)=(\S+)", done.stdout))
    if done.returncode or "JobState" not in found:
        return None
    preempted = found.get("PreemptTime", "None") != "None"
    return Shown(job, found["JobState"], found.get("Reason", "None"), int(found.get("Restarts", 0)), preempted)


def patience_s() -> float:
    """After so long without a sign of life Slurm takes a node out of service (SlurmdTimeout)."""
    with suppress(JobError):
        if found := re.search(r"^SlurmdTimeout\s*=\s*(\d+)", _run(["scontrol", "show", "config"]).stdout, re.MULTILINE):
            return float(found[1])
    return _SLURMD_TIMEOUT_S


@dataclass(frozen=True)
class Listed(Queued):
    """A job as squeue has it."""

    nodes: str
    """As Slurm writes a list of them; empty while it waits."""
    left: str
    """Of this allocation's time, as Slurm writes it."""


def listed(jobs: Iterable[str]) -> dict[str, Listed]:
    """Those of these jobs that Slurm still knows, in one call; those that have ended lately are among them.

    Raises:
        JobError: there is no Slurm here, or it does not answer.
    """
    asked = sorted(set(jobs))
    if not asked:
        return {}
    words = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(asked)}", "--format=%i|%T|%N|%L|%r"]
    done = _run(words)
    if done.returncode and "Invalid job id" in done.stderr:
        return {}
    lines = (line.split("|", 4) for line in _said(words, done).splitlines() if line.count("|") >= 4)
    return {job: Listed(job, state, reason, nodes, left) for job, state, nodes, left, reason in lines}


def ask_to_save(job: str) -> None:
    """Signals the batch script of a running job, as Slurm does before the limit. One that has ended is let be."""
    _scancel("--batch", "--signal=USR1", job)


def cancel(job: str) -> None:
    """Ends a job, or takes it out of the queue. One that has ended is let be."""
    _scancel(job)


def _scancel(*options: str) -> None:
    words = ["scancel", *options]
    done = _run(words)
    # A job that ended a moment ago is an error too, without a word or by these.
    if done.stderr.strip() and "already complet" not in done.stderr:
        _said(words, done)


def requeue(job: str) -> str | None:
    """Puts a running job back into the queue. None, or why Slurm does not."""
    try:
        _answer(["scontrol", "requeue", job])
    except JobError as error:
        return str(error)
    return None


def _environment(script: str) -> dict[str, str]:
    """The shell's, without what would speak against the script: a rank's variables, another job's, and sbatch's own that rule over the
    script's lines. The defaults that people keep there stay where the script says nothing."""
    kept = {name for name, option in _DEFAULTS.items() if f"\n#SBATCH {option}=" not in script}
    return {
        name: value
        for name, value in os.environ.items()
        if name in kept or name == "SLURM_CONF" or not (name in _RANKS or name.startswith(("SLURM_", "SBATCH_")))
    }


def _answer(words: list[str], **options: object) -> str:
    return _said(words, _run(words, **options))


def _said(words: list[str], done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode:
        said = " ".join(line.split("error: ", 1)[-1].strip() for line in done.stderr.strip().splitlines())
        raise JobError(f"{words[0]}: {said or f'exit code {done.returncode}'}. Correct what it names, or ask your site.")
    return done.stdout


def _run(words: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(  # type: ignore[call-overload]
            words, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, timeout=_PATIENCE_S, check=False, **options
        )
    except FileNotFoundError:
        raise JobError(f"{words[0]}: there is no such program here. Run this where Slurm is, on a login node.") from None
    except subprocess.TimeoutExpired:
        raise JobError(f"{words[0]}: no answer within {_PATIENCE_S:g} s. Is Slurm up? Try again.") from None
