"""What a run is trained on, by content: the tokens of each file's examples. Where the file lies does not matter."""

from __future__ import annotations

import hashlib
from array import array

from pipeline.job.errors import JobError
from pipeline.tasks.example import Example, Sequence
from pipeline.weights.state import DataFile


def fingerprint(examples: list[Example], sequences: list[Sequence]) -> tuple[DataFile, ...]:
    """One entry a file, in the order of the examples."""
    hashes, counts = {}, {}
    for example, sequence in zip(examples, sequences, strict=True):
        file = example.source.rpartition(":")[0]
        if file not in hashes:
            hashes[file], counts[file] = hashlib.sha256(), 0
        hashes[file].update(array("q", (len(sequence), sequence.target_start, *sequence.tokens)).tobytes())
        counts[file] += 1
    return tuple(DataFile(file=file, examples=counts[file], sha256=hashes[file].hexdigest()) for file in hashes)


def refuse_changed(before: tuple[DataFile, ...], now: tuple[DataFile, ...]) -> None:
    """Raises:
    JobError: on every rank; the examples are not those that the run began with."""
    if [file.sha256 for file in before] == [file.sha256 for file in now]:
        return
    for old, new in zip(before, now, strict=False):
        if old.sha256 != new.sha256:
            counts = "" if old.examples == new.examples else f" ({old.examples:,} then, {new.examples:,} now)"
            raise JobError(
                f"{new.file}: its examples are not those that the run began with{counts}. "
                "Put back the file (and the base's tokenizer), or begin another run with --run or --fresh.",
                everywhere=True,
            )
    raise JobError(
        f"{(before or now)[0].file}: the run began with {len(before)} files of examples, now there are {len(now)}. "
        "Put them back, or begin another run with --run or --fresh.",
        everywhere=True,
    )
