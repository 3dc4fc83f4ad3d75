"""WebNLG challenge 2017 (Gardent et al. 2017): texts from sets of DBpedia triples.

In: the official XML folders (`train/`, `dev/`, `test/testdata_with_lex.xml`), the JSON files of the LoRA paper's code, or the hub's copy.
Out: prompt `Harbour_Inn : openingYear : 1911 | ...`, names as they are; completion ` The Harbour Inn opened in 1911 ...`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.job.errors import JobError
from pipeline.job.section import Split
from pipeline.job.task import WebNlg
from pipeline.tasks.example import Dropped, Pair, Source
from pipeline.tasks.files import split_path
from pipeline.tasks.hub import HubCopy, from_hub
from pipeline.tasks.json_rows import Row, as_object, field, json_array
from pipeline.tasks.triples import Entry, Text, as_triple, checked_triple, complete, linearise, pair, read_benchmark

_SEEN = frozenset(
    {"Airport", "Astronaut", "Building", "City", "ComicsCharacter", "Food", "Monument", "SportsTeam", "University", "WrittenWork"}
)
"""The categories of the training split; the test split has five more."""
_NAMES = {
    "train": ("train", "train.json"),
    "valid": ("dev", "dev.json"),
    "test": ("test/testdata_with_lex.xml", "test.json"),
}
HUB = HubCopy(
    "webnlg-challenge/web_nlg", "the official XML folders train, dev and test", ("train", "dev", "test"), folder="webnlg_challenge_2017"
)


def open_webnlg(task: WebNlg, split: Split) -> Source:
    """A split of the task: files in the order of their paths, texts in file order.

    Raises:
        JobError: the folder holds neither form; later, that a file is malformed or the task's choice leaves none.
    """
    if task.data is None:
        return from_hub(HUB, split, lambda row, where: [e for entry in _hub_entry(row, where) for e in _examples(task, split, entry)])
    place = split_path(Path(task.data), _NAMES[split], f"WebNLG {split}")
    files = tuple(sorted(place.rglob("*.xml"))) if place.is_dir() else (place,)
    if not files:
        raise JobError(f"{place}: no XML file in it. Put the official files there.")

    def read() -> Iterator[Pair | Dropped]:
        entries = left = 0
        for file in files:
            for entry in read_benchmark(file) if file.suffix == ".xml" else _json_entries(file):
                entries += 1
                for found in _examples(task, split, entry):
                    left += isinstance(found, Pair)
                    yield found
        if entries and not left:
            raise JobError(
                f'{place}: none of its {entries} entries is left with task.texts = "{task.texts}" and '
                f'task.test_categories = "{task.test_categories}". Choose "all".'
            )

    return Source(files, read)


def _examples(task: WebNlg, split: Split, entry: Entry) -> Iterator[Pair | Dropped]:
    seen = entry.category in _SEEN
    if split == "test" and task.test_categories != "all" and (task.test_categories == "seen") != seen:
        return
    prompt = linearise(entry.triples)
    for text in entry.texts:
        if task.texts == "all" or text.comment == "good":
            yield pair(prompt, text)
        else:
            yield Dropped(f'text marked "{text.comment}"', text.source)


def _json_entries(file: Path) -> Iterator[Entry]:
    names: dict[str, str] = {}
    for row, where in json_array(file, "entries"):
        if len(row) != 1:
            raise JobError(f"{where}: {len(row)} named entries in one pair of braces, expected one. Mend it.")
        ((name, value),) = row.items()
        if name in names:
            raise JobError(f'{where}: the entry "{name}" is there twice; the first is at {names[name]}. Remove one or rename it.')
        names[name] = where
        entry = as_object(value, where)
        triples = tuple(
            checked_triple([field(part, key, str, where) for key in ("subject", "property", "object")], where)
            for part in _objects(entry, "modifiedtripleset", where)
        )
        texts = tuple(
            Text(field(part, "lex", str, where), field(part, "comment", str, where), where)
            for part in _objects(entry, "lexicalisations", where)
        )
        yield complete(Entry(field(entry, "category", str, where), triples, texts), where)


def _objects(row: Row, key: str, where: str) -> list[Row]:
    return [as_object(part, where) for part in field(row, key, list, where)]


def _hub_entry(row: dict[str, Any], where: str) -> list[Entry]:
    # The hub's test split is three files one after another: without texts, the unseen categories again, and the whole.
    if row["test_category"] not in ("", None, "testdata_with_lex"):
        return []
    (triples,) = row["modified_triple_sets"]["mtriple_set"]
    texts = zip(row["lex"]["text"], row["lex"]["comment"], strict=True)
    entry = Entry(
        row["category"],
        tuple(as_triple(triple, where) for triple in triples),
        tuple(Text(text, comment, where) for text, comment in texts),
    )
    return [complete(entry, where)]
