"""Token sequences in files: tokenised once, then mapped into memory by every rank, and read where training looks.

In: a source of examples and the way they are encoded. Out: `Store`, in the folder `tokens/<key>` of the cache: `sequences.arrow` and
`about.json`. The key is made of all that decides the content: the files' own contents, the task, the tokenizer.
A rank's private memory holds offsets only; the pages of the file belong to the machine and are shared by its ranks.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
from array import array
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.job.errors import JobError
from pipeline.tasks.example import Dropped, Example, Sequence, Source
from pipeline.weights.atomic import new_folder, write_json
from pipeline.weights.digest import cache_folder, digest_of
from pipeline.weights.record import DataFile

_VERSION = 1
_SCHEMA = pa.schema(
    {
        "tokens": pa.list_(pa.int32()),
        "spans": pa.list_(pa.int32()),
        "label": pa.float64(),
        "targets": pa.int32(),
        "file": pa.int32(),
        "line": pa.int64(),
    }
)
_BATCH_TOKENS = 1 << 20
_BATCH_ROWS = 1 << 13
_SAID_EVERY = 256
Encode = Callable[[Iterable[Example]], Iterator[tuple[Sequence, str]]]
Progress = Callable[[Iterable[int], int], Iterable[int]]


@dataclass(frozen=True)
class Reason:
    """Why examples were left out, how many, and where the first of them is."""

    reason: str
    count: int
    first: str


@dataclass(frozen=True)
class About:
    files: tuple[DataFile, ...]
    """What is in it, by content: in the order of the examples."""
    read: tuple[str, ...]
    """The source's files when it was written."""
    longest: int
    total_tokens: int
    total_targets: int
    dropped: tuple[Reason, ...]


class Store:
    """A split's sequences, mapped. See `Sequences`."""

    def __init__(self, folder: Path, names: dict[str, str] | None = None) -> None:
        """`names`: what the files are called now, where they had other names when it was written."""
        self.about = _about(folder, names or {})
        self._file = pa.ipc.open_file(pa.memory_map(str(folder / "sequences.arrow")))
        self._batches = [self._file.get_batch(number) for number in range(self._file.num_record_batches)]
        self._ends = list(accumulate(batch.num_rows for batch in self._batches))
        self._files = [file.file for file in self.about.files]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sequence:
        batch, row = self._at(index)
        spans = _values(batch["spans"], row).tolist()
        label = batch["label"][row].as_py()
        return Sequence(tuple(_values(batch["tokens"], row).tolist()), tuple(zip(spans[::2], spans[1::2], strict=True)), label)

    def tokens(self, index: int) -> int:
        batch, row = self._at(index)
        offsets = batch["tokens"].offsets
        return int(offsets[row + 1].as_py() - offsets[row].as_py())

    def targets(self, index: int) -> int:
        batch, row = self._at(index)
        return int(batch["targets"][row].as_py())

    def source(self, index: int) -> str:
        batch, row = self._at(index)
        return f"{self._files[batch['file'][row].as_py()]}:{batch['line'][row].as_py()}"

    @property
    def longest(self) -> int:
        return self.about.longest

    def lengths(self) -> np.ndarray:
        """Tokens of every sequence: [examples] int32."""
        return np.concatenate([np.diff(batch["tokens"].offsets.to_numpy()) for batch in self._batches])

    def labels(self) -> np.ndarray:
        """The label of every sequence, NaN where it has none: [examples] fp64."""
        return np.concatenate([batch["label"].to_numpy(zero_copy_only=False).astype(np.float64) for batch in self._batches])

    def _at(self, index: int) -> tuple[pa.RecordBatch, int]:
        number = bisect(self._ends, index)
        return self._batches[number], index - (self._ends[number - 1] if number else 0)


def _values(column: pa.ListArray, row: int) -> np.ndarray:
    offsets = column.offsets
    first, end = offsets[row].as_py(), offsets[row + 1].as_py()
    return column.values.slice(first, end - first).to_numpy()


def open_store(source: Source, settings: object, encode: Encode, what: str, progress: Progress) -> Store:
    """The sequences of a source: from the cache, or written there first. One process of a machine writes, the others wait for it.

    Args:
        settings: all that the sequences depend on beside the files' contents; its `repr` is part of the key.
        what: the split, for messages.
        progress: wraps the iteration over lines that are done, given how many there are, for a progress bar.

    Raises:
        JobError: malformed or no examples; a cache that cannot be written.
    """
    names = [str(file) for file in source.files]
    contents = [digest_of(file) for file in source.files]
    key = hashlib.sha256(repr((_VERSION, contents, source.version, settings)).encode()).hexdigest()
    folder = cache_folder() / "tokens" / key[:40]
    if not (folder / "about.json").is_file():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _alone(folder.with_suffix(".lock")):
                if not (folder / "about.json").is_file():
                    _write(folder, source, encode, what, progress)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            raise JobError(
                f"{folder.parent}: tokens cannot be kept here ({error.strerror}). Set XDG_CACHE_HOME to another folder."
            ) from None
    return Store(folder, dict(zip(_about(folder, {}).read, names, strict=True)))


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    with file.open("w") as stream:
        # Where there are no locks several may write, each whole, and the last one stays.
        with suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
    file.unlink(missing_ok=True)


def _write(folder: Path, source: Source, encode: Encode, what: str, progress: Progress) -> None:
    dropped: dict[str, tuple[int, str]] = {}

    def kept() -> Iterator[Example]:
        for found in source.read():
            if isinstance(found, Dropped):
                count, first = dropped.get(found.reason, (0, found.source))
                dropped[found.reason] = (count + 1, first)
            else:
                yield found

    with new_folder(folder, replace=True) as partial:
        writer = _Writer(partial / "sequences.arrow")
        with writer:
            for _ in progress(_added(writer, encode(kept()), source), sum(map(_lines, source.files))):
                pass
        if not writer.rows:
            left = "; ".join(f"{count:,} left out: {reason} ({first})" for reason, (count, first) in dropped.items())
            raise JobError(f"{what} has no examples{f' ({left})' if left else ''}. Give it at least one.")
        reasons = tuple(Reason(reason, count, first) for reason, (count, first) in dropped.items())
        read = tuple(map(str, source.files))
        about = About(writer.files(), read, writer.longest, writer.total_tokens, writer.total_targets, reasons)
        write_json(partial / "about.json", asdict(about) | {"files": [file.model_dump() for file in about.files]})


def _added(writer: _Writer, sequences: Iterator[tuple[Sequence, str]], source: Source) -> Iterator[int]:
    """Writes; says now and then how many lines of the source are done."""
    before = dict(zip(map(str, source.files), accumulate(map(_lines, source.files), initial=0), strict=False))
    for number, (sequence, place) in enumerate(sequences):
        writer.add(sequence, place)
        if number % _SAID_EVERY == 0:
            file, _, line = place.rpartition(":")
            yield before.get(file, 0) + int(line)


def _lines(file: Path) -> int:
    """Lines of a text file, rows of a Parquet file: what places count."""
    if file.suffix == ".parquet":
        with suppress(pa.ArrowException):  # whoever reads it says so better
            return int(pq.read_metadata(file).num_rows)
    with file.open("rb") as stream:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(1 << 22), b""))


class _Writer:
    def __init__(self, file: Path) -> None:
        self._sink = pa.OSFile(str(file), "wb")
        self._out = pa.ipc.new_file(self._sink, _SCHEMA)
        self._columns: dict[str, list[object]] = {name: [] for name in _SCHEMA.names}
        self._hashes: dict[str, hashlib._Hash] = {}
        self._counts: dict[str, int] = {}
        self._numbers: dict[str, int] = {}
        self._held = 0
        self.rows = self.longest = self.total_tokens = self.total_targets = 0

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._out.close()
        self._sink.close()

    def add(self, sequence: Sequence, source: str) -> None:
        file, _, line = source.rpartition(":")
        spans = [place for span in sequence.spans for place in span]
        values = (np.asarray(sequence.tokens, np.int32), spans, sequence.label, sequence.targets, self._number(file), int(line))
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)
        self._hashes[file].update(array("q", (len(sequence), *spans, *sequence.tokens)).tobytes() + repr(sequence.label).encode())
        self._counts[file] += 1
        self.rows += 1
        self.longest = max(self.longest, len(sequence))
        self.total_tokens += len(sequence)
        self.total_targets += sequence.targets
        self._held += len(sequence)
        if self._held >= _BATCH_TOKENS or len(self._columns["file"]) >= _BATCH_ROWS:
            self._flush()

    def files(self) -> tuple[DataFile, ...]:
        return tuple(DataFile(file=f, examples=n, sha256=self._hashes[f].hexdigest()) for f, n in self._counts.items())

    def _number(self, file: str) -> int:
        if file not in self._numbers:
            self._hashes[file], self._counts[file], self._numbers[file] = hashlib.sha256(), 0, len(self._numbers)
        return self._numbers[file]

    def _flush(self) -> None:
        if self._columns["file"]:
            self._out.write_batch(pa.record_batch([pa.array(self._columns[f.name], f.type) for f in _SCHEMA], schema=_SCHEMA))
            self._columns = {name: [] for name in _SCHEMA.names}
            self._held = 0


def _about(folder: Path, names: dict[str, str]) -> About:
    fields = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    files = tuple(DataFile(**file | {"file": names.get(file["file"], file["file"])}) for file in fields.pop("files"))
    dropped = tuple(Reason(**reason | {"first": _renamed(reason["first"], names)}) for reason in fields.pop("dropped"))
    return About(files=files, dropped=dropped, **fields | {"read": tuple(fields["read"])})


def _renamed(source: str, names: dict[str, str]) -> str:
    file, _, line = source.rpartition(":")
    return f"{names.get(file, file)}:{line}"
