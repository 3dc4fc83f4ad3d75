"""Metrics of your own texts: BLEU by sacrebleu's defaults, and the share of predictions that are exactly a reference.

In: predictions and any number of references of each. Out: BLEU from 0 to 100, exact match from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Sequence as Sized

import sacrebleu


def bleu(predictions: list[str], references: Sized[Sized[str]]) -> float:
    """Corpus BLEU; each prediction may have its own number of references."""
    most = max(map(len, references))
    streams = [[refs[n].strip() if n < len(refs) else None for refs in references] for n in range(most)]
    return float(sacrebleu.corpus_bleu(predictions, streams).score)


def exact_match(predictions: list[str], references: Sized[Sized[str]]) -> float:
    """Space around a text does not count."""
    same = (text.strip() in {other.strip() for other in group} for text, group in zip(predictions, references, strict=True))
    return sum(same) / len(predictions)
