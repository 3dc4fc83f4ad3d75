"""How many training examples a job has, and so how many steps, as far as that can be known without reading data.

In: a job's task. Out: a number with where it is from. Official training sets have known sizes (docs/tasks.md); of your own data the
rows of one file that is here are counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from pipeline.job.spec import Train
from pipeline.job.task import Glue, Mix, OwnData, Task

_OFFICIAL = {"e2e": 42_061, "webnlg": 18_025, "dart": 62_659, "samsum": 14_732, "wikisql": 56_355}
_GLUE = {"cola": 8_551, "sst2": 67_349, "mrpc": 3_668, "stsb": 5_749, "qqp": 363_846, "mnli": 392_702, "qnli": 104_743, "rte": 2_490}
_ROWS = {"jsonl", "csv", "chat", "classification", "regression"}
"""Kinds of which a row is an example."""
_LARGEST_BYTES = 1 << 28
"""Of a file whose rows are counted: a tenth of a second."""


@dataclass(frozen=True)
class Examples:
    count: int
    source: str


def examples_of(task: Task) -> Examples | None:
    """Those of the training split; None where it cannot be told."""
    if isinstance(task, Mix):
        return None
    found = None
    if isinstance(task, Glue):
        found = Examples(_GLUE[task.name], f"the official training set of {task.name}")
    elif task.kind in _OFFICIAL:
        found = Examples(_OFFICIAL[task.kind], f"the official training set of {task.kind}")
    elif isinstance(task, OwnData) and task.kind in _ROWS and (file := _file(Path(task.data))):
        found = Examples(_rows(file), f"rows of {file}")
    if found is None:
        return None
    kept = round(found.count * (1 - (getattr(task, "dev_fraction", None) or 0)))
    limit = task.train_examples
    return Examples(min(kept, limit) if limit else kept, found.source)


def steps_of(train: Train, examples: int | None) -> int | None:
    """Optimizer steps of the whole run."""
    if train.steps is not None or examples is None:
        return train.steps
    return math.ceil(max(1, round(examples * (train.epochs or 1.0))) / train.batch_examples)


def _file(data: Path) -> Path | None:
    """The one training file, where it is small and its rows are lines."""
    files = [data] if data.is_file() else [file for file in data.glob("train.*") if file.is_file()]
    if len(files) != 1 or files[0].suffix not in (".jsonl", ".csv", ".tsv") or files[0].stat().st_size > _LARGEST_BYTES:
        return None
    return files[0]


def _rows(file: Path) -> int:
    with file.open("rb") as lines:
        count = sum(not line.isspace() for line in lines)
    return max(1, count - (file.suffix != ".jsonl"))
