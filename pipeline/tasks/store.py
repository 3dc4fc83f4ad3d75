"""Token sequences in files: tokenised once, then mapped into memory by every rank, and read where training looks.

In: a source of examples and the way they are encoded. Out: `Store`, in the folder `tokens/<key>` of the cache: `sequences.arrow` and
`about.json`. The key is made of all that decides the content: the files' own contents, the task, the tokenizer.
What is damaged is made again.
A rank's private memory holds offsets only; the pages of the file belong to the machine and are shared by its ranks.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.job.errors import JobError
from pipeline.tasks.example import Dropped, Example, Reason, Sequence, Source, count, none_left
from pipeline.weights.atomic import new_folder, write_json
from pipeline.weights.digest import cache_folder, digest_of, sha256_of
from pipeline.weights.record import DataFile

_VERSION = 2
_ARROW, _ABOUT = "sequences.arrow", "about.json"
_SCHEMA = pa.schema(
    {
        "tokens": pa.list_(pa.int32()),
        "spans": pa.list_(pa.int32()),
        "texts": pa.list_(pa.int32()),
        "label": pa.float64(),
        "targets": pa.int32(),
        "file": pa.int32(),
        "line": pa.int64(),
    }
)
_BATCH_TOKENS = 1 << 18
_BATCH_ROWS = 1 << 13
_SAID_EVERY = 256
Encode = Callable[[Iterable[Example]], Iterator[tuple[Sequence, str]]]
Progress = Callable[[Iterable[int], int], Iterable[int]]


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
    sha256: str
    """Of `sequences.arrow`."""


class Store:
    """A split's sequences, mapped. See `Sequences`."""

    def __init__(self, folder: Path, names: dict[str, str] | None = None) -> None:
        """`names`: what the files are called now, where they had other names when it was written."""
        self.about = _about(folder, names or {})
        self._file = pa.ipc.open_file(pa.memory_map(str(folder / _ARROW)))
        self._batches = [self._file.get_batch(number) for number in range(self._file.num_record_batches)]
        # Views of the mapped pages: looked at for every example of a step, by every rank.
        self._tokens, self._spans, self._texts = ([_views(batch[name]) for batch in self._batches] for name in ("tokens", "spans", "texts"))
        self._targets = [_numbers(batch["targets"]) for batch in self._batches]
        self._ends = list(accumulate(batch.num_rows for batch in self._batches))
        self._files = [file.file for file in self.about.files]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sequence:
        number, row = self._at(index)
        tokens = tuple(self._tokens[number].of(row))
        label = self._batches[number]["label"][row].as_py()
        return Sequence(tokens, self._spans[number].runs(row), label, self._texts[number].runs(row))

    def tokens(self, index: int) -> int:
        number, row = self._at(index)
        offsets = self._tokens[number].offsets
        return int(offsets[row + 1] - offsets[row])

    def targets(self, index: int) -> int:
        number, row = self._at(index)
        return int(self._targets[number][row])

    def source(self, index: int) -> str:
        number, row = self._at(index)
        batch = self._batches[number]
        return f"{self._files[batch['file'][row].as_py()]}:{batch['line'][row].as_py()}"

    @property
    def longest(self) -> int:
        return self.about.longest

    def lengths(self) -> np.ndarray:
        """Tokens of every sequence: [examples] int32."""
        return np.concatenate([np.diff(tokens.offsets) for tokens in self._tokens])

    def labels(self) -> np.ndarray:
        """The label of every sequence, NaN where it has none: [examples] fp64."""
        return np.concatenate([batch["label"].to_numpy(zero_copy_only=False).astype(np.float64) for batch in self._batches])

    def _at(self, index: int) -> tuple[int, int]:
        """Batch and row."""
        number = bisect(self._ends, index)
        return number, index - (self._ends[number - 1] if number else 0)


@dataclass(frozen=True)
class _Views:
    """A column of lists of integers."""

    offsets: np.ndarray
    values: np.ndarray

    def of(self, row: int) -> list[int]:
        return self.values[self.offsets[row] : self.offsets[row + 1]].tolist()

    def runs(self, row: int) -> tuple[tuple[int, int], ...]:
        places = self.of(row)
        return tuple(zip(places[::2], places[1::2], strict=True))


def _views(column: pa.ListArray) -> _Views:
    return _Views(_numbers(column.offsets), _numbers(column.values))


def _numbers(column: pa.Array) -> np.ndarray:
    """As `to_numpy` gives them, which imports pandas."""
    return np.frombuffer(column.buffers()[1], str(column.type))[column.offset : column.offset + len(column)]


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
    folder = cache_folder() / "tokens" / cache_key(source, settings)
    if store := _whole(folder, names):
        return store
    with ExitStack() as held:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            locked = held.enter_context(alone(folder.with_suffix(".lock")))
        except OSError as error:
            raise JobError(
                f"{folder.parent}: tokens cannot be kept here ({error.strerror}). Set XDG_CACHE_HOME to another folder."
            ) from None
        if store := _whole(folder, names):
            return store
        if locked:
            for left in folder.parent.glob(f".{folder.name}.*"):  # by writers that were killed
                shutil.rmtree(left, ignore_errors=True)
        try:
            _write(folder, source, encode, what, progress)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise JobError(f"{folder}: {os.strerror(error.errno)}. Make room, or set XDG_CACHE_HOME to another folder.") from None
        return Store(folder)


def cache_key(source: Source, settings: object) -> str:
    """Made of what a source's files hold, and of all else that decides what is kept."""
    contents = [(digest_of(file), file.suffix) for file in source.files]
    return hashlib.sha256(repr((_VERSION, contents, source.version, settings)).encode()).hexdigest()[:40]


def _whole(folder: Path, names: list[str]) -> Store | None:
    """What is in the cache, if it is there and as it was written.

    Args:
        names: what the source's files are called now.
    """
    try:
        about = _about(folder, {})
        # Looked at again only where the file has changed since.
        if digest_of(folder / _ARROW) == about.sha256:
            return Store(folder, dict(zip(about.read, names, strict=True)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException):
        pass
    return None


@contextmanager
def alone(file: Path) -> Iterator[bool]:
    """False where there are no locks: then several may write, each whole, and the last one stays."""
    while True:
        with file.open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX)
                locked = True
            except OSError:
                locked = False
            # Whoever had it has removed it: a lock on a file without a name keeps nobody out.
            if locked and not (file.exists() and os.path.samestat(file.stat(), os.fstat(stream.fileno()))):
                continue
            try:
                yield locked
            finally:
                file.unlink(missing_ok=True)
            return


def _write(folder: Path, source: Source, encode: Encode, what: str, progress: Progress) -> None:
    dropped: dict[str, Reason] = {}

    def kept() -> Iterator[Example]:
        for found in source.read():
            if isinstance(found, Dropped):
                count(dropped, found)
            else:
                yield found

    lines = {str(file): _lines(file) for file in source.files}
    with new_folder(folder, replace=True) as partial:
        with _Writer(partial / _ARROW) as writer:
            for _ in progress(_added(writer, encode(kept()), lines), sum(lines.values())):
                pass
        if not writer.rows:
            raise none_left(what, dropped)
        totals = (writer.longest, writer.total_tokens, writer.total_targets)
        about = About(writer.files(), tuple(lines), *totals, tuple(dropped.values()), sha256_of(partial / _ARROW))
        write_json(partial / _ABOUT, asdict(about) | {"files": [file.model_dump() for file in about.files]})


def _added(writer: _Writer, sequences: Iterator[tuple[Sequence, str]], lines: dict[str, int]) -> Iterator[int]:
    """Writes; says now and then how many lines of the source's files are done."""
    before = dict(zip(lines, accumulate(lines.values(), initial=0), strict=False))
    for number, (sequence, place) in enumerate(sequences):
        writer.add(sequence, place)
        if number % _SAID_EVERY == 0:
            file, _, line = place.rpartition(":")
            yield before.get(file, 0) + int(line)


def _lines(file: Path) -> int:
    """Lines of a text file, rows of a Parquet file: what places count. 0: not known."""
    if file.suffix == ".arrow":
        return 0
    if file.suffix == ".parquet":
        with suppress(pa.ArrowException):  # whoever reads it says so better
            return int(pq.read_metadata(file).num_rows)
    with file.open("rb") as stream:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(1 << 22), b""))


class _Writer:
    def __init__(self, file: Path) -> None:
        self._sink = pa.OSFile(str(file), "wb")
        self._out = pa.ipc.new_file(self._sink, _SCHEMA)
        self._tokens: list[np.ndarray] = []
        self._spans: list[list[int]] = []
        self._texts: list[list[int]] = []
        self._rows: list[tuple[float | None, int, int, int]] = []
        """Of each sequence: label, targets, number of its file, line."""
        self._hashes: dict[str, hashlib._Hash] = {}
        self._counts: dict[str, int] = {}
        self._numbers: dict[str, int] = {}
        self._held = 0
        self.rows = self.longest = self.total_tokens = self.total_targets = 0

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._flush()
                self._out.close()
        finally:
            self._sink.close()

    def add(self, sequence: Sequence, source: str) -> None:
        file, _, line = source.rpartition(":")
        tokens = np.array(sequence.tokens, np.int32)
        spans, texts = ([place for run in runs for place in run] for runs in (sequence.spans, sequence.texts))
        targets = sequence.targets
        self._tokens.append(tokens)
        self._spans.append(spans)
        self._texts.append(texts)
        self._rows.append((sequence.label, targets, self._number(file), int(line)))
        self._hashes[file].update(repr((len(tokens), spans, sequence.label)).encode() + tokens.tobytes())
        self._counts[file] += 1
        self.rows += 1
        self.longest = max(self.longest, len(tokens))
        self.total_tokens += len(tokens)
        self.total_targets += targets
        self._held += len(tokens)
        if self._held >= _BATCH_TOKENS or len(self._rows) >= _BATCH_ROWS:
            self._flush()

    def files(self) -> tuple[DataFile, ...]:
        return tuple(DataFile(file=f, examples=n, sha256=self._hashes[f].hexdigest()) for f, n in self._counts.items())

    def _number(self, file: str) -> int:
        if file not in self._numbers:
            self._hashes[file], self._counts[file], self._numbers[file] = hashlib.sha256(), 0, len(self._numbers)
        return self._numbers[file]

    def _flush(self) -> None:
        if self._rows:
            runs = [_lists([np.array(places, np.int32) for places in column]) for column in (self._spans, self._texts)]
            lists = [_lists(self._tokens), *runs]
            fields = list(_SCHEMA)[len(lists) :]
            single = [pa.array(values, f.type) for values, f in zip(zip(*self._rows, strict=True), fields, strict=True)]
            self._out.write_batch(pa.record_batch([*lists, *single], schema=_SCHEMA))
            self._tokens, self._spans, self._texts, self._rows, self._held = [], [], [], [], 0


def _lists(values: list[np.ndarray]) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, np.concatenate(values))


def _about(folder: Path, names: dict[str, str]) -> About:
    fields = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
    files = tuple(DataFile(**file | {"file": names.get(file["file"], file["file"])}) for file in fields.pop("files"))
    dropped = tuple(Reason(**reason | {"first": _renamed(reason["first"], names)}) for reason in fields.pop("dropped"))
    return About(files=files, dropped=dropped, **fields | {"read": tuple(fields["read"])})


def _renamed(source: str, names: dict[str, str]) -> str:
    file, _, line = source.rpartition(":")
    return f"{names.get(file, file)}:{line}"
