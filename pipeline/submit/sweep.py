"""`zlora submit` of a job with `[sweep]`: one array of Slurm's, a task for each member that is not finished. No torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.cluster.queue import listed
from pipeline.cluster.record import events, note
from pipeline.cluster.sbatch import MEMBER, Array, Raw, Task, queue_name
from pipeline.cluster.scripts import FOLDER, frozen_text, make_script, next_number, program, write_and_submit
from pipeline.cluster.standing import newest
from pipeline.job.errors import JobError
from pipeline.job.spec import Job
from pipeline.submit.job import (
    SCHEMA_VERSION,
    Asked,
    Planned,
    Prepared,
    dependency,
    options_of,
    prepare,
    submit_after,
    submitted,
    with_after,
)
from pipeline.sweeping import Run


def submit_sweep(job: Job, runs: list[Run], asked: Asked) -> dict[str, Any]:
    """What was submitted, ready for JSON; only members that are neither finished nor in the queue.

    Args:
        job: with the sweep.

    Raises:
        JobError: a member does not fit, or is another than its run's; sbatch refuses the array. Nothing is left behind.
    """
    chosen, notes = _chosen(runs, asked)
    plans: dict[str, Planned] = {}
    ready = {number: _prepared(runs[number], asked, plans) for number in chosen}
    answer: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "job": None,
        "run": str(asked.run),
        "members": [runs[number].name for number in chosen],
        "after": asked.after,
        "notes": [*notes, *dict.fromkeys(note for each in ready.values() for note in each.notes)],
    }
    if not chosen:
        return answer
    number, first = next_number(asked.run), next(iter(ready.values()))
    cluster = first.job.cluster
    array = Array({each: runs[each].folder.absolute() for each in chosen}, job.sweep.max_parallel if job.sweep else None)
    words = ("train", Raw(f"{MEMBER}/{FOLDER}/{_frozen(number)}"), "--run", MEMBER, *options_of(asked))
    task = Task(queue_name(asked.job.stem), MEMBER, words, Path.cwd(), program(), array)
    script = make_script(asked.run / FOLDER / f"{number}.sbatch", cluster, task, asked.command, asked.job, "of each member: in slurm.jsonl")
    later = with_after({runs[each].folder: own.job for each, own in ready.items()}, asked, task, script)
    answer |= {
        "script": str(script.file),
        "text": script.text,
        "nodes": cluster.nodes,
        "ranks": cluster.nodes * first.tasks,
        "then": [{"kind": kind, "script": str(each.file), "text": each.text} for kind, each in later.items()],
    }
    if asked.dry_run:
        return answer
    frozen = {runs[each].folder.absolute() / FOLDER / _frozen(number): frozen_text(ready[each].job, asked.job) for each in chosen}
    array_id = write_and_submit(script, frozen, dependency("afterok", asked.after))

    def noted(script_id: str, script_name: str, kind: str) -> None:
        for each, own in ready.items():
            log = f"../{FOLDER}/{script_id}_{each}.txt"
            about = submitted(f"{script_id}_{each}", script, f"../{FOLDER}/{script_name}", own, asked, log)
            note(runs[each].folder, replace(about, kind=kind))

    noted(array_id, script.file.name, "train")
    # Each task of an array after the task of the same number.
    answer["then"] = submit_after(later, "aftercorr", array_id, noted)
    return {**answer, "job": array_id}


def _chosen(runs: list[Run], asked: Asked) -> tuple[list[int], list[str]]:
    """Numbers of the members to submit; and how many are not, and why."""
    jobs = {number: last.job for number, run in enumerate(runs) if (last := newest(events(run.folder)))}
    known = {} if asked.dry_run else listed(jobs.values())
    queued = {number for number, job in jobs.items() if job in known and not known[job].over}
    finished = set() if asked.fresh else {number for number, run in enumerate(runs) if run.finished} - queued
    counts = ((finished, "finished"), (queued, "in the queue already"))
    notes = [f"{len(found)} of {len(runs)} members are {what}" for found, what in counts if found]
    return [number for number in range(len(runs)) if number not in finished | queued], notes


def _prepared(run: Run, asked: Asked, plans: dict[str, Planned]) -> Prepared:
    try:
        return prepare(run.job, replace(asked, run=run.folder), plans)
    except JobError as error:
        raise JobError(f"sweep ({run.name}): {error}") from None


def _frozen(number: int) -> str:
    return f"sweep-{number}.toml"
