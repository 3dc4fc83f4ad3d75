"""Special tokens around the prompts of examples, for methods that train what stands there (the paper's prefixing and infixing).

They have ids from the vocabulary's end on. A prefix stands before the prompt, of an encoder's text behind the token that it is judged by;
an infix behind the prompt, of texts with labels at their end.
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, replace

import numpy as np

from pipeline.job.method import Method, PrefixEmbed, PrefixLayer
from pipeline.tasks.example import Sequence
from pipeline.tasks.sequences import Sequences


@dataclass(frozen=True)
class Specials:
    prefix: int
    """How many before the prompt."""
    infix: int
    """How many behind it."""
    first_id: int

    def __len__(self) -> int:
        return self.prefix + self.infix

    def prompt(self, tokens: Tokens[int]) -> list[int]:
        """A prompt that a text is to follow."""
        before, behind = self._ids()
        return [*before, *tokens, *behind]

    def around(self, sequence: Sequence) -> Sequence:
        before, behind = self._ids()
        first = sequence.texts[0][0] if sequence.texts else 0
        end = sequence.spans[0][0] if sequence.spans else len(sequence)
        tokens = (*sequence.tokens[:first], *before, *sequence.tokens[first:end], *behind, *sequence.tokens[end:])
        spans = tuple((start + len(self), stop + len(self)) for start, stop in sequence.spans)
        texts = tuple((start + self.prefix, stop + self.prefix) for start, stop in sequence.texts)
        return replace(sequence, tokens=tokens, spans=spans, texts=texts)

    def _ids(self) -> tuple[range, range]:
        middle = self.first_id + self.prefix
        return range(self.first_id, middle), range(middle, middle + self.infix)


def specials_of(methods: tuple[Method, ...], vocabulary: int) -> Specials | None:
    """The special tokens that a method places."""
    placed = [method for method in methods if isinstance(method, PrefixEmbed | PrefixLayer)]
    return Specials(placed[0].prefix_tokens, placed[0].infix_tokens, vocabulary) if placed else None


class Surrounded:
    """Sequences with special tokens around their prompts."""

    def __init__(self, whole: Sequences, specials: Specials) -> None:
        self._whole, self._specials = whole, specials

    def __len__(self) -> int:
        return len(self._whole)

    def __getitem__(self, index: int) -> Sequence:
        return self._specials.around(self._whole[index])

    def tokens(self, index: int) -> int:
        return self._whole.tokens(index) + len(self._specials)

    def targets(self, index: int) -> int:
        return self._whole.targets(index)

    def source(self, index: int) -> str:
        return self._whole.source(index)

    def lengths(self) -> np.ndarray:
        return self._whole.lengths() + len(self._specials)

    @property
    def longest(self) -> int:
        return self._whole.longest + len(self._specials)
