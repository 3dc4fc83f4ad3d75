"""The queue: `submit`, and `batch`, which a batch script ends with. Heavy imports are inside."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from pipeline.commands import options
from pipeline.job.errors import JobError

if TYPE_CHECKING:
    from pipeline.submit.after import Then


def submit(
    job: options.JobFile,
    run: options.RunFolder = None,
    nodes: Annotated[int | None, typer.Option(help="Machines (cluster.nodes).")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="GPUs of each, a rank each (cluster.gpus_per_node).")] = None,
    time: Annotated[str | None, typer.Option(metavar="H:MM:SS", help="Limit of one allocation (cluster.time).")] = None,
    partition: Annotated[str | None, typer.Option(help="Of the cluster (cluster.partition).")] = None,
    account: Annotated[str | None, typer.Option(help="That pays (cluster.account).")] = None,
    gpu: Annotated[str | None, typer.Option(metavar="NAME", help="Which GPUs: a100-80g, ... (cluster.gpu).")] = None,
    template: Annotated[Path | None, typer.Option(metavar="FILE", help="A batch script of your own (cluster.template).")] = None,
    after: Annotated[str | None, typer.Option(metavar="JOBID", help="Begin when that Slurm job has ended well.")] = None,
    then: Annotated[
        str | None, typer.Option("--then", metavar="COMMANDS", help="What comes after training, as jobs of their own: evaluate,merge.")
    ] = None,
    overrides: options.Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace the run in the run folder instead of going on with it.")] = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on with another learning rate, schedule or the like than the run began with.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Submit what the plan says does not fit.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the batch script; write and submit nothing.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Check and plan a job, and put its training into Slurm's queue. It goes on by itself until it is done.

    Example: zlora submit my.toml --nodes 2 --gpus-per-node 8 --time 4:00:00
    """
    from pipeline.job.read import read_job
    from pipeline.screen import Screen
    from pipeline.submit.job import Asked
    from pipeline.submit.job import submit as submit_job
    from pipeline.submit.sweep import submit_sweep
    from pipeline.sweeping import runs_of

    if after is not None and not re.fullmatch(r"\d+(_\d+)?", after):
        raise JobError(f"--after {after}: not a Slurm job's id. Give its number.")
    given = {
        "nodes": nodes,
        "gpus_per_node": gpus_per_node,
        "time": time,
        "partition": partition,
        "account": account,
        "gpu": gpu,
        "template": template and str(template),
    }
    texts = [f"cluster.{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items() if value is not None]
    folder, keys = run or Path("runs") / job.stem, (*(overrides or ()), *texts)
    asked = Asked(job, folder, ("zlora", *sys.argv[1:]), after, force, dry_run, fresh, accept_changes, _commands(then))
    read = read_job(job, keys)
    found = submit_sweep(read, runs_of(job, folder, keys), asked) if read.sweep else submit_job(read, asked)
    if as_json:
        print(json.dumps(found))
        return
    for note in found["notes"]:
        print(f"note: {note}", file=sys.stderr)
    if "text" not in found:
        print(f"{folder}: nothing to submit")
        return
    if dry_run:
        print("\n".join([found["text"], *(each["text"] for each in found["then"])]), end="")
        return
    rows = [
        ("job", found["job"]),
        *[("members", f"{len(found['members'])}: {', '.join(found['members'])}") for _ in (1,) if "members" in found],
        ("ranks", f"{found['ranks']} on {found['nodes']} node{'s'[: found['nodes'] > 1]}{' each' if 'members' in found else ''}"),
        ("run", found["run"]),
        ("script", found["script"]),
        *((f"then {each['kind']}", each["job"]) for each in found["then"]),
    ]
    Screen(sys.stdout).table("submitted", rows)


def _commands(then: str | None) -> tuple[Then, ...]:
    words = tuple(word.strip() for word in then.split(",")) if then is not None else ()
    if unknown := next((word for word in words if word not in ("evaluate", "merge")), None):
        raise JobError(f"--then {unknown}: is not what can come after training. Use evaluate, merge, or both with a comma.")
    return cast("tuple[Then, ...]", words)


def batch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder.")],
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="srun with all ranks.")],
) -> None:
    """What a batch script ends with: runs the ranks, writes down how they ended, and puts the job back into the queue where that helps.

    Example: zlora batch runs/my -- srun zlora train my.toml --run runs/my
    """
    from pipeline.cluster.attend import attend

    sys.exit(attend(run, command))
