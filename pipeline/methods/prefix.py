"""Special tokens with trained embeddings (`prefix_embed`), or with a trained input to every layer (`prefix_layer`), as the paper's 5.1.

The tokens stand in the examples themselves, under ids from the vocabulary's end on (`Specials`), so positions, packing, length and caches
count them as any others. prefix_layer replaces what comes into each layer at their places, the embedding layer's output included, so
L x D numbers a token; what the last layer puts out there is computed, since the token behind an infix is predicted from it.

Shapes: tokens [B, T], hidden states [B, T, D], S special tokens, rows [S, D].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.job.method import PrefixEmbed, PrefixLayer
from pipeline.methods.draw import generator_of
from pipeline.model.families import Family

_STANDARD_DEVIATION = 0.02


@dataclass
class Prefix:
    """What stands at the special tokens. Not registered with a module: ZeRO-3 must not shard it."""

    first_id: int
    rows: dict[str, torch.Tensor]
    """By name: one of the embeddings, or one for each layer, in order."""
    _places: tuple[torch.Tensor, ...] = ()
    """Where in the tokens of the pass they are."""
    _slots: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """Which they are."""

    def find(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Before the embedding: notes where special tokens are, and asks for token 0 there."""
        tokens = inputs[0]
        special = tokens >= self.first_id
        self._places = special.nonzero(as_tuple=True)
        self._slots = tokens[self._places] - self.first_id
        return (tokens.masked_fill(special, 0), *inputs[1:])

    def put(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Also with no special token about: a rank without examples must have a backward pass as the others have."""
        return hidden.index_put(self._places, rows[self._slots].to(hidden.dtype))


def attach_prefix(model: PreTrainedModel, family: Family, method: PrefixEmbed | PrefixLayer, seed: int, device: torch.device) -> Prefix:
    """Rows are drawn from (seed, name), so every rank draws the same."""
    embedding = model.get_submodule(family.body).get_input_embeddings()  # type: ignore[operator]
    count = method.prefix_tokens + method.infix_tokens
    if isinstance(method, PrefixEmbed):
        # OPT 350m's embeddings are narrower than its layers.
        width = getattr(model.config, "word_embed_proj_dim", model.config.hidden_size)
        prefix = Prefix(model.config.vocab_size, {"prefix.embeddings": _drawn("prefix.embeddings", (count, width), seed, device)})
        (rows,) = prefix.rows.values()
        embedding.register_forward_hook(lambda module, inputs, output: prefix.put(output, rows))
    else:
        names = [f"prefix.layer.{number}" for number in range(model.config.num_hidden_layers)]
        prefix = Prefix(model.config.vocab_size, {name: _drawn(name, (count, model.config.hidden_size), seed, device) for name in names})
        for number, rows in enumerate(prefix.rows.values()):
            layer = model.get_submodule(f"{family.layers}.{number}")
            layer.register_forward_pre_hook(_replacing(prefix, rows), with_kwargs=True)
    embedding.register_forward_pre_hook(prefix.find)
    return prefix


def _replacing(prefix: Prefix, rows: torch.Tensor) -> Any:
    def hook(layer: nn.Module, inputs: tuple[Any, ...], keys: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if inputs:
            return (prefix.put(inputs[0], rows), *inputs[1:]), keys
        return inputs, keys | {"hidden_states": prefix.put(keys["hidden_states"], rows)}

    return hook


def _drawn(name: str, shape: tuple[int, int], seed: int, device: torch.device) -> torch.Tensor:
    return torch.empty(shape).normal_(0.0, _STANDARD_DEVIATION, generator=generator_of(seed, name)).to(device).requires_grad_()
