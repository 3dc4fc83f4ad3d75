"""The shapes of data: examples as a task reads them, and token sequences as a model sees them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from pipeline.job.errors import JobError

_REASON = re.compile(r'("[^"]*"|[^(:.]|\.(?! ))*')
"""Up to a value, an explanation or a repair; names in quotation marks are part of it."""
ASSISTANT = "assistant"
"""The role whose turns are learnt."""


@dataclass(frozen=True)
class Pair:
    """One prompt and what should follow it."""

    prompt: str
    completion: str
    source: str
    """File and line, for messages."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Chat:
    """A conversation, of which the assistant's turns are learnt."""

    messages: tuple[Message, ...]
    source: str


@dataclass(frozen=True)
class Labelled:
    """One text, or two, and what is to be said of them."""

    texts: tuple[str, ...]
    label: float | None
    """The place of the class in the task's list, or the score. None: withheld, as in GLUE's test splits."""
    source: str


@dataclass(frozen=True)
class Document:
    """Running text, all of which is learnt."""

    text: str
    source: str
    continued: bool = False
    """It goes on from the document before, of which it is a piece."""


Example: TypeAlias = Pair | Chat | Labelled | Document


@dataclass(frozen=True)
class Dropped:
    """A row that the job leaves out."""

    reason: str
    source: str


def dropped(error: JobError, source: str) -> Dropped:
    """A row left out for what a message says of it, but for place, value and repair: rows with the same fault are counted together."""
    file, _, _ = source.rpartition(":")
    found = _REASON.match(re.sub(rf"^{re.escape(file)}:\d+: ", "", str(error)))
    assert found
    return Dropped(found[0].strip(), source)


@dataclass(frozen=True)
class Reason:
    """Why examples were left out, how many, and where the first of them is."""

    reason: str
    count: int
    first: str

    def __str__(self) -> str:
        return f"{self.count:,} x {self.reason} (the first: {self.first})"


def count(reasons: dict[str, Reason], found: Dropped) -> None:
    """Adds one to those that were left out."""
    before = reasons.get(found.reason, Reason(found.reason, 0, found.source))
    reasons[found.reason] = replace(before, count=before.count + 1)


def none_left(what: str, reasons: dict[str, Reason]) -> JobError:
    """A split without examples."""
    left = f" (left out: {'; '.join(map(str, reasons.values()))})" if reasons else ""
    return JobError(f"{what} has no examples{left}. Give it at least one.")


@dataclass(frozen=True)
class Source:
    """A split of a task, not read yet."""

    files: tuple[Path, ...]
    """All that the examples depend on."""
    read: Callable[[], Iterator[Example | Dropped]]
    """From the beginning, in file order."""
    version: str = ""
    """What else they depend on: the hub's revision."""


@dataclass(frozen=True)
class Sequence:
    """Token ids of one example, and what is learnt of it."""

    tokens: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    """First token and end of each run of tokens that the loss counts; from 1 on, since the first has nothing that predicts it."""
    label: float | None = None
    """Of the whole, where the task has labels."""
    texts: tuple[tuple[int, int], ...] = ()
    """First token and end of each text that is judged, where the rest are the tokenizer's own. None given: all is one text."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def targets(self) -> int:
        """What the loss counts: tokens, or one label."""
        return sum(end - start for start, end in self.spans) + (self.label is not None)


@dataclass(frozen=True)
class Prompt:
    """One distinct prompt of an evaluation split with all its references, in file order."""

    text: str
    references: tuple[str, ...]


def grouped(pairs: Iterable[Pair]) -> list[Prompt]:
    """Pairs with the same prompt are references of one prompt."""
    groups: dict[str, list[str]] = {}
    for pair in pairs:
        groups.setdefault(pair.prompt, []).append(pair.completion)
    return [Prompt(text, tuple(references)) for text, references in groups.items()]
