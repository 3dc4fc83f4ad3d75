"""Translation edit rate (Snover et al. 2006), as two official scripts compute it.

In: predictions and the references of each, tokenised. Out: edits per word of the references.
`ter_tercom` is the challenge's, tercom 0.7.25; `ter_pyter` is that of GenerationEval. They differ in the shifts that they try.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from pipeline.evaluate.metrics.edit_distance import EditDistance, State, cost

_BEAM, _LONGEST, _FARTHEST = 20, 10, 50
"""tercom's limits: edits beyond the best of a column, words in a shift, words that a shift passes."""
# Java's blanks: a no-break space is none of them.
_WORD = re.compile(r"\S+", re.ASCII)

Shift = tuple[int, int, int]
"""start, end, after: words[start:end] goes behind the word `after`; -1 is the front."""
Runs = dict[tuple[str, ...], list[int]]
"""The runs of words in a text, and where each starts."""


def ter_tercom(predictions: list[str], references: list[list[str]]) -> float:
    """Over the corpus: edits to the nearest reference, per word of the mean reference. Case does not count."""
    edits, length = 0, 0.0
    for text, group in zip(predictions, references, strict=True):
        words, others = _WORD.findall(text.lower()), [_WORD.findall(other.lower()) for other in group]
        edits += min(_edits(words, list(other)) for other in {tuple(other) for other in others})
        length += sum(map(len, others)) / len(others)
    return edits / length if length else float(edits > 0)


def _edits(words: list[str], other: list[str]) -> int:
    """Shifts, the best one at a time until none pays, and the edits that are left. Of equally good ones the first counts."""
    if not other:
        return len(words)
    distance, runs, shifts = EditDistance(other), _runs(other), 0
    states = distance.states(words)
    left, steps = _align(words, other, states)
    while True:
        best, most = None, left - 1
        for shift in _shifts(words, runs, steps):
            if best is not None and left - most - 2 >= 2 * (shift[1] - shift[0]):
                break  # no shift of so few words saves more
            moved, same = _move(words, shift), min(shift[0], shift[2] + 1)
            after = distance.states(moved, states[: same + 1])
            # The beam only ever makes a distance longer.
            if cost(after, len(words)) <= most and (found := _align(moved, other, after))[0] <= most:
                best, most = (moved, after, *found), found[0] - 1
        if best is None:
            return shifts + left
        shifts, (words, states, left, steps) = shifts + 1, best


def _align(words: list[str], other: list[str], states: list[State]) -> tuple[int, str]:
    """Edit distance, and its steps: a word of both (=), substituted (S), of `words` alone (I), of `other` alone (D), in this order.

    tercom gives up the cells of a column that are worse than its best by more than the beam. As neighbours differ by one at most, no cell
    on the way is given up while its cost and its distance from the diagonal are together at most twice the beam.
    """
    steps, here, there, left = "", len(words), len(other), cost(states, len(words))
    while here or there:
        if here < len(words) and left + abs(here - there) > 2 * _BEAM:
            return _align_in_beam(words, other)
        if here and there and cost(states, here - 1, there - 1) + (change := words[here - 1] != other[there - 1]) == left:
            steps, here, there, left = steps + "=S"[change], here - 1, there - 1, left - change
        elif here and cost(states, here - 1, there) + 1 == left:
            steps, here, left = steps + "I", here - 1, left - 1
        else:
            steps, there, left = steps + "D", there - 1, left - 1
    return cost(states, len(words)), steps[::-1]


def _align_in_beam(words: list[str], other: list[str]) -> tuple[int, str]:
    """The same by the whole table, cells given up and all; none is in the last column."""
    column: list[float] = list(range(len(other) + 1))
    table = [["D"] * len(column)]
    for number, word in enumerate(words, 1):
        across = [math.inf, *(before + (word != same) for before, same in zip(column, other, strict=False))]
        limit = min(across) + _BEAM if number < len(words) else math.inf
        upper, line = math.inf, []
        for place, (edits, before) in enumerate(zip(across, column, strict=True)):
            step = "=" if place and word == other[place - 1] else "S"
            if before + 1 < edits:
                edits, step = before + 1, "I"
            if upper + 1 < edits:
                edits, step = upper + 1, "D"
            column[place] = upper = edits if edits <= limit else math.inf
            line.append(step)
        table.append(line)
    steps, here, there = "", len(words), len(other)
    while here or there:
        steps += table[here][there]
        here, there = here - (steps[-1] != "D"), there - (steps[-1] != "I")
    return int(column[-1]), steps[::-1]


def _runs(other: list[str]) -> Runs:
    runs: Runs = {}
    for start in range(len(other)):
        for end in range(start + 1, min(start + _LONGEST, len(other)) + 1):
            runs.setdefault(tuple(other[start:end]), []).append(start)
    return runs


def _shifts(words: list[str], runs: Runs, steps: str) -> Iterator[Shift]:
    """Longest first: each run that both texts have, with an edit in both, to where the other has it and behind each of its words there."""
    wrong, wrong_other, aligned = [], [], []
    for step in steps:
        if step != "D":
            wrong.append(step != "=")
        if step != "I":
            wrong_other.append(step != "=")
            aligned.append(len(wrong) - 1)
    found: list[list[Shift]] = [[] for _ in range(_LONGEST + 1)]
    for start in range(len(words)):
        for end in range(start + 1, min(start + _LONGEST, len(words)) + 1):
            if not (places := runs.get(tuple(words[start:end]))):
                break
            if not any(wrong[start:end]):
                continue
            size = end - start
            for place in places:
                to = aligned[place]
                if start <= to < end or abs(to - start) > _FARTHEST or not any(wrong_other[place : place + size]):
                    continue
                if place == 0:
                    found[size].append((start, end, -1))
                for near in range(max(place - 1, 0), place + size):
                    if aligned[near] != start and (near == place or aligned[near] != to):
                        found[size].append((start, end, aligned[near]))
    return (shift for group in reversed(found) for shift in group)


def _move(words: list[str], shift: Shift) -> list[str]:
    start, end, after = shift
    run, rest = words[start:end], words[:start] + words[end:]
    # Behind a word of its own, the run goes as many words on.
    to = after + 1 if after < start else after + 1 - len(run) if after >= end else after
    return rest[:to] + run + rest[to:]


def ter_pyter(predictions: list[str], references: list[list[str]]) -> float:
    """Mean over predictions of the rate to the nearest reference; an empty reference rates 1."""
    rates = [min(_rate(text.split(), other.split()) for other in set(group)) for text, group in zip(predictions, references, strict=True)]
    return sum(rates) / len(rates)


def _rate(words: list[str], other: list[str]) -> float:
    if not other:
        return 1.0
    distance = EditDistance(other)
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
