"""What comes after training in the queue: scoring its delta, merging it. Each is a job of its own that begins when training ended well."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.job.cluster import Cluster
from pipeline.job.errors import JobError
from pipeline.job.method import merges
from pipeline.job.spec import Job
from pipeline.job.task import Glue, Mix, OwnData

Then = Literal["evaluate", "merge"]
MERGED = "merged"
"""In the run folder."""


@dataclass(frozen=True)
class After:
    kind: Then
    cluster: Cluster
    words: Callable[[str], tuple[str, ...]]
    """Of zlora; is handed the run folder as a script has it."""


def afterwards(kind: Then, job: Job, run: Path, file: Path) -> After:
    """A command that comes after training.

    Args:
        file: the job, for messages.

    Raises:
        JobError: it could only fail.
    """
    match kind:
        case "evaluate":
            split = _split(job, file)
            return After(kind, job.cluster, lambda folder: ("evaluate", folder, "--split", split))
        case "merge":
            if not merges(job.methods):
                raise JobError(f"{file}: --then merge: these methods cannot be merged into the base. Leave it out.")
            if (run / MERGED).exists():
                raise JobError(f"{run / MERGED}: is there already, and merging writes over nothing. Remove it, or leave --then merge out.")
            chosen = "best" if job.evaluate.best_metric else "delta"
            revision = ("--revision", job.base.revision) if job.base.revision else ()
            # Any one machine will do; a GPU is asked for only because a partition of GPUs may want that.
            gpu = 1 if job.cluster.gpus_per_node else None
            one = {"nodes": 1, "gpus_per_node": gpu, "ranks_per_node": None if gpu else 1}
            return After(
                kind,
                job.cluster.model_copy(update=one),
                lambda folder: ("merge", job.base.model, _inside(folder, chosen), "--out", _inside(folder, MERGED), *revision),
            )


def _inside(folder: str, name: str) -> str:
    """A path in the run folder, which may be the shell's to fill in."""
    return type(folder)(f"{folder}/{name}")


def _split(job: Job, file: Path) -> str:
    """The test split where there is one, which GLUE keeps to itself; else the validation split."""
    sources = job.task.sources if isinstance(job.task, Mix) else (job.task,)
    own = [source for source in sources if isinstance(source, OwnData) and not Path(source.data).is_dir()]
    if not any(isinstance(source, Glue) for source in sources) and (len(own) < len(sources) or any(source.test for source in own)):
        return "test"
    if len(own) == len(sources) and not any(source.valid or source.dev_fraction for source in own):
        raise JobError(f"{file}: --then evaluate: there is no test or validation split. Name its file in [task], or leave it out.")
    return "valid"
