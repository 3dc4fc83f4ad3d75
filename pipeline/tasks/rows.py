"""Your own files -> rows of named values: JSON lines, a JSON list, CSV, TSV, Parquet; one row in memory at a time.

Reading a row is put off until it is asked for, so that whoever reads can leave a bad one out and go on with the next.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

from pipeline.job.errors import JobError
from pipeline.tasks.files import decoded, raw_lines
from pipeline.tasks.json_rows import Row, json_array, parsed

Format = Literal["jsonl", "json", "csv", "parquet", "txt"]
FORMATS: dict[str, Format] = {".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "txt"}
Found = tuple[str, Callable[[], Row]]
"""Where a row is, and what reads it: raises JobError where it is bad."""

_LARGEST_CELL = 1 << 26
"""Characters. Without a limit, a quotation mark left open would swallow the rest of the file."""
_BATCH = 256


def rows(file: Path, form: Format) -> Iterator[Found]:
    """The rows of a file, in file order.

    Raises:
        JobError: the file as a whole cannot be read.
    """
    match form:
        case "jsonl":
            return _json_lines(file)
        case "json":
            return ((where, partial(_given, row)) for row, where in json_array(file))
        case "csv":
            return _csv(file)
        case "parquet":
            return _parquet(file)
        case "txt":
            raise JobError(f"{file}: plain text has no columns. Use .jsonl, .csv, .tsv or .parquet.")


def _json_lines(file: Path) -> Iterator[Found]:
    for number, raw in raw_lines(file):
        if raw.strip():
            where = f"{file}:{number}"
            yield where, partial(_parsed, raw, where)


def _parsed(raw: bytes, where: str) -> Row:
    return parsed(decoded(raw, where), where)


def _given(row: Row) -> Row:
    return row


def _csv(file: Path) -> Iterator[Found]:
    csv.field_size_limit(_LARGEST_CELL)
    wrong: list[JobError] = []
    found, line = csv.reader(_lines(file, wrong), strict=True, delimiter="\t" if file.suffix == ".tsv" else ","), 1
    try:
        header = next(found, [])
        if wrong:
            raise wrong[0]
        if not header or len(set(header)) < len(header):
            raise JobError(f"{file}:1: {'names a column twice' if header else 'no header'}. Name each column once in the first line.")
        line = found.line_num + 1
        for cells in found:
            if cells:
                where = f"{file}:{line}"
                yield where, partial(_named, header, cells, where, wrong[0] if wrong else None)
            wrong.clear()
            line = found.line_num + 1
    except csv.Error as error:
        raise JobError(f"{file}:{line}: not valid CSV ({error}). Is a quotation mark left open? Mend the line.") from None


def _lines(file: Path, wrong: list[JobError]) -> Iterator[str]:
    """Notes a line that is not UTF-8 instead of raising: it spoils its own row only."""
    for number, raw in raw_lines(file):
        try:
            yield decoded(raw, f"{file}:{number}")
        except JobError as error:
            wrong.append(error)
            yield raw.decode("utf-8", "replace")


def _named(header: list[str], cells: list[str], where: str, wrong: JobError | None) -> Row:
    if wrong:
        raise wrong
    if len(cells) != len(header):
        raise JobError(f"{where}: {len(cells)} columns, but the header has {len(header)} ({', '.join(header)}). Mend the line.")
    return dict(zip(header, cells, strict=True))


def _parquet(file: Path) -> Iterator[Found]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}:{number}", partial(_given, row)
    except (pa.ArrowException, OSError) as error:
        raise JobError(f"{file}: not readable as Parquet after row {number} ({str(error).splitlines()[0]}). Write it again.") from None
