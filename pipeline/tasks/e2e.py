"""E2E NLG challenge (Novikova, Dusek and Rieser 2017): restaurant descriptions from meaning representations.

In: the official CSV files (`mr`, `ref`), or the tokenised text of the LoRA paper's code (`context||reference`), or the hub's copy.
Out: prompt `name : Blue Spice | eatType : coffee shop | area : city centre`, completion ` A coffee shop ...`.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

from pipeline.job.errors import JobError
from pipeline.job.spec import E2E, Split
from pipeline.tasks.example import Example
from pipeline.tasks.files import lines, split_path
from pipeline.tasks.hub import HubCopy, from_hub

_CSV = {"train": "trainset.csv", "valid": "devset.csv", "test": "testset_w_refs.csv"}
_TEXT = {"train": "train.txt", "valid": "valid.txt", "test": "test.txt"}
HUB = HubCopy("tuetschek/e2e_nlg", "the official CSV files")
_FIELD = re.compile(r"\s*([^\[\],]+)\[([^\]]*)\]\s*")


def read_e2e(task: E2E, split: Split) -> list[Example]:
    """All examples of a split, in file order.

    Raises:
        JobError: the folder holds neither format, or a line is malformed.
    """
    if task.data is None:
        return from_hub(HUB, split, lambda row, where: [_example([row["meaning_representation"], row["human_reference"]], where)])
    file = split_path(Path(task.data), (_CSV[split], _TEXT[split]), f"E2E {split}")
    return _from_csv(file) if file.suffix == ".csv" else _from_text(file)


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
    rows, line = csv.reader((text for _, text in lines(file)), strict=True), 1
    try:
        header = next(rows, None)
        if header != ["mr", "ref"]:
            raise JobError(f'{file}:1: the columns are {header}, not "mr" and "ref". Is this the official file?')
        line = rows.line_num + 1
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
    for number, line in lines(file):
        if not line.strip():
            continue
        context, bars, reference = line.partition("||")
        if not bars or not context.strip() or not reference.strip():
            raise JobError(f"{file}:{number}: not of the form context||reference. Mend the line.")
        examples.append(Example(context.strip(), " " + reference.strip(), f"{file}:{number}"))
    return examples
