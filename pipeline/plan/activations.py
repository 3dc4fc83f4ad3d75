"""Bytes of activations on one rank: what a micro-batch keeps for its backward pass, and what comes on top at the worst moment.

What modules keep is in their parts (pipeline/plan/parts.py); here are the branches of methods, the ends, and the worst moments, found by
walking a layer's parts forward and back.

N tokens of the micro-batch, P of them as attention sees them (padded), M with a label; D width, F ffn, H heads, V vocabulary, R rank;
e bytes of an element of the base.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.plan.shapes import Adapted, Kept, Shape

CHUNK_LOGITS = 1 << 25
"""Elements of the logits held at a time, as pipeline/model/head.py has it."""
_FP32 = 4


@dataclass(frozen=True)
class MicroBatch:
    tokens: int
    """With padding, where the base's attention cannot tell packed examples apart."""
    padded_tokens: int
    label_tokens: int
    examples: int
    longest: int
    pairs: int
    """Of padded tokens of one example each."""

    def bytes(self, kept: Kept, element_bytes: int, window: int | None) -> int:
        beyond = window is not None and self.longest > window
        square = self.pairs // self.examples
        count = {
            "token": self.tokens,
            "padded": self.padded_tokens,
            "pair": self.pairs,
            "square": square,
            "windowed": self.padded_tokens if beyond else 0,
            "windowed square": square if beyond else 0,
            "example": self.examples,
        }[kept.of]
        return round(count * (kept.elements * element_bytes + kept.fp32 * _FP32 + kept.bytes))


@dataclass(frozen=True)
class Term:
    what: str
    formula: str
    bytes: int


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
    """The most in the backward pass, all told: gradients of activations and, with checkpointing, what one layer recomputes."""
    terms: tuple[Term, ...]
    """What one layer keeps."""


def activations(
    shape: Shape, adapted: Adapted, batch: MicroBatch, element_bytes: int, checkpointing: bool, dropout: float, labels: bool = False
) -> Activations:
    """Args:
    dropout: the base's own.
    labels: a task's own head takes the place of the vocabulary projection.
    """
    e, hidden = element_bytes, batch.tokens * shape.width * element_bytes

    def total(kept: tuple[Kept, ...]) -> int:
        return sum(batch.bytes(each, e, shape.window) for each in kept)

    # Two masks of the base's dropout.
    drops = 2 * hidden if dropout else 0
    inputs = _branch_inputs(shape, adapted, batch.tokens, e)
    branches = _branches(shape, adapted, batch.tokens, e)
    layer = sum(total(part.keeps) for part in shape.layer) + sum(inputs.values()) + branches + drops
    # What stands before everything trained has no gradient in the first layer.
    first = layer - sum(total(part.keeps) for part in shape.layer if not adapted.precedes(part, shape))
    # Tokens, positions, keys and layout; what the layers share.
    common = 48 * batch.tokens + total(shape.shared)
    end = sum(total(part.keeps) for part in shape.end)
    # The label positions' gradient that the loss already knows (pipeline/model/head.py).
    known = 0 if labels else batch.label_tokens * shape.outer_width * e
    kept = (shape.layers - 1) * layer + first + common + end + known
    if checkpointing:
        # Each layer's input; where something is added to the embedding's output, that too, which was made a leaf.
        behind = sum(total(part.keeps) for part in shape.embeddings)
        leaf = batch.tokens * shape.outer_width * e if any(part.sizes for part in shape.embeddings if part != shape.table) else 0
        kept = shape.layers * hidden + leaf + behind + common + end + known
    worst = kept - known + max((total(part.backward) for part in shape.end), default=0)
    now = kept - known - end + hidden
    if checkpointing:
        now += layer - _shared(shape, hidden, e) + hidden
    for part in reversed(shape.layer):
        now -= inputs.get(part.name, 0)
        # The gradients of a branch's input, of its map's, and their sum.
        sums = 3 * batch.tokens * part.inputs * e if adapted.of(part) else 0
        worst = max(worst, now + max(total(part.backward), sums))
        now -= total(part.keeps)
    # The forward pass's last layer; where nothing is kept, any.
    inside, now = 0, -layer - end - known
    for part in shape.layer:
        now += total(part.keeps) + inputs.get(part.name, 0)
        if checkpointing:
            alone = total(part.alone) or max(total(part.forward), total(part.keeps))
            inside = max(inside, alone + 2 * hidden)
        else:
            inside = max(inside, now + total(part.forward) + hidden)
    return Activations(kept, 0 if labels else _logits(shape, batch, e), inside, worst, _terms(shape, inputs, branches, drops, total))


def _logits(shape: Shape, batch: MicroBatch, e: int) -> int:
    rows = min(batch.label_tokens, max(1, CHUNK_LOGITS // shape.vocabulary))
    # Two fp32 tensors of a run of rows; from the second run on, the run before is still there. And the last hidden states.
    logits = (8 if rows == batch.label_tokens else 12) * rows * shape.vocabulary
    return logits + (batch.label_tokens + batch.tokens) * shape.width * e


def _branches(shape: Shape, adapted: Adapted, n: int, e: int) -> int:
    """A's outputs, and in the base's dtype for each pass: B times its scale, and A where that is not fp32."""
    cast = adapted.layer_parameters(shape) if e != _FP32 else adapted.layer_outputs
    return sum(n * branch.rank * e for branch in adapted.branches) + cast * e


def _branch_inputs(shape: Shape, adapted: Adapted, n: int, e: int) -> dict[str, int]:
    """By part. A branch keeps its input for the gradient of A; those that read the same keep it once, unless each drops its own."""
    if adapted.dropout:
        return {part.name: 2 * n * part.inputs * e * len(adapted.of(part)) for part in shape.layer if adapted.of(part)}
    read = {(part.stage, part.lane): part for part in reversed(shape.layer) if adapted.of(part)}
    return {part.name: n * part.inputs * e for part in read.values() if not part.input_kept}


def _shared(shape: Shape, hidden: int, e: int) -> int:
    """Of what a layer keeps, its own input, which checkpointing has kept already."""
    reads = [part for part in shape.layer if part.stage == 0 and part.keeps]
    # Where norms stand behind, the gradient of the residual makes up for it.
    return hidden if reads and (reads[0].keeps[0].elements or e == _FP32) else 0


def _terms(shape: Shape, inputs: dict[str, int], branches: int, drops: int, total: Callable[[tuple[Kept, ...]], int]) -> tuple[Term, ...]:
    terms = [Term(kept.what, kept.formula, total((kept,))) for part in shape.layer for kept in part.keeps]
    terms += [
        Term("inputs of branches", "N K e (2 N K e each with dropout)", sum(inputs.values())),
        Term("branches", "N R e each, and A, B in the base's dtype", branches),
    ]
    if drops:
        terms.append(Term("the base's dropout", "2 N D e", drops))
    return tuple(term for term in terms if term.bytes)
