"""`zlora submit`: checks and plans a job, makes its batch script, puts it into the queue, and notes that in the run folder. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.cluster.queue import queued
from pipeline.cluster.record import Submitted, events, note
from pipeline.cluster.sbatch import LOG, Task, queue_name
from pipeline.cluster.scripts import FOLDER, Script, frozen_text, make_script, next_number, program, write_and_submit
from pipeline.cluster.standing import newest
from pipeline.job.changes import changes, refuse_changes
from pipeline.job.errors import JobError
from pipeline.job.read import job_digest, read_resolved, with_settings
from pipeline.job.settings import settings_file
from pipeline.job.spec import Job
from pipeline.planning.job import make_plan
from pipeline.runs.folder import begun, refuse_foreign
from pipeline.submit.after import Then, afterwards

SCHEMA_VERSION = 1
_WARNING = "SIGUSR1"


@dataclass(frozen=True)
class Asked:
    """What the command line says beside the job."""

    job: Path
    run: Path
    command: tuple[str, ...]
    """Itself."""
    after: str | None = None
    force: bool = False
    dry_run: bool = False
    fresh: bool = False
    accept_changes: bool = False
    then: tuple[Then, ...] = ()
    """What comes after training, as jobs of their own."""


Planned = tuple[dict[str, Any] | None, list[str]]
"""The plan, if there is one, and what a person should know of it."""


@dataclass(frozen=True)
class Prepared:
    """A job that may be submitted."""

    job: Job
    """With the user's settings."""
    tasks: int
    """Ranks of a node."""
    plan: dict[str, Any] | None
    notes: list[str]


def submit(job: Job, asked: Asked) -> dict[str, Any]:
    """What was submitted, ready for JSON; with `dry_run` what would be, and nothing is written or asked.

    Raises:
        JobError: the job does not fit, is another than the run's, or is in the queue already; sbatch refuses it. Nothing is left behind.
    """
    refuse_in_queue(asked)
    ready = prepare(job, asked, {})
    cluster, run, number = ready.job.cluster, asked.run.absolute(), next_number(asked.run)
    frozen = run / FOLDER / f"{number}.toml"
    words = ("train", str(frozen), "--run", str(run), *options_of(asked))
    task = Task(queue_name(asked.job.stem), str(run), words, Path.cwd(), program())
    script = make_script(asked.run / FOLDER / f"{number}.sbatch", cluster, task, asked.command, asked.job, job_digest(job))
    later = with_after({asked.run: ready.job}, asked, task, script)
    answer = {
        "schema_version": SCHEMA_VERSION,
        "job": None,
        "run": str(asked.run),
        "script": str(script.file),
        "text": script.text,
        "nodes": cluster.nodes,
        "ranks": cluster.nodes * ready.tasks,
        "after": asked.after,
        "plan": ready.plan and {key: ready.plan[key] for key in ("fits", "peak_bytes", "capacity_bytes")},
        "notes": ready.notes,
        "then": [{"kind": kind, "job": None, "script": str(each.file), "text": each.text} for kind, each in later.items()],
    }
    if asked.dry_run:
        return answer
    queue_id = write_and_submit(script, {frozen: frozen_text(ready.job, asked.job)}, dependency("afterok", asked.after))

    def noted(job_id: str, name: str, kind: str) -> None:
        log = f"{FOLDER}/{LOG.replace('%j', job_id)}"
        note(asked.run, replace(submitted(job_id, script, f"{FOLDER}/{name}", ready, asked, log), kind=kind))

    noted(queue_id, script.file.name, "train")
    return {**answer, "job": queue_id, "then": submit_after(later, "afterok", queue_id, noted)}


def dependency(kind: str, job: str | None) -> tuple[str, ...]:
    """Options of sbatch; a job that can never begin does not stay in the queue."""
    return (f"--dependency={kind}:{job}", "--kill-on-invalid-dep=yes") if job else ()


def submitted(job_id: str, script: Script, name: str, ready: Prepared, asked: Asked, log: str) -> Submitted:
    about = (script.template, script.template_sha256, job_digest(ready.job), ready.job.cluster.nodes, ready.tasks)
    return Submitted(job_id, name, *about, asked.command, asked.after, log=log)


def with_after(runs: dict[Path, Job], asked: Asked, task: Task, script: Script) -> dict[Then, Script]:
    """The scripts of what comes after training, by what they do.

    Args:
        runs: folders that it trains in, and their jobs, with the user's settings.
        task: training's.
        script: training's.

    Raises:
        JobError: one of them could only fail, or a sweep's members would need different ones.
    """
    found: dict[Then, Script] = {}
    for kind in dict.fromkeys(asked.then):
        members = [afterwards(kind, job, run, asked.job) for run, job in runs.items()]
        words = {after.words(task.run) for after in members}
        if len(words) > 1:
            raise JobError(f"{asked.job}: --then {kind}: the members of the sweep differ in what {kind} is told. Leave it out.")
        own = replace(task, name=f"{task.name}-{kind}", arguments=words.pop())
        file = script.file.with_name(f"{script.file.stem}-{kind}.sbatch")
        digest = job_digest(next(iter(runs.values())))
        found[kind] = make_script(file, members[0].cluster, own, asked.command, asked.job, digest)
    return found


def submit_after(later: dict[Then, Script], how: str, job: str, noted: Callable[[str, str, str], None]) -> list[dict[str, str]]:
    """Puts what comes after training into the queue behind it.

    Args:
        how: it depends on the training's job.
        noted: is told the job's id, the script's name and what it does.
    """
    found = []
    for kind, script in later.items():
        try:
            own = write_and_submit(script, {}, dependency(how, job))
        except JobError as error:
            raise JobError(f"--then {kind}: {error} The training is in the queue all the same, as job {job}.") from None
        noted(own, script.file.name, kind)
        found.append({"kind": kind, "job": own, "script": str(script.file), "text": script.text})
    return found


def prepare(job: Job, asked: Asked, plans: dict[str, Planned]) -> Prepared:
    """The job with the user's settings, planned.

    Args:
        plans: made before, for members of one sweep; this one is added.

    Raises:
        JobError: what training would refuse, or stumble over, after the wait in the queue; it does not fit.
    """
    job = with_settings(job)
    tasks = job.cluster.tasks_per_node
    if tasks is None:
        raise JobError(
            f"{asked.job}: how many ranks a node has is not said. Give --gpus-per-node N, or cluster.ranks_per_node for CPU ranks, "
            f"in the job or in [cluster] of {settings_file()}."
        )
    if _WARNING not in job.train.stop_signals:
        raise JobError(f"{asked.job}: train.stop_signals: before its time is up the job is asked to save by {_WARNING}. Add it.")
    refuse_foreign(asked.run)
    if found := next((character for character in "%\\" if character in str(asked.run.absolute())), None):
        raise JobError(f"{asked.run}: Slurm does not take {found} in the folder of a log as it is. Use --run for another folder.")
    if begun(asked.run) and not asked.fresh and (before := read_resolved(asked.run / "job.toml")):
        refuse_changes(changes(before, job), str(asked.run), asked.accept_changes)
    alike = _planned_alike(job)
    if alike not in plans:
        plans[alike] = _plan(job, asked)
    return Prepared(job, tasks, *plans[alike])


def _planned_alike(job: Job) -> str:
    """The same text for jobs that one plan does for, as the members of a sweep over seeds."""
    return job_digest(job.model_copy(update={"train": job.train.model_copy(update={"seed": 0, "learning_rate": 1.0})}))


def refuse_in_queue(asked: Asked) -> None:
    """A run has one job at a time."""
    last = newest(events(asked.run))
    if last is None or asked.dry_run or asked.after == last.job:
        return
    known = queued(last.job)
    if known and not known.over:
        raise JobError(
            f"{asked.run}: job {last.job} works on it already ({known.state}). Wait for its end, cancel it (zlora cancel {asked.run}), "
            f"come after it (--after {last.job}), or use --run for another folder."
        )


def options_of(asked: Asked) -> tuple[str, ...]:
    return (*(["--fresh"] if asked.fresh else []), *(["--accept-changes"] if asked.accept_changes else []))


def _plan(job: Job, asked: Asked) -> Planned:
    cluster = job.cluster
    gpu = "cpu" if cluster.ranks_per_node else cluster.gpu
    if gpu is None:
        where = f"--gpu a100-80g, or cluster.gpu in the job or in {settings_file()}"
        return None, [f"not planned: which GPUs the nodes have is not known. Name them: {where}."]
    try:
        plan = make_plan(job, gpu, cluster.nodes * (cluster.tasks_per_node or 1), cluster.nodes, None)
    except JobError as error:
        if asked.force:
            return None, [f"not planned: {error}"]
        raise
    if plan["fits"]:
        return plan, []
    if not asked.force:
        raise JobError(f"{asked.job}: {_advice(plan)} --force submits it all the same.")
    return plan, [f"the plan says: {_advice(plan)}"]


def _advice(plan: dict[str, Any]) -> str:
    setting, gib = plan["setting"], 1 << 30
    where = "a rank" if setting["gpu"] == "cpu" else "a GPU"
    fewest = plan["answers"]["fewest_gpus"][setting["gpu"]]
    means = [f"{fewest} of them"] if fewest and fewest > setting["gpus"] else []
    means += [
        ", ".join(f"{key}={value}" for key, value in change["keys"].items()) for change in plan["answers"]["changes"] if change["fits"]
    ]
    repair = f"Use {', or '.join(means[:3])}." if means else "Use larger GPUs, or see what zlora plan says."
    peak, capacity = plan["peak_bytes"] / gib, plan["capacity_bytes"] / gib
    return f"does not fit on {setting['gpus']} x {setting['gpu']}: {peak:,.1f} of {capacity:,.1f} GiB {where}. {repair}"
