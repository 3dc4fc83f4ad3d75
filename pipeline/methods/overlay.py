"""Trained rows in place of what a model has at the places of some token ids: special tokens, and tokens that the base did not know.

Shapes: tokens [B, T], hidden states [B, T, D], S trained ids, rows [S, D].
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass
class Overlay:
    """Not registered with a module: ZeRO-3 must not shard its rows."""

    ids: torch.Tensor
    """[S] ascending."""
    rows: dict[str, torch.Tensor]
    """By name: one of the embeddings, or one for each layer, in order."""
    _places: tuple[torch.Tensor, ...] = ()
    """Where in the tokens of the pass they are."""
    _slots: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """Which they are."""

    def watch(self, embedding: nn.Module) -> None:
        """Has every pass say where its ids are."""
        embedding.register_forward_pre_hook(self._find)

    def _find(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Asks for token 0 at its places, since the embedding may have no such row."""
        tokens = inputs[0]
        found = torch.isin(tokens, self.ids)
        self._places = found.nonzero(as_tuple=True)
        self._slots = torch.searchsorted(self.ids, tokens[self._places])
        return (tokens.masked_fill(found, 0), *inputs[1:])

    def put(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Also with none of its ids about: a rank without examples must have a backward pass as the others have."""
        if not len(self._slots) and not torch.is_grad_enabled():
            return hidden
        return hidden.index_put(self._places, rows[self._slots].to(hidden.dtype))
