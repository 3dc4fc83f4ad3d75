"""Edit distance to one text, a column at a time in the bits of integers (Myers 1999; Hyyro 2003).

In: words. Out: the distance, or the table of the edits between any two beginnings, a state for each word.
"""

from __future__ import annotations

State = tuple[int, int]
"""Bit n of the first says that the next beginning of the other text, of n + 1 words, costs one more; of the second, one less."""


class EditDistance:
    """From texts to `other`, which is not changed."""

    def __init__(self, other: list[str]) -> None:
        self._whole = (1 << len(other)) - 1
        self._bits: dict[str, int] = {}
        for place, word in enumerate(other):
            self._bits[word] = self._bits.get(word, 0) | 1 << place

    def to(self, words: list[str]) -> int:
        return cost(self.states(words), len(words))

    def states(self, words: list[str], first: list[State] | None = None) -> list[State]:
        """The state before the first word and after each; `first` are those before and after the first words, if known."""
        states = list(first or [(self._whole, 0)])
        up, down = states[-1]
        for word in words[len(states) - 1 :]:
            equal = self._bits.get(word, 0)
            across = (((equal & up) + up) ^ up) | equal
            more, less = (down | ~(across | up)) << 1 | 1, (up & across) << 1
            equal |= down
            up, down = (less | ~(equal | more)) & self._whole, more & equal
            states.append((up, down))
        return states


def cost(states: list[State], here: int, there: int | None = None) -> int:
    """Edits from the first `here` words to the first `there` of the other text, or to all of it."""
    up, down = states[here]
    if there is not None:
        up, down = up & (1 << there) - 1, down & (1 << there) - 1
    return here + up.bit_count() - down.bit_count()
