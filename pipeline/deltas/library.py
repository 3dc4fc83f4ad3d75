"""A folder of deltas -> one row for each: task, method, size, score, base; which are the same, which are of another base, which are broken.

In: manifests, headers and what their runs wrote down. Out: `Shelf`. No tensor is read and no torch is imported.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from pipeline.deltas.origin import origin_of
from pipeline.job.errors import JobError
from pipeline.job.metrics import names_of, shown
from pipeline.job.task import Mix, titled
from pipeline.weights.manifest import CONFIG, MANIFEST, TENSORS, Manifest, read_manifest
from pipeline.weights.parse import parse_json

_DEPTH = 4
"""Folders below the one that is named: runs/, a group, a run, its delta/."""
_LEFT_OUT = {"state", "tensorboard", "logs", "predictions", "profile"}
_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Row:
    folder: str
    """Below the one that is named."""
    problem: str | None = None
    """Why it cannot be used; the rest is empty then."""
    task: str | None = None
    method: str | None = None
    parameters: int | None = None
    bytes: int | None = None
    score: str | None = None
    step: int | None = None
    base: str | None = None
    base_digest: str | None = None
    date: str | None = None
    """When it was written, UTC."""
    sha256: str | None = None
    same_as: str | None = None
    """An earlier row with the same tensors."""
    other_base: bool = False


@dataclass(frozen=True)
class Shelf:
    rows: tuple[Row, ...]
    base_digest: str | None
    """The base that was asked for, or that most of them are of."""


def look_through(folder: Path, base_digest: str | None = None) -> Shelf:
    """Every delta of a folder, by name.

    Args:
        base_digest: of the base that they should be of; that of most when absent.

    Raises:
        JobError: no such folder, or no delta in it.
    """
    if not folder.is_dir():
        raise JobError(f"{folder}: no such folder. Name one that has runs or deltas in it.")
    rows = [_row(folder, place) for place in sorted(_places(folder, _DEPTH))]
    if not rows:
        raise JobError(f"{folder}: no delta is here, {_DEPTH} folders deep. Name the folder that has runs or deltas in it.")
    digests = Counter(row.base_digest for row in rows if row.base_digest)
    base_digest = base_digest or next((digest for digest, _ in digests.most_common(1)), None)
    first: dict[str | None, str] = {None: ""}
    found = []
    for row in rows:
        same = first.setdefault(row.sha256, row.folder)
        found.append(
            replace(
                row,
                same_as=same if row.sha256 and same != row.folder else None,
                other_base=row.base_digest is not None and row.base_digest != base_digest,
            )
        )
    return Shelf(tuple(found), base_digest)


def _places(folder: Path, depth: int) -> Iterator[Path]:
    """Folders with a manifest, or with a delta's tensors and none."""
    if (folder / MANIFEST).is_file() or (folder / TENSORS).is_file():
        yield folder
        return
    if depth == 0:
        return
    try:
        inside = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return
    for name in inside:
        if name not in _LEFT_OUT:
            yield from _places(folder / name, depth - 1)


def _row(root: Path, folder: Path) -> Row:
    name = str(folder.relative_to(root))
    if not (folder / MANIFEST).is_file() and (folder / CONFIG).is_file():
        return Row(name, problem=f"{folder}: was saved by PEFT and has no {MANIFEST}. Make a delta of it: zlora import.")
    try:
        manifest = read_manifest(folder)
        size = _sound_bytes(folder / TENSORS)
    except (JobError, OSError) as error:
        return Row(name, problem=str(error))
    origin = origin_of(folder, manifest)
    task = score = None
    if origin.job:
        task = " + ".join(map(titled, origin.job.task.sources if isinstance(origin.job.task, Mix) else (origin.job.task,)))
        split = origin.job.evaluate.split
        metrics = origin.scores.get(split, {})
        wanted = origin.chosen or origin.job.evaluate.best_metric
        metric = wanted or next((one for one in names_of(origin.job.task) if one in metrics), None)
        if metric in metrics:
            score = f"{split} {metric} {shown(origin.job.task.kind, metric, metrics[metric])}"
    written = datetime.fromtimestamp((folder / MANIFEST).stat().st_mtime, timezone.utc)
    return Row(
        name,
        task=task,
        method=method_text(manifest),
        parameters=manifest.parameters,
        bytes=size,
        score=score,
        step=manifest.step,
        base=manifest.base,
        base_digest=manifest.base_digest,
        date=written.strftime("%Y-%m-%d %H:%M"),
        sha256=manifest.sha256,
    )


def method_text(manifest: Manifest) -> str:
    """What was trained, in a few words. LoRA's rank is the job's; where no job is known of, that of the pairs as they are stored."""
    told = []
    if manifest.modules:
        lora = next((method for method in manifest.methods if method.get("kind") == "lora"), {})
        stored = sorted({module.rank for module in manifest.modules})
        rank = lora.get("rank") or (stored[0] if len(stored) == 1 else f"{stored[0]} to {stored[-1]}")
        targets = f" ({', '.join(lora['targets'])})" if lora.get("targets") else ""
        told.append(f"lora rank {rank}{targets}")
    told += [str(method.get("kind")) for method in manifest.methods if method.get("kind") != "lora"]
    return " + ".join([*told, *(["head"] if manifest.head else [])]) or "parameters of the base"


def _sound_bytes(file: Path) -> int:
    """Size of a safetensors file that is as long as its header says.

    Raises:
        JobError: it is not.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = parse_json(stream.read(length)) if length <= min(size, _HEADER_BYTES) else None
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]  # type: ignore[union-attr]
        if size != 8 + length + max(ends):
            raise ValueError("truncated")
    except FileNotFoundError:
        raise JobError(f"{file}: is missing. Save the delta again.") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise JobError(f"{file}: is not a whole safetensors file. Save the delta again.") from None
    return size
