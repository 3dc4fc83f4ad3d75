"""Your own files -> examples: prompts and completions, conversations, labelled texts, running text.

In: a folder with `train.*`, `valid.*`, `test.*` (files, or folders of files), or files named one by one. Texts are taken as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pipeline.job.errors import JobError
from pipeline.job.section import Split
from pipeline.job.task import Classification, Conversations, OwnData, Pairs, PlainText, Regression
from pipeline.tasks.documents import documents
from pipeline.tasks.example import ASSISTANT, Chat, Document, Dropped, Example, Labelled, Message, Pair, Source, dropped
from pipeline.tasks.json_rows import Row, as_object, field
from pipeline.tasks.rows import FORMATS, Format, rows

_LARGEST_NUMBER = 3.4028234e38
"""Of fp32, in which a head is trained."""
_SPLIT_NAMES = {"train": ("train",), "valid": ("valid", "validation", "dev"), "test": ("test",)}


def open_own(task: OwnData, split: Split) -> Source:
    """A split of your own data.

    Raises:
        JobError: no file for this split; later, that one is malformed.
    """
    files = split_files(task, split)
    if not files:
        if Path(task.data).is_dir():
            first, *others = _endings(task)
            add = f"{task.data}/{split}{first}" + (f" (or {', '.join(others)})" if others else "")
        else:
            add = f'{split} = "FILE" in [task]'
        share = " or task.dev_fraction" if split == "valid" else ""
        raise JobError(f"task.data = {task.data}: there is no {split} split. Add {add}{share}, or choose another split.")
    for file in files:
        if not file.is_file():
            raise JobError(f"{file}: not a file. Name a file of the {split} split.")
        _format(task, file)
    return Source(files, lambda: _read(task, files))


def split_files(task: OwnData, split: Split) -> tuple[Path, ...]:
    """Where a split is; nothing if the job has none of its own.

    Raises:
        JobError: several files could be meant, or the one that is named is of no known format.
    """
    named = {"train": None, "valid": task.valid, "test": task.test}[split]
    place = Path(task.data if named is None else named)
    if named is None and not place.is_dir():
        return (place,) if split == "train" else ()
    if not place.exists():
        raise JobError(f"{place}: no such file or folder. Name the {split} split's.")
    if named is not None:
        return _listed(place, task) if place.is_dir() else (place,)
    found = sorted({path for name in _SPLIT_NAMES[split] for path in _candidates(place, name, task)})
    if len(found) > 1 and not all(re.search(r"-\d+-of-\d+$", path.stem) for path in found):
        raise JobError(f"{place}: {' and '.join(path.name for path in found)} could both be the {split} split. Leave one of them there.")
    return tuple(file for path in found for file in (_listed(path, task) if path.is_dir() else (path,)))


def _candidates(folder: Path, name: str, task: OwnData) -> list[Path]:
    shards = [path for path in folder.glob(f"{name}-*-of-*") if path.suffix in _endings(task)]
    whole = [folder / f"{name}{ending}" for ending in _endings(task) if (folder / f"{name}{ending}").is_file()]
    return shards + whole + ([folder / name] if (folder / name).is_dir() else [])


def _listed(folder: Path, task: OwnData) -> tuple[Path, ...]:
    return tuple(sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in _endings(task)))


def _endings(task: OwnData) -> tuple[str, ...]:
    """Of the files that a task of this kind may consist of."""
    match task:
        case Pairs(kind=kind):
            return tuple(ending for ending, form in FORMATS.items() if form == kind)
        case PlainText():
            return tuple(FORMATS)
        case Conversations():
            return tuple(ending for ending, form in FORMATS.items() if form not in ("txt", "csv"))
        case _:
            return tuple(ending for ending, form in FORMATS.items() if form != "txt")


def _format(task: OwnData, file: Path) -> Format:
    if isinstance(task, Pairs):
        return task.kind
    if file.suffix not in _endings(task):
        raise JobError(f'{file}: "{file.suffix}" is not the end of a known format\'s name. Use {", ".join(_endings(task))}.')
    return FORMATS[file.suffix]


def _read(task: OwnData, files: tuple[Path, ...]) -> Iterator[Example | Dropped]:
    for file in files:
        form = _format(task, file)
        if isinstance(task, PlainText) and form == "txt":
            yield from documents(file, task.document)
            continue
        for where, row in rows(file, form, _columns(task)):
            try:
                yield _example(task, row(), where)
            except JobError as error:
                if task.bad_rows == "refuse":
                    raise
                yield dropped(error, where)


def _columns(task: OwnData) -> tuple[str, ...]:
    match task:
        case Pairs(prompt=prompt, completion=completion):
            return prompt, completion
        case Conversations(messages=messages):
            return (messages,)
        case Classification(text=text, text_pair=pair, label=label) | Regression(text=text, text_pair=pair, label=label):
            return (text, label) if pair is None else (text, pair, label)
        case PlainText(text=text):
            return (text,)
        case _:
            raise AssertionError(f"no columns of {task.kind}")


def _example(task: OwnData, row: Row, where: str) -> Example:
    match task:
        case Pairs(prompt=prompt, completion=completion):
            found = Pair(field(row, prompt, str, where), field(row, completion, str, where), where)
            if not found.completion:
                raise JobError(f'{where}: "{completion}" is empty: there is nothing to learn. Mend or remove the line.')
            return found
        case Conversations(messages=messages):
            return _chat(tuple(_message(part, where) for part in field(row, messages, list, where)), where)
        case Classification(text=text, text_pair=pair, label=label, labels=labels):
            name = str(row[label]) if isinstance(row.get(label), int | bool) else field(row, label, str, where)
            if name not in labels:
                known = ", ".join(labels)[:400]
                raise JobError(
                    f'{where}: "{label}" is not one of task.labels ("{name[:80]}", not {known}). Mend the line, or add the label.'
                )
            return Labelled(_texts(row, text, pair, where), float(labels.index(name)), where)
        case Regression(text=text, text_pair=pair, label=label):
            return Labelled(_texts(row, text, pair, where), _number(row, label, where), where)
        case PlainText(text=text):
            found_text = field(row, text, str, where)
            if not found_text:
                raise JobError(f'{where}: "{text}" is empty: there is nothing to learn. Mend or remove the line.')
            return Document(found_text, where)
        case _:
            raise AssertionError(f"no examples of {task.kind}")


def _message(part: object, where: str) -> Message:
    message = as_object(part, where)
    return Message(field(message, "role", str, where), field(message, "content", str, where))


def _chat(messages: tuple[Message, ...], where: str) -> Chat:
    answers = [message for message in messages if message.role == ASSISTANT]
    if not answers:
        raise JobError(f'{where}: no turn has the role "{ASSISTANT}": there is nothing to learn. Mend or remove the line.')
    if not all(answer.content.strip() for answer in answers):
        raise JobError(f"{where}: an answer of the assistant's is empty: there is nothing to learn. Mend or remove the line.")
    return Chat(messages, where)


def _texts(row: Row, text: str, pair: str | None, where: str) -> tuple[str, ...]:
    texts = tuple(field(row, key, str, where) for key in (text, pair) if key is not None)
    if not any(part.strip() for part in texts):
        raise JobError(f"{where}: the text is empty: there is nothing to judge. Mend or remove the line.")
    return texts


def _number(row: Row, key: str, where: str) -> float:
    value = row.get(key)
    try:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError
        number = float(value)
        if not abs(number) <= _LARGEST_NUMBER:  # nor what is no number
            raise ValueError
    except (ValueError, OverflowError):
        found = f'it is "{str(value)[:80]}"' if key in row else f"has {', '.join(sorted(map(str, row)))}"
        raise JobError(f'{where}: "{key}" is missing or not a number ({found}). Mend the line.') from None
    return number
