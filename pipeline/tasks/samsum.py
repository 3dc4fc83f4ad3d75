"""SAMSum (Gliwa et al. 2019): summaries of messenger dialogues.

In: the official JSON files, the same as JSON lines, or the hub's copy.
Out: prompt: the dialogue, a turn a line; completion: the summary. The paper's separator is a blank line.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline.job.errors import JobError
from pipeline.job.section import Split
from pipeline.job.task import SamSum
from pipeline.tasks.example import Pair, Source
from pipeline.tasks.files import split_path
from pipeline.tasks.hub import HubCopy, from_hub
from pipeline.tasks.json_rows import Row, field, json_array, json_lines

_NAMES = {
    "train": ("train.json", "train.jsonl"),
    "valid": ("val.json", "validation.jsonl"),
    "test": ("test.json", "test.jsonl"),
}
HUB = HubCopy("knkarthick/samsum", "the official train.json, val.json and test.json", revision=None)


def open_samsum(task: SamSum, split: Split) -> Source:
    """A split of the task.

    Raises:
        JobError: the folder has no such file; later, that it is malformed.
    """
    if task.data is None:
        # An empty dialogue, of which the training split has one, is an empty cell there.
        return from_hub(HUB, split, lambda row, where: [_example({**row, "dialogue": row["dialogue"] or ""}, where)])
    file = split_path(Path(task.data), _NAMES[split], f"SAMSum {split}")
    return Source((file,), lambda: _read(file))


def _read(file: Path) -> Iterator[Pair]:
    names: dict[str, str] = {}
    for row, where in (json_array if file.suffix == ".json" else json_lines)(file):
        name = field(row, "id", str, where)
        if name in names:
            raise JobError(f'{where}: the dialogue "{name}" is there twice; the first is at {names[name]}. Remove one.')
        names[name] = where
        yield _example(row, where)


def _example(row: Row, where: str) -> Pair:
    """The dialogue's line ends become line feeds, whatever the writer's machine had."""
    summary = field(row, "summary", str, where).strip()
    if not summary:
        raise JobError(f"{where}: the summary is empty: there is nothing to learn. Mend or remove it.")
    dialogue = field(row, "dialogue", str, where).strip()
    return Pair(dialogue.replace("\r\n", "\n").replace("\r", "\n"), summary, where)
