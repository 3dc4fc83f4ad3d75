"""`zlora status`: run folders and one question to squeue -> how each run stands, and how far it is. No torch."""

from __future__ import annotations

import json
import os
import re
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cluster.failures import DIVERGED, JOB_ERROR
from pipeline.cluster.queue import Listed, listed
from pipeline.cluster.record import FILE, Began, Event, events, newest_step
from pipeline.cluster.standing import Standing, newest_job, restarts, standing
from pipeline.cluster.stop import STOPPED
from pipeline.cluster.watchdog import ENDED, RANK_FAILED
from pipeline.job.errors import JobError
from pipeline.runs.folder import LOGS, begun, held

_TAIL_BYTES = 1 << 16
_STEPS = 20
"""Of the newest so many the rate is taken."""
_DEPTH = 3
_KINDS = ("train", "evaluate", "merge")
_LOCAL = {
    STOPPED: ("stopped", "stopped, saved"),
    DIVERGED: ("failed", "diverged"),
    JOB_ERROR: ("failed", "a mistake in the job"),
    RANK_FAILED: ("failed", "a rank was killed, lost or hung"),
    1: ("failed", "a fault of zlora's"),
}


@dataclass(frozen=True)
class Status:
    """A run as it is now; None: not known."""

    run: str
    state: str
    """waiting, running, finished, stopped, failed, cancelled, not begun."""
    words: str
    why: str | None
    job: str | None
    """Slurm's id."""
    nodes: str | None
    allocation_left: str | None
    """As Slurm writes it."""
    step: int
    steps: int | None
    loss: float | None
    tokens_per_s: float | None
    left_s: float | None
    """At the rate of the newest steps; scoring not counted."""
    saved_step: int | None
    saved_age_s: float | None
    restarts: int
    then: dict[str, str]
    """What comes after training -> how that stands, in words."""


def statuses(runs: Sequence[Path]) -> tuple[list[Status], list[str]]:
    """How these runs stand, in one call to squeue; and what a person should know of the answer."""
    records = {run: events(run) for run in runs}
    jobs = {run: {kind: job for kind in _KINDS if (job := newest_job(record, kind))} for run, record in records.items()}
    notes: list[str] = []
    known: dict[str, Listed] = {}
    try:
        known = listed(job for own in jobs.values() for job in own.values())
    except JobError as error:
        notes.append(f"{error} What follows is what the runs' own records say.")
    return [_status(run, records[run], jobs[run], known) for run in runs], notes


def find_runs(given: Sequence[Path]) -> list[Path]:
    """Run folders: those named, and those inside of what is no run itself (runs/, a sweep), in the order of their names.

    Raises:
        JobError: there is none in a folder that was named.
    """
    found: list[Path] = []
    for folder in given or (Path("runs"),):
        inside = list(_runs_in(folder, _DEPTH))
        if not inside:
            raise JobError(f"{folder}: there is no run in it. Name a run folder, or go to where runs/ is.")
        found += inside
    return list(dict.fromkeys(found))


def _runs_in(folder: Path, depth: int) -> Iterator[Path]:
    if begun(folder) or (folder / FILE).is_file() or (folder / LOGS / "rank0.json").is_file():
        yield folder
    elif depth and folder.is_dir():
        for child in sorted(folder.iterdir(), key=_as_people_count):
            if not child.name.startswith("."):
                yield from _runs_in(child, depth - 1)


def _as_people_count(path: Path) -> list[tuple[int, str]]:
    """rank=4 before rank=16."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def tail_rows(file: Path) -> list[dict[str, Any]]:
    """The newest rows of `metrics.jsonl`, which may be large."""
    try:
        with file.open("rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(max(0, size - _TAIL_BYTES))
            lines = opened.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        # The first may be cut, and so may the last.
        with suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


def steps_of(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that are of a step."""
    return [row for row in rows if "step_s" in row and "loss" in row]


def is_finished(run: Path) -> bool:
    """A run that goes on takes its result back."""
    return (run / "result.json").is_file()


def _status(run: Path, record: list[Event], jobs: dict[str, str], queued: dict[str, Listed]) -> Status:
    job, known = jobs.get("train"), queued.get(jobs.get("train", ""))
    after = {kind: standing(record, queued.get(own), kind) for kind, own in jobs.items() if kind != "train"}
    rows, place = steps_of(tail_rows(run / "metrics.jsonl")), _place(run)
    last = rows[-1] if rows else {}
    stands = _standing(run, record, known, place)
    step, result = last.get("step", 0), _object(run / "result.json")
    steps = result.get("steps") or place.get("steps") or _asked_steps(run)
    recent = rows[-_STEPS:]
    spent = sum(row["step_s"] for row in recent)
    # At its end a run without new steps, taken up again, has said all.
    going = stands.state == "running" and bool(recent)
    saved = newest_step(run) or None
    began = next((event.nodes for event in reversed(record) if isinstance(event, Began)), None)
    return Status(
        run=str(run),
        state=stands.state,
        words=stands.words,
        why=stands.why,
        job=job,
        nodes=(known and known.nodes) or began or place.get("host"),
        allocation_left=known.left if known and stands.state == "running" else None,
        step=step,
        steps=steps,
        loss=last.get("loss"),
        tokens_per_s=sum(row.get("tokens", 0) for row in recent) / spent if spent else None,
        left_s=statistics.median(row["step_s"] for row in recent) * max(0, steps - step) if going and steps else None,
        saved_step=saved,
        saved_age_s=_age_s(run, saved),
        restarts=restarts(record),
        then={kind: stands.words for kind, stands in after.items() if stands},
    )


def _standing(run: Path, record: list[Event], known: Listed | None, place: dict[str, Any]) -> Standing:
    """The queue knows best of a job that is in it; else whether somebody works here; else the record, or the ranks' last words."""
    told = standing(record, known)
    if told and known and not known.over:
        return Standing("running", f"running: {place['phase']}", told.why) if _says_more(told, place) else told
    if held(run):
        return Standing("running", f"running: {place.get('phase', 'starting')}")
    if is_finished(run):
        return Standing("finished", "finished")
    if told:
        return told
    ended = re.fullmatch(rf"{ENDED}(\d+)", str(place.get("phase", "")))
    if ended and int(ended[1]) in _LOCAL:
        state, words = _LOCAL[int(ended[1])]
        return Standing("stopped" if state == "stopped" else "failed", words)
    if not place:
        return Standing("not begun", "not begun")
    return Standing("stopped", "ended without a word: killed, or its machine went down")


def _says_more(told: Standing, place: dict[str, Any]) -> bool:
    return told.words == "running" and bool(place) and not str(place["phase"]).startswith((ENDED, "done"))


def _place(run: Path) -> dict[str, Any]:
    """Where the first rank was last; that of another where that one ended with the cause."""
    places = [place for file in (run / LOGS).glob("rank*.json") if "phase" in (place := _object(file))]
    if not places:
        return {}
    first = min(places, key=lambda place: place["rank"])
    order = [f"{ENDED}{code}" for code in (JOB_ERROR, DIVERGED, 1, RANK_FAILED)]
    if not str(first["phase"]).startswith(ENDED):
        return first
    # Of this sitting only.
    of_now = [place for place in places if place["phase"] in order and place["since"] > first["since"] - 60.0]
    return {**first, "phase": min((place["phase"] for place in of_now), key=order.index, default=first["phase"])}


def _asked_steps(run: Path) -> int | None:
    """From the job's text, without its types: epochs need the data."""
    with suppress(OSError):
        found = re.search(r"^\[train\]\n(?:(?!\[).*\n)*?steps = (\d+)$", (run / "job.toml").read_text(encoding="utf-8"), re.MULTILINE)
        return int(found[1]) if found else None
    return None


def _age_s(run: Path, step: int | None) -> float | None:
    with suppress(OSError, StopIteration):
        folder = next(path for path in (run / "state").glob("step-*") if path.name[5:].isdigit() and int(path.name[5:]) == step)
        return max(0.0, time.time() - folder.stat().st_mtime)
    return None


def _object(file: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}
