"""CIDEr as the COCO caption evaluation computes it, which is CIDEr-D (Vedantam et al. 2015, section 5 and appendix).

In: words of each prediction, words of its references. Out: the mean over predictions, on the scale of 0 to 10.
"""

from __future__ import annotations

import math
from collections import Counter

_ORDERS = 4
_SIGMA = 6.0
"""Of the Gaussian penalty on the difference in length, in bigrams as in the official code."""

Ngram = tuple[str, ...]
Weights = list[dict[Ngram, float]]


def cider(predictions: list[list[str]], references: list[list[list[str]]]) -> float:
    """Mean cosine of tf-idf n-grams, clipped at the reference's; idf from the references' groups."""
    seen: Counter[Ngram] = Counter()
    for group in references:
        seen.update({ngram for words in group for ngram in _counts(words)})
    most = math.log(len(references))

    def weights(words: list[str]) -> Weights:
        by_order: Weights = [{} for _ in range(_ORDERS)]
        for ngram, count in _counts(words).items():
            by_order[len(ngram) - 1][ngram] = count * (most - math.log(max(1, seen[ngram])))
        return by_order

    total = 0.0
    for words, group in zip(predictions, references, strict=True):
        ours = weights(words)
        total += sum(_alike(ours, weights(other), _bigrams(words) - _bigrams(other)) for other in group) / len(group)
    return 10 * total / len(predictions)


def _alike(ours: Weights, theirs: Weights, longer: int) -> float:
    cosines = []
    for mine, other in zip(ours, theirs, strict=True):
        norm = math.sqrt(sum(w * w for w in mine.values()) * sum(w * w for w in other.values()))
        dot = sum(min(weight, other[ngram]) * other[ngram] for ngram, weight in mine.items() if ngram in other)
        cosines.append(dot / norm if norm else 0.0)
    return sum(cosines) / _ORDERS * math.exp(-(longer**2) / (2 * _SIGMA**2))


def _counts(words: list[str]) -> Counter[Ngram]:
    return Counter(tuple(words[start : start + n]) for n in range(1, _ORDERS + 1) for start in range(len(words) - n + 1))


def _bigrams(words: list[str]) -> int:
    return max(0, len(words) - 1)
