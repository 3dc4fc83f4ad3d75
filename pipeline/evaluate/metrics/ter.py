"""Translation edit rate (Snover et al. 2006), as two official scripts compute it.

In: predictions and the references of each, tokenised. Out: edits per word of the references.
`ter_tercom` is the challenge's (tercom 0.7.25, by sacrebleu); `ter_pyter` is that of GenerationEval, whose shifts differ.
"""

from __future__ import annotations

import sacrebleu


def ter_tercom(predictions: list[str], references: list[list[str]]) -> float:
    """Over the corpus: edits to the nearest reference, per word of the mean reference."""
    most = max(map(len, references))
    streams = [[group[n] if n < len(group) else None for group in references] for n in range(most)]
    return float(sacrebleu.corpus_ter(predictions, streams).score) / 100


def ter_pyter(predictions: list[str], references: list[list[str]]) -> float:
    """Mean over predictions of the rate to the nearest reference; an empty reference rates 1."""
    rates = [min(_rate(text.split(), other.split()) for other in set(group)) for text, group in zip(predictions, references, strict=True)]
    return sum(rates) / len(rates)


def _rate(words: list[str], other: list[str]) -> float:
    if not other:
        return 1.0
    distance = _Distance(other)
    shifts, left = 0, distance.to(words)
    while left:
        best = max(((distance.to(moved), moved) for moved in _shifted(words, other)), key=lambda it: (-it[0], it[1]), default=None)
        if best is None or best[0] >= left:
            break
        shifts, (left, words) = shifts + 1, best
    return (shifts + left) / len(other)


def _shifted(words: list[str], other: list[str]) -> list[list[str]]:
    """Every move of a longest run that both texts have, to the place where the other text has it."""
    moves = []
    for here, word in enumerate(words):
        for there, same in enumerate(other):
            if word != same or here == there:
                continue
            length = 1
            while here + length < len(words) and there + length < len(other) and words[here + length] == other[there + length]:
                length += 1
            rest = words[:here] + words[here + length :]
            moves.append(rest[:there] + words[here : here + length] + rest[there:])
    return moves


class _Distance:
    """Edit distance to one text, a column at a time in the bits of integers (Myers 1999; Hyyro 2003)."""

    def __init__(self, other: list[str]) -> None:
        self._length = len(other)
        self._bits: dict[str, int] = {}
        for place, word in enumerate(other):
            self._bits[word] = self._bits.get(word, 0) | 1 << place

    def to(self, words: list[str]) -> int:
        whole, last = (1 << self._length) - 1, 1 << (self._length - 1)
        up, down, distance = whole, 0, self._length
        for word in words:
            equal = self._bits.get(word, 0)
            across = (((equal & up) + up) ^ up) | equal
            more, less = (down | ~(across | up)) & whole, up & across
            distance += (more & last != 0) - (less & last != 0)
            more, less = (more << 1 | 1) & whole, less << 1 & whole
            equal |= down
            up, down = (less | ~(equal | more)) & whole, more & equal
        return distance
