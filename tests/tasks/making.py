"""What the tests of tasks make: sequences of a prompt and a completion, and an encoder for one task."""

from __future__ import annotations

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
