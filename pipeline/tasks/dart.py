"""DART v1.1.1 (Nan et al. 2021): texts from triples of tables, of WebNLG and of E2E.

In: the official JSON or XML files, or the hub's copy.
Out: prompt `Harbour Inn : opened : 1911 | ...`, predicates in lower case as in the LoRA paper's code; completion ` The Harbour Inn ...`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.job.errors import JobError
from pipeline.job.section import Split
from pipeline.job.task import Dart
from pipeline.tasks.example import Dropped, Pair, Source
from pipeline.tasks.files import split_path
from pipeline.tasks.hub import HubCopy, from_hub
from pipeline.tasks.json_rows import Row, as_object, field, json_array, texts
from pipeline.tasks.triples import Entry, Text, checked_triple, complete, linearise, pair, read_benchmark

_STEM = {"train": "dart-v1.1.1-full-train", "valid": "dart-v1.1.1-full-dev", "test": "dart-v1.1.1-full-test"}
HUB = HubCopy("Yale-LILY/dart", "the official files dart-v1.1.1-full-train.json, -dev.json and -test.json")


def open_dart(task: Dart, split: Split) -> Source:
    """A split of the task.

    Raises:
        JobError: the folder has no such file; later, that it is malformed.
    """
    if task.data is None:
        return from_hub(HUB, split, lambda row, where: _examples(task, _hub_entry(row, where)))
    file = split_path(Path(task.data), (f"{_STEM[split]}.json", f"{_STEM[split]}.xml"), f"DART {split}")

    def read() -> Iterator[Pair | Dropped]:
        for entry in read_benchmark(file) if file.suffix == ".xml" else _json_entries(file):
            yield from _examples(task, entry)

    return Source((file,), read)


def _examples(task: Dart, entry: Entry) -> Iterator[Pair | Dropped]:
    prompt = linearise(tuple((subject, predicate.lower(), target) for subject, predicate, target in entry.triples))
    for text in entry.texts:
        if text.text.strip() or task.empty_texts == "refuse":
            yield _named(prompt, text)
        else:
            yield Dropped("empty text", text.source)


def _named(prompt: str, text: Text) -> Pair:
    try:
        return pair(prompt, text)
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
