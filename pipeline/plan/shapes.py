"""The shape of a base: every parameter in the order in which a pass uses it, and what each module keeps. No torch, no transformers.

pipeline/plan/families.py makes one from a config.json. N tokens of a micro-batch, P of them as attention sees them (padded), S pairs of
tokens that attend to each other; e bytes of an element of the base.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Literal

Counted = Literal["token", "padded", "pair", "square", "windowed", "windowed square", "example"]
"""A token, one as attention sees it, a pair of such, a pair of one example, padded tokens and such pairs where an example is longer than
the window, an example."""


@dataclass(frozen=True)
class Kept:
    """Elements that a module holds, for each of what is counted."""

    what: str
    formula: str
    elements: float = 0
    """In the base's dtype."""
    fp32: float = 0
    bytes: float = 0
    """Of anything else."""
    of: Counted = "token"


@dataclass(frozen=True)
class Part:
    """A module, as ZeRO-3 meets it. Those without parameters count too: at each, it looks ahead."""

    name: str
    sizes: tuple[int, ...] = ()
    """Elements of each of its parameters."""
    inputs: int = 0
    outputs: int = 0
    """Of a linear map."""
    roles: tuple[str, ...] = ()
    """What equal runs of its output rows are called."""
    stage: int = 0
    """Parts of a layer that read the same input have the same number; a higher one reads what a lower one made."""
    lane: int = 0
    """Parts in different lanes stand beside one another; those of lane 0 are in line with all."""
    inside: int = 0
    """So many of the parts after it are inside it."""
    keeps: tuple[Kept, ...] = ()
    """From the forward to the backward pass."""
    forward: tuple[Kept, ...] = ()
    """For a moment of the forward pass, beside what it keeps."""
    alone: tuple[Kept, ...] = ()
    """The same, all told, where nothing is kept. Without it: the larger of what it keeps and what stands beside it."""
    backward: tuple[Kept, ...] = ()
    """For a moment of the backward pass, beside what it keeps."""
    input_kept: bool = False
    """By what made it."""
    trained: tuple[Kept, ...] = ()
    """Kept beside, of a norm whose weight is trained."""

    @property
    def has_bias(self) -> bool:
        """A linear map and a norm have their weight first, and then a bias or nothing."""
        return len(self.sizes) > 1

    def matrices(self) -> tuple[int, ...]:
        """Elements of its parameters that are no vectors."""
        is_norm = not self.inputs and (self.sizes[1:] == self.sizes[:1] or bool(self.keeps and not self.has_bias))
        return () if is_norm else self.sizes[:1]

    def reads(self, other: Part) -> bool:
        """What the other made, at one remove or more."""
        return other.stage < self.stage and (self.lane == other.lane or 0 in (self.lane, other.lane))


@dataclass(frozen=True)
class LabelHead:
    """A task's own head: a map to its outputs, and for some architectures one of the base's width before it."""

    dense: bool = False
    bias: bool = False
    width: int | None = None
    """Of the hidden states that it reads, where that is not the base's."""


@dataclass(frozen=True)
class Shape:
    family: str
    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    context: int
    embeddings: tuple[Part, ...]
    """The token embedding is the first of them with parameters."""
    layer: tuple[Part, ...]
    end: tuple[Part, ...]
    """Behind the last layer."""
    head: Part | None
    """The vocabulary projection. None: an encoder, which has none here."""
    tied: bool = False
    """The head is the token embedding."""
    softcapped: bool = False
    """Logits are bent to stay within a bound."""
    shared: tuple[Kept, ...] = ()
    """Kept once, for all layers."""
    packs: bool = True
    """Examples lie end to end; else they are padded to the longest."""
    label_head: LabelHead = LabelHead()
    window: int | None = None
    """Tokens that some layers look back over."""
    notes: tuple[str, ...] = ()
    """What of it is a guess, and what cannot be done with it."""
    guessed: bool = False
    """From the usual keys: the architecture is not known."""
    counted: int | None = None
    """Parameters, where that is known better than from its parts."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements of every parameter, a tied one once."""
        layer = tuple(chain.from_iterable(part.sizes for part in self.layer))
        outside = tuple(chain.from_iterable(part.sizes for part in (*self.embeddings, *self.end)))
        head = self.head.sizes if self.head and not self.tied else ()
        found = outside + layer * self.layers + head
        # What the parts do not account for lies in the layers too.
        rest = max(0, (self.counted or 0) - sum(found)) // self.layers
        return found + (rest,) * self.layers if rest else found

    @property
    def parameters(self) -> int:
        return self.counted or sum(self.sizes)

    @property
    def outer_width(self) -> int:
        """Of the token embedding and the head."""
        return self.label_head.width or self.width

    @property
    def table(self) -> Part:
        """The token embedding."""
        return next(part for part in self.embeddings if part.sizes)

    @property
    def matmul_parameters(self) -> int:
        """Elements that every token is multiplied with: those of the layers' linear maps."""
        return self.layers * sum(part.inputs * part.outputs for part in self.layer)

    @property
    def largest(self) -> int:
        """Elements of the largest parameter."""
        return max(self.sizes)

    @property
    def post_norm(self) -> str | None:
        """The norm of the sum of MLP and residual, of bases that norm there and not at a layer's beginning."""
        if any(part.stage == 0 and part.keeps for part in self.layer):
            return None
        return next((part.name for part in reversed(self.layer) if part.stage == 8 and part.keeps), None)

    @property
    def queries(self) -> str:
        """The part with the role q."""
        return next(part.name for part in self.layer if "q" in part.roles)

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(role for part in self.layer for role in part.roles))

    def head_parameters(self, outputs: int) -> int:
        """Trained elements of a task's own head."""
        width, bias = self.outer_width, int(self.label_head.bias)
        return (self.label_head.dense * width * (width + 1) + outputs * (width + bias)) if outputs else 0


def shard(sizes: tuple[int, ...], ranks: int) -> int:
    """Elements that a rank holds: of each parameter ceil(n / ranks), as ZeRO-3 pads it (pipeline/model/zero3.py)."""
    return sum(-(-size // ranks) for size in sizes)
