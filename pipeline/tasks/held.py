"""Examples that were held back for validation, kept in the cache: to find them, all of the training files must be read.

In: the source that holds them back. Out: the same, read from JSON lines in `held/<key>.jsonl` of the cache.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from pipeline.tasks.example import Chat, Document, Dropped, Example, Labelled, Message, Pair, Source
from pipeline.tasks.store import alone, cache_key
from pipeline.weights.atomic import write_text
from pipeline.weights.digest import cache_folder

_KINDS = {kind.__name__: kind for kind in (Pair, Chat, Labelled, Document, Dropped)}


def kept(source: Source, settings: object) -> Source:
    """The source, which is read once on a machine: after that it comes from the cache.

    Args:
        settings: all that the examples depend on beside the files' contents.
    """

    def read() -> Iterator[Example | Dropped]:
        file = cache_folder() / "held" / f"{cache_key(source, settings)}.jsonl"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with alone(file.with_suffix(".lock")):
                if not file.is_file():
                    write_text(file, "".join(_line(found, source) for found in source.read()))
        except OSError:
            # Without a cache they are looked for again.
            yield from source.read()
            return
        yield from _read(file, source)

    return replace(source, read=read)


def _line(found: Example | Dropped, source: Source) -> str:
    """A place is kept as the number of its file: tomorrow the file may have another name."""
    file, _, line = found.source.rpartition(":")
    place = [[str(path) for path in source.files].index(file), line] if file in map(str, source.files) else found.source
    return json.dumps([type(found).__name__, place, asdict(found)]) + "\n"


def _read(file: Path, source: Source) -> Iterator[Example | Dropped]:
    with file.open(encoding="utf-8") as stream:
        for text in stream:
            kind, place, fields = json.loads(text)
            fields["source"] = place if isinstance(place, str) else f"{source.files[place[0]]}:{place[1]}"
            if "messages" in fields:
                fields["messages"] = tuple(Message(**message) for message in fields["messages"])
            if "texts" in fields:
                fields["texts"] = tuple(fields["texts"])
            yield _KINDS[kind](**fields)
