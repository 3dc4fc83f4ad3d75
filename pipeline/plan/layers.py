"""Bytes that a layer keeps for its backward pass, part by part: what its modules keep, and what the job's methods hang on them.

N tokens of the micro-batch, D width, K inputs of a map, R rank; e bytes of an element of the base.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.plan.adapted import Adapted
from pipeline.plan.shapes import Kept, Part, Shape

_FP32 = 4
Total = Callable[[tuple[Kept, ...]], int]
"""Bytes of a micro-batch."""


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
class PartBytes:
    """What one part of a layer keeps, and needs in the backward pass."""

    kept: int
    input: int
    """Kept for gradients of what is trained on it."""
    sums: int
    """In the backward pass of a branch or an adapter."""
    outputs: int
    """Gradients of what it and those beside it put out."""
    of_input: int
    """That of its input."""
    matrix: int
    """Elements, where its matrix is trained."""
    element_bytes: int

    def in_computing(self) -> int:
        """While the gradient of the matrix is computed."""
        return self.outputs + self.of_input + self.matrix * self.element_bytes if self.matrix else 0

    def moment(self, sharers: int | None) -> int:
        if not self.matrix:
            return self.sums
        gradient = self.matrix * self.element_bytes + collected(self.matrix, self.element_bytes, sharers)
        return max(self.sums, self.of_input + gradient)


@dataclass(frozen=True)
class Layer:
    kept: int
    parts: dict[str, PartBytes]
    behind_kept: int
    """By an adapter behind the whole layer."""
    behind: int
    """The same in the backward pass."""
    terms: tuple[Term, ...]


def held_by(shape: Shape, adapted: Adapted, batch: MicroBatch, e: int, dropout: float, total: Total, checkpointing: bool) -> Layer:
    """What a layer keeps while it is computed with gradients: nothing, below everything that is trained."""
    n, hidden = batch.tokens, batch.tokens * shape.width * e
    reached = checkpointing or adapted.reached

    def live(part: Part) -> bool:
        """A gradient goes through it."""
        return reached or adapted.precedes(part, shape) or (not part.inputs and adapted.own(part))

    inputs = _inputs(shape, adapted, n, e, live)
    parts, terms = {}, []
    for part in shape.layer:
        keeps = part.keeps if live(part) else ()
        if adapted.own(part) and not part.inputs:
            keeps = (*keeps, *part.trained)
        terms += [Term(kept.what, kept.formula, total((kept,))) for kept in keeps]
        adapter = sum(_bottleneck(each.rank, each.inner, each.norm, shape.width, n, e) for each in adapted.behind(part))
        if any(each.again for each in adapted.behind(part)):
            adapter += total(part.keeps)
        beside = sum(other.outputs for other in shape.layer if (other.stage, other.lane) == (part.stage, part.lane))
        # What a layer's last maps put out has the gradient of the residual.
        outputs = 0 if part.outputs == shape.width and part.stage > 2 else n * beside * e
        of_input = n * part.inputs * e if live(part) else 0
        # The gradients of a branch's input, of its map's, and their sum.
        sums = 3 * n * part.inputs * e if adapted.of(part) else 3 * hidden if adapted.behind(part) else 0
        matrix = part.sizes[0] if adapted.matrix(part) else 0
        parts[part.name] = PartBytes(total(keeps) + adapter, inputs.get(part.name, 0), sums, outputs, of_input, matrix, e)
        terms += [Term("adapter", "2 N D e, N R e", adapter)]
    branches = _branches(shape, adapted, n, e)
    # Two masks of the base's dropout.
    drops = 2 * hidden if dropout and (reached or adapted.any) else 0
    # Indices of the places of special tokens, and what stands there.
    special = batch.examples * adapted.special_tokens * (24 + 2 * shape.width * e)
    terms += [
        Term("inputs of branches and of trained maps", "N K e each (of branches 2 N K e with dropout)", sum(inputs.values())),
        Term("branches", "N R e each, and A, B in the base's dtype", branches),
        Term("special tokens", "2 D e each", special),
        Term("the base's dropout", "2 N D e", drops),
    ]
    kept = sum(part.kept + part.input for part in parts.values()) + branches + drops + special
    whole = next((part for part in shape.layer if adapted.behind(part) and not part.sizes and part.stage == 9), None)
    behind_kept, behind = (parts[whole.name].kept, 3 * hidden) if whole else (0, 0)
    if whole:
        # It comes first in the backward pass.
        parts[whole.name] = PartBytes(0, 0, 0, 0, 0, 0, e)
    return Layer(kept, parts, behind_kept, behind, tuple(term for term in terms if term.bytes))


def _bottleneck(rank: int, inner: int, norm: bool, width: int, n: int, e: int) -> int:
    """An adapter's input, its norm's, what its nonlinearity keeps, and its maps in the base's dtype."""
    kept = n * width * e + inner * n * rank * e
    if norm:
        kept += n * width * e + 8 * n
    return kept + (0 if e == _FP32 else (2 * width * rank + rank + width) * e)


def _branches(shape: Shape, adapted: Adapted, n: int, e: int) -> int:
    """A's outputs, and in the base's dtype for each pass: B times its scale, and A where that is not fp32."""
    cast = sum(branch.rank * (part.inputs + branch.rows) for part in shape.layer for branch in adapted.of(part))
    cast = cast if e != _FP32 else adapted.layer_outputs
    return sum(n * branch.rank * e for branch in adapted.branches) + cast * e


def _inputs(shape: Shape, adapted: Adapted, n: int, e: int, live: Callable[[Part], bool]) -> dict[str, int]:
    """By part. A branch keeps its input for the gradient of A, a map for that of its matrix; those that read the same keep it once,
    unless a branch drops its own: then a mask stands beside it, where a gradient goes through."""
    read = {
        (part.stage, part.lane): part
        for part in reversed(shape.layer)
        if adapted.matrix(part) or (adapted.of(part) and not adapted.dropout)
    }
    kept = {part.name: n * part.inputs * e for part in read.values() if not part.input_kept}
    if adapted.dropout:
        for part in shape.layer:
            if dropped := (1 + live(part)) * n * part.inputs * e * len(adapted.of(part)):
                kept[part.name] = kept.get(part.name, 0) + dropped
    return kept


def collected(size: int, e: int, sharers: int | None) -> int:
    """On top of a weight's gradient, while it is summed: an fp32 copy, a padded one, this rank's run (pipeline/methods/subset.py)."""
    copy = 0 if e == _FP32 else size * _FP32
    if sharers is None:
        return copy
    run = -(-size // sharers)
    return copy + (size * _FP32 if run * sharers > size else 0) + run * _FP32
