"""How many parameters methods train on a base, from its shape alone: the counts of the LoRA paper's tables. No torch.

In: a `Shape` and the methods of a job. Out: integers, which what pipeline/methods attaches has too. A task's head for labels is
counted apart (`Shape.head_parameters`). docs/methods.md has the formulas: L layers, D width, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.job.errors import JobError
from pipeline.job.method import Adapter, BitFit, FullTop, Method
from pipeline.plan.adapted import Adapted, adapt
from pipeline.plan.shapes import Part, Shape


@dataclass(frozen=True)
class Trained:
    """Elements."""

    whole: int
    """Whole on every rank: what methods add, and vectors of the base."""
    matrices: tuple[int, ...] = ()
    """Of the base, each sharded where the base is."""

    @property
    def parameters(self) -> int:
        return self.whole + sum(self.matrices)

    def on_rank(self, sharers: int) -> int:
        """Elements that a rank holds, where so many share a matrix: of each ceil(n / sharers)."""
        return self.whole + sum(-(-size // sharers) for size in self.matrices)


def counted(shape: Shape, *methods: Method, added_tokens: int = 0) -> Trained:
    """What these methods train together: what they add, and the base's own parameters, each once.

    Args:
        added_tokens: that the base did not know, with embeddings and rows of the vocabulary projection of their own.

    Raises:
        JobError: a target, a layer or biases that the base does not have; in the words of pipeline/methods.
    """
    for place, method in enumerate(methods):
        _refuse(shape, method, f"methods[{place}]")
    found = adapt(shape, *methods, added_tokens=added_tokens)
    # OPT 350m's embeddings are narrower than its layers.
    row = shape.table.sizes[0] // shape.vocabulary
    added = row * (found.embeddings.special_tokens + added_tokens * (2 if shape.head and not shape.tied else 1))
    added += sum(layer.layer_parameters(shape) + layer.special_tokens * shape.width for layer in found.layers)
    places = [(part, found.embeddings) for part in shape.embeddings] + [(part, found.end) for part in shape.end]
    places += [(part, layer) for layer in found.layers for part in shape.layer]
    if shape.head and not shape.tied:
        places.append((shape.head, found.end))
    vectors = 0
    matrices: list[int] = []
    for part, adapted in places:
        own = _own(part, adapted)
        of_matrix = part.matrices() if own == part.sizes else ()
        matrices += of_matrix
        vectors += sum(own) - sum(of_matrix)
    if found.end.weights and (rest := shape.parameters - vectors - sum(matrices)) > 0:
        # What the parts do not account for.
        matrices.append(rest)
    return Trained(added + vectors, tuple(matrices))


def trained(shape: Shape, *methods: Method) -> int:
    """The same, as one number."""
    return counted(shape, *methods).parameters


def _own(part: Part, adapted: Adapted) -> tuple[int, ...]:
    """Sizes of its parameters that are trained."""
    if adapted.weights or (adapted.norms and not part.inputs):
        return part.sizes
    return part.sizes[1:] if adapted.biases else ()


def _refuse(shape: Shape, method: Method, key: str) -> None:
    match method:
        case FullTop(layers=layers) if layers > shape.layers:
            raise JobError(f"{key}.layers = {layers}: the base has {shape.layers} layers. Use fewer.")
        case BitFit() if not any(part.has_bias for part in (*shape.embeddings, *shape.layer, *shape.end)):
            raise JobError(f'{key}.kind = "bitfit": this {shape.family} has no bias vectors. Use another method.')
        case Adapter(first_layer=first) if first is not None and first >= shape.layers:
            raise JobError(f"{key}.first_layer = {first}: the last layer is {shape.layers - 1}. Use a lower one.")
        case Adapter(rank=rank) if rank > shape.width:
            raise JobError(f"{key}.rank = {rank}: the base is {shape.width} wide. Use a smaller rank.")
