"""The texts of a split that is scored: what is asked and expected, or what is judged. Their tokens are in the token cache.

In: a source of examples. Out: the texts that are wanted, and the places of their sequences in the cache; the others are passed over.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.tasks.encode import Encoder
from pipeline.tasks.example import Chat, Document, Dropped, Labelled, Pair, Source


@dataclass(frozen=True)
class Texts:
    places: list[int] = field(default_factory=list)
    """Of the wanted among the examples that are not left out."""
    pairs: list[Pair] = field(default_factory=list)
    """What is asked and expected, where something is generated."""
    labelled: list[Labelled] = field(default_factory=list)
    """What is judged, where there are labels."""


def wanted_texts(source: Source, encoder: Encoder, most: int | None) -> Texts:
    """The first `most` prompts with all their references, or as many labelled texts; all, where it is None. Running text has none."""
    texts, prompts = Texts(), set[str]()
    for place, found in enumerate(example for example in source.read() if not isinstance(example, Dropped)):
        match found:
            case Document():
                break
            case Labelled():
                if most is not None and place >= most:
                    break
                texts.labelled.append(found)
                texts.places.append(place)
            case Pair() | Chat():
                (pair,) = encoder.asked([found])
                if pair.prompt in prompts or most is None or len(prompts) < most:
                    prompts.add(pair.prompt)
                    texts.pairs.append(pair)
                    texts.places.append(place)
    return texts
