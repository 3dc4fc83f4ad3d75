"""Words as the COCO caption evaluation counts them: Penn Treebank tokens, lower-cased, without punctuation.

In: a line of text. Out: its words. The rules are the conventions of the treebank and those of Stanford's PTBTokenizer 3.4.1 that
restaurant descriptions meet: the official script runs that program, which needs Java.
"""

from __future__ import annotations

import re

_DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_RENAMED = {
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
    "£": "#",
    "€": "$",
    "¢": "cents",
    "–": "--",
    "—": "--",
    "…": "...",
    "“": "``",
    "”": "''",
    "‘": "`",
    '"': "''",
}
_ONE_AS_TWO = re.compile(r"\b(can)(not)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b|\b(gim|lem)(me)\b", re.IGNORECASE)
_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))(?![\w'])", re.IGNORECASE)
_TOKEN = re.compile(
    r"""
      https?://\S+ | \S+@\w[\w.]*\w
    | (?<!\S)\d{1,2}/\d{1,2}(?![\w/])                     # a fraction
    | [-+]?\d+(?:[.,:]\d+)*(?:-\d+)*(?![\w-]) | \.\d+     # a number or a range of them
    | (?:[A-Za-z]\.)+(?=[\s,]|$)                          # U.S., e.g.
    | (?i:mr|mrs|ms|dr|prof|jr|sr|vs|etc|st|ave|rd|blvd)\.(?=[\s,]|$)
    | \w+\.(?=,)                                          # a full stop before a comma makes an abbreviation
    | [A-Z]+(?:&[A-Z]+)+
    | n't\b | '(?:s|m|d|re|ve|ll)\b | (?i:[dol]'[a-z]\w+)
    | \w+(?:-\w+)*
    | \.{2,} | -{2,} | \S
    """,
    re.VERBOSE,
)


def words(text: str) -> list[str]:
    """`The Eagle isn't cheap (£20-25).` -> `the eagle is n't cheap -lrb- # 20-25 -rrb-`."""
    text = _CLITIC.sub(r" \1", text.replace("’", "'"))
    text = _ONE_AS_TWO.sub(lambda match: " ".join(filter(None, match.groups())), text)
    tokens = (_RENAMED.get(token, token).lower() for token in _TOKEN.findall(text))
    return [token for token in tokens if token not in _DROPPED and not re.fullmatch(r"\.{2,}|-{2,}", token)]
