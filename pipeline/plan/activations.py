"""Bytes of activations on one rank: what a micro-batch keeps for its backward pass, and what comes on top at the worst moment.

Each line says which tensor it is and which code keeps it. Frozen linear maps keep nothing (pipeline/model/linear.py), so only norms,
attention, the activation function and the branches of methods do.

N tokens of the micro-batch, P of them as attention sees them (padded), M with a label; D width, F ffn, H heads, V vocabulary, R rank;
e bytes of an element of the base.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.plan.shapes import Adapted, Part, Shape

CHUNK_LOGITS = 1 << 25
"""Elements of the logits held at a time, as pipeline/model/head.py has it."""
_FP32 = 4


@dataclass(frozen=True)
class MicroBatch:
    tokens: int
    padded_tokens: int
    label_tokens: int


@dataclass(frozen=True)
class Term:
    what: str
    formula: str
    bytes: int
    stage: int = 9
    """Of the part that keeps it (`Part.stage`); branches keep theirs always."""


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


def activations(shape: Shape, adapted: Adapted, batch: MicroBatch, element_bytes: int, checkpointing: bool, dropout: float) -> Activations:
    """Args:
    dropout: the base's own.
    """
    n, d, e = batch.tokens, shape.width, element_bytes
    terms = _layer(shape, adapted, batch, e, dropout)
    layer = sum(term.bytes for term in terms)
    norm = _norm(shape, n, e)
    hidden = n * d * e
    # The label positions' gradient that the loss already knows (pipeline/model/head.py), tokens, positions, keys and layout.
    ends = norm + batch.label_tokens * d * e + 48 * n
    ends += 2 * n * shape.head_width * e if shape.norm == "rms" else 0  # cos and sin, shared by the layers
    # What stands before everything trained has no gradient in the first layer.
    first = min(part.stage for part in shape.layer if adapted.of(part))
    kept = shape.layers * layer + ends - sum(term.bytes for term in terms if term.stage < first)
    # Backward at its worst, if the last layer's activation function is: the gradient of its output and of both factors of its product.
    peak = 3 * n * shape.ffn * e
    worst = kept - norm - batch.label_tokens * d * e + peak + hidden
    if shape.norm == "rms":
        # Or the last norm: five fp32 tensors as large as the hidden states, while everything is still kept.
        worst = max(worst, kept - batch.label_tokens * d * e + 5 * n * d * _FP32)
    if checkpointing:
        # Each layer's input; where learnt positions are added, the embedding's output too, which was made a leaf.
        kept = shape.layers * hidden + ends + (hidden if shape.learns_positions else 0)
        shared = hidden if norm == hidden + _statistics(shape, n) else 0  # the norm keeps the layer's input itself
        worst = kept - norm - batch.label_tokens * d * e + layer - shared + peak + 2 * hidden
    rows = min(batch.label_tokens, max(1, CHUNK_LOGITS // shape.vocabulary))
    # Two fp32 tensors of a run of rows; from the second run on, the run before is still there. And the last hidden states.
    logits = (8 if rows == batch.label_tokens else 12) * rows * shape.vocabulary + batch.label_tokens * d * e + hidden
    # With nothing kept inside a layer, the activation function's factors and what stands around it.
    factors = 4 if shape.activation == "new_gelu" else 3
    inside = factors * n * shape.ffn * e + 2 * hidden if checkpointing else 2 * n * shape.ffn * e
    return Activations(kept, logits, inside, worst, terms)


def _layer(shape: Shape, adapted: Adapted, batch: MicroBatch, e: int, dropout: float) -> tuple[Term, ...]:
    n, p, d, f = batch.tokens, batch.padded_tokens, shape.width, shape.ffn
    wide, narrow = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    norm, formula = _norm(shape, n, e), "N D e" if shape.norm == "layer" else "N D 4, in fp32"
    branches = sum(n * branch.rank * e for branch in adapted.branches)
    # In the base's dtype for each pass: B times its scale, and A where that is not fp32.
    cast = adapted.layer_parameters(shape) if e != _FP32 else adapted.layer_outputs
    # Of GPT-2's 0.5 x (1 + tanh(...)): x, tanh, 0.5 x and 1 + tanh (NewGELUActivation). Of silu(x) y: x, silu(x) and y.
    factors = 4 if shape.activation == "new_gelu" else 3
    terms = [
        Term("first norm", formula, norm, 0),
        Term("queries, keys, values", "P (H + 2 Hkv) Dh e", p * (wide + 2 * narrow) * e, 1),
        Term("attention's output", "P H Dh e + 4 P H", p * wide * e + _FP32 * p * shape.heads, 1),
        Term("second norm", formula, norm, 3),
        Term("activation function", f"{factors} N F e", factors * n * f * e, 4),
        Term("inputs of branches", "N K e (2 N K e each with dropout)", _branch_inputs(shape, adapted, n, e)),
        Term("branches", "N R e each, and A, B in the base's dtype", branches + cast * e),
    ]
    return (*terms, Term("the base's dropout", "2 N D e", 2 * n * d * e)) if dropout else tuple(terms)


def _branch_inputs(shape: Shape, adapted: Adapted, n: int, e: int) -> int:
    """A branch keeps its input for the gradient of A; branches that read the same keep it once, unless each drops its own."""
    if adapted.dropout:
        return sum(2 * n * part.inputs * e for part in shape.layer for _ in adapted.of(part))
    read: dict[int, Part] = {part.stage: part for part in shape.layer if adapted.of(part)}
    return sum(n * part.inputs * e for part in read.values())


def _norm(shape: Shape, n: int, e: int) -> int:
    """What one norm keeps: its input (Llama's makes an fp32 copy of it) and its statistics."""
    return n * shape.width * (_FP32 if shape.norm == "rms" else e) + _statistics(shape, n)


def _statistics(shape: Shape, n: int) -> int:
    return n * _FP32 * (2 if shape.norm == "layer" else 1)
