"""Files -> predictions and the references of each.

In: predictions, one a line, with references, one a line and an empty line between groups, as the official E2E script reads them (a file
without any empty line has one reference a line); or the JSON lines that `zlora evaluate` writes, which hold both.
"""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.job.errors import JobError


def read_scored(predictions: Path, references: Path | None) -> tuple[list[str], list[list[str]]]:
    """Predictions and as many groups of references.

    Raises:
        JobError: a file that is not there or not UTF-8, a group without references, or another number of groups than predictions.
    """
    if predictions.suffix == ".jsonl" and references is None:
        return _from_jsonl(predictions)
    if references is None:
        raise JobError(f"{predictions}: predictions alone cannot be scored. Add --references FILE, or name a .jsonl of zlora evaluate.")
    found, groups = _texts(predictions), _groups(references)
    if not found:
        raise JobError(f"{predictions}: is empty. Name a file with one prediction a line.")
    if len(groups) == 1 and len(found) != 1:
        groups = [[line] for line in groups[0]]
    if len(found) != len(groups):
        line = min(len(found), len(groups)) + 1
        raise JobError(
            f"{predictions}:{line}: predictions: {len(found)}, but groups of references in {references}: {len(groups)}. "
            "Put one prediction a line, and an empty line between the references of one and those of the next."
        )
    return found, groups


def _groups(file: Path) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    for number, line in enumerate(lines := _lines(file), 1):
        if line.strip():
            groups[-1].append(line.strip())
        elif not groups[-1]:
            raise JobError(
                f"{file}:{number}: an empty group of references. Put one or more references before this empty line, or remove it."
            )
        elif number < len(lines):
            groups.append([])
    if not groups[0]:
        raise JobError(f"{file}: is empty. Name a file with one reference a line.")
    return groups


def _texts(file: Path) -> list[str]:
    """Predictions: lines, WikiSQL's JSON among them; of JSON lines that have a "prediction" each, that."""
    found = _lines(file)
    if file.suffix != ".jsonl":
        return found
    texts = [text for row in map(_parsed, found) if isinstance(row, dict) and isinstance(text := row.get("prediction"), str)]
    if texts and len(texts) < len(found):
        raise JobError(f'{file}: {len(found)} lines, but only {len(texts)} are objects with a "prediction". Mend or remove the others.')
    return texts or found


def _parsed(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _from_jsonl(file: Path) -> tuple[list[str], list[list[str]]]:
    found, groups = [], []
    tasks = dict[str, None]()
    for number, line in enumerate(_lines(file), 1):
        row = _parsed(line)
        if isinstance(row, dict) and isinstance(row.get("task"), str):
            tasks[row["task"]] = None
        match row:
            case {"prediction": str(), "references": []}:
                raise JobError(f"{file}:{number}: has no references: its label or text is withheld. Add --references FILE.")
            case {"prediction": str(text), "references": [str(), *_] as group} if all(isinstance(other, str) for other in group):
                found.append(text)
                groups.append(group)
            case _:
                raise JobError(
                    f'{file}:{number}: not an object with "prediction" and "references", as zlora evaluate writes. Mend the line.'
                )
    if not found:
        raise JobError(f"{file}: is empty. Name a file with one prediction a line.")
    if len(tasks) > 1:
        raise JobError(f"{file}: holds predictions of several tasks ({', '.join(tasks)}). Put those of one into a file of their own.")
    return found, groups


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        raise JobError(f"{file}: there is no such file. Correct the path.")
    data = file.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise JobError(f"{file}:{line}: not UTF-8 text (byte 0x{data[error.start]:02x}). Convert the file to UTF-8.") from None
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines
