"""Base + deltas -> an ordinary checkpoint, file to file: W + (alpha / R) B A in fp32, rounded once (Hu et al. 2021, section 4.1), and
the base's own parameters where they were trained; several deltas with their weights.

The result is made in `.<name>.merging/result` and gets its name when it is whole. `journal.jsonl` beside it says what is being merged,
and of each file that is finished and on disk what its bytes are: a merge that was killed goes on with those that still are so.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from pipeline.deltas.beside import CERTIFICATE, write_beside
from pipeline.deltas.certificate import HEADER, SCHEMA_VERSION, Sums, beside_digests, certificate_of, read_certificate
from pipeline.deltas.layout import Layout, layouts_of
from pipeline.deltas.mixture import Mixture, mix
from pipeline.deltas.parallel import Progress, Tick, side_by_side
from pipeline.deltas.pieces import make_piece
from pipeline.job.errors import JobError
from pipeline.weights.atomic import fsync, of_path, refuse_filled, write_json
from pipeline.weights.digest import sha256_of
from pipeline.weights.parse import parse_json
from pipeline.weights.read import Reader

_JOURNAL, _RESULT = "journal.jsonl", "result"
Check = Callable[[Mixture, Path], dict[str, Any]]
"""Compares the finished folder with the unmerged model; its answer is the certificate's `logits`."""


def merge(
    base: Path,
    deltas: Path | Sequence[tuple[Path, float]],
    out: Path,
    progress: Progress = iter,
    *,
    dtype: str | None = None,
    workers: int | None = None,
    say: Callable[[str], None] = lambda text: None,
    check: Check | None = None,
) -> dict[str, Any]:
    """Writes the merged checkpoint with tokenizer and config, and its certificate `merge.json`.

    Args:
        deltas: one, or each with its weight.
        progress: wraps the iteration over the result's tensors, for a progress bar.
        dtype: "fp32", "bf16" or "fp16"; None: the base's.
        workers: files made at a time; None: as many as there are cores. Each holds 20 MB at most.
        say: is told what is gone on with.

    Returns:
        The certificate.

    Raises:
        JobError: what `mix` refuses, a result that is not finite, a destination that is not empty, or another merge into it.
    """
    mixture = mix(base, [(deltas, 1.0)] if isinstance(deltas, Path) else deltas, dtype)
    asked = {"schema_version": SCHEMA_VERSION, **mixture.asked}
    work = out.absolute().parent / f".{out.absolute().name}.merging"
    if _only_its_journal_is_left(work, out, asked):
        shutil.rmtree(work, ignore_errors=True)
        say(f"{out} was finished already")
        return read_certificate(out)
    refuse_filled(out)
    if out.is_dir() and out.resolve() != Path.cwd():
        # Now, not at the end: an empty folder that cannot be moved away (a mount point) must not cost the work.
        out.rmdir()
    with _journal(work, out, asked, say) as (journal, finished):
        result, layouts = work / _RESULT, layouts_of(mixture)
        rows = _write_files(layouts, result, journal, finished, workers, progress)
        names = [layout.name for layout in layouts]
        write_beside(mixture, layouts, result)
        logits = check(mixture, result) if check else None
        certificate = certificate_of(mixture, {name: rows[name] for name in names}, beside_digests(result, names), logits)
        write_json(result / CERTIFICATE, certificate)
        for file in result.rglob("*"):
            fsync(file)
        fsync(result)
        result.replace(out.absolute())
        fsync(work.parent)
    shutil.rmtree(work, ignore_errors=True)
    return certificate


def _write_files(
    layouts: Sequence[Layout],
    result: Path,
    journal: TextIO,
    finished: dict[str, dict[str, Any]],
    workers: int | None,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """What the `Sums` of each file say."""
    rows: dict[str, dict[str, Any]] = {}
    lock = threading.Lock()

    def one(layout: Layout, tick: Tick) -> None:
        row, target = finished.get(layout.name), result / layout.name
        if row and target.is_file() and sha256_of(target) == row["sha256"]:
            rows[layout.name] = row
            for _ in layout.pieces:
                tick()
            return
        rows[layout.name] = row = write_file(layout, target, tick).row()
        with lock:
            _note(journal, {"file": layout.name, **row})

    side_by_side(layouts, [piece.name for layout in layouts for piece in layout.pieces], one, workers, progress)
    return rows


def write_file(layout: Layout, target: Path, tick: Tick) -> Sums:
    """Writes a whole file of the result, and has it on disk."""
    sums = Sums()
    with target.open("wb", buffering=0) as stream, Reader() as reader:

        def write(data: bytes | memoryview) -> None:
            sums.take(data)
            view = memoryview(data)
            while view:
                view = view[stream.write(view) :]

        write(layout.header)
        sums.end(HEADER)
        for piece in layout.pieces:
            if (rounding := make_piece(piece, reader, write)) is not None:
                sums.tensors[piece.name] = rounding
            sums.end(piece.name)
            tick()
        os.fsync(stream.fileno())
    return sums


@contextmanager
def _journal(
    work: Path, out: Path, asked: dict[str, Any], say: Callable[[str], None]
) -> Iterator[tuple[TextIO, dict[str, dict[str, Any]]]]:
    """The journal, open at its end, and what it says of finished files. A failure removes all; a kill or an interrupt nothing."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / _JOURNAL).open("a+", encoding="utf-8") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JobError(f"{out}: another process is merging into it. Wait for it, or choose another folder.") from None
        except OSError:
            pass  # a file system without locks
        finished = _read(work / _JOURNAL, asked)
        if finished is None:
            if (work / _RESULT).exists():
                shutil.rmtree(work / _RESULT)
                say(f"an unfinished merge of something else into {out} is thrown away")
            journal.truncate(0)
            _note(journal, {"asked": asked})
            finished = {}
        elif (work / _RESULT).exists():
            say(f"going on with an unfinished merge: {len(finished)} finished files of it are checked and kept")
            # Whatever a kill cut off is a line of its own.
            _append(journal, "\n")
        (work / _RESULT).mkdir(exist_ok=True)
        try:
            yield journal, finished
        except Exception as error:
            shutil.rmtree(work, ignore_errors=True)
            raise of_path(out, error) from None


def _note(journal: TextIO, row: dict[str, Any]) -> None:
    _append(journal, json.dumps(row) + "\n")


def _append(journal: TextIO, text: str) -> None:
    journal.write(text)
    journal.flush()
    os.fsync(journal.fileno())


def _read(file: Path, asked: dict[str, Any]) -> dict[str, dict[str, Any]] | None:
    """Finished files, or None: not of what is asked. A line that a kill cut off counts for nothing."""
    rows = []
    for line in file.read_bytes().splitlines() if file.is_file() else ():
        try:
            rows.append(parse_json(line))
        except ValueError:
            continue
    if not rows or rows[0] != {"asked": json.loads(json.dumps(asked))}:
        return None
    return {row.pop("file"): row for row in rows[1:] if isinstance(row, dict) and {"file", "sha256", "running", "tensors"} <= row.keys()}


def _only_its_journal_is_left(work: Path, out: Path, asked: dict[str, Any]) -> bool:
    """Killed between giving the result its name and removing the journal."""
    return (out / CERTIFICATE).is_file() and not (work / _RESULT).exists() and _read(work / _JOURNAL, asked) is not None
