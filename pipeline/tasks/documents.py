"""A plain text file -> its documents: the file, its paragraphs or its lines.

A document longer than a piece is handed on in pieces that end where a line does and the next does not begin with a space, where
tokenizers part texts too; so a file of any size is read in little memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Literal

from pipeline.tasks.example import Document
from pipeline.tasks.files import lines

_PIECE_CHARACTERS = 1 << 20


def documents(file: Path, document: Literal["file", "paragraph", "line"]) -> Iterator[Document]:
    """The documents of a file; its pieces of one document say so by `continued`."""
    match document:
        case "line":
            for number, line in lines(file):
                if line.strip():
                    yield Document(line.rstrip("\r\n"), f"{file}:{number}")
        case "paragraph":
            for blank, group in groupby(lines(file), key=lambda numbered: not numbered[1].strip()):
                if not blank:
                    yield from _pieces(file, group)
        case "file":
            yield from _pieces(file, lines(file))


def _pieces(file: Path, numbered: Iterator[tuple[int, str]]) -> Iterator[Document]:
    held: list[str] = []
    size, first, continued = 0, 1, False
    for number, line in numbered:
        if not held:
            first = number
        elif size > _PIECE_CHARACTERS and not line[:1].isspace():
            yield Document("".join(held), f"{file}:{first}", continued)
            held, size, first, continued = [], 0, number, True
        held.append(line)
        size += len(line)
    text = "".join(held).rstrip("\r\n")
    if text.strip():
        yield Document(text, f"{file}:{first}", continued)
