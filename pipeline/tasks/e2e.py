"""E2E NLG challenge (Novikova, Dusek and Rieser 2017): restaurant descriptions from meaning representations.

In: the official CSV files (`mr`, `ref`), or the tokenised text of the LoRA paper's code (`context||reference`), or the hub's copy.
Out: prompt `name : Blue Spice | eatType : coffee shop | area : city centre`, completion ` A coffee shop ...`.
"""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

from pipeline.job.errors import JobError
from pipeline.job.spec import E2E, Split
from pipeline.tasks.example import Example

_CSV = {"train": "trainset.csv", "valid": "devset.csv", "test": "testset_w_refs.csv"}
_TEXT = {"train": "train.txt", "valid": "valid.txt", "test": "test.txt"}
_HUB = "tuetschek/e2e_nlg"
_HUB_REVISION = "refs/convert/parquet"
"""The main branch holds a loading script, which `datasets` no longer runs; the hub keeps its result on this one."""
_HUB_SPLITS = {"train": "train", "valid": "validation", "test": "test"}
_FIELD = re.compile(r"\s*([^\[\],]+)\[([^\]]*)\]\s*")


def read_e2e(task: E2E, split: Split) -> list[Example]:
    """All examples of a split, in file order.

    Raises:
        JobError: the folder holds neither format, or a line is malformed.
    """
    if task.data is None:
        return _from_hub(split)
    folder = Path(task.data)
    if folder.is_file():
        raise JobError(f"task.data = {folder}: is a file. Name the folder that holds {_CSV[split]} or {_TEXT[split]}.")
    if (file := folder / _CSV[split]).is_file():
        return _from_csv(file)
    if (file := folder / _TEXT[split]).is_file():
        return _from_text(file)
    raise JobError(f"{folder}: no E2E {split} file. Put {_CSV[split]} (official) or {_TEXT[split]} (the paper's tokenised text) there.")


def linearise(meaning: str) -> str:
    """`name[Blue Spice], area[city centre]` -> `name : Blue Spice | area : city centre`.

    Raises:
        ValueError: not a meaning representation.
    """
    fields, end = [], 0
    for match in _FIELD.finditer(meaning):
        if meaning[end : match.start()].strip(" ,"):
            raise ValueError(meaning)
        fields.append(f"{match[1].strip()} : {match[2].strip()}")
        end = match.end()
    if not fields or meaning[end:].strip(" ,"):
        raise ValueError(meaning)
    return " | ".join(fields)


def _from_csv(file: Path) -> list[Example]:
    examples = []
    with io.StringIO(_utf8(file), newline="") as stream:
        rows = csv.reader(stream, strict=True)
        header = next(rows, None)
        if header != ["mr", "ref"]:
            raise JobError(f'{file}:1: the columns are {header}, not "mr" and "ref". Is this the official file?')
        line = rows.line_num + 1
        try:
            for row in rows:
                if row:
                    examples.append(_example(row, f"{file}:{line}"))
                line = rows.line_num + 1
        except csv.Error as error:
            raise JobError(f"{file}:{line}: not valid CSV ({error}). Is a quotation mark left open? Mend the line.") from None
    return examples


def _example(row: list[str], where: str) -> Example:
    if len(row) != 2:
        raise JobError(f"{where}: columns found: {len(row)}, expected a meaning representation and a reference. Mend the line.")
    meaning, reference = row
    if not reference.strip():
        raise JobError(f"{where}: the reference is empty: there is nothing to learn. Mend or remove the line.")
    try:
        return Example(linearise(meaning), " " + reference.strip(), where)
    except ValueError:
        raise JobError(f"{where}: {json.dumps(meaning[:200])} is not of the form name[value], name[value]. Mend the line.") from None


def _from_text(file: Path) -> list[Example]:
    examples = []
    for number, line in enumerate(_utf8(file).split("\n"), 1):
        if not line.strip():
            continue
        context, bars, reference = line.partition("||")
        if not bars or not context.strip() or not reference.strip():
            raise JobError(f"{file}:{number}: not of the form context||reference. Mend the line.")
        examples.append(Example(context.strip(), " " + reference.strip(), f"{file}:{number}"))
    return examples


def _utf8(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise JobError(f"{file}: not UTF-8 text ({error}). Convert the file.") from None


def _from_hub(split: Split) -> list[Example]:
    from datasets import load_dataset

    try:
        rows = load_dataset(_HUB, revision=_HUB_REVISION, split=_HUB_SPLITS[split])
    except Exception as error:  # the hub's failures have no common type
        raise JobError(
            f'task.data: absent, and the hub\'s copy "{_HUB}" cannot be had ({type(error).__name__}: {_first_line(error)}). '
            "Name a folder with the official CSV files in task.data."
        ) from None
    return [
        _example([row["meaning_representation"], row["human_reference"]], f"{_HUB}/{split}:{number}") for number, row in enumerate(rows, 1)
    ]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]
