"""E2E NLG challenge (Novikova, Dusek and Rieser 2017): restaurant descriptions from meaning representations.

In: the official CSV files (`mr`, `ref`), or the tokenised text of the LoRA paper's code (`context||reference`), or the hub's copy.
Out: prompt `name : Blue Spice | eatType : coffee shop | area : city centre`, completion ` A coffee shop ...`.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

from pipeline.job.errors import JobError
from pipeline.job.spec import E2E, Split
from pipeline.tasks.example import Example

_CSV = {"train": "trainset.csv", "valid": "devset.csv", "test": "testset_w_refs.csv"}
_TEXT = {"train": "train.txt", "valid": "valid.txt", "test": "test.txt"}
_HUB = "GEM/e2e_nlg"
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
    with file.open(encoding="utf-8-sig", newline="") as stream:
        rows = csv.reader(stream)
        header = next(rows, None)
        if header != ["mr", "ref"]:
            raise JobError(f'{file}:1: the columns are {header}, not "mr" and "ref". Is this the official file?')
        for row in rows:
            where = f"{file}:{rows.line_num}"
            if len(row) != 2 or not row[1].strip():
                raise JobError(f"{where}: {len(row)} columns, expected a meaning representation and a reference. Mend the line.")
            try:
                prompt = linearise(row[0])
            except ValueError:
                raise JobError(f'{where}: "{row[0]}" is not of the form name[value], name[value]. Mend the line.') from None
            examples.append(Example(prompt, " " + row[1].strip(), where))
    return examples


def _from_text(file: Path) -> list[Example]:
    examples = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        context, bars, reference = line.partition("||")
        if not bars or not context.strip() or not reference.strip():
            raise JobError(f"{file}:{number}: not of the form context||reference. Mend the line.")
        examples.append(Example(context.strip(), " " + reference.strip(), f"{file}:{number}"))
    return examples


def _from_hub(split: Split) -> list[Example]:
    from datasets import load_dataset

    try:
        rows = load_dataset(_HUB, split=_HUB_SPLITS[split])
    except Exception as error:  # the hub's failures have no common type
        raise JobError(
            f'task.data: absent, and the hub\'s copy "{_HUB}" cannot be had ({type(error).__name__}: {_first_line(error)}). '
            "Name a folder with the official CSV files in task.data."
        ) from None
    examples = []
    for number, row in enumerate(rows):
        prompt = linearise(row["meaning_representation"])
        references = row.get("references") or [row["target"]]
        examples += [Example(prompt, " " + reference.strip(), f"{_HUB}/{split}:{number}") for reference in references]
    return examples


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]
