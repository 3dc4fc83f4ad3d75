"""Bytes of activations on one rank: what a micro-batch keeps for its backward pass, and what comes on top at the worst moment.

What modules keep is in their parts (pipeline/plan/parts.py); here is what hangs on them by the job's methods, the ends, and the worst
moments, found by walking the last layer's parts forward and back. A layer below everything trained keeps nothing.

N tokens of the micro-batch, P of them as attention sees them (padded), M with a label; D width, F ffn, H heads, V vocabulary, R rank;
e bytes of an element of the base.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.plan.adapted import Adapted, Everywhere
from pipeline.plan.shapes import Kept, Part, Shape

CHUNK_LOGITS = 1 << 25
"""Elements of the logits held at a time, as pipeline/model/head.py has it."""
_FP32 = 4
_Total = Callable[[tuple[Kept, ...]], int]


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
    """The most in the backward pass, all told: gradients of activations and of weights, and with checkpointing what a layer recomputes."""
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
) -> Activations:
    """Args:
    dropout: the base's own.
    labels: a task's own head takes the place of the vocabulary projection.
    sharers: ranks that share a matrix of the base. None: it is whole on each.
    """
    e, hidden = element_bytes, batch.tokens * shape.width * element_bytes

    def total(kept: tuple[Kept, ...]) -> int:
        return sum(batch.bytes(each, e, shape.window) for each in kept)

    kinds = Counter(adapted.layers)
    layers = {kind: _layer(shape, kind, batch, e, dropout, total, checkpointing) for kind in kinds}
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
        frozen = not (adapted.embeddings.weights or adapted.embeddings.special_tokens)
        leaf = batch.tokens * shape.outer_width * e if frozen and added else 0
        kept = shape.layers * hidden + hooked + leaf + behind + outside
    worst = kept - known + max((total(part.backward) for part in shape.end), default=0)
    if head:
        worst = max(worst, kept + _collected(head, _FP32, sharers))
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
    if adapted.embeddings.weights:
        most = max(size for part in shape.embeddings for size in part.matrices())
        worst = max(worst, common + behind + 2 * hidden + _collected(most, e, sharers) + most * e)
    # The forward pass's last layer; where nothing is kept, any.
    inside, now = 0, -top.kept - end - known
    for part in shape.layer:
        own = top.parts[part.name]
        now += own.kept + own.input
        if checkpointing:
            alone = total(part.alone) or max(total(part.forward), total(part.keeps))
            inside = max(inside, alone + 2 * hidden)
        else:
            inside = max(inside, now + total(part.forward) + hidden)
    return Activations(kept, 0 if labels else _logits(shape, batch, e, head), inside, worst, top.terms)


def _collected(size: int, e: int, sharers: int | None) -> int:
    """On top of a weight's gradient, while it is summed: an fp32 copy, a padded one, this rank's run (pipeline/methods/subset.py)."""
    copy = 0 if e == _FP32 else size * _FP32
    if sharers is None:
        return copy
    run = -(-size // sharers)
    return copy + (size * _FP32 if run * sharers > size else 0) + run * _FP32


def _logits(shape: Shape, batch: MicroBatch, e: int, head: int) -> int:
    rows = min(batch.label_tokens, max(1, CHUNK_LOGITS // shape.vocabulary))
    # Two fp32 tensors of a run of rows; from the second run on, the run before is still there. And the last hidden states.
    logits = (8 if rows == batch.label_tokens else 12) * rows * shape.vocabulary
    if head:
        # One of them, another in the base's dtype, and a run's share of the weight's gradient.
        logits = max(logits, (4 if e == _FP32 else 4 + e) * rows * shape.vocabulary + head * e)
    return logits + (batch.label_tokens + batch.tokens) * shape.width * e


@dataclass(frozen=True)
class _PartBytes:
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
        gradient = self.matrix * self.element_bytes + _collected(self.matrix, self.element_bytes, sharers)
        return max(self.sums, self.of_input + gradient)


@dataclass(frozen=True)
class _Layer:
    kept: int
    parts: dict[str, _PartBytes]
    behind_kept: int
    """By an adapter behind the whole layer."""
    behind: int
    """The same in the backward pass."""
    terms: tuple[Term, ...]


def _layer(
    shape: Shape, adapted: Adapted, batch: MicroBatch, e: int, dropout: float, total: _Total, checkpointing: bool
) -> _Layer:
    """What a layer keeps while it is computed with gradients."""
    n, hidden = batch.tokens, batch.tokens * shape.width * e
    reached = checkpointing or adapted.reached

    def live(part: Part) -> bool:
        """A gradient goes through it."""
        return reached or adapted.precedes(part, shape) or (not part.inputs and adapted.own(part))

    inputs = _inputs(shape, adapted, n, e)
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
        parts[part.name] = _PartBytes(total(keeps) + adapter, inputs.get(part.name, 0), sums, outputs, of_input, matrix, e)
        terms += [Term("adapter", "2 N D e, N R e", adapter)]
    branches = _branches(shape, adapted, n, e)
    # Two masks of the base's dropout.
    drops = 2 * hidden if dropout else 0
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
        parts[whole.name] = _PartBytes(0, 0, 0, 0, 0, 0, e)
    return _Layer(kept, parts, behind_kept, behind, tuple(term for term in terms if term.bytes))


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


def _inputs(shape: Shape, adapted: Adapted, n: int, e: int) -> dict[str, int]:
    """By part. A branch keeps its input for the gradient of A, a map for that of its matrix; those that read the same keep it once,
    unless a branch drops its own."""
    read = {
        (part.stage, part.lane): part
        for part in reversed(shape.layer)
        if adapted.matrix(part) or (adapted.of(part) and not adapted.dropout)
    }
    kept = {part.name: n * part.inputs * e for part in read.values() if not part.input_kept}
    if adapted.dropout:
        for part in shape.layer:
            if dropped := 2 * n * part.inputs * e * len(adapted.of(part)):
                kept[part.name] = kept.get(part.name, 0) + dropped
    return kept


def _shared(shape: Shape, hidden: int, e: int) -> int:
    """Of what a layer keeps, its own input, which checkpointing has kept already."""
    reads = [part for part in shape.layer if part.stage == 0 and part.keeps]
    # Where norms stand behind, the gradient of the residual makes up for it.
    return hidden if reads and (reads[0].keeps[0].elements or e == _FP32) else 0
