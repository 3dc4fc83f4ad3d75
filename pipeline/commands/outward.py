"""Deltas for other tools: `export`, and whether vLLM takes one. Heavy imports are inside."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pipeline.commands import options
from pipeline.job.errors import JobError


def export(
    delta: Annotated[Path, typer.Argument(metavar="DELTA", help="A run's folder delta/ or best/.")],
    form: Annotated[
        Literal["peft", "loralib", "dense", "hub"] | None,
        typer.Option("--format", help="PEFT's folder, loralib's file, W' - W of every tensor, or a folder for the hub with its card."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where it goes; absent or empty.")] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="BASE", help="Folder or hub id of its base: for dense, and --check.")
    ] = None,
    check: Annotated[Literal["vllm"] | None, typer.Option(help="First say whether vLLM loads it; alone, nothing is written.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Write a delta for other tools: PEFT, loralib, a dense difference, or a Hugging Face folder with a model card made from its run.

    Example: zlora export runs/my/best --format hub --out my-adapter
    """
    from pipeline.exchange.exporting import check_vllm
    from pipeline.exchange.exporting import export as export_files
    from pipeline.screen import Screen

    if not check and (form is None or out is None):
        raise JobError("zlora export: needs --format and --out, or --check vllm. For PEFT: zlora export DELTA --format peft --out DIR.")
    if (form is None) != (out is None):
        raise JobError("zlora export: --format and --out go together. Give both, or --check vllm alone.")
    told: dict[str, Any] = {"schema_version": 1}
    if check:
        verdict = check_vllm(delta, base, revision)
        if verdict.reasons:
            raise JobError(f"{delta}: vLLM does not load it. {verdict.refusal}")
        told["vllm"] = {"max_lora_rank": verdict.max_lora_rank, "notes": list(verdict.notes)}
        if not as_json:
            print("\n".join(verdict.lines))
    if form and out:
        told |= export_files(delta, form, out, base, revision)
    if as_json:
        print(json.dumps(told))
    elif form:
        Screen(sys.stdout).table("exported", [("to", str(out)), ("files", ", ".join(told["files"])), *_read_back(told)])


def _read_back(told: dict[str, Any]) -> list[tuple[str, str]]:
    if "settings" not in told:
        return []
    parts, labels = told["settings"]["parts"], told["settings"]["labels"]
    more = (f" --parts {','.join(parts)}" if parts else "") + (f" --labels {','.join(labels)}" if labels else "")
    return [("read with", f"lora_alpha {told['settings']['lora_alpha']:g}{more}")]
