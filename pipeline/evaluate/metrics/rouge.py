"""ROUGE (Lin 2004): ROUGE-L of the COCO caption evaluation, and ROUGE-1, 2 and L of Google's rouge-score with stemming.

In: predictions and the references of each. Out: means over predictions, from 0 to 1.
"""

from __future__ import annotations

import re
from collections import Counter

_BETA = 1.2
"""Of the COCO caption evaluation: recall counts beta times as much as precision."""


def rouge_l_coco(predictions: list[list[str]], references: list[list[list[str]]]) -> float:
    """F-measure of the best precision and the best recall over the references, which need not be of the same one."""
    total = 0.0
    for words, group in zip(predictions, references, strict=True):
        common = [_common(words, other) for other in group]
        precision = max(common) / max(1, len(words))
        recall = max(length / max(1, len(other)) for length, other in zip(common, group, strict=True))
        if precision and recall:
            total += (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)
    return total / len(predictions)


def rouge(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """F-measures with Porter stems; of several references the best."""
    from nltk.stem.porter import PorterStemmer

    stem = PorterStemmer().stem

    def stems(text: str) -> list[str]:
        # rouge-score leaves words of up to three letters alone.
        return [stem(word) if len(word) > 3 else word for word in re.findall(r"[a-z0-9]+", text.lower())]

    totals = {"ROUGE_1": 0.0, "ROUGE_2": 0.0, "ROUGE_L": 0.0}
    for text, group in zip(predictions, references, strict=True):
        words, others = stems(text), [stems(reference) for reference in group]
        totals["ROUGE_1"] += max(_overlap(words, other, 1) for other in others)
        totals["ROUGE_2"] += max(_overlap(words, other, 2) for other in others)
        totals["ROUGE_L"] += max(_f1(_common(words, other), len(words), len(other)) for other in others)
    return {name: total / len(predictions) for name, total in totals.items()}


def _overlap(words: list[str], other: list[str], order: int) -> float:
    ours, theirs = (Counter(zip(*(text[n:] for n in range(order)), strict=False)) for text in (words, other))
    return _f1((ours & theirs).total(), ours.total(), theirs.total())


def _f1(shared: int, found: int, wanted: int) -> float:
    return 2 * shared / (found + wanted) if shared else 0.0


def _common(ours: list[str], theirs: list[str]) -> int:
    """Length of the longest common subsequence."""
    before = [0] * (len(theirs) + 1)
    for word in ours:
        row = [0]
        for n, other in enumerate(theirs):
            row.append(before[n] + 1 if word == other else max(before[n + 1], row[n]))
        before = row
    return before[-1]
