"""JSON files -> objects, each with the file and line where it begins, and their fields, checked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pipeline.job.errors import JobError
from pipeline.tasks.files import lines, whole_text

Row = dict[str, Any]
Kind = TypeVar("Kind")

_SPACE = re.compile(r"[ \t\r\n]*")
_WORDS = {str: "text", list: "a list", dict: "an object", int: "a whole number"}


def json_lines(file: Path) -> Iterator[tuple[Row, str]]:
    """The object of each line that is not blank."""
    for number, line in lines(file):
        if line.strip():
            where = f"{file}:{number}"
            yield parsed(line, where), where


def parsed(line: str, where: str) -> Row:
    """Raises:
    JobError: not a JSON object."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise JobError(f"{where}: not valid JSON: {error.msg} at column {error.colno}. Mend the line.") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting of thousands of levels
        raise JobError(f"{where}: not readable JSON: {error}. Mend the line.") from None
    return as_object(value, where)


def json_array(file: Path, key: str | None = None) -> Iterator[tuple[Row, str]]:
    """The objects of a file that is one array, or `{key: array}`."""
    return ((as_object(value, where), where) for value, where in json_values(file, key))


def json_values(file: Path, key: str | None = None) -> Iterator[tuple[Any, str]]:
    """The same, whatever they are."""
    text = whole_text(file)
    decoder, place, line = json.JSONDecoder(), 0, 1

    def move(end: int) -> None:
        nonlocal place, line
        line += text.count("\n", place, end)
        place = end

    def follows(mark: str) -> bool:
        if match := _SPACE.match(text, place):
            move(match.end())
        found = text.startswith(mark, place)
        move(place + len(mark) * found)
        return found

    def expect(*marks: str) -> None:
        for mark in marks:
            if not follows(mark):
                found = json.dumps(text[place : place + 20]) if place < len(text) else "the end of the file"
                raise JobError(f"{file}:{line}: not a JSON list as expected: {found} where {mark} belongs. Fetch the file again.")

    expect(*(("{", f'"{key}"', ":", "[") if key else ("[",)))
    more = not follows("]")
    while more:
        follows("")
        where = f"{file}:{line}"
        try:
            value, end = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise JobError(f"{file}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}. Mend the line.") from None
        except (ValueError, RecursionError) as error:
            raise JobError(f"{where}: not readable JSON: {error}. Mend the line.") from None
        yield value, where
        move(end)
        more = not follows("]")
        if more:
            expect(",")
    expect(*("}" if key else ""))
    follows("")
    if place < len(text):
        raise JobError(f"{file}:{line}: text after the end of the list. Are these two files in one? Fetch the file again.")


def as_object(value: object, where: str) -> Row:
    """Raises:
    JobError: not a JSON object."""
    if not isinstance(value, dict):
        raise JobError(f"{where}: {type(value).__name__}, not an object of named fields. Mend the line.")
    return value


def field(row: Row, key: str, kind: type[Kind], where: str) -> Kind:
    """A field of that type.

    Raises:
        JobError: it is absent, of another type, or text that no tokenizer can read.
    """
    value = row.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        found = f"it is {type(value).__name__}, not {_WORDS[kind]}" if key in row else f"has {', '.join(sorted(map(str, row)))}"
        raise JobError(f'{where}: "{key}" is missing or not {_WORDS[kind]} ({found}). Mend the line.')
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise JobError(
                f'{where}: "{key}" holds half of a surrogate pair (\\ud800 to \\udfff), which is not text. Mend the line.'
            ) from None
    return value


def texts(row: Row, key: str, where: str) -> list[str]:
    """A field that is a list of texts."""
    values = field(row, key, list, where)
    return [field({key: value}, key, str, where) for value in values]
