"""Corpus BLEU, and NIST (Doddington 2002), on the tokens of NIST's mteval-v13a.

In: predictions as plain text, and the references of each. Out: floats.
BLEU is sacrebleu's; NIST is written from the definition, since no kept library gives the official script's number.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Literal

import sacrebleu
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

_ORDERS = 5
# A text of 2/3 of the references' length loses half of its score.
_BETA = math.log(0.5) / math.log(2 / 3) ** 2

Ngram = tuple[str, ...]


def bleu(predictions: list[str], references: list[list[str]], tokens: Literal["13a", "none"], lowercase: bool, smooth: bool) -> float:
    """Corpus BLEU from 0 to 100, brevity by the closest reference.

    Args:
        tokens: mteval-v13a's, or the blanks of the text, as in multi-bleu.perl.
        smooth: an order without any match counts 1/2, 1/4, ..., as in mteval-v13a; otherwise it makes the score 0.
    """
    most = max(map(len, references))
    streams = [[group[n] if n < len(group) else None for group in references] for n in range(most)]
    method = "exp" if smooth else "none"
    score = sacrebleu.corpus_bleu(predictions, streams, method, tokenize=tokens, lowercase=lowercase, force=True)
    return float(score.score)


def nist(predictions: list[str], references: list[list[str]], script: Literal["mteval", "pymteval"]) -> float:
    """Corpus NIST of order 5.

    Both scripts weigh an n-gram by its information over all references and punish brevity. They differ in the length that a text
    should have: pymteval takes the mean of each group of references; mteval, as E2E's script carries it, all words of all references
    over the mean number of references. So they differ on short texts where the groups differ in size.
    """
    tokenise = Tokenizer13a()
    found = [tokenise(text).lower().split() for text in predictions]
    wanted = [[tokenise(text).lower().split() for text in group] for group in references]
    counts: Counter[Ngram] = Counter()
    for group in wanted:
        for words in group:
            counts.update(_ngrams(words))
            counts[()] += len(words)
    gained, totals = [0.0] * _ORDERS, [0] * _ORDERS
    for words, group in zip(found, wanted, strict=True):
        best: Counter[Ngram] = Counter()
        for reference in group:
            best |= _ngrams(reference)
        for ngram, count in (_ngrams(words) & best).items():
            gained[len(ngram) - 1] += count * math.log2(counts[ngram[:-1]] / counts[ngram])
        for n in range(_ORDERS):
            # pymteval lets a text shorter than n words count negatively.
            totals[n] += len(words) - n if script == "pymteval" else max(0, len(words) - n)
    match script:
        case "mteval":
            length = sum(len(words) for group in wanted for words in group) * len(wanted) / sum(map(len, wanted))
        case "pymteval":
            length = sum(sum(map(len, group)) / len(group) for group in wanted)
    ratio = sum(map(len, found)) / length if length else 1.0
    if ratio == 0:
        return 0.0
    penalty = math.exp(_BETA * math.log(min(1.0, ratio)) ** 2)
    return penalty * sum(gain / max(1, total) for gain, total in zip(gained, totals, strict=True))


def _ngrams(words: list[str]) -> Counter[Ngram]:
    return Counter(tuple(words[start : start + n]) for n in range(1, _ORDERS + 1) for start in range(len(words) - n + 1))
