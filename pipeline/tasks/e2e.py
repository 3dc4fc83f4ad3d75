"""E2E NLG challenge (Novikova, Dusek and Rieser 2017): restaurant descriptions from meaning representations.

In: the official CSV files (`mr`, `ref`), or the tokenised text of the LoRA paper's code (`context||reference`), or the hub's copy.
Out: prompt `name : Blue Spice | eatType : coffee shop | area : city centre`, completion ` A coffee shop ...`.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

from pipeline.job.errors import JobError
from pipeline.job.section import Split
from pipeline.job.task import E2E
from pipeline.tasks.example import Pair, Source
from pipeline.tasks.files import lines, split_path
from pipeline.tasks.hub import HubCopy, from_hub
from pipeline.tasks.rows import rows

_CSV = {"train": "trainset.csv", "valid": "devset.csv", "test": "testset_w_refs.csv"}
_TEXT = {"train": "train.txt", "valid": "valid.txt", "test": "test.txt"}
HUB = HubCopy("tuetschek/e2e_nlg", "the official CSV files")
_FIELD = re.compile(r"\s*([^\[\],]+)\[([^\]]*)\]\s*")


def open_e2e(task: E2E, split: Split) -> Source:
    """A split of the task.

    Raises:
        JobError: the folder holds neither format; later, that a line is malformed.
    """
    if task.data is None:
        return from_hub(HUB, split, lambda row, where: [_pair(row["meaning_representation"], row["human_reference"], where)])
    file = split_path(Path(task.data), (_CSV[split], _TEXT[split]), f"E2E {split}")
    return Source((file,), lambda: _from_csv(file) if file.suffix == ".csv" else _from_text(file))


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


def _from_csv(file: Path) -> Iterator[Pair]:
    header = next(csv.reader([next(lines(file), (1, ""))[1]]), [])
    if header != ["mr", "ref"]:
        raise JobError(f'{file}:1: the columns are {", ".join(header) or "none"}, not "mr" and "ref". Is this the official file?')
    for where, read in rows(file, "csv", ("mr", "ref")):
        row = read()
        yield _pair(row["mr"], row["ref"], where)


def _pair(meaning: str, reference: str, where: str) -> Pair:
    if not reference.strip():
        raise JobError(f"{where}: the reference is empty: there is nothing to learn. Mend or remove the line.")
    try:
        return Pair(linearise(meaning), " " + reference.strip(), where)
    except ValueError:
        raise JobError(f"{where}: {json.dumps(meaning[:200])} is not of the form name[value], name[value]. Mend the line.") from None


def _from_text(file: Path) -> Iterator[Pair]:
    for number, line in lines(file):
        if not line.strip():
            continue
        context, bars, reference = line.partition("||")
        if not bars or not context.strip() or not reference.strip():
            raise JobError(f"{file}:{number}: not of the form context||reference. Mend the line.")
        yield Pair(context.strip(), " " + reference.strip(), f"{file}:{number}")
