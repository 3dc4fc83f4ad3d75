"""Special tokens with trained embeddings (`prefix_embed`), or with a trained input to every layer (`prefix_layer`), as the paper's 5.1.

The tokens stand in the examples themselves, under ids from the vocabulary's end on (`Specials`), so positions, packing, length and caches
count them as any others. prefix_layer replaces what comes into each layer at their places, the embedding layer's output included, so
L x D numbers a token; what the last layer puts out there is computed, since the token behind an infix is predicted from it.

Shapes: S special tokens, D width, L layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.job.method import PrefixEmbed, PrefixLayer
from pipeline.methods.draw import generator_of
from pipeline.methods.overlay import Overlay
from pipeline.model.load import LoadedBase
from pipeline.weights.read import Reader

EMBEDDINGS = "prefix.embeddings"
_STANDARD_DEVIATION = 0.02


def attach_prefix(base: LoadedBase, method: PrefixEmbed | PrefixLayer, first_id: int, seed: int, device: torch.device) -> Overlay:
    """Embeddings begin as those of tokens of the vocabulary (Lester et al. 2021), inputs of layers as small random numbers; both are drawn
    from (seed, name), so every rank draws the same.

    Args:
        first_id: of the special tokens.
    """
    model, family = base.model, base.family
    embedding = model.get_submodule(family.body).get_input_embeddings()  # type: ignore[operator]
    count = method.prefix_tokens + method.infix_tokens
    ids = torch.arange(first_id, first_id + count, device=device)
    if isinstance(method, PrefixEmbed):
        rows = _of_the_vocabulary(base, embedding, count, seed).to(device).requires_grad_()
        prefix = Overlay(ids, {EMBEDDINGS: rows})
        embedding.register_forward_hook(lambda module, inputs, output: prefix.put(output, rows))
    else:
        shape, names = (count, model.config.hidden_size), [f"prefix.layer.{number}" for number in range(model.config.num_hidden_layers)]
        drawn = {name: torch.empty(shape).normal_(0.0, _STANDARD_DEVIATION, generator=generator_of(seed, name)) for name in names}
        prefix = Overlay(ids, {name: rows.to(device).requires_grad_() for name, rows in drawn.items()})
        for number, name in enumerate(names):
            layer = model.get_submodule(f"{family.layers}.{number}")
            layer.register_forward_pre_hook(_replacing(prefix, prefix.rows[name]), with_kwargs=True)
    prefix.watch(embedding)
    return prefix


def _of_the_vocabulary(base: LoadedBase, embedding: nn.Module, count: int, seed: int) -> torch.Tensor:
    """[S, D] rows of the base's embedding, as it gives them."""
    entry = next(base.tensors[name] for name, parameter in base.model.named_parameters() if parameter is embedding.weight)
    tokens = torch.randint(entry.shape[0], (count,), generator=generator_of(seed, EMBEDDINGS))
    rows = torch.empty(count, entry.shape[1])
    with Reader() as reader:
        for row, token in zip(rows, tokens.tolist(), strict=True):
            reader.read(entry, token * entry.shape[1], row)
    # Gemma's embedding scales what it looks up.
    return rows * getattr(embedding, "embed_scale", 1.0)


def _replacing(prefix: Overlay, rows: torch.Tensor) -> Any:
    def hook(layer: nn.Module, inputs: tuple[Any, ...], keys: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if inputs:
            return (prefix.put(inputs[0], rows), *inputs[1:]), keys
        return inputs, keys | {"hidden_states": prefix.put(keys["hidden_states"], rows)}

    return hook
