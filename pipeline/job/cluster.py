"""`[cluster]` of a job, and of the user's settings: what a batch system is asked for. Only `zlora submit` reads it.

Its values end up in a batch script: in `#SBATCH` lines, which no shell quotes, so that their characters are limited here, and in the
shell's part, where they are quoted. `setup` alone is shell by intent.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt, field_validator, model_validator

from pipeline.job.section import Section, Text

WARN_S = 120
_TIME = re.compile(
    r"(?:(?P<days>\d+)-(?P<hours>\d+)(?::(?P<m>\d+)(?::(?P<s>\d+))?)?)|(?:(?:(?P<h>\d+):)?(?P<min>\d+):(?P<sec>\d+))|(?P<only>\d+)"
)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,@+:-]*")
_OPTION = re.compile(r"--[a-z][a-z0-9-]*(=[A-Za-z0-9_.,:@+*&|()\[\]/%=-]+)?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(
    r"(^|_)(TOKENS?|SECRETS?|PASSWORDS?|PASSWD|PASSPHRASE|CREDENTIALS?|(API|ACCESS|PRIVATE|AUTH)_?KEY)(_|$)", re.IGNORECASE
)
_SECRET_VALUE = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|AKIA[A-Z0-9]{16})")
_ASSIGNED = re.compile(r"""\b([A-Za-z_]\w*)=(?!["']?[$`])["']?[^\s"';]""")
_EXPORT_IT = (
    "Export it in the shell that submits, or use hf auth login: the job gets the shell's environment, and no file of the run has it."
)
_OURS = {
    **dict.fromkeys(("--nodes", "--time", "--partition", "--account"), "the key of that name"),
    **dict.fromkeys(("--ntasks", "--ntasks-per-node"), "gpus_per_node or ranks_per_node"),
    "--gpus-per-node": "gpus_per_node",
    "--cpus-per-task": "cpus_per_rank",
    "--signal": "warn_s",
    "--dependency": "zlora submit --after",
    **dict.fromkeys(("--job-name", "--output", "--error", "--open-mode", "--chdir", "--requeue", "--no-requeue"), "nothing: zlora sets it"),
    **dict.fromkeys(("--export", "--export-file", "--array", "--wrap", "--parsable", "--wait", "--test-only"), "nothing: zlora sets it"),
}
"""Options of sbatch that have a key of their own, or a value that going on depends on -> what to use instead."""


def is_secret(name: str) -> bool:
    """Whether an environment variable of that name holds something that no file should have."""
    return bool(_SECRET.search(name))


def control_character(text: str) -> str | None:
    """The first character that would end a line or is not one (tabs apart), as a person can read it; None: there is none."""
    found = next((c for c in text if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c != "\t"), None)
    return None if found is None else found.encode("unicode_escape").decode()


def time_s(time: str) -> int:
    """Slurm's ways to write a time: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    found = _TIME.fullmatch(time)
    if not found:
        raise ValueError(f'"{time}" is not a time. Write hours:minutes:seconds, or days-hours, such as "04:00:00" or "2-12".')
    count = {name: int(value or 0) for name, value in found.groupdict().items()}
    minutes = count["only"] + count["min"] + count["m"]
    return ((count["days"] * 24 + count["hours"] + count["h"]) * 60 + minutes) * 60 + count["s"] + count["sec"]


def _one_line(text: str) -> str:
    if (found := control_character(text)) is not None:
        raise ValueError(f"{text!r} has a character ({found}) that a line of a batch script cannot have. Leave it out.")
    return text


def _no_secret(text: str) -> str:
    named = next((name for name in _ASSIGNED.findall(text) if is_secret(name)), None)
    if named or _SECRET_VALUE.search(text):
        raise ValueError(f"{named or 'a token'} in a batch script could be read by others. {_EXPORT_IT}")
    return text


def _no_option(text: str) -> str:
    if text.startswith("-"):
        raise ValueError(f'"{text}" would be taken for an option. Name it so that it does not begin with a dash.')
    return text


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError(f"{text!r} is not a name of Slurm's. Use letters, digits and any of _ . , @ + : - after the first.")
    return text


def _option(text: str) -> str:
    if not _OPTION.fullmatch(text):
        raise ValueError(f'{text!r} is not an option of sbatch. Write it whole, without blanks or quotes, such as "--qos=high".')
    name = text.partition("=")[0]
    # sbatch takes any beginning of an option's name that is nobody else's.
    ours = next((own for own in _OURS if own.startswith(name) and (name == own or name not in ("--gpus", "--mem"))), None)
    if ours:
        raise ValueError(f'"{text}" does not go here. Use {_OURS[ours]}.')
    return text


Line = Annotated[Text, AfterValidator(_one_line)]
Place = Annotated[Line, AfterValidator(_no_option)]
Name = Annotated[str, AfterValidator(_name)]


class Cluster(Section):
    nodes: PositiveInt = 1
    """Machines."""
    gpus_per_node: PositiveInt | None = None
    """GPUs of each, a rank each."""
    ranks_per_node: PositiveInt | None = None
    """Ranks of each, where nodes have no GPUs."""
    cpus_per_rank: PositiveInt | None = None
    """Cores of a rank. Absent: as many as the cluster gives a task by itself."""
    time: str | None = None
    """Limit of one allocation, `hours:minutes:seconds` or `days-hours`; a longer job goes on in the next. Absent: the partition's."""
    warn_s: Annotated[int, Field(ge=60, le=65535)] = WARN_S
    """So long before the limit the ranks are asked to save and leave. Slurm looks twice a minute."""
    partition: Name | None = None
    """Absent: the cluster's default."""
    account: Name | None = None
    """Absent: your default."""
    sbatch: Annotated[tuple[Annotated[str, AfterValidator(_option)], ...], Field(strict=False)] = ()
    """Other options of sbatch, such as `["--qos=high", "--constraint=a100", "--mem=0"]`."""
    gpu: Name | None = None
    """Which GPUs the nodes have, by a name of `zlora plan`: with it a job that does not fit is refused before it waits."""
    setup: Annotated[tuple[Annotated[Line, AfterValidator(_no_secret)], ...], Field(strict=False)] = ()
    """Lines of shell before training: modules to load, an environment to activate. They run as they are."""
    environment: dict[str, Annotated[Line, AfterValidator(_no_secret)]] = Field(default={})
    """Variables of the ranks, such as `NCCL_SOCKET_IFNAME`. Tokens are refused."""
    container: Place | None = None
    """Image that the ranks run in."""
    container_runtime: Literal["pyxis", "apptainer", "singularity"] = "pyxis"
    """pyxis: `srun --container-image`."""
    mounts: Annotated[tuple[Place, ...], Field(strict=False)] = ()
    """Folders of the node that the container sees, `/from:/to` or `/same`: base, data, run folder, this folder."""
    program: Place | None = None
    """zlora as the ranks find it. Absent: this one; in a container: `zlora`."""
    template: Text | None = None
    """A batch script of your own with zlora's placeholders. Absent: `slurm/train.sbatch`."""

    @field_validator("time")
    @classmethod
    def _is_time(cls, time: str | None) -> str | None:
        if time is not None and time_s(time) == 0:
            raise ValueError(f'"{time}" is no time at all. Leave the key out for the partition\'s limit.')
        return time

    @field_validator("environment")
    @classmethod
    def _is_environment(cls, environment: dict[str, str]) -> dict[str, str]:
        for name in environment:
            if not _VARIABLE.fullmatch(name):
                raise ValueError(f"{name!r} is not a variable's name. Use letters, digits and _, a digit not first.")
            if is_secret(name):
                raise ValueError(f"{name} in a batch script could be read by others. {_EXPORT_IT}")
        return environment

    @model_validator(mode="after")
    def _go_together(self) -> Cluster:
        if self.gpus_per_node and self.ranks_per_node:
            raise ValueError("gpus_per_node and ranks_per_node are both given. Keep one of them.")
        if self.time is not None and time_s(self.time) <= self.warn_s:
            raise ValueError(f"time = {self.time}: no longer than warn_s = {self.warn_s}, so that no step would be taken. Raise it.")
        if self.mounts and not self.container:
            raise ValueError("mounts: there is no container to see them. Name one, or leave them out.")
        if any("," in mount for mount in self.mounts):
            raise ValueError("mounts: a comma divides mounts, so none can have one in its name. Mount the folder above it.")
        return self

    @property
    def tasks_per_node(self) -> int | None:
        """Ranks of a node; None: not said."""
        return self.gpus_per_node or self.ranks_per_node
