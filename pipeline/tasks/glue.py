"""GLUE (Wang et al. 2019): one text or two, and a label or a score. The benchmark's dev split is the `valid` split.

In: the official folders of tab-separated files, CoLA's and MRPC's own releases, or the hub's copy.
Out: the texts, blanks around them cut; the place of the label in `glue_labels`, STS-B's score, or None where it is withheld.
Quotation marks are characters of the text, as in the official files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

from pipeline.job.errors import JobError
from pipeline.job.labels import glue_labels
from pipeline.job.section import Split
from pipeline.job.task import Glue
from pipeline.tasks.example import Dropped, Labelled, Pair, Source, dropped
from pipeline.tasks.files import decoded, lines, raw_lines, split_path
from pipeline.tasks.hub import HubCopy, from_hub
from pipeline.tasks.json_rows import Row


@dataclass(frozen=True)
class _Form:
    folder: str
    """Of the official release."""
    texts: tuple[str, ...]
    label: str
    """These columns of the official files."""
    hub_texts: tuple[str, ...]
    named: bool = False
    """A label is written by its name, not by its place."""


_FORMS = {
    "cola": _Form("CoLA", ("sentence",), "label", ("sentence",)),
    "sst2": _Form("SST-2", ("sentence",), "label", ("sentence",)),
    "mrpc": _Form("MRPC", ("#1 String", "#2 String"), "Quality", ("sentence1", "sentence2")),
    "stsb": _Form("STS-B", ("sentence1", "sentence2"), "score", ("sentence1", "sentence2")),
    "qqp": _Form("QQP", ("question1", "question2"), "is_duplicate", ("question1", "question2")),
    "mnli": _Form("MNLI", ("sentence1", "sentence2"), "gold_label", ("premise", "hypothesis"), named=True),
    "qnli": _Form("QNLI", ("question", "sentence"), "label", ("question", "sentence"), named=True),
    "rte": _Form("RTE", ("sentence1", "sentence2"), "label", ("sentence1", "sentence2"), named=True),
}
_STEM = {"train": "train", "valid": "dev", "test": "test"}
_COLA_COLUMNS = ("source", "label", "star", "sentence")
"""CoLA's labelled files have no header."""
_MRPC_IDS = ("#1 ID", "#2 ID")
_LARGEST_SCORE = 5.0
_REPAIR = 'Mend or remove the line, or set task.bad_rows = "drop" to leave such rows out.'


def open_glue(task: Glue, split: Split) -> Source:
    """A split of one of the eight tasks.

    Raises:
        JobError: a file is not there; later, that one is malformed.
    """
    form = _FORMS[task.name]
    if task.data is None:
        return _joined([from_hub(_copy(task, part), split, partial(_hub_examples, task, split)) for part in _parts(task, split)])
    folder = Path(task.data)
    folder = folder / form.folder if (folder / form.folder).is_dir() else folder
    files = _files(task, split, folder)
    if files[0].name == "msr_paraphrase_train.txt" and (ids := folder / "dev_ids.tsv").exists():
        return Source((*files, ids), lambda: _msr_split(task, split, files[0], ids))
    return Source(files, lambda: chain.from_iterable(_read(task, split, file) for file in files))


def as_text(task: Glue, source: Source) -> Source:
    """The same with each label as words to generate: `premise: ...`, `hypothesis: ...`, a line each, and the label's name.

    Raises:
        JobError: while reading: a label is withheld.
    """
    names, columns = glue_labels(task.name), _FORMS[task.name].hub_texts
    assert names is not None

    def read() -> Iterator[Pair | Dropped]:
        for found in source.read():
            if not isinstance(found, Labelled):
                assert isinstance(found, Dropped)
                yield found
            elif found.label is None:
                raise JobError(f'{found.source}: labels of this split are withheld, and task.form = "text" generates them. Score "valid".')
            else:
                prompt = "\n".join(f"{column}: {text}" for column, text in zip(columns, found.texts, strict=True))
                yield Pair(prompt, f" {names[int(found.label)]}", found.source)

    return replace(source, read=read)


def glue_copies(task: Glue) -> tuple[HubCopy, ...]:
    """The hub's copies of what a task reads."""
    return tuple(dict.fromkeys(_copy(task, part) for part in _parts(task, "valid")))


def _copy(task: Glue, part: str) -> HubCopy:
    about = f"the official files of {_FORMS[task.name].folder}"
    return HubCopy("nyu-mll/glue", about, ("train", f"validation{part}", f"test{part}"), folder=task.name)


def _joined(sources: list[Source]) -> Source:
    files = tuple(file for source in sources for file in source.files)
    return Source(files, lambda: chain.from_iterable(source.read() for source in sources), " ".join(source.version for source in sources))


def _parts(task: Glue, split: Split) -> tuple[str, ...]:
    """What the names of a split's files end with; only MNLI's are several."""
    if task.name != "mnli" or split == "train":
        return ("",)
    return ("_matched", "_mismatched") if task.section == "both" else (f"_{task.section}",)


def _files(task: Glue, split: Split, folder: Path) -> tuple[Path, ...]:
    def one(*names: str) -> Path:
        return split_path(folder, names, f"{_FORMS[task.name].folder} {split}")

    match task.name, split:
        case "cola", "train":
            return (one("train.tsv", "in_domain_train.tsv"),)
        case "cola", "valid":
            dev = one("dev.tsv", "in_domain_dev.tsv")
            return (dev,) if dev.name == "dev.tsv" else (dev, one("out_of_domain_dev.tsv"))
        case "mrpc", "train" if not (folder / "dev.tsv").exists():
            return (one("train.tsv", "msr_paraphrase_train.txt"),)
        case "mrpc", "valid" if one("dev.tsv", "dev_ids.tsv").name == "dev_ids.tsv":
            return (one("msr_paraphrase_train.txt"),)
        case "mrpc", "test":
            # The same sentences as GLUE's test.tsv, with their labels.
            return (one("msr_paraphrase_test.txt", "test.tsv"),)
        case _:
            return tuple(one(f"{_STEM[split]}{part}.tsv") for part in _parts(task, split))


def _read(task: Glue, split: Split, file: Path, wanted: Callable[[Row], bool] = lambda row: True) -> Iterator[Labelled | Dropped]:
    form = _FORMS[task.name]
    columns: tuple[str, ...] = _COLA_COLUMNS if task.name == "cola" and split != "test" else ()
    for number, raw in raw_lines(file):
        where = f"{file}:{number}"
        if not columns:
            columns = _header(task, split, raw, where)
        elif raw.strip(b" \r\n"):
            try:
                row = _row(raw, columns, where)
                if wanted(row):
                    label = _label(task, row[form.label], where, form.named) if form.label in columns else None
                    yield _example([row[column] for column in form.texts], label, where)
            except JobError as error:
                yield _or_dropped(task, error, where)


def _header(task: Glue, split: Split, raw: bytes, where: str) -> tuple[str, ...]:
    form, columns = _FORMS[task.name], _cells(raw, where)
    needed = form.texts if split == "test" else (*form.texts, form.label)
    if missing := [column for column in needed if columns.count(column) != 1]:
        raise JobError(
            f'{where}: the header does not name "{missing[0]}" once ({", ".join(columns)[:200]}). Is this {form.folder}\'s official file?'
        )
    return columns


def _cells(raw: bytes, where: str) -> tuple[str, ...]:
    return tuple(decoded(raw, where).rstrip("\r\n").split("\t"))


def _row(raw: bytes, columns: tuple[str, ...], where: str) -> Row:
    cells = _cells(raw, where)
    if len(cells) != len(columns):
        raise JobError(f"{where}: {len(cells)} columns, expected {len(columns)} ({', '.join(columns)}). {_REPAIR}")
    return dict(zip(columns, cells, strict=True))


def _example(texts: list[str], label: float | None, where: str) -> Labelled:
    stripped = tuple(text.strip() for text in texts)
    if not all(stripped):
        raise JobError(f"{where}: a text is empty: there is nothing to judge. {_REPAIR}")
    return Labelled(stripped, label, where)


def _label(task: Glue, written: str, where: str, named: bool) -> float:
    names, found = glue_labels(task.name), written.strip()
    if names is None:
        return _score(found, where)
    known = names if named else tuple(map(str, range(len(names))))
    if found not in known:
        listed = ", ".join(names if named else map(" ".join, zip(known, names, strict=True)))
        raise JobError(f'{where}: "{found[:80]}" is not a label of {task.name} ({listed}). {_REPAIR}')
    return float(known.index(found))


def _score(written: str, where: str) -> float:
    try:
        if 0.0 <= (score := float(written)) <= _LARGEST_SCORE:
            return score
    except ValueError:
        pass
    raise JobError(f'{where}: the score is not a number from 0 to {_LARGEST_SCORE:g} ("{written[:80]}"). {_REPAIR}')


def _or_dropped(task: Glue, error: JobError, where: str) -> Dropped:
    if task.bad_rows == "refuse":
        raise error
    return dropped(error, where)


def _msr_split(task: Glue, split: Split, file: Path, ids_file: Path) -> Iterator[Labelled | Dropped]:
    """GLUE's dev split is made of pairs of MRPC's training file, listed by their sentences' ids."""
    ids: dict[tuple[str, ...], bool] = {}
    for number, line in lines(ids_file):
        if not (pair := tuple(line.split())):
            continue
        if len(pair) != len(_MRPC_IDS):
            raise JobError(f"{ids_file}:{number}: {len(pair)} ids, expected those of a pair of sentences. Mend the line.")
        ids[pair] = False

    def wanted(row: Row) -> bool:
        pair = tuple(row[column] for column in _MRPC_IDS)
        if pair in ids:
            ids[pair] = True
        return (pair in ids) == (split == "valid")

    yield from _read(task, split, file, wanted)
    if missing := [pair for pair, seen in ids.items() if not seen]:
        raise JobError(
            f"{ids_file}: {len(missing)} of its {len(ids)} pairs are not in {file} (the first: {' '.join(missing[0])}). "
            "Fetch both files again."
        )


def _hub_examples(task: Glue, split: Split, row: Row, where: str) -> list[Labelled | Dropped]:
    withheld = split == "test" and row["label"] == -1
    try:
        label = None if withheld else _label(task, str(row["label"]), where, named=False)
        return [_example([row[column] or "" for column in _FORMS[task.name].hub_texts], label, where)]
    except JobError as error:
        return [_or_dropped(task, error, where)]
