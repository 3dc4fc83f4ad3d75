"""A template and values -> the text of a batch script. Pure: no file, no clock, no queue.

A template is plain text with `{{names}}`. Values that go to the shell are quoted here; what goes into `#SBATCH` lines and comments,
which no shell reads, has been held to harmless characters by the job's own types, and is held to one line here.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from pipeline.cluster.launch import CPU_RANK
from pipeline.job.cluster import Cluster, control_character
from pipeline.job.errors import JobError

_PLACE = re.compile(r"\{\{ *(\w+) *\}\}")
_NEEDED = ("sbatch", "run", "command")
LOG, ARRAY_LOG = "%j.txt", "%A_%a.txt"
"""Of the batch script, beside it: named by the Slurm job."""
CONTAINER_PROGRAM = "zlora"


class Raw(str):
    """Text for the shell as it stands."""


MEMBER = Raw('"$ZLORA_MEMBER"')
"""A sweep's run folder, of the array's task that the script runs in."""


@dataclass(frozen=True)
class Array:
    """A script for several runs, each in a task of the job's array."""

    runs: dict[int, Path]
    """The array's numbers -> run folders."""
    at_once: int | None

    @property
    def option(self) -> str:
        return f"{','.join(map(str, self.runs))}{f'%{self.at_once}' if self.at_once else ''}"

    @property
    def choice(self) -> str:
        cases = [f"  {number}) ZLORA_MEMBER={_quoted(str(run))} ;;" for number, run in self.runs.items()]
        return "\n".join(["case $SLURM_ARRAY_TASK_ID in", *cases, "esac"])


@dataclass(frozen=True)
class Made:
    """How a script came about, for its first lines."""

    version: str
    command: tuple[str, ...]
    when: str
    job: Path
    job_digest: str


@dataclass(frozen=True)
class Task:
    """What a script is to run, and where."""

    name: str
    """In the queue."""
    run: str
    """The run folder; `MEMBER` where there is an array."""
    arguments: tuple[str, ...]
    """Of zlora: train, and what belongs to it."""
    folder: Path
    """That it runs in."""
    program: tuple[str, ...]
    """zlora on the nodes, outside any container."""
    array: Array | None = None


def render(template: str, where: str, cluster: Cluster, task: Task, made: Made) -> str:
    """The script's text.

    Args:
        template: text with placeholders; values are put in once, and not looked through again.
        where: the template's name, for messages.

    Raises:
        JobError: a placeholder that is none, or one that is missing; a path that no line can have.
    """
    values = {
        "made": _comments(made),
        "sbatch": "\n".join(f"#SBATCH {option}" for option in _options(cluster, task)),
        "environment": "\n".join(_environment(cluster, task)),
        "setup": "\n".join(cluster.setup),
        "folder": _quoted(str(task.folder)),
        "zlora": _words(task.program),
        "run": _quoted(task.run),
        "srun": _words(_step_options(cluster)),
        "command": _words(_command(cluster, task)),
    }
    found = set(_PLACE.findall(template))
    if unknown := sorted(found - set(values)):
        raise JobError(f"{where}: {{{{{unknown[0]}}}}} is not a placeholder. Use {', '.join(f'{{{{{name}}}}}' for name in values)}.")
    needed = (*_NEEDED, "environment") if task.array else _NEEDED
    if missing := [name for name in needed if name not in found]:
        raise JobError(f"{where}: {{{{{missing[0]}}}}} is missing. Put it where slurm/train.sbatch has it.")
    lines = (_PLACE.sub(lambda place: values[place[1]], line).rstrip() for line in template.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip("\n") + "\n"


def queue_name(text: str) -> str:
    """A text as a job's name in the queue: what is not plain becomes _."""
    return re.sub(r"[^A-Za-z0-9_.+-]", "_", text).lstrip("-.") or "zlora"


def _comments(made: Made) -> str:
    command = " ".join(shlex.quote(word) for word in made.command)
    return "\n".join(
        f"# {_plain(line)}"
        for line in (
            f"Made by zlora {made.version}, {made.when}: {command}",
            f"Job {made.job}, sha256 {made.job_digest}",
        )
    )


def _options(cluster: Cluster, task: Task) -> list[str]:
    """Of sbatch. The warning goes to the script alone, which tells the ranks."""
    own_gpus = any(option.startswith(("--gres", "--gpus")) for option in cluster.sbatch)
    options = {
        "--job-name": task.name,
        "--array": task.array.option if task.array else None,
        "--nodes": cluster.nodes,
        "--ntasks-per-node": cluster.tasks_per_node,
        "--gpus-per-node": None if own_gpus else cluster.gpus_per_node,
        "--cpus-per-task": cluster.cpus_per_rank,
        "--time": cluster.time,
        "--partition": cluster.partition,
        "--account": cluster.account,
        "--signal": f"B:USR1@{cluster.warn_s}",
        "--output": ARRAY_LOG if task.array else LOG,
        "--open-mode": "append",
        "--export": "ALL",
    }
    return [*(f"{name}={value}" for name, value in options.items() if value is not None), "--requeue", *cluster.sbatch]


def _environment(cluster: Cluster, task: Task) -> list[str]:
    exports = [f"export {name}={_quoted(value)}" for name, value in _variables(cluster).items()]
    return [*exports, *([task.array.choice] if task.array else [])]


def _variables(cluster: Cluster) -> dict[str, str]:
    """Of the ranks: zlora's, and over them the user's."""
    return {**({} if cluster.gpus_per_node else CPU_RANK), **cluster.environment}


def _step_options(cluster: Cluster) -> list[str]:
    """Of srun, which does not take this from sbatch."""
    options = [f"--cpus-per-task={cluster.cpus_per_rank}"] if cluster.cpus_per_rank else []
    if cluster.container and cluster.container_runtime == "pyxis":
        options += [f"--container-image={cluster.container}"]
        options += [f"--container-mounts={','.join(_both(mount) for mount in cluster.mounts)}"] if cluster.mounts else []
    return options


def _command(cluster: Cluster, task: Task) -> list[str]:
    program = task.program
    if cluster.program or cluster.container:
        program = (cluster.program or CONTAINER_PROGRAM,)
    words = [*program, *task.arguments]
    if not cluster.container or cluster.container_runtime == "pyxis":
        return words
    mounts = [word for mount in cluster.mounts for word in ("--bind", mount)]
    gpus = ["--nv"] if cluster.gpus_per_node else []
    return [cluster.container_runtime, "exec", *gpus, "--pwd", str(task.folder), *mounts, cluster.container, *words]


def _both(mount: str) -> str:
    """pyxis wants both ends."""
    return mount if ":" in mount else f"{mount}:{mount}"


def _words(words: tuple[str, ...] | list[str]) -> str:
    return " ".join(map(_quoted, words))


def _quoted(text: str) -> str:
    if isinstance(text, Raw):
        return str(text)
    if (found := control_character(text)) is not None:
        raise JobError(f"{text!r}: has a character ({found}) that a batch script cannot have. Rename it.")
    return shlex.quote(text)


def _plain(line: str) -> str:
    """On one line, whatever it has."""
    return "".join(c if control_character(c) is None else c.encode("unicode_escape").decode() for c in line)
