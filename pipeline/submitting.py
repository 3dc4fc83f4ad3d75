"""`zlora submit`: checks and plans a job, makes its batch script, puts it into the queue, and notes that in the run folder. No torch."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.cluster.queue import queued, sbatch
from pipeline.cluster.record import Submitted, events, note
from pipeline.cluster.sbatch import LOG, Made, Training, queue_name, render
from pipeline.job.changes import changes, refuse_changes
from pipeline.job.cluster import is_secret
from pipeline.job.errors import JobError
from pipeline.job.files import shipped
from pipeline.job.read import job_digest, job_toml, read_resolved, with_settings
from pipeline.job.settings import settings_file
from pipeline.job.spec import Job
from pipeline.planning import make_plan
from pipeline.run_folder import begun, refuse_foreign

SCHEMA_VERSION = 1
FOLDER = "slurm"
"""Of the run: batch scripts, the jobs they train, and their logs."""
_WARNING = "SIGUSR1"
_SECRET_CHARACTERS = 8


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


def submit(job: Job, asked: Asked) -> dict[str, Any]:
    """What was submitted, ready for JSON; with `dry_run` what would be, and nothing is written or asked.

    Raises:
        JobError: the job does not fit, is another than the run's, or is in the queue already; sbatch refuses it. Nothing is left behind.
    """
    job = with_settings(job)
    cluster, tasks = job.cluster, job.cluster.tasks_per_node
    if tasks is None:
        raise JobError(
            f"{asked.job}: how many ranks a node has is not said. Give --gpus-per-node N, or cluster.ranks_per_node for CPU ranks, "
            f"in the job or in [cluster] of {settings_file()}."
        )
    if _WARNING not in job.train.stop_signals:
        raise JobError(f"{asked.job}: train.stop_signals: before its time is up the job is asked to save by {_WARNING}. Add it.")
    _refuse_another(job, asked)
    plan, notes = _plan(job, asked)
    folder = asked.run / FOLDER
    number = _next_number(folder)
    template = Path(cluster.template) if cluster.template else shipped("slurm") / "train.sbatch"
    source = _template_text(template)
    options = (*(["--fresh"] if asked.fresh else []), *(["--accept-changes"] if asked.accept_changes else []))
    frozen, script = folder.absolute() / f"{number}.toml", folder / f"{number}.sbatch"
    training = Training(queue_name(asked.job.stem), frozen, asked.run.absolute(), Path.cwd(), _program(), options)
    made = Made(version("zlora"), asked.command, time.strftime("%Y-%m-%d %H:%M:%S %z"), asked.job.absolute(), job_digest(job))
    text = render(source, str(template), cluster, training, made)
    _refuse_secrets(text, asked.job)
    after = (f"--dependency=afterok:{asked.after}", "--kill-on-invalid-dep=yes") if asked.after else ()
    answer = {
        "schema_version": SCHEMA_VERSION,
        "job": None,
        "run": str(asked.run),
        "script": str(script),
        "text": text,
        "nodes": cluster.nodes,
        "ranks": cluster.nodes * tasks,
        "after": asked.after,
        "plan": plan and {key: plan[key] for key in ("fits", "peak_bytes", "capacity_bytes")},
        "notes": notes,
    }
    if asked.dry_run:
        return answer
    frozen_text = job_toml(_portable(job))
    _refuse_secrets(frozen_text, asked.job)
    queue_id = _write_and_submit(script, text, frozen, frozen_text, after)
    digest = hashlib.sha256(source.encode()).hexdigest()
    name = f"{FOLDER}/{script.name}"
    about = (name, str(template), digest, made.job_digest, cluster.nodes, tasks, asked.command, asked.after)
    note(asked.run, Submitted(queue_id, *about, log=f"{FOLDER}/{LOG.replace('%j', queue_id)}"))
    return {**answer, "job": queue_id}


def _refuse_another(job: Job, asked: Asked) -> None:
    """What training would refuse, or stumble over, after the wait in the queue."""
    refuse_foreign(asked.run)
    if found := next((character for character in "%\\" if character in str(asked.run.absolute())), None):
        raise JobError(f"{asked.run}: Slurm does not take {found} in the folder of a log as it is. Use --run for another folder.")
    if begun(asked.run) and not asked.fresh and (before := read_resolved(asked.run / "job.toml")):
        refuse_changes(changes(before, job), str(asked.run), asked.accept_changes)
    last = next((event for event in reversed(events(asked.run)) if isinstance(event, Submitted)), None)
    if last is None or asked.dry_run or asked.after == last.job:
        return
    known = queued(last.job)
    if known and not known.over:
        raise JobError(
            f"{asked.run}: job {last.job} works on it already ({known.state}). Wait for its end, cancel it (zlora cancel {asked.run}), "
            f"come after it (--after {last.job}), or use --run for another folder."
        )


def _plan(job: Job, asked: Asked) -> tuple[dict[str, Any] | None, list[str]]:
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


def _template_text(template: Path) -> str:
    try:
        return template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"cluster.template: {template}: not readable as text ({error}). Name a file like slurm/train.sbatch.") from None


def _program() -> tuple[str, ...]:
    """This zlora, for nodes that see the same files."""
    beside = Path(sys.executable).with_name("zlora")
    return (str(beside),) if os.access(beside, os.X_OK) else (sys.executable, "-m", "pipeline")


def _portable(job: Job) -> Job:
    """A configuration that comes with zlora is named, not located: a container has its own."""
    config = Path(job.memory.config)
    if config.parent != shipped("ds_configs").resolve():
        return job
    return job.model_copy(update={"memory": job.memory.model_copy(update={"config": config.name})})


def _next_number(folder: Path) -> int:
    return 1 + max((int(file.stem) for file in folder.glob("*.sbatch") if file.stem.isdigit()), default=0)


def _refuse_secrets(text: str, job: Path) -> None:
    for name, value in os.environ.items():
        if is_secret(name) and len(value) >= _SECRET_CHARACTERS and value in text:
            raise JobError(f"{job}: the value of {name} is in it, and would be in a file that others may read. Take it out of the job.")


def _write_and_submit(script: Path, text: str, frozen: Path, frozen_text: str, options: tuple[str, ...]) -> str:
    made = [folder for folder in (script.parent, *script.parent.parents) if not folder.exists()]
    script.parent.mkdir(parents=True, exist_ok=True)
    try:
        for file, content in ((frozen, frozen_text), (script, text)):
            with file.open("x", encoding="utf-8") as out:
                out.write(content)
        return sbatch(script, text, options)
    except (JobError, OSError):
        for file in (frozen, script):
            file.unlink(missing_ok=True)
        for folder in made:
            folder.rmdir()
        raise
