"""`zlora analyze`: one delta or two, and their base where it is given -> a report, and a folder with its figures.

Tensors of the base are read when their turn comes (`walk.py`); without a base, whatever needs W is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.analyze.maps import Left, Map, maps_of
from pipeline.analyze.summary import summary_of
from pipeline.analyze.walk import keys_of, walk
from pipeline.deltas.changes import changes_of
from pipeline.deltas.mixture import refuse_misfit, refuse_not_finite, refuse_other_base
from pipeline.job.errors import JobError
from pipeline.methods.lora import linears_of
from pipeline.model.build import build
from pipeline.model.config import read_config
from pipeline.model.linear import BaseLinear
from pipeline.screen import json_text
from pipeline.weights.atomic import new_folder, refuse_filled, write_text
from pipeline.weights.delta import StoredDelta, read_delta
from pipeline.weights.digest import file_digests
from pipeline.weights.hub import local_base
from pipeline.weights.index import Checkpoint, open_checkpoint
from pipeline.weights.manifest import delta_folder

SCHEMA_VERSION = 1
REPORT = "analysis.json"
RANDOM = "random"
Progress = Callable[[str, Iterable[Any], int], Iterable[Any]]
"""(what is done, its items, how many) -> the same items."""


def analyze(
    given: Sequence[Path],
    base: str | None = None,
    revision: str | None = None,
    out: Path | None = None,
    limit: int = 64,
    layers: tuple[int, ...] = (),
    targets: tuple[str, ...] = (),
    exact: bool = False,
    progress: Progress = lambda _, items, __: items,
) -> dict[str, Any]:
    """Returns the report, and writes it with its figures into `out` where that is given.

    Args:
        given: one delta or two, of one base.
        base: folder or hub id.
        limit: directions that subspaces are compared up to; of trained copies, also those that W is projected on.
        layers: the only ones that are looked at; all when empty. So `targets`, by role.
        exact: large matrices by all singular vectors too.
        progress: passes items on as they are done.

    Raises:
        JobError: damaged files, another base, nothing to analyse, layers or roles that are not there; `out` is there already.
    """
    if out:
        refuse_filled(out)
    folders = [delta_folder(path) for path in given]
    stored = [_read(folder) for folder in folders]
    if len({one.manifest.base_digest for one in stored}) > 1:
        names = " and ".join(f"{folder} ({one.manifest.base})" for folder, one in zip(folders, stored, strict=True))
        raise JobError(f"{names}: were trained on different bases, so their directions are not of one space. Name two of one base.")
    checkpoint, heads, linears = _open(base, revision, stored, folders)
    deltas: list[list[Map]] = []
    left: list[list[Left]] = []
    for one, folder in zip(stored, folders, strict=True):
        maps, others = maps_of(one, folder, heads, linears)
        deltas.append(maps)
        left.append(others)
    deltas = _chosen(deltas, layers, targets)
    if len(deltas) > 1 and not {one.key for one in deltas[0]} & {one.key for one in deltas[1]}:
        raise JobError(f"{folders[0]} and {folders[1]}: change no map in common, so there is nothing to compare. Analyse each by itself.")
    rows = list(progress("analysing", walk(deltas, checkpoint, limit, exact), len(keys_of(deltas))))
    for place, (maps, folder) in enumerate(zip(deltas, folders, strict=True)):
        has = {one.key: one.module for one in maps}
        same = [row for row in rows if row["deltas"][place] is None and (row["layer"], row["role"]) in has]
        left[place] += [Left(f"{row['module']} ({row['role']})", "it is the base's own") for row in same]
        if len(same) == len(maps):
            raise JobError(f"{folder}: changes nothing of the base. Name a delta that was trained.")
    rows = [row for row in rows if any(row["deltas"])]
    report = {
        "schema_version": SCHEMA_VERSION,
        "deltas": [_told(*one) for one in zip(folders, stored, left, strict=True)],
        "base": {"folder": str(checkpoint.folder.resolve()), "digest": stored[0].manifest.base_digest} if checkpoint else None,
        "asked": {"directions": limit, "layers": list(layers), "targets": list(targets), "exact": exact},
        "compared": [str(folder) for folder in folders] if len(folders) > 1 else [str(folders[0]), RANDOM],
        "summary": summary_of(rows),
        "maps": rows,
    }
    if out:
        _write(report, out, progress)
    return report


def _read(folder: Path) -> StoredDelta:
    stored = read_delta(folder)
    refuse_not_finite(stored, folder)
    return stored


def _open(
    base: str | None, revision: str | None, stored: list[StoredDelta], folders: list[Path]
) -> tuple[Checkpoint | None, int | None, dict[str, BaseLinear] | None]:
    """The base's headers, its attention heads, and its linear maps without their weights."""
    if base is None:
        return None, None, None
    checkpoint = open_checkpoint(local_base(base, revision))
    digests = file_digests(checkpoint.files)
    for one, folder in zip(stored, folders, strict=True):
        refuse_other_base(checkpoint.folder, digests, one.manifest, folder)
        refuse_misfit(checkpoint, changes_of([(1.0, one)]), folder)
    config = read_config(checkpoint.folder)
    return checkpoint, config.num_attention_heads, linears_of(*build(config, 0.0))


def _chosen(deltas: list[list[Map]], layers: tuple[int, ...], targets: tuple[str, ...]) -> list[list[Map]]:
    there = [one for maps in deltas for one in maps]
    for option, asked, has in (
        ("--layers", layers, sorted({one.layer for one in there})),
        ("--targets", targets, list(dict.fromkeys(one.role for one in there))),
    ):
        for value in asked:
            if value not in has:
                raise JobError(f"{option}: {value} is not changed by what is analysed. There are {', '.join(map(str, has))}.")
    return [[one for one in maps if one.layer in (layers or (one.layer,)) and one.role in (targets or (one.role,))] for maps in deltas]


def _told(folder: Path, stored: StoredDelta, left: list[Left]) -> dict[str, Any]:
    manifest = stored.manifest
    return {
        "delta": str(folder),
        "sha256": manifest.sha256,
        "base": manifest.base,
        "base_digest": manifest.base_digest,
        "step": manifest.step,
        "left_out": [asdict(one) for one in left],
    }


def _write(report: dict[str, Any], out: Path, progress: Progress) -> None:
    # Of what is not needed without a folder.
    from pipeline.analyze.board import write_board
    from pipeline.analyze.figures import figures_of, save

    drawn = figures_of(report)
    with new_folder(out) as partial:
        pictures = [save(draw, partial, name) for name, draw in progress("drawing", drawn.items(), len(drawn))]
        write_board(report, pictures, partial)
        write_text(partial / REPORT, json_text(report) + "\n")
