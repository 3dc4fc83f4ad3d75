"""Deltas, file to file: `merge`, `import`. Heavy imports are inside."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands import options


def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder or hub id of the base that the delta was trained on.")],
    delta: Annotated[Path, typer.Argument(metavar="DELTA", help="A run's folder delta/ or best/.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the merged checkpoint goes; absent or empty.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Merge a delta into its base: an ordinary checkpoint, and merge.json as its certificate.

    Example: zlora merge gpt2-medium runs/gpt2_medium_lora/delta --out merged
    """
    from pipeline.deltas.merge import CERTIFICATE
    from pipeline.deltas.merge import merge as merge_files
    from pipeline.screen import Screen
    from pipeline.weights.hub import local_base

    screen = Screen(sys.stderr)
    certificate = merge_files(local_base(base, revision), delta, out, lambda items: screen.progress("merging", items))
    if as_json:
        print(json.dumps(certificate))
        return
    errors = certificate["largest_rounding_error"]
    rows = [
        ("merged", str(out)),
        ("tensors", f"{len(errors)} changed, the others copied byte by byte"),
        ("rounding", f"{max(errors.values()):.3g} at most"),
        ("certificate", str(out / CERTIFICATE)),
    ]
    Screen(sys.stdout).table("done", rows)


def import_(
    source: Annotated[Path, typer.Argument(metavar="FILE|FOLDER", help="A loralib checkpoint, or the folder of a LoRA that PEFT saved.")],
    base: Annotated[str, typer.Option("--base", metavar="BASE", help="Folder or hub id of the base that it was trained on.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the delta goes; absent or empty.")],
    alpha: Annotated[float | None, typer.Option(min=0.0, help="Of a loralib checkpoint, which does not hold it.")] = None,
    parts: Annotated[str, typer.Option(metavar="q,v", help="What a loralib checkpoint's pairs of a fused map are of, in its order.")] = "",
    labels: Annotated[
        str, typer.Option(metavar="A,B,C", help="Names of the classes of its head, in its order; LABEL_0, ... when absent.")
    ] = "",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Make a delta of a checkpoint of loralib's, the paper's own library, or of a LoRA that PEFT saved; its head too.

    Example: zlora import mnli.bin --base roberta-base --alpha 16 --out mnli
    """
    from pipeline.importing import import_delta
    from pipeline.screen import Screen

    chosen, names = (tuple(filter(None, text.split(","))) for text in (parts, labels))
    found = import_delta(source, base, revision, out, alpha, chosen, names)
    if as_json:
        print(json.dumps(found))
        return
    rows = [("delta", found["delta"]), ("modules", str(found["modules"])), ("parameters", f"{found['parameters']:,}")]
    Screen(sys.stdout).table("imported", [*rows, ("head", ", ".join(found["labels"] or found["head"]) or "none")])
