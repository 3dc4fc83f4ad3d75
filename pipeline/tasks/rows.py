"""Your own files -> rows of named values: JSON lines, a JSON list, CSV, TSV, Parquet; one row in memory at a time.

Reading a row is put off until it is asked for, so that whoever reads can leave a bad one out and go on with the next.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.job.errors import JobError
from pipeline.tasks.files import decoded, raw_lines
from pipeline.tasks.json_rows import Row, as_object, json_values, parsed

if TYPE_CHECKING:
    from pyarrow import RecordBatch

Format = Literal["jsonl", "json", "csv", "parquet", "txt"]
FORMATS: dict[str, Format] = {".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "txt"}
Found = tuple[str, Callable[[], Row]]
"""Where a row is, and what reads it: raises JobError where it is bad."""

_LARGEST_CELL = 1 << 24
"""Characters. Without a limit, a quotation mark left open would swallow the rest of the file."""
_BATCH = 256
_BUFFER_BYTES = 1 << 20
"""Otherwise a whole column of a row group is read at once, and all of a file may be one group."""


def rows(file: Path, form: Format, columns: tuple[str, ...]) -> Iterator[Found]:
    """The rows of a file, in file order.

    Args:
        columns: those that are wanted; where the file says what it has, the others are not read.

    Raises:
        JobError: the file as a whole cannot be read, or has no such column.
    """
    match form:
        case "jsonl":
            return _json_lines(file)
        case "json":
            return ((where, partial(as_object, value, where)) for value, where in json_values(file))
        case "csv":
            return _csv(file, columns)
        case "parquet":
            return _parquet(file, columns)
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


def _refused(error: JobError) -> Row:
    raise error


def _require(columns: tuple[str, ...], found: list[str], where: str) -> None:
    listed = ", ".join(found)
    for column in columns:
        if column not in found:
            raise JobError(f'{where}: no column "{column[:80]}"; there are {listed[:400]}. Say in [task] what the column is called.')
    for column in found:
        if found.count(column) > 1:
            raise JobError(f'{where}: names a column twice ("{column[:80]}"). Name each column once.')


def _csv(file: Path, columns: tuple[str, ...]) -> Iterator[Found]:
    csv.field_size_limit(_LARGEST_CELL)
    wrong: list[JobError] = []
    found, line = csv.reader(_lines(file, wrong), strict=True, delimiter="\t" if file.suffix == ".tsv" else ","), 1
    header: list[str] = []
    while True:
        where, bad = f"{file}:{line}", None
        try:
            cells = next(found, None)
        except csv.Error as error:
            repair = "End lines with a line feed." if "new-line" in str(error) else "Is a quotation mark left open? Mend the line."
            cells, bad = [], JobError(f"{where}: not valid CSV ({error}). {repair}")
            # What follows belongs to the open quotation: it cannot be told how many rows are lost.
            if not header or "expected after" not in str(error):
                raise bad from None
        if cells is None and header:
            return
        bad = wrong[0] if wrong else bad
        if not header:
            if bad:
                raise bad
            if not cells:
                raise JobError(f"{where}: no header. Name each column once in the first line.")
            _require(columns, cells, where)
            header = cells
        elif bad:
            yield where, partial(_refused, bad)
        elif cells:
            yield where, partial(_named, header, cells, where)
        wrong.clear()
        line = found.line_num + 1


def _lines(file: Path, wrong: list[JobError]) -> Iterator[str]:
    """Notes a line that is not UTF-8 instead of raising: it spoils its own row only."""
    for number, raw in raw_lines(file):
        try:
            yield decoded(raw, f"{file}:{number}")
        except JobError as error:
            wrong.append(error)
            yield raw.decode("utf-8", "replace")


def _named(header: list[str], cells: list[str], where: str) -> Row:
    if len(cells) != len(header):
        raise JobError(f"{where}: {len(cells)} columns, but the header has {len(header)} ({', '.join(header)}). Mend the line.")
    return dict(zip(header, cells, strict=True))


def _parquet(file: Path, columns: tuple[str, ...]) -> Iterator[Found]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False) as table:
            _require(columns, table.schema_arrow.names, str(file))
            for batch in table.iter_batches(_BATCH, columns=list(columns)):
                for row in _values(batch):
                    number += 1
                    where = f"{file}:{number}"
                    not_text = JobError(f"{where}: not UTF-8 text. Write the column as UTF-8.")
                    yield where, partial(_refused, not_text) if row is None else partial(_given, row)
    except (pa.ArrowException, OSError) as error:
        raise JobError(f"{file}: not readable as Parquet after row {number} ({str(error).splitlines()[0]}). Write it again.") from None


def _values(batch: RecordBatch) -> list[Row | None]:
    """None for a row that is not UTF-8, which Arrow does not look at."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        parts = [batch.slice(place, 1) for place in range(len(batch))]
        return [row for part in parts for row in (_values(part) if len(batch) > 1 else [None])]
