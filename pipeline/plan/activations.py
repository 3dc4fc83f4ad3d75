"""Bytes of activations on one rank: what a micro-batch keeps for its backward pass, and what comes on top at the worst moment.

What modules keep is in their parts (pipeline/plan/parts.py), what hangs on those of a layer by the job's methods in
pipeline/plan/layers.py; here are the ends, and the worst moments, found by walking the last layer's parts forward and back.

N tokens of the micro-batch, P of them as attention sees them (padded), M with a label; D width, F ffn, H heads, V vocabulary, R rank;
e bytes of an element of the base.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from pipeline.plan.adapted import Everywhere
from pipeline.plan.layers import MicroBatch, Term, collected, held_by
from pipeline.plan.shapes import Kept, Shape
from pipeline.plan.tables import Loss, chunk_logits

_FP32 = 4


@dataclass(frozen=True)
class Activations:
    """Bytes."""

    kept: int
    """Between the forward and the backward pass."""
    logits: int
    """The vocabulary projection and its loss, in the forward pass, when all of `kept` but its own is there."""
    forward: int
    """On top of `kept`, at the forward pass's worst moment outside the loss."""
    backward: int
    """The most in the backward pass, all told: gradients of activations and of weights, and with checkpointing what a layer recomputes."""
    below: int
    """In a layer below everything trained, which keeps nothing."""
    finish: int
    """Behind the layers' backward pass: the gradient of the largest embedding, where that is trained."""
    terms: tuple[Term, ...]
    """What the last layer keeps."""


def activations(
    shape: Shape,
    adapted: Everywhere,
    batch: MicroBatch,
    element_bytes: int,
    checkpointing: bool,
    dropout: float,
    labels: bool = False,
    sharers: int | None = None,
    loss: Loss | None = None,
    device: str = "cuda",
) -> Activations:
    """Args:
    dropout: the base's own.
    labels: a task's own head takes the place of the vocabulary projection.
    sharers: ranks that share a matrix of the base. None: it is whole on each.
    loss: where no rank has the head's table.
    device: computes.
    """
    e, hidden = element_bytes, batch.tokens * shape.width * element_bytes

    def total(kept: tuple[Kept, ...]) -> int:
        return sum(batch.bytes(each, e, shape.window) for each in kept)

    kinds = Counter(adapted.layers)
    layers = {kind: held_by(shape, kind, batch, e, dropout, total, checkpointing) for kind in kinds}
    top = layers[adapted.layers[-1]]
    # Tokens, positions, keys and layout; what the layers share.
    common = 48 * batch.tokens + total(shape.shared)
    # A head for labels reads some tokens only.
    read = batch.examples if labels else batch.tokens
    end = sum(total(part.keeps) + (total(part.trained) if adapted.end.own(part) else 0) for part in shape.end)
    end += sum(read * part.inputs * e for part in shape.end if adapted.end.matrix(part))
    # The label positions' gradient that the loss already knows, and that of a trained head (pipeline/model/head.py).
    known = 0 if labels else batch.label_tokens * shape.outer_width * e
    head = shape.head.sizes[0] if shape.head and adapted.end.weights and not labels else 0
    outside = common + end + known + head * _FP32
    # What stands behind the embedding: where it is trained itself, or reads what is.
    maps = sum(batch.tokens * part.inputs * e for part in shape.embeddings if adapted.embeddings.matrix(part))
    behind = sum(total(part.keeps) for part in shape.embeddings if checkpointing or part.sizes) + maps
    kept = sum(layers[kind].kept * count for kind, count in kinds.items()) + outside
    kept += behind if adapted.embeddings.any else 0
    if checkpointing:
        # Each layer's input, and what hooks on layers do, which stands outside of what is recomputed. The embedding's output was made a
        # leaf, so it is kept too where something is added to it.
        hooked = sum(layers[kind].behind_kept * count for kind, count in kinds.items())
        added = any(part.sizes for part in shape.embeddings if part != shape.table) or adapted.layers[0].special_tokens
        frozen = not (adapted.embeddings.weights or adapted.embeddings.replaces)
        leaf = batch.tokens * shape.outer_width * e if frozen and added else 0
        kept = shape.layers * hidden + hooked + leaf + behind + outside
    worst = kept - known + max((total(part.backward) for part in shape.end), default=0)
    if head:
        worst = max(worst, kept + collected(head, _FP32, sharers))
    now = kept - known - head * _FP32 - end + hidden
    worst = max(worst, now + top.behind)
    now -= top.behind_kept
    if checkpointing:
        now += top.kept - top.behind_kept - _shared(shape, hidden, e) + hidden
    for part in reversed(shape.layer):
        own = top.parts[part.name]
        worst = max(worst, now + own.in_computing())
        now -= own.input
        worst = max(worst, now + max(total(part.backward), own.moment(sharers)))
        now -= own.kept
    finish = 0
    if adapted.embeddings.weights:
        most = max(size for part in shape.embeddings for size in part.matrices())
        finish = common + behind + 2 * hidden + collected(most, e, sharers) + most * e
    # The forward pass's last layer; where nothing is kept, any.
    inside, now, alone = 0, -top.kept - end - known, 0
    for part in shape.layer:
        own = top.parts[part.name]
        now += own.kept + own.input
        inside = max(inside, now + total(part.forward) + hidden)
        alone = max(alone, (total(part.alone) or max(total(part.forward), total(part.keeps))) + 2 * hidden)
    inside = alone if checkpointing else inside
    return Activations(
        kept, 0 if labels else _logits(shape, batch, e, head, loss, device), inside, worst, common + alone, finish, top.terms
    )


def _logits(shape: Shape, batch: MicroBatch, e: int, head: int, loss: Loss | None, device: str) -> int:
    labels, columns = (loss.labels, loss.columns) if loss else (batch.label_tokens, shape.vocabulary)
    rows = min(labels, max(1, chunk_logits(device) // columns))
    # A run of rows in fp32, where they are bent twice; in half precision also as the product gives and takes them. A trained head has a
    # run's share of its gradient.
    logits = (_FP32 * (1 + shape.softcapped) + (e if e != _FP32 else 0)) * rows * columns + head * e
    # The last hidden states.
    return logits + (batch.label_tokens + batch.tokens) * shape.width * e + (loss.held * e if loss else 0)


def _shared(shape: Shape, hidden: int, e: int) -> int:
    """Of what a layer keeps, its own input, which checkpointing has kept already."""
    reads = [part for part in shape.layer if part.stage == 0 and part.keeps]
    # Where norms stand behind, the gradient of the residual makes up for it.
    return hidden if reads and (reads[0].keeps[0].elements or e == _FP32) else 0
