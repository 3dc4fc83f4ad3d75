"""What the tests of tasks make: sequences of a prompt and a completion, and an encoder for one task."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.tasks.encode import Encoder
from pipeline.tasks.example import Sequence
from pipeline.tasks.tokens import Tokens

VOCABULARY = 1 << 30


def learnt_from(tokens, start):
    """Tokens of which those from `start` on are learnt."""
    return Sequence(tuple(tokens), ((start, len(tokens)),))


def start_of(sequence):
    """Where the one run of learnt tokens begins."""
    ((start, end),) = sequence.spans
    assert end == len(sequence)
    return start


def encoder(folder, separator="", **settings):
    return Encoder(Tokens(folder), separator, **{"block_tokens": 0, "vocabulary": VOCABULARY, **settings})


def encoded(made, examples):
    """Sequences alone."""
    return [sequence for sequence, _ in made.sequences(examples)]


@dataclass(frozen=True)
class Listed:
    """Sequences in memory."""

    sequences: list[Sequence]
    sources: list[str]

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> Sequence:
        return self.sequences[index]

    def tokens(self, index: int) -> int:
        return len(self.sequences[index])

    def targets(self, index: int) -> int:
        return self.sequences[index].targets

    def source(self, index: int) -> str:
        return self.sources[index]

    def lengths(self) -> np.ndarray:
        return np.array([len(sequence) for sequence in self.sequences])

    @property
    def longest(self) -> int:
        return int(self.lengths().max())
