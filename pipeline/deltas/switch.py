"""A merged folder turned into that of other deltas in its place, from the pristine base: only the tensors that differ are written.

Never by subtracting: a tensor that the old deltas changed and the new ones do not is the base's again, byte for byte. A file whose header
or size is to be another (a head, added tokens, a dtype) is made whole beside and moved in. Killed anywhere, the same command finishes
it, or `undo.roll_back` takes it back; no step starts from anything that an earlier one has overwritten.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.deltas.beside import CERTIFICATE, CONFIG, write_beside
from pipeline.deltas.certificate import HEADER, Sums, beside_digests, certificate_of, read_certificate
from pipeline.deltas.layout import Layout, Piece, layouts_of
from pipeline.deltas.merge import write_file
from pipeline.deltas.mixture import Mixture, mix
from pipeline.deltas.parallel import Progress, Tick, side_by_side
from pipeline.deltas.pieces import make_piece
from pipeline.deltas.undo import (
    BACK,
    JOURNAL,
    NEW,
    OLD,
    PREPARING,
    UNDO,
    close,
    locked,
    put_aside,
    put_in,
    read_journal,
    save_bytes,
    take_back,
    tidy,
)
from pipeline.deltas.verify import verify_merged
from pipeline.job.errors import JobError
from pipeline.weights.atomic import fsync, write_json
from pipeline.weights.digest import base_digest
from pipeline.weights.read import Reader
from pipeline.weights.unfinished import SWITCHING

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Switched:
    certificate: dict[str, Any]
    tensors: int
    """Written."""
    bytes: int
    """Of weights written: in place, and whole files where the layout is another; with the bytes kept to take it back."""


def switch(
    merged: Path,
    deltas: Sequence[tuple[Path, float]],
    base: Path,
    progress: Progress = iter,
    *,
    workers: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Switched:
    """Makes `merged` what a fresh merge of the deltas into the base would be, in the dtype that it has; of none: the base itself again.

    Raises:
        JobError: another base than that of the merged folder, a folder that is not what its certificate says, another switch in the middle,
            and what `mix` refuses.
    """
    with locked(merged):
        work = merged / SWITCHING
        begun = work.exists()
        old = read_certificate(work / OLD if (work / OLD / CERTIFICATE).is_file() else merged)
        mixture = mix(base, deltas, old["dtype"] if deltas else None)
        if base_digest(mixture.digests) != old["base"]["digest"]:
            raise JobError(
                f"{base}: its digest is {base_digest(mixture.digests)[:12]}..., {merged} was merged from "
                f"{old['base']['digest'][:12]}... ({old['base']['path']}). Name the base that it was merged from."
            )
        layouts = layouts_of(mixture)
        if begun:
            journal = _unfinished(merged, mixture)
            say("going on with an unfinished switch")
        else:
            try:
                journal = _prepare(merged, old, mixture, layouts, workers)
            except Exception:
                tidy(merged)
                raise
        try:
            put_aside(journal["gives_way"], merged, work / OLD)
            rows = _overwrite(merged, old, mixture, layouts, journal, workers, progress)
            write_json(work / NEW / CERTIFICATE, certificate_of(mixture, rows, journal["beside"], None))
        except Exception:
            # A delta that is not finite in this dtype, say: known only now.
            take_back(merged)
            raise
        # The config last: without it nothing loads the folder.
        put_in([*(name for name in journal["comes"] if name != CONFIG), CERTIFICATE, CONFIG], work / NEW, merged)
        certificate = read_certificate(merged)
        close(merged)
    segments = [end - start for pieces in journal["overwritten"].values() for start, end in pieces]
    whole = [layout for layout in layouts if layout.name in journal["rows"]]
    return Switched(
        certificate,
        len(segments) + sum(len(layout.pieces) for layout in whole),
        2 * sum(segments) + sum((merged / layout.name).stat().st_size for layout in whole),
    )


def _unfinished(merged: Path, mixture: Mixture) -> dict[str, Any]:
    journal = read_journal(merged)
    if (merged / SWITCHING / BACK).exists():
        raise JobError(f"{merged}: is being rolled back. Finish that first: zlora switch {merged} --roll-back.")
    if journal["to"] != mixture.asked:
        raise JobError(
            f"{merged}: is in the middle of a switch to others than these ({', '.join(journal['deltas']) or 'the base alone'}). Finish it "
            f"with those, or take it back: zlora switch {merged} --roll-back."
        )
    return journal


def _prepare(merged: Path, old: dict[str, Any], mixture: Mixture, layouts: Sequence[Layout], workers: int | None) -> dict[str, Any]:
    """Makes all that the switch needs but for the tensors in place, and only then gives it its name."""
    tidy(merged)
    verify_merged(merged, workers=workers)
    for layout in layouts:
        if (file := merged / layout.name).is_symlink() or file.stat().st_nlink > 1:
            raise JobError(
                f"{file}: is a link, and writing in its place would change what it is linked with. Make it a copy: cp --dereference."
            )
    work = merged / PREPARING
    for name in (UNDO, OLD, NEW):
        (work / name).mkdir(parents=True)
    overwritten: dict[str, list[tuple[int, int]]] = {}
    rows: dict[str, dict[str, Any]] = {}

    def prepare(layout: Layout, tick: Tick) -> None:
        if not _same_layout(merged / layout.name, layout):
            rows[layout.name] = write_file(layout, work / NEW / layout.name, lambda: None).row()
        elif segments := [(piece.start, piece.start + piece.bytes) for piece in layout.pieces if _differs(piece, old)]:
            overwritten[layout.name] = segments
            save_bytes(merged / layout.name, segments, work / UNDO / layout.name)

    side_by_side(layouts, (), prepare, workers)
    write_beside(mixture, layouts, work / NEW)
    beside = beside_digests(work / NEW, [layout.name for layout in layouts])
    for name, digest in beside.items():
        if name != CONFIG and old["result"]["beside"].get(name) == digest:
            (work / NEW / name).unlink()
    comes = sorted(file.name for file in (work / NEW).iterdir())
    goes = {*comes, *(name for name in old["result"]["beside"] if name not in beside)}
    journal = {
        "schema_version": SCHEMA_VERSION,
        "to": mixture.asked,
        "deltas": [f"{one.folder.resolve()}:{one.weight:g}" for one in mixture.shares],
        "overwritten": overwritten,
        "gives_way": [name for name in (CONFIG, CERTIFICATE, *sorted(goes - {CONFIG, CERTIFICATE})) if (merged / name).exists()],
        "comes": comes,
        "beside": beside,
        "rows": rows,
    }
    write_json(work / JOURNAL, journal)
    for path in (*(work / NEW).iterdir(), work / NEW, work / UNDO, work):
        fsync(path)
    work.replace(merged / SWITCHING)
    fsync(merged)
    return journal


def _same_layout(file: Path, layout: Layout) -> bool:
    size = len(layout.header) + sum(piece.bytes for piece in layout.pieces)
    with file.open("rb") as stream:
        return file.stat().st_size == size and stream.read(len(layout.header)) == layout.header


def _differs(piece: Piece, old: dict[str, Any]) -> bool:
    return piece.name in old["tensors"] or piece.change is not None or piece.head is not None


def _overwrite(
    merged: Path,
    old: dict[str, Any],
    mixture: Mixture,
    layouts: Sequence[Layout],
    journal: dict[str, Any],
    workers: int | None,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Writes the tensors in place. Returns what the `Sums` of each file of the result say."""
    rows: dict[str, dict[str, Any]] = {}
    for layout in layouts:
        names = [piece.name for piece in layout.pieces]
        converted = {name: old["converted"][name] for name in names if name in old["converted"]}
        kept = {"sha256": old["result"]["files"][layout.name], "running": old["running"][layout.name], "tensors": converted}
        rows[layout.name] = journal["rows"].get(layout.name, kept)
    touched = [layout for layout in layouts if layout.name in journal["overwritten"]]

    def one(layout: Layout, tick: Tick) -> None:
        starts = {start for start, _ in journal["overwritten"][layout.name]}
        found = _overwrite_file(merged / layout.name, layout, starts, tick).row()
        found["tensors"] = rows[layout.name]["tensors"] | found["tensors"]
        rows[layout.name] = found

    side_by_side(touched, [piece.name for layout in touched for piece in layout.pieces], one, workers, progress)
    return rows


def _overwrite_file(file: Path, layout: Layout, starts: set[int], tick: Tick) -> Sums:
    sums = Sums()
    with file.open("r+b", buffering=0) as stream, Reader() as reader:

        def write(data: memoryview) -> None:
            sums.take(data)
            while data:
                data = data[stream.write(data) :]

        sums.take(layout.header)
        sums.end(HEADER)
        for piece in layout.pieces:
            if piece.start in starts and piece.bytes:
                stream.seek(piece.start)
                if (rounding := make_piece(piece, reader, write)) is not None:
                    sums.tensors[piece.name] = rounding
            else:
                # Verified before the first byte was overwritten.
                reader.read_run(file, piece.start, piece.bytes, sums.take)
            sums.end(piece.name)
            tick()
        os.fsync(stream.fileno())
    return sums
