"""The root module that ZeRO-3's hooks stand on: a frozen causal language model with one way in for each use.

Scoring runs the body over a micro-batch and the vocabulary projection only where there is a label; decoding continues a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from pipeline.model.attention import no_mask
from pipeline.model.families import Family
from pipeline.model.head import head_loss
from pipeline.tasks.batch import MicroBatch


@dataclass(frozen=True)
class Decode:
    """One pass of generation. B prompts, T new tokens each (all of the prompt at first, one afterwards), S seen in all."""

    tokens: torch.Tensor
    """[B, T]"""
    mask: torch.Tensor
    """[B, S] 1 where a token is real; padding stands on the left."""
    positions: torch.Tensor
    """[B, T]"""
    cache: Cache


Readout: TypeAlias = Callable[[torch.Tensor, MicroBatch, float], tuple[torch.Tensor, ...]]
"""From the hidden states [M, D] where there is a label: sums of the smoothed and the plain loss, and whatever else it puts out."""


class Causal(nn.Module):
    """Args:
    readout: a head that takes the place of the vocabulary projection in scoring a batch.
    """

    def __init__(self, model: PreTrainedModel, family: Family, readout: Readout | None = None) -> None:
        super().__init__()
        self.model = model
        self._body = family.body
        self._readout = readout

    @property
    def has_readout(self) -> bool:
        return self._readout is not None

    def forward(self, batch: MicroBatch | None = None, decode: Decode | None = None, smoothing: float = 0.0) -> tuple[torch.Tensor, ...]:
        """For a batch: sums of the smoothed and the plain loss over its labels. For a decode: the last position's logits [B, V]."""
        body = self.model.get_submodule(self._body)
        if batch is not None:
            output = body(
                input_ids=batch.tokens,
                position_ids=batch.positions,
                attention_mask=no_mask(batch.layout, batch.tokens.device),
                layout=batch.layout,
                use_cache=False,
            )
            hidden = output.last_hidden_state.flatten(0, 1)[batch.label_index]
            if self._readout is not None:
                return self._readout(hidden, batch, smoothing)
            return head_loss(self.model.lm_head, hidden, batch.labels, smoothing)
        if decode is None:
            raise TypeError("Causal needs a batch or a decode")
        output = body(
            input_ids=decode.tokens,
            position_ids=decode.positions,
            attention_mask=decode.mask,
            past_key_values=decode.cache,
            use_cache=True,
        )
        return (self.model.lm_head(output.last_hidden_state[:, -1]),)
