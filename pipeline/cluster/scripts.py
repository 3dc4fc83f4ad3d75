"""Batch scripts of a run folder: rendered, written beside the jobs they train, handed to sbatch; taken back where it refuses them."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from pipeline.cluster import queue
from pipeline.cluster.sbatch import Made, Task, render
from pipeline.job.cluster import Cluster, is_secret
from pipeline.job.errors import JobError
from pipeline.job.files import shipped
from pipeline.job.read import job_toml
from pipeline.job.spec import Job

FOLDER = "slurm"
"""Of the run: batch scripts, the jobs they train, and their logs."""
_SECRET_CHARACTERS = 8


@dataclass(frozen=True)
class Script:
    file: Path
    text: str
    template: str
    template_sha256: str


def make_script(file: Path, cluster: Cluster, task: Task, command: tuple[str, ...], job: Path, digest: str) -> Script:
    """Its text; nothing is written.

    Args:
        command: of the person who submits.
        job: the file that it comes from.
        digest: of the resolved job.
    """
    template = Path(cluster.template) if cluster.template else shipped("slurm") / "train.sbatch"
    source = _template_text(template)
    made = Made(version("zlora"), command, time.strftime("%Y-%m-%d %H:%M:%S %z"), job.absolute(), digest)
    text = render(source, str(template), cluster, task, made)
    _refuse_secrets(text, job)
    return Script(file, text, str(template), hashlib.sha256(source.encode()).hexdigest())


def frozen_text(job: Job, file: Path) -> str:
    """The job as it is submitted."""
    text = job_toml(_portable(job))
    _refuse_secrets(text, file)
    return text


def write_and_submit(script: Script, frozen: dict[Path, str], options: tuple[str, ...]) -> str:
    """Slurm's id.

    Args:
        frozen: the jobs' files -> their texts.

    Raises:
        JobError: sbatch refuses it. Nothing is left behind.
    """
    files = {**frozen, script.file: script.text}
    made = {folder for file in files for folder in file.absolute().parents if not folder.exists()}
    try:
        for file, content in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("x", encoding="utf-8") as out:
                out.write(content)
        return queue.sbatch(script.file, script.text, options)
    except (JobError, OSError):
        for file in files:
            file.unlink(missing_ok=True)
        for folder in sorted(made, key=lambda folder: len(folder.parts), reverse=True):
            folder.rmdir()
        raise


def next_number(run: Path) -> int:
    """Of the run's scripts."""
    return 1 + max((int(file.stem) for file in (run / FOLDER).glob("*.sbatch") if file.stem.isdigit()), default=0)


def _template_text(template: Path) -> str:
    try:
        return template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"cluster.template: {template}: not readable as text ({error}). Name a file like slurm/train.sbatch.") from None


def program() -> tuple[str, ...]:
    """This zlora, for nodes that see the same files."""
    beside = Path(sys.executable).with_name("zlora")
    return (str(beside),) if os.access(beside, os.X_OK) else (sys.executable, "-m", "pipeline")


def _portable(job: Job) -> Job:
    """A configuration that comes with zlora is named, not located: a container has its own."""
    config = Path(job.memory.config)
    if config.parent != shipped("ds_configs").resolve():
        return job
    return job.model_copy(update={"memory": job.memory.model_copy(update={"config": config.name})})


def _refuse_secrets(text: str, job: Path) -> None:
    for name, value in os.environ.items():
        if is_secret(name) and len(value) >= _SECRET_CHARACTERS and value in text:
            raise JobError(f"{job}: the value of {name} is in it, and would be in a file that others may read. Take it out of the job.")
