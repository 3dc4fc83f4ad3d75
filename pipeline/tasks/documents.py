"""A plain text file -> its documents: the file, its paragraphs or its lines.

A document longer than a piece is handed on in pieces, so that a file of any size is read in little memory. A piece begins with the
space or line feed between two words: there tokenizers part texts, whatever stands before and behind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Literal

from pipeline.tasks.example import Document
from pipeline.tasks.files import lines

_PIECE_CHARACTERS = 1 << 14
_CUT = re.compile(r"(?<=[^\W\d_])[ \n](?=[^\W\d_])")
"""One blank between two letters."""


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
    held, first, continued = "", 0, False
    parts: list[str] = []
    size = 0
    for number, line in numbered:
        first = first or number
        parts.append(line)
        size += len(line)
        # Twice as much each time: text without such a blank is not looked through again and again.
        if size > max(_PIECE_CHARACTERS, len(held)):
            *pieces, held = _cut(held + "".join(parts))
            parts, size = [], 0
            for piece in pieces:
                yield Document(piece, f"{file}:{first}", continued)
                first, continued = first + piece.count("\n"), True
    text = (held + "".join(parts)).rstrip("\r\n")
    if text.strip():
        yield Document(text, f"{file}:{first}", continued)


def _cut(text: str) -> Iterator[str]:
    """Pieces of at least so many characters; what is left is the last."""
    begin = 0
    while cut := _CUT.search(text, begin + _PIECE_CHARACTERS):
        yield text[begin : cut.start()]
        begin = cut.start()
    yield text[begin:]
