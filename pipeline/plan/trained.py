"""How many parameters methods train on a base, from its shape alone: the counts of the LoRA paper's tables. No torch.

In: a `Shape` and the methods of a job. Out: an integer, which what pipeline/methods attaches has too. A task's head for labels is
counted apart (`Shape.head_parameters`). docs/methods.md has the formulas: L layers, D width, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.job.errors import JobError
from pipeline.job.method import Adapter, BitFit, Full, FullTop, Lora, Method, PrefixEmbed, PrefixLayer
from pipeline.plan.shapes import Part, Shape, adapt


@dataclass(frozen=True)
class _Parameter:
    """One of the base."""

    size: int
    bias: bool
    norm: bool
    layer: int | None
    """None: outside the layers."""


def trained(shape: Shape, *methods: Method) -> int:
    """Parameters that these methods train together: those they add, and those of the base that one of them trains, each once.

    Raises:
        JobError: a target, a layer or biases that the base does not have; in the words of pipeline/methods.
    """
    for place, method in enumerate(methods):
        _refuse(shape, method, f"methods[{place}]")
    added = sum(_added(shape, method) for method in methods)
    if any(isinstance(method, Full) for method in methods):
        return added + shape.parameters
    return added + sum(parameter.size for parameter in _parameters(shape) if any(_trains(shape, method, parameter) for method in methods))


def _refuse(shape: Shape, method: Method, key: str) -> None:
    match method:
        case FullTop(layers=layers) if layers > shape.layers:
            raise JobError(f"{key}.layers = {layers}: the base has {shape.layers} layers. Use fewer.")
        case BitFit() if not any(parameter.bias for parameter in _parameters(shape)):
            raise JobError(f'{key}.kind = "bitfit": this {shape.family} has no bias vectors. Use another method.')
        case Adapter(first_layer=first) if first is not None and first >= shape.layers:
            raise JobError(f"{key}.first_layer = {first}: the last layer is {shape.layers - 1}. Use a lower one.")
        case Adapter(rank=rank) if rank > shape.width:
            raise JobError(f"{key}.rank = {rank}: the base is {shape.width} wide. Use a smaller rank.")


def _added(shape: Shape, method: Method) -> int:
    """Parameters that a method puts beside the base's own."""
    match method:
        case Lora():
            return shape.layers * adapt(shape, method).layer_parameters(shape)
        case PrefixEmbed():
            # OPT 350m's embeddings are narrower than its layers.
            width = next(part.sizes[0] for part in shape.embeddings if part.sizes) // shape.vocabulary
            return width * (method.prefix_tokens + method.infix_tokens)
        case PrefixLayer():
            return shape.layers * shape.width * (method.prefix_tokens + method.infix_tokens)
        case Adapter():
            bottleneck = 2 * shape.width * method.rank + method.rank + shape.width
            norm = 2 * shape.width if method.placement == "lin" and method.layernorm else 0
            in_a_layer = 2 if method.placement == "houlsby" else 1
            return (shape.layers - (method.first_layer or 0)) * in_a_layer * (bottleneck + norm)
        case Full() | FullTop() | BitFit():
            return 0


def _trains(shape: Shape, method: Method, parameter: _Parameter) -> bool:
    match method:
        case FullTop():
            return parameter.layer is not None and parameter.layer >= shape.layers - method.layers
        case BitFit():
            return parameter.bias
        case Adapter() if method.layernorm and method.placement != "lin":
            # Where there is an adapter: below it nothing is trained, and so no backward pass is needed.
            return parameter.norm and parameter.layer is not None and parameter.layer >= (method.first_layer or 0)
        case _:
            return False


def _parameters(shape: Shape) -> Iterator[_Parameter]:
    """Every one but the head's, which is no bias."""
    for part in (*shape.embeddings, *shape.end):
        yield from _of_part(part, None)
    for layer in range(shape.layers):
        for part in shape.layer:
            yield from _of_part(part, layer)


def _of_part(part: Part, layer: int | None) -> Iterator[_Parameter]:
    for place, size in enumerate(part.sizes):
        # A linear map, an embedding and a norm have their weight first, and then a bias or nothing.
        yield _Parameter(size, bias=place == 1, norm=not part.inputs, layer=layer)
