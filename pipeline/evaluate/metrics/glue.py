"""GLUE's metrics (Wang et al. 2019, table 1), and those of your own labels.

In: labels or scores, predicted and true. Out: floats; accuracy and F1 from 0 to 1, correlations from -1 to 1.
A correlation with a constant is not defined; it is 0, as Matthews' is in scikit-learn.
"""

from __future__ import annotations

import math
from collections import Counter


def accuracy(predictions: list[str], labels: list[str]) -> float:
    """Share of equal labels."""
    return sum(a == b for a, b in zip(predictions, labels, strict=True)) / len(labels)


def f1(predictions: list[str], labels: list[str], positive: str) -> float:
    """F1 of one label; 0 where it is neither predicted nor true."""
    both = sum(a == b == positive for a, b in zip(predictions, labels, strict=True))
    return 2 * both / (predictions.count(positive) + labels.count(positive)) if both else 0.0


def macro_f1(predictions: list[str], labels: list[str]) -> float:
    """Mean of the F1 of every label that is predicted or true."""
    seen = sorted({*predictions, *labels})
    return sum(f1(predictions, labels, label) for label in seen) / len(seen)


def rmse(predictions: list[float], scores: list[float]) -> float:
    """Root of the mean squared error."""
    return math.sqrt(math.fsum((a - b) ** 2 for a, b in zip(predictions, scores, strict=True)) / len(scores))


def matthews(predictions: list[str], labels: list[str]) -> float:
    """Matthews correlation, for any number of labels (Gorodkin 2004)."""
    found, wanted = Counter(predictions), Counter(labels)
    count, right = len(labels), sum(a == b for a, b in zip(predictions, labels, strict=True))
    together = right * count - sum(found[label] * wanted[label] for label in wanted)
    spread = (count**2 - sum(n**2 for n in found.values())) * (count**2 - sum(n**2 for n in wanted.values()))
    return together / math.sqrt(spread) if spread else 0.0


def pearson(predictions: list[float], scores: list[float]) -> float:
    """Correlation of the values."""
    ours, theirs = _centred(predictions), _centred(scores)
    spread = math.sqrt(math.fsum(x * x for x in ours)) * math.sqrt(math.fsum(y * y for y in theirs))
    together = math.fsum(x * y for x, y in zip(ours, theirs, strict=True))
    return max(-1.0, min(1.0, together / spread)) if spread else 0.0


def spearman(predictions: list[float], scores: list[float]) -> float:
    """Correlation of the ranks; equal values share the mean of theirs."""
    return pearson(_ranks(predictions), _ranks(scores))


def _centred(values: list[float]) -> list[float]:
    mean = math.fsum(values) / len(values)
    return [value - mean for value in values]


def _ranks(values: list[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for place in order[start:end]:
            ranks[place] = (start + end - 1) / 2
        start = end
    return ranks
