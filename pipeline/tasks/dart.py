"""DART v1.1.1 (Nan et al. 2021): texts from triples of tables, of WebNLG and of E2E.

In: the official JSON or XML files, or the hub's copy.
Out: prompt `Harbour Inn : opened : 1911 | ...`, predicates in lower case as in the LoRA paper's code; completion ` The Harbour Inn ...`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.job.errors import JobError
from pipeline.job.spec import Dart, Split
from pipeline.tasks.example import Example
from pipeline.tasks.files import split_path
from pipeline.tasks.hub import HubCopy, from_hub
from pipeline.tasks.json_rows import Row, as_object, field, json_array, texts
from pipeline.tasks.triples import Entry, Text, checked_triple, complete, example, linearise, read_benchmark

_STEM = {"train": "dart-v1.1.1-full-train", "valid": "dart-v1.1.1-full-dev", "test": "dart-v1.1.1-full-test"}
HUB = HubCopy("Yale-LILY/dart", "the official files dart-v1.1.1-full-train.json, -dev.json and -test.json")


def read_dart(task: Dart, split: Split) -> list[Example]:
    """All examples of a split, in file order.

    Raises:
        JobError: the folder has no such file, or it is malformed.
    """
    if task.data is None:
        return from_hub(HUB, split, lambda row, where: _examples(task, _hub_entry(row, where)))
    file = split_path(Path(task.data), (f"{_STEM[split]}.json", f"{_STEM[split]}.xml"), f"DART {split}")
    entries = read_benchmark(file) if file.suffix == ".xml" else _json_entries(file)
    return [e for entry in entries for e in _examples(task, entry)]


def _examples(task: Dart, entry: Entry) -> list[Example]:
    prompt = linearise(tuple((subject, predicate.lower(), target) for subject, predicate, target in entry.triples))
    examples = []
    for text in entry.texts:
        if text.text.strip() or task.empty_texts == "refuse":
            examples.append(_named(prompt, text))
    return examples


def _named(prompt: str, text: Text) -> Example:
    try:
        return example(prompt, text)
    except JobError as error:
        raise JobError(f'{error} The official test file has one such text: task.empty_texts = "drop" leaves it out.') from None


def _json_entries(file: Path) -> Iterator[Entry]:
    for row, where in json_array(file):
        triples = field(row, "tripleset", list, where)
        annotations = [as_object(part, where) for part in field(row, "annotations", list, where)]
        yield _entry(triples, [field(part, "text", str, where) for part in annotations], where)


def _hub_entry(row: Row, where: str) -> Entry:
    return _entry(row["tripleset"], texts(row["annotations"], "text", where), where)


def _entry(triples: list[Any], sayings: list[str], where: str) -> Entry:
    named = tuple(checked_triple(texts({"tripleset": triple}, "tripleset", where), where) for triple in triples)
    return complete(Entry("", named, tuple(Text(saying, "", where) for saying in sayings)), where)
