"""Deltas, file to file: `merge`, `switch`, `unmerge`, `verify`, `import`. Heavy imports are inside."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.commands import options
from pipeline.job.errors import JobError

if TYPE_CHECKING:
    from pipeline.deltas.mixture import Mixture


def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder or hub id of the base that the deltas were trained on.")],
    delta: Annotated[list[str], typer.Argument(metavar="DELTA[:WEIGHT]...", help="A run's folder delta/ or best/; several: their sum.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the merged checkpoint goes; absent or empty.")],
    dtype: Annotated[Literal["fp32", "bf16", "fp16"] | None, typer.Option(help="Of the result; the base's when absent.")] = None,
    check_logits: Annotated[bool, typer.Option("--check-logits", help="Compare with base + deltas unmerged: takes a whole model.")] = False,
    prompt: Annotated[list[str] | None, typer.Option(help="What it is compared on; a few of its own when absent.")] = None,
    workers: options.Workers = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Merge deltas into their base: an ordinary checkpoint, and merge.json as its certificate. Killed, the same command goes on.

    Example: zlora merge gpt2-medium runs/gpt2_medium_lora/delta --out merged
    """
    from pipeline.deltas.beside import CERTIFICATE
    from pipeline.deltas.merge import merge as merge_files
    from pipeline.deltas.mixture import parse_share
    from pipeline.screen import Screen
    from pipeline.weights.hub import local_base

    check = None
    if check_logits or prompt:
        from pipeline.logits import PROMPTS, compare_logits

        def check(mixture: Mixture, folder: Path) -> dict[str, Any]:
            return compare_logits(mixture, folder, prompt or PROMPTS)

    screen = Screen(sys.stderr)
    certificate = merge_files(
        local_base(base, revision),
        [parse_share(text) for text in delta],
        out,
        lambda names: screen.progress("merging", names),
        dtype=dtype,
        workers=workers,
        say=screen.print,
        check=check,
    )
    if as_json:
        print(json.dumps(certificate))
        return
    Screen(sys.stdout).table(
        "done",
        [
            ("merged", str(out)),
            *_rounding(certificate),
            ("logits", _logits(certificate["logits"])),
            ("certificate", str(out / CERTIFICATE)),
        ],
    )


def _logits(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not compared with base + delta unmerged; --check-logits does, in the memory of a whole model"
    if "skipped" in found:
        return f"not compared: {found['skipped']}"
    same = f"the same choice at {found['equal_argmax']:.1%} of {found['positions']} positions"
    return f"differ by {found['largest_difference']:.3g} at most, {found['mean_difference']:.3g} on average; {same}"


def _rounding(certificate: dict[str, Any]) -> list[tuple[str, str]]:
    changed = [row for row in certificate["tensors"].values() if row["changed_elements"]]
    moved, vanished = (sum(row[f"{what}_elements"] for row in changed) for what in ("changed", "vanished"))
    others = f"{len(certificate['converted'])} converted, " if certificate["converted"] else ""
    return [
        ("tensors", f"{len(changed)} changed, {others}the others copied byte by byte"),
        ("rounding", f"{max((row['largest_error'] for row in certificate['tensors'].values()), default=0):.3g} at most"),
        ("vanished", f"{vanished:,} of {moved:,} changed elements are too small a change for the dtype"),
    ]


def switch(
    merged: Annotated[Path, typer.Argument(metavar="MERGED", help="A folder that zlora merge wrote; it is changed in its place.")],
    delta: Annotated[list[str] | None, typer.Argument(metavar="DELTA[:WEIGHT]...", help="What it shall be merged from.")] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="BASE", help="Folder or hub id of the base that it was merged from.")
    ] = None,
    roll_back: Annotated[bool, typer.Option("--roll-back", help="Take an unfinished switch back; needs neither base nor delta.")] = False,
    workers: options.Workers = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Turn a merged folder into another delta's: only the tensors that differ are written. Killed, the same command finishes it.

    Example: zlora switch merged runs/other/delta --base gpt2-medium
    """
    from pipeline.screen import Screen

    if roll_back:
        from pipeline.deltas.undo import roll_back as take_back

        if delta or base:
            raise JobError("--roll-back: takes the unfinished switch back from what it kept. Leave DELTA and --base out.")
        take_back(merged)
        found: dict[str, Any] = {"schema_version": 1, "folder": str(merged.resolve()), "rolled_back": True}
        print(json.dumps(found)) if as_json else Screen(sys.stdout).table("rolled back", [("merged", str(merged))])
        return
    if not delta or base is None:
        raise JobError("zlora switch: needs DELTA and --base. For the base itself again: zlora unmerge MERGED --base BASE.")
    _switch(merged, delta, base, revision, workers, as_json)


def unmerge(
    merged: Annotated[Path, typer.Argument(metavar="MERGED", help="A folder that zlora merge wrote; it is changed in its place.")],
    base: Annotated[str, typer.Option("--base", metavar="BASE", help="Folder or hub id of the base that it was merged from.")],
    workers: options.Workers = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Make a merged folder the base again, bit for bit: weights, config and tokenizer. Killed, the same command finishes it.

    Example: zlora unmerge merged --base gpt2-medium
    """
    _switch(merged, [], base, revision, workers, as_json)


def _switch(merged: Path, delta: list[str], base: str, revision: str | None, workers: int | None, as_json: bool) -> None:
    from pipeline.deltas.mixture import parse_share
    from pipeline.deltas.switch import switch as switch_files
    from pipeline.screen import Screen, size_text
    from pipeline.weights.hub import local_base

    screen = Screen(sys.stderr)
    done = switch_files(
        merged,
        [parse_share(text) for text in delta],
        local_base(base, revision),
        lambda names: screen.progress("switching", names),
        workers=workers,
        say=screen.print,
    )
    if as_json:
        print(json.dumps({"schema_version": 1, "tensors": done.tensors, "bytes": done.bytes, "certificate": done.certificate}))
        return
    now = ", ".join(delta) or "the base alone"
    rows = [("merged", str(merged)), ("is now", now), ("written", f"{done.tensors} tensors, {size_text(done.bytes)} with what was kept")]
    Screen(sys.stdout).table("switched", [*rows, *(_rounding(done.certificate) if delta else [])])


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A merged folder, a delta, a state, or a run with its deltas and states.")],
    as_json: options.AsJson = False,
) -> None:
    """Check every byte against the digests that were written with it; name the first file and tensor that differ.

    Example: zlora verify merged
    """
    from pipeline.deltas.verify import bytes_of
    from pipeline.deltas.verify import verify as verify_folder
    from pipeline.screen import Screen, size_text

    with Screen(sys.stderr).bytes("verifying", bytes_of(folder)) as show:
        done, lock = 0, threading.Lock()

        def seen(count: int) -> None:
            nonlocal done
            with lock:
                done += count
                show(done)

        found = verify_folder(folder, seen)
    if as_json:
        print(json.dumps(found))
        return
    rows = [("kind", " and ".join(found["kinds"])), ("files", str(found["files"])), ("bytes", size_text(found["bytes"]))]
    Screen(sys.stdout).table("as written", [("folder", str(folder)), *rows])


def import_(
    source: Annotated[Path, typer.Argument(metavar="FILE|FOLDER", help="A loralib checkpoint, or the folder of a LoRA that PEFT saved.")],
    base: Annotated[str, typer.Option("--base", metavar="BASE", help="Folder or hub id of the base that it was trained on.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the delta goes; absent or empty.")],
    alpha: Annotated[float | None, typer.Option(min=0.0, help="Of a loralib checkpoint, unless loralib.json beside it says it.")] = None,
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
    from pipeline.exchange.importing import import_delta
    from pipeline.screen import Screen

    chosen, names = (tuple(filter(None, text.split(","))) for text in (parts, labels))
    found = import_delta(source, base, revision, out, alpha, chosen, names)
    if as_json:
        print(json.dumps(found))
        return
    rows = [("delta", found["delta"]), ("modules", str(found["modules"])), ("parameters", f"{found['parameters']:,}")]
    Screen(sys.stdout).table("imported", [*rows, ("head", ", ".join(found["labels"] or found["head"]) or "none")])
