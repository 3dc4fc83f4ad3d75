"""The order in which a micro-batch's forward and backward passes use the base's modules, and the sizes of their parameters.

It is the order of DeepSpeed's hooks (deepspeed 0.19.8) on the modules that pipeline/model builds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.plan.adapted import Adapted, Everywhere
from pipeline.plan.prefetch import Prefetch
from pipeline.plan.shapes import Part, Shape
from pipeline.plan.tables import tables_of

Pass = Literal["forward", "recompute", "backward", "release"]


@dataclass(frozen=True)
class Visit:
    parameters: tuple[int, ...]
    passes: Pass
    layer: int
    leaves: bool = True
    """Backward: a post-backward hook fires, because the module's input has a gradient."""
    keeps: bool = True
    """Forward: something may be kept for a backward pass."""


def trace(
    shape: Shape, adapted: Everywhere, prefetch: Prefetch, checkpointing: bool, labels: bool
) -> tuple[tuple[int, ...], list[Visit], frozenset[int], frozenset[int]]:
    """Sizes of what is gathered; the visits of modules, in the order of a micro-batch; the matrices that a step changes; the vectors."""
    sizes: list[int] = []
    stale: set[int] = set()
    vectors: set[int] = set()
    apart = tables_of(shape, adapted, prefetch.persistence)

    def take(part: Part, trained: Adapted) -> tuple[int, ...]:
        first = len(sizes)
        sizes.extend(part.sizes)
        if trained.weights and part.matrices():
            stale.add(first)
        vectors.update(range(first + len(part.matrices()), len(sizes)))
        return tuple(range(first, len(sizes)))

    table = shape.embeddings.index(shape.table)
    embeddings = [() if apart.embedding and n == table else take(part, adapted.embeddings) for n, part in enumerate(shape.embeddings)]
    layers = [[take(part, trained) for part in shape.layer] for trained in adapted.layers]
    end = [take(part, adapted.end) for part in shape.end]
    head = embeddings[table] if shape.tied else take(shape.head, adapted.end) if shape.head and not apart.head else ()
    # The root and the body have no parameters of their own.
    visits = [Visit((), "forward", -1)] * 2
    visits += [Visit(each, "forward", -1) for n, each in enumerate(embeddings) if not (apart.embedding and n == table)]
    for number, layer in enumerate(layers):
        keeps = checkpointing or adapted.layers[number].reached or adapted.layers[number].any
        visits += [Visit(each, "forward", number, keeps=keeps) for each in layer]
    visits += [Visit(each, "forward", -1) for each in end]
    if not labels and not apart.head:
        # The head stands outside the graph (pipeline/model/head.py), so it is visited once.
        visits.append(Visit(head, "forward", -1))
    visits += [Visit((), "backward", -1)] * 2 + [Visit(each, "backward", -1) for each in reversed(end)]
    for number in reversed(range(shape.layers)):
        pairs = list(zip(shape.layer, layers[number], strict=True))
        if checkpointing:
            # The layer itself is not recomputed: its backward hook stands outside.
            visits.append(Visit((), "backward", number))
            visits += [Visit(each, "recompute", number) for _, each in pairs[1:]]
            pairs = pairs[1:]
        trained = adapted.layers[number]
        for part, each in _backward(pairs):
            # Nothing before the first of what is trained has a gradient, unless checkpointing gives the embeddings one.
            inner = checkpointing or trained.precedes(part, shape)
            if inner or trained.of(part) or trained.own(part) or trained.behind(part):
                visits.append(Visit(each, "backward", number, inner))
        if checkpointing:
            # What was recomputed belongs to the layer and leaves with it.
            visits.append(Visit(tuple(p for each in layers[number] for p in each), "release", number))
    outside = adapted.embeddings
    pairs = list(zip(shape.embeddings, embeddings, strict=True))
    if checkpointing or outside.any:
        # What stands between the token embedding and the layers has a gradient too.
        for part, each in reversed(pairs[table + 1 :]):
            if part.inputs or part.keeps or outside.own(part):
                behind = checkpointing or bool(outside.weights or outside.replaces)
                visits.append(Visit(each, "backward", -1, leaves=behind and (part.inputs > 0 or bool(part.keeps))))
        # Where its output has a gradient, a hook gathers it for a backward pass that does not need it; frozen, checkpointing makes it a
        # leaf that has one (pipeline/model/build.py).
        if not apart.embedding and (checkpointing or outside.weights or outside.replaces):
            visits.append(Visit(embeddings[table], "backward", -1, leaves=False))
    return tuple(sizes), visits, frozenset(stale), frozenset(vectors)


def _backward(pairs: list[tuple[Part, tuple[int, ...]]]) -> list[tuple[Part, tuple[int, ...]]]:
    """The order in which backward hooks fire: last first, but a module before what is inside it."""
    blocks = []
    while pairs:
        (whole, _), count = pairs[0], 1 + pairs[0][0].inside
        blocks.append([pairs[0], *_backward(pairs[1:count])] if whole.inside else [pairs[0]])
        pairs = pairs[count:]
    return [pair for block in reversed(blocks) for pair in block]


def left(visits: list[Visit]) -> set[int]:
    """What the recorded pass leaves gathered if it is small: all else that it has used it releases, small or not."""
    left: set[int] = set()
    for visit in visits:
        if visit.passes == "release" or not visit.leaves:
            left.update(visit.parameters)
        else:
            left.difference_update(visit.parameters)
    return left
