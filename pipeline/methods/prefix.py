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
from transformers import PreTrainedModel

from pipeline.job.method import PrefixEmbed, PrefixLayer
from pipeline.methods.draw import generator_of
from pipeline.methods.overlay import Overlay
from pipeline.model.families import Family

_STANDARD_DEVIATION = 0.02


def attach_prefix(
    model: PreTrainedModel, family: Family, method: PrefixEmbed | PrefixLayer, first_id: int, seed: int, device: torch.device
) -> Overlay:
    """Rows are drawn from (seed, name), so every rank draws the same.

    Args:
        first_id: of the special tokens.
    """
    embedding = model.get_submodule(family.body).get_input_embeddings()  # type: ignore[operator]
    count = method.prefix_tokens + method.infix_tokens
    ids = torch.arange(first_id, first_id + count, device=device)
    if isinstance(method, PrefixEmbed):
        # OPT 350m's embeddings are narrower than its layers.
        width = getattr(model.config, "word_embed_proj_dim", model.config.hidden_size)
        rows = _drawn("prefix.embeddings", (count, width), seed, device)
        prefix = Overlay(ids, {"prefix.embeddings": rows})
        embedding.register_forward_hook(lambda module, inputs, output: prefix.put(output, rows))
    else:
        names = [f"prefix.layer.{number}" for number in range(model.config.num_hidden_layers)]
        prefix = Overlay(ids, {name: _drawn(name, (count, model.config.hidden_size), seed, device) for name in names})
        for number, name in enumerate(names):
            layer = model.get_submodule(f"{family.layers}.{number}")
            layer.register_forward_pre_hook(_replacing(prefix, prefix.rows[name]), with_kwargs=True)
    prefix.watch(embedding)
    return prefix


def _replacing(prefix: Overlay, rows: torch.Tensor) -> Any:
    def hook(layer: nn.Module, inputs: tuple[Any, ...], keys: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if inputs:
            return (prefix.put(inputs[0], rows), *inputs[1:]), keys
        return inputs, keys | {"hidden_states": prefix.put(keys["hidden_states"], rows)}

    return hook


def _drawn(name: str, shape: tuple[int, int], seed: int, device: torch.device) -> torch.Tensor:
    return torch.empty(shape).normal_(0.0, _STANDARD_DEVIATION, generator=generator_of(seed, name)).to(device).requires_grad_()
