"""What is trained on, as training sees it: any number of sequences by index, wherever they lie."""

from __future__ import annotations

from bisect import bisect
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, Protocol

import numpy as np

from pipeline.job.errors import JobError
from pipeline.tasks.example import Sequence


class Sequences(Protocol):
    """A split, of which every rank knows each sequence's length without reading its tokens."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sequence: ...

    def tokens(self, index: int) -> int:
        """How many a sequence has."""

    def targets(self, index: int) -> int:
        """How many the loss counts."""

    def source(self, index: int) -> str:
        """File and line, for messages."""

    def lengths(self) -> np.ndarray:
        """Tokens of every sequence: [examples]."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""


@dataclass(frozen=True)
class Truncated:
    """Those longer than `max_tokens` cut to it."""

    whole: Sequences
    max_tokens: int

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, index: int) -> Sequence:
        return truncate(self.whole[index], self.max_tokens)

    def tokens(self, index: int) -> int:
        return min(self.whole.tokens(index), self.max_tokens)

    def targets(self, index: int) -> int:
        return self.whole.targets(index) if self.whole.tokens(index) <= self.max_tokens else self[index].targets

    def source(self, index: int) -> str:
        return self.whole.source(index)

    def lengths(self) -> np.ndarray:
        return np.minimum(self.whole.lengths(), self.max_tokens)

    @property
    def longest(self) -> int:
        return min(self.whole.longest, self.max_tokens)


@dataclass(frozen=True)
class Chosen:
    """Some of a split."""

    whole: Sequences
    kept: np.ndarray
    """Their indices."""

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Sequence:
        return self.whole[int(self.kept[index])]

    def tokens(self, index: int) -> int:
        return self.whole.tokens(int(self.kept[index]))

    def targets(self, index: int) -> int:
        return self.whole.targets(int(self.kept[index]))

    def source(self, index: int) -> str:
        return self.whole.source(int(self.kept[index]))

    def lengths(self) -> np.ndarray:
        return self.whole.lengths()[self.kept]

    @property
    def longest(self) -> int:
        return int(self.lengths().max())


class Joined:
    """Several, one behind the other."""

    def __init__(self, parts: list[Sequences]) -> None:
        self._parts, self._ends = parts, list(accumulate(map(len, parts)))

    def _at(self, index: int) -> tuple[Sequences, int]:
        part = bisect(self._ends, index)
        return self._parts[part], index - (self._ends[part - 1] if part else 0)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sequence:
        part, place = self._at(index)
        return part[place]

    def tokens(self, index: int) -> int:
        part, place = self._at(index)
        return part.tokens(place)

    def targets(self, index: int) -> int:
        part, place = self._at(index)
        return part.targets(place)

    def source(self, index: int) -> str:
        part, place = self._at(index)
        return part.source(place)

    def lengths(self) -> np.ndarray:
        return np.concatenate([part.lengths() for part in self._parts])

    @property
    def longest(self) -> int:
        return max(part.longest for part in self._parts)


def fit(whole: Sequences, max_tokens: int, too_long: Literal["refuse", "truncate", "drop"]) -> tuple[Sequences, int]:
    """Applies the job's rule to sequences longer than `max_tokens`.

    Returns:
        The sequences that remain, and how many were too long.

    Raises:
        JobError: `too_long` is "refuse" and there are some, or nothing remains.
    """
    if whole.longest <= max_tokens:
        return whole, 0
    lengths = whole.lengths()
    over = np.flatnonzero(lengths > max_tokens)
    if too_long == "refuse":
        first, worst = int(over[0]), int(lengths.argmax())
        raise JobError(
            f"{whole.source(first)}: {lengths[first]} tokens, more than the {max_tokens} that fit; {len(over)} of "
            f"{len(whole)} examples are too long, the longest {lengths[worst]} ({whole.source(worst)}). "
            'Set task.too_long = "truncate" or "drop", or shorten them.'
        )
    if too_long == "truncate":
        return Truncated(whole, max_tokens), len(over)
    kept = np.flatnonzero(lengths <= max_tokens)
    if not len(kept):
        raise JobError(f"{whole.source(0)}: every example is longer than the {max_tokens} tokens that fit. Shorten them.")
    return Chosen(whole, kept), len(over)


def truncate(sequence: Sequence, max_tokens: int) -> Sequence:
    """A prompt loses its left, so that its end and the whole completion stay; then the completion loses its end.

    At least one prompt token stays: the first target token is predicted from it. A conversation loses its beginning, so that its
    last answer stays. Of a text with a label its end is cut; of two, the end of the longer one, as transformers' `longest_first` does.
    """
    over = len(sequence) - max_tokens
    if over <= 0:
        return sequence
    if sequence.label is not None or not sequence.spans:
        return _cut_texts(sequence, max_tokens)
    cut = min(over, sequence.spans[-1][0] - 1)
    moved = [(max(1, start - cut), min(end - cut, max_tokens)) for start, end in sequence.spans]
    return Sequence(sequence.tokens[cut:][:max_tokens], tuple((start, end) for start, end in moved if start < end))


def _cut_texts(sequence: Sequence, max_tokens: int) -> Sequence:
    """The tokenizer's own tokens stay around what is left of each text."""
    texts = sequence.texts or ((0, len(sequence)),)
    lengths = [end - first for first, end in texts]
    room = max(0, max_tokens - (len(sequence) - sum(lengths)))
    kept = [min(room, lengths[0])] if len(texts) == 1 else _longest_first(lengths[0], lengths[1], room)
    tokens: tuple[int, ...] = ()
    places, last = [], 0
    for (first, end), length in zip(texts, kept, strict=True):
        tokens += sequence.tokens[last:first]
        places.append((len(tokens), len(tokens) + length))
        tokens += sequence.tokens[first : first + length]
        last = end
    return Sequence(tokens + sequence.tokens[last:], (), sequence.label, tuple(places) if sequence.texts else ())


def _longest_first(first: int, second: int, room: int) -> list[int]:
    """What stays of two texts: only the longer one is cut where that is enough, else both to a half (as in tokenizers)."""
    short, long = sorted((first, second))
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short = room // 2
        long = short + room % 2
    return [short, long] if first <= second else [long, short]
