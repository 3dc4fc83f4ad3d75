"""Which examples of a source belong to a split: a share held back for validation, or a small draw for a low-data study.

Both depend on a seed and on the examples, never on when or where they are read.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from dataclasses import replace

from pipeline.job.errors import JobError
from pipeline.tasks.example import Chat, Document, Dropped, Example, Labelled, Pair, Source


def held_back(source: Source, fraction: float, seed: int, taken: bool) -> Source:
    """Those held back (`taken`) or the others. Examples that ask for the same are on the same side: no scored one was learnt.

    Raises:
        JobError: while reading: all examples are on the other side.
    """

    def read() -> Iterator[Example | Dropped]:
        inside, sides = False, {True: 0, False: 0}
        for example in source.read():
            if isinstance(example, Dropped):
                # Counted once, where most of its neighbours are.
                if not taken:
                    yield example
                continue
            if not _goes_on(example):
                inside = _draw(seed, _asked(example)) < fraction
                sides[inside] += 1
            if inside == taken:
                yield example
        if sides[not taken] and not sides[taken]:
            what = "none is held back" if taken else "all are held back"
            raise JobError(
                f"task.dev_fraction = {fraction}: of {sides[not taken]:,} examples in the training split {what}; those with the same "
                "prompt stay together, and a document of plain text is one example. Set task.dev_seed or task.dev_fraction to another "
                'value, task.document = "paragraph", or name a file in task.valid.'
            )

    return replace(source, read=read)


def drawn(source: Source, count: int, seed: int) -> Source:
    """So many of the examples, in file order; with the same seed a smaller draw is part of a larger one.

    Raises:
        JobError: while reading: there are fewer.
    """

    def read() -> Iterator[Example | Dropped]:
        lots = heapq.nsmallest(count, _lots(source, seed))
        if len(lots) < count:
            raise JobError(
                f"task.train_examples = {count}: the training split has {len(lots)} examples. Ask for fewer, or leave the key out."
            )
        # Read again instead of kept: a large file's examples are not held in memory.
        chosen, place = {place for _, place in lots}, -1
        for example in source.read():
            if isinstance(example, Dropped):
                yield example
                continue
            place += not _goes_on(example)
            if place in chosen:
                yield example

    return replace(source, read=read)


def _lots(source: Source, seed: int) -> Iterator[tuple[float, int]]:
    examples = (example for example in source.read() if not isinstance(example, Dropped) and not _goes_on(example))
    return ((_draw(seed, str(place)), place) for place, _ in enumerate(examples))


def _goes_on(example: Example) -> bool:
    """A piece of the example before it, and where that is."""
    return isinstance(example, Document) and example.continued


def _draw(seed: int, text: str) -> float:
    """From 0 to 1, evenly."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:7], "big") / (1 << 56)


def _asked(example: Example) -> str:
    match example:
        case Pair(prompt=prompt):
            return prompt
        case Chat(messages=messages):
            return "\0".join(message.content for message in messages if message.role == "user")
        case Labelled(texts=texts):
            return "\0".join(texts)
        case Document(text=text):
            return text
