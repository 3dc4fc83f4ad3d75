"""What a job's methods train, as the modules of a base meet it: where gradients begin, and what hangs on which module. No torch.

In: a `Shape` and the methods. Out: for each layer, and for what stands before and behind them, an `Adapted`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.job.errors import JobError
from pipeline.job.method import Adapter, BitFit, Full, FullTop, Lora, Method, PrefixEmbed, PrefixLayer
from pipeline.plan.shapes import Part, Shape

_WHOLE = ""
"""The part that is the layer itself."""


@dataclass(frozen=True)
class Branch:
    """B A beside some rows of one part: A [R, K], B [P, R]."""

    part: str
    rank: int
    rows: int


@dataclass(frozen=True)
class Bottleneck:
    """An adapter behind a part: down [R, D], up [D, R] and their biases."""

    part: str
    rank: int
    norm: bool
    """Of its own, on its input."""
    inner: int
    """Tensors of width R that its nonlinearity keeps."""
    again: bool
    """The part is a norm that is computed a second time, behind it."""

    def parameters(self, width: int) -> int:
        return 2 * width * self.rank + self.rank + width + (2 * width if self.norm else 0)


@dataclass(frozen=True)
class Adapted:
    """What is trained of a layer, or of what stands before or behind the layers."""

    branches: tuple[Branch, ...] = ()
    dropout: float = 0.0
    bottlenecks: tuple[Bottleneck, ...] = ()
    special_tokens: int = 0
    """Of an example, whose hidden states are replaced by trained ones where it begins."""
    weights: bool = False
    """All parameters of the base."""
    biases: bool = False
    norms: bool = False
    added_tokens: int = 0
    """That the base did not know, with rows of their own."""
    reached: bool = False
    """Something trained comes before it."""

    def of(self, part: Part) -> tuple[Branch, ...]:
        return tuple(branch for branch in self.branches if branch.part == part.name)

    def behind(self, part: Part) -> tuple[Bottleneck, ...]:
        return tuple(each for each in self.bottlenecks if each.part == part.name)

    def own(self, part: Part) -> bool:
        """Parameters of the base are trained in it."""
        if not part.sizes:
            return False
        return self.weights or (self.biases and part.has_bias) or (self.norms and not part.inputs)

    def matrix(self, part: Part) -> bool:
        """Its matrix is trained, and so its input is kept."""
        return self.weights and bool(part.sizes) and part.inputs > 0

    @property
    def replaces(self) -> bool:
        """Hidden states at the places of some tokens."""
        return bool(self.special_tokens or self.added_tokens)

    @property
    def any(self) -> bool:
        return bool(self.branches or self.bottlenecks or self.replaces or self.weights or self.biases or self.norms)

    def precedes(self, part: Part, shape: Shape) -> bool:
        """Something trained comes before a part of this layer."""
        if self.reached or self.special_tokens:
            return True
        return any(part.reads(other) for other in shape.layer if self.of(other) or self.own(other) or self.behind(other))

    def layer_parameters(self, shape: Shape) -> int:
        """Elements that methods add to a layer's maps."""
        branches = sum(branch.rank * (part.inputs + branch.rows) for part in shape.layer for branch in self.of(part))
        return branches + sum(each.parameters(shape.width) for each in self.bottlenecks)

    @property
    def layer_outputs(self) -> int:
        """Elements of a layer's Bs."""
        return sum(branch.rank * branch.rows for branch in self.branches)


@dataclass(frozen=True)
class Everywhere:
    """What is trained, from the embeddings to the head."""

    embeddings: Adapted
    layers: tuple[Adapted, ...]
    end: Adapted
    """Behind the layers, the head included."""


def adapt(shape: Shape, *methods: Method, added_tokens: int = 0) -> Everywhere:
    """Args:
        added_tokens: that the base did not know.

    Raises:
        JobError: a LoRA target that the base does not have.
    """
    layers, outside = [Adapted()] * shape.layers, Adapted(added_tokens=added_tokens)
    for place, method in enumerate(methods):
        match method:
            case Lora():
                branches = _branches(shape, method, place)
                layers = [replace(layer, branches=branches, dropout=method.dropout) for layer in layers]
            case Full():
                layers, outside = [replace(layer, weights=True) for layer in layers], replace(outside, weights=True)
            case FullTop(layers=count):
                layers[-count:] = [replace(layer, weights=True) for layer in layers[-count:]]
            case BitFit():
                layers, outside = [replace(layer, biases=True) for layer in layers], replace(outside, biases=True)
            case PrefixEmbed():
                outside = replace(outside, special_tokens=method.prefix_tokens + method.infix_tokens)
            case PrefixLayer():
                layers = [replace(layer, special_tokens=method.prefix_tokens + method.infix_tokens) for layer in layers]
            case Adapter():
                first, found = method.first_layer or 0, _bottlenecks(shape, method)
                norms = method.layernorm and method.placement != "lin"
                layers[first:] = [replace(layer, bottlenecks=found, norms=norms) for layer in layers[first:]]
    embeddings = replace(outside, biases=outside.biases and any(part.has_bias for part in shape.embeddings))
    reached = embeddings.any
    for number, layer in enumerate(layers):
        layers[number] = replace(layer, reached=reached)
        reached = reached or layer.any
    return Everywhere(embeddings, tuple(layers), replace(outside, special_tokens=0, reached=reached))


def _branches(shape: Shape, method: Lora, place: int) -> tuple[Branch, ...]:
    """On each layer. Targets are roles, or module names as pipeline/methods/lora.py takes them."""
    branches: list[Branch] = []
    for target in method.targets:
        found = [
            Branch(part.name, method.rank_of(target), part.outputs // (len(part.roles) if target in part.roles else 1))
            for part in shape.layer
            if part.outputs and (target in part.roles or f".{part.name}".endswith(f".{target}"))
        ]
        if not found and shape.guessed:
            # A map as wide as q.
            found = [Branch(shape.queries, method.rank_of(target), shape.width)]
        if not found:
            raise JobError(f'methods[{place}].targets: "{target}" is not a target of this base. It has {", ".join(shape.roles)}.')
        branches += found
    return tuple(branches)


def _bottlenecks(shape: Shape, method: Adapter) -> tuple[Bottleneck, ...]:
    """On each layer that has them, as pipeline/methods/adapter.py places them."""
    norm = method.placement == "lin" and method.layernorm
    # Their result is what the map up keeps too; others keep what they read beside it.
    inner = 1 if method.nonlinearity in ("relu", "tanh") else 2
    if method.placement == "houlsby":
        ends = [part.name for role in ("o", "mlp_out") for part in shape.layer if role in part.roles]
        return tuple(Bottleneck(name, method.rank, norm, inner, False) for name in ends)
    post_norm = shape.post_norm if method.placement != "lin" else None
    return (Bottleneck(post_norm or _WHOLE, method.rank, norm, inner, post_norm is not None),)
