"""Text of unknown origin (names of files, what a model wrote, logs) -> text that a terminal shows and nothing else. Pure."""

from __future__ import annotations

import unicodedata

_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""They turn the direction of writing, so that a name reads as another."""


def printable(text: str, kept: str = "\n\t") -> str:
    """Control characters, halves of characters and what turns the direction become their escapes; a line's end and a tab stay."""
    if text.isprintable():
        return text
    return "".join(c if c in kept or not _steers(c) else c.encode("unicode_escape").decode() for c in text)


def _steers(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _TURNING
