"""Before training: `check`, `plan`, `methods`, `fetch`, `data`. Heavy imports are inside."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.commands import options
from pipeline.job.errors import JobError


def check(
    job: options.JobFile,
    overrides: options.Overrides = None,
    tool: Annotated[Literal["vllm"] | None, typer.Option("--check", help="Say instead whether vLLM would load its delta.")] = None,
) -> None:
    """Read and validate a job; print it resolved. With --check vllm: what vLLM would refuse of the delta, before it is trained.

    Example: zlora check jobs/e2e/local.toml
    """
    from pipeline.job.read import job_toml, read_job, read_members

    asked = read_job(job, tuple(overrides or ()))
    if tool is None:
        print(job_toml(asked), end="")
        for member, _ in read_members(job, tuple(overrides or ())):
            print(f"# member {member.name}")
        return
    from pipeline.plan.vllm import judge, of_job
    from pipeline.weights.hub import model_type_of

    verdict = judge(of_job(asked, model_type_of(asked.base.model, asked.base.revision)))
    if verdict.reasons:
        raise JobError(f"{job}: vLLM would not load its delta. {verdict.refusal}")
    print("\n".join(verdict.lines))


def plan(
    job: options.JobFile,
    gpu: Annotated[str, typer.Option(metavar="NAME", help="v100-16g, v100-32g, a100-40g, a100-80g, h100, h200, l40s, cpu.")] = "a100-80g",
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs in all; the fewest on which the job fits, when absent.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes they are on; as few as hold them, when absent.")] = None,
    example_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of an example; the longest there can be, when absent.")] = None,
    examples: Annotated[int | None, typer.Option(min=1, help="Training examples; as many as are known of, when absent.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of a GPU hour; the settings', when absent.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show the arithmetic.")] = False,
    mend: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the memory configuration without what costs.")] = None,
    overrides: options.Overrides = None,
    as_json: options.AsJson = False,
) -> None:
    """Will it fit, on how many GPUs, how fast; what to change and what that costs. Needs the base's config.json, not its weights.

    Example: zlora plan jobs/gpt3/175b_lora_wikisql.toml --gpu v100-32g
    """
    from pipeline.job.read import read_job
    from pipeline.planning.job import make_plan, write_mended
    from pipeline.planning.tables import show_plan
    from pipeline.screen import Screen

    read = read_job(job, tuple(overrides or ()), lenient=True)
    options.say_of_sweep(job, read)
    found = make_plan(read, gpu, gpus, nodes, example_tokens, examples, price)
    if mend:
        write_mended(found, mend)
    if as_json:
        print(json.dumps(found))
        return
    show_plan(found, Screen(sys.stdout), explain)


def methods(
    base: Annotated[
        str | None, typer.Option("--base", metavar="BASE", help="Folder or hub id of a base; the paper's list when absent.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Count what each method trains, from shapes alone: the LoRA paper's list beside its printed figures, or every method on a base.

    Example: zlora methods --base gpt2-medium
    """
    from pipeline.planning.methods import make_counts, show_counts
    from pipeline.screen import Screen

    counts = make_counts(base)
    if as_json:
        print(json.dumps(counts))
        return
    show_counts(counts, Screen(sys.stdout))


def fetch(job: options.JobFile, overrides: options.Overrides = None, as_json: options.AsJson = False) -> None:
    """Download a job's base and data, of a sweep every member's, so that ranks need no network. Interrupted? The same again goes on.

    Example: zlora fetch jobs/e2e/local.toml
    """
    from pipeline.fetch import fetch_all
    from pipeline.job.read import read_job, read_members
    from pipeline.screen import Screen

    keys = tuple(overrides or ())
    members = [own for _, own in read_members(job, keys)]
    found = fetch_all(members or [read_job(job, keys)], Screen(sys.stderr if as_json else sys.stdout))
    if as_json:
        print(json.dumps(found))


def data(
    job: options.JobFile,
    overrides: options.Overrides = None,
    examples: Annotated[int, typer.Option(min=0, help="Show so many training examples of each source, token by token.")] = 3,
    as_json: options.AsJson = False,
) -> None:
    """Show what a job's model will see: counts, lengths, labels, what is left out, and examples with the tokens that are learnt.

    Reads no weights and needs no ranks. Exit code 2 with training's own line where training would refuse the data.

    Example: zlora data jobs/e2e/local.toml --examples 1
    """
    # transformers imports torch wherever it is; its tokenizers do not need it, and so start in half the time.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    from pipeline.data.look import look
    from pipeline.data.show import show_data
    from pipeline.job.read import read_job
    from pipeline.screen import Screen, json_text

    screen = Screen(sys.stderr if as_json else sys.stdout)
    read = read_job(job, tuple(overrides or ()))
    options.say_of_sweep(job, read)
    report = look(read, examples, screen)
    if as_json:
        print(json_text(report))
    else:
        show_data(screen, report)
    if report["refusal"]:
        raise JobError(report["refusal"])
