"""TOML file -> `Job`. Reading touches no GPU, no network and no clock; every mistake becomes one `JobError`.

Paths in a job are relative to the folder the command runs in, as with every shell tool; the resolved job holds absolute ones.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any, get_args

import tomli_w
from pydantic import BaseModel, ValidationError

from pipeline.job.cluster import Cluster
from pipeline.job.errors import JobError
from pipeline.job.files import AUTO, memory_config
from pipeline.job.method import Method, trains_matrices
from pipeline.job.overrides import make_room, put, read_override
from pipeline.job.section import Section
from pipeline.job.settings import CLUSTER, read_settings, settings_file
from pipeline.job.spec import Base, Evaluate, Job, Memory, Published, Train
from pipeline.job.sweep import Member, Sweep, expand
from pipeline.job.task import Mix, SingleTask, Task
from pipeline.job.toml import Asked, laid_over, read_toml
from pipeline.job.zero import deepspeed_config, group_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_SECTIONS: dict[str, type[BaseModel]] = {
    "base": Base,
    "train": Train,
    "evaluate": Evaluate,
    "memory": Memory,
    "cluster": Cluster,
    "sweep": Sweep,
    "published": Published,
}


class _Settings(Section):
    cluster: Cluster


def _by_kind(union: Any) -> dict[str, type[BaseModel]]:
    return {kind: section for section in get_args(get_args(union)[0]) for kind in get_args(section.model_fields["kind"].annotation)}


_TASKS, _METHODS = _by_kind(Task), _by_kind(Method)


def read_job(path: Path, overrides: tuple[str, ...] = (), lenient: bool = False) -> Job:
    """Reads, checks and resolves a job.

    Args:
        path: the TOML file.
        overrides: `--set` texts such as "train.steps=20"; the value is read as TOML, or as text where that fails.
        lenient: for the plan. Keys that have no place in the memory configuration are let be, since it tells what they cost; data and a
            delta to begin from need not be there yet.

    Raises:
        JobError: naming file, key, value and repair.
    """
    return _read(read_toml(path), path, overrides, lenient)


def read_members(path: Path, overrides: tuple[str, ...] = (), lenient: bool = False) -> list[tuple[Member, Job]]:
    """The members of a job's sweep, each as a job of its own; none where it has no sweep.

    Args:
        overrides: of all of them; a member's own settings lie over these.

    Raises:
        JobError: as `read_job`, and naming the member whose setting it is.
    """
    files = read_toml(path)
    job = _read(files, path, overrides, lenient)
    return [(member, _read(files, path, overrides, lenient, member)) for member in (expand(job.sweep) if job.sweep else ())]


def _read(files: Asked, path: Path, overrides: tuple[str, ...], lenient: bool, member: Member | None = None) -> Job:
    asked = copy.deepcopy(files.merged)
    over = [(*read_override(text), f"--set {text}") for text in overrides]
    make_room(asked, [key for key, _, _ in over])
    for key, value, said in over:
        put(asked, key, value, said)
    if member:
        asked.pop("sweep")
        make_room(asked, list(member.settings))
        for key, value in member.settings.items():
            put(asked, key, copy.deepcopy(value), f"{path}: sweep: {key}")
    try:
        job = Job.model_validate(asked)
    except ValidationError as error:
        where = files.origin(_plain_path(error.errors()[0]["loc"], asked))
        raise JobError(f"{where}: {f'sweep ({member.name}): ' if member else ''}{_explain(error, asked)}") from None
    return _resolve(job, path, lenient)


def resolved(values: dict[str, Any], where: Path) -> Job:
    """A resolved job as a state holds it.

    Raises:
        JobError: another version wrote it.
    """
    try:
        return Job.model_validate(values)
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise JobError(f"{where}: its job has a {key} that this version of zlora does not know. Use the version that wrote it.") from None


def read_resolved(file: Path) -> Job | None:
    """The job that a run folder holds, as it is; None where there is none or another version wrote it."""
    try:
        return Job.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def with_settings(job: Job) -> Job:
    """The job with the user's `[cluster]` settings underneath its own.

    Raises:
        JobError: naming the settings' file, or the keys of both that do not go together.
    """
    settings, file = {"cluster": read_settings().get(CLUSTER, {})}, settings_file()
    try:
        _Settings.model_validate(settings)
        own = job.cluster.model_dump(mode="json", exclude_unset=True)
        both = {"cluster": laid_over(settings["cluster"], own)}
        return job.model_copy(update={"cluster": _Settings.model_validate(both).cluster})
    except ValidationError as error:
        raise JobError(f"{file}: {_explain(error, settings)}") from None


def job_digest(job: Job) -> str:
    """sha256 of the resolved job in canonical JSON, but for where it runs, what else is made of it, and what others report of it."""
    canonical = json.dumps(job.model_dump(mode="json", exclude={"cluster", "sweep", "published"}), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def job_toml(job: Job) -> str:
    """The resolved job as TOML that `read_job` reads back to an equal job."""
    return tomli_w.dumps(_without_none(job.model_dump(mode="json")))


def _without_none(value: Any) -> Any:
    match value:
        case dict():
            return {key: _without_none(item) for key, item in value.items() if item is not None}
        case list():
            return [_without_none(item) for item in value]
        case _:
            return value


def _explain(error: ValidationError, asked: dict[str, Any]) -> str:
    """The first mistake, in words."""
    problem = error.errors()[0]
    path = _plain_path(problem["loc"], asked)
    where = ".".join(path[:1]) + "".join(f"[{p}]" if p.isdigit() else f".{p}" for p in path[1:])
    match problem["type"]:
        case "extra_forbidden":
            known = _known_keys(path, asked)
            near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
            hint = f'Did you mean "{near[0]}"?' if near else f"Known here: {', '.join(known)}."
            return f"{where}: unknown key. {hint}"
        case "missing":
            return f"{where}: missing. Add it."
        case "union_tag_invalid":
            kind = json.dumps(problem["input"]["kind"], default=str)
            return f"{where}.kind = {kind}: not a known kind. Use one of {problem['ctx']['expected_tags']}."
        case "union_tag_not_found":
            kinds = _METHODS if path[0] == "methods" else _TASKS
            return f"{where}.kind: missing. Add it, one of {', '.join(map(repr, kinds))}."
        case "model_type" | "model_attributes_type":
            heading = "[[methods]]" if path[0] == "methods" else f"[{where}]"
            return (
                f"{where} = {json.dumps(problem['input'], default=str)}: not a section. Write {heading} with its keys on the lines below."
            )
        case "tuple_type" if path == ["methods"]:
            return "methods: not a list of sections. Write [[methods]], with two brackets, above each."
        case "tuple_type":
            return f"{where} = {json.dumps(problem['input'], default=str)}: not a list. Write it in brackets."
        case "too_short":
            return f"{where} = {json.dumps(problem['input'], default=str)}: empty. Give at least one."
        case "value_error":
            # What holds between sections names its keys itself.
            return f"{where}: {problem['ctx']['error']}" if where else str(problem["ctx"]["error"])
        case _:
            return f"{where} = {json.dumps(problem['input'], default=str)}: {_lower(problem['msg'])}."


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _plain_path(location: tuple[str | int, ...], asked: dict[str, Any]) -> list[str]:
    """pydantic's location without the tags it adds for unions."""
    plain: list[str] = []
    place: Any = asked
    for index, part in enumerate(location):
        if not isinstance(place, dict | list):
            break  # what follows tells the types that the value could have had
        if isinstance(place, dict) and part not in place and index < len(location) - 1:
            continue
        plain.append(str(part))
        if isinstance(place, dict):
            place = place.get(str(part))
        elif isinstance(place, list) and isinstance(part, int) and part < len(place):
            place = place[part]
    return plain


def _known_keys(path: list[str], asked: dict[str, Any]) -> list[str]:
    if len(path) == 1:
        return sorted(Job.model_fields)
    if path[0] == "methods":
        return sorted(_METHODS[asked["methods"][int(path[1])]["kind"]].model_fields)
    if path[0] != "task":
        return sorted(_SECTIONS[path[0]].model_fields)
    task = asked["task"]
    if path[1:2] == ["sources"]:
        task = task["sources"][int(path[2])]
    return sorted(_TASKS[task["kind"]].model_fields)


def _resolve(job: Job, path: Path, lenient: bool) -> Job:
    """Names made absolute, files checked to be there."""
    base = job.base
    if Path(base.model).is_dir():
        base = base.model_copy(update={"model": str(Path(base.model).resolve())})
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base.model) or base.model.startswith("."):
        raise JobError(
            f'{path}: base.model = "{base.model}": no such folder ({Path(base.model).absolute()}), and not a hub id '
            "(name or owner/name). Correct the path; it is relative to the folder you run the command in."
        )
    task = job.task
    if isinstance(task, Mix):
        sources = tuple(_located(source, path, f"task.sources[{place}]", lenient) for place, source in enumerate(task.sources))
        task = task.model_copy(update={"sources": sources})
    else:
        task = _located(task, path, "task", lenient)
    methods = tuple(_begun(method, path, place, lenient) for place, method in enumerate(job.methods))
    trained = trains_matrices(job.methods)
    if job.memory.int8_gathers and trained:
        raise JobError(
            f'{path}: memory.int8_gathers: "{trained}" trains the base, which must come as it is. Set it to false, or train a delta.'
        )
    if job.memory.config == AUTO:
        return job.model_copy(update={"base": base, "task": task, "methods": methods})
    try:
        config = memory_config(job.memory.config)
    except JobError as error:
        raise JobError(f"{path}: {error}") from None
    zero = deepspeed_config(config, job.memory.nvme_path, lenient, job.memory.int8_gathers)
    group = group_of(zero)
    if group and trained:
        raise JobError(
            f'{path}: memory.config: zero_hpz_partition_size = {group}: groups of ranks hold copies of a frozen base, and "{trained}" '
            "trains it. Use zero3.json, or leave the key out."
        )
    memory = job.memory.model_copy(update={"config": str(config)})
    return job.model_copy(update={"base": base, "task": task, "memory": memory, "methods": methods})


def _begun(method: Method, path: Path, place: int, lenient: bool) -> Method:
    if method.start is None:
        return method
    if not Path(method.start).is_dir() and not lenient:
        raise JobError(
            f'{path}: methods[{place}].start = "{method.start}": no such folder ({Path(method.start).absolute()}). Train '
            "the run that it names first, or name another run or delta; the path is relative to the folder you run the command in."
        )
    return method.model_copy(update={"start": str(Path(method.start).resolve())})


def _located(task: SingleTask, path: Path, section: str, lenient: bool) -> SingleTask:
    for key in ("data", "valid", "test"):
        value = getattr(task, key, None)
        if value is None:
            continue
        if not Path(value).exists() and not lenient:
            raise JobError(
                f'{path}: {section}.{key} = "{value}": no such file or folder ({Path(value).absolute()}). '
                "Correct the path; it is relative to the folder you run the command in."
            )
        task = task.model_copy(update={key: str(Path(value).resolve())})
    return task
