"""The root module that ZeRO-3's hooks stand on: a frozen language model or encoder with one way in for each use.

Scoring runs the body over a micro-batch and the vocabulary projection, or a head, only where there is a label; decoding continues a cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from pipeline.model.attention import no_mask
from pipeline.model.families import Family
from pipeline.model.head import head_loss
from pipeline.model.pooler import Pooler
from pipeline.model.routing import Routing
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
    owners: tuple[int, ...] = ()
    """[B] number of each row's delta, where many are served."""


class Readout(Protocol):
    """A head that takes the place of the vocabulary projection."""

    def places(self, batch: MicroBatch) -> torch.Tensor:
        """[E] index into the flattened tokens: what it reads."""
        ...

    def __call__(self, hidden: torch.Tensor, batch: MicroBatch, smoothing: float) -> tuple[torch.Tensor, ...]:
        """From hidden states [E, D]: sums of the smoothed and the plain loss, and whatever else it puts out."""
        ...


class Causal(nn.Module):
    """Args:
    readout: a head that takes the place of the vocabulary projection in scoring a batch.
    routing: is told whose the rows of a decode are, where many deltas are served.
    """

    def __init__(self, model: PreTrainedModel, family: Family, readout: Readout | None = None, routing: Routing | None = None) -> None:
        super().__init__()
        self.model = model
        self._family, self._body = family, family.body
        self._first_position = family.first_position(model.config)
        self._token_types = family.token_types and model.config.type_vocab_size > 1
        self._readout = readout
        self._routing = routing

    @property
    def context(self) -> int:
        """Positions that a text may have."""
        return self._family.context(self.model.config)

    @property
    def has_readout(self) -> bool:
        return self._readout is not None

    def forward(self, batch: MicroBatch | None = None, decode: Decode | None = None, smoothing: float = 0.0) -> tuple[torch.Tensor, ...]:
        """For a batch: sums of the smoothed and the plain loss over its labels. For a decode: the last position's logits [B, V]."""
        body = self.model.get_submodule(self._body)
        if batch is not None:
            if self._readout is None and self._family.own_logits:
                return _loss_of(self.model(**self._inputs(batch)).logits.flatten(0, 1)[batch.label_index], batch.labels, smoothing)
            hidden = body(**self._inputs(batch)).last_hidden_state.flatten(0, 1)
            if self._readout is None:
                return head_loss(self.model.lm_head, hidden[batch.label_index], batch.labels, smoothing)
            hidden = hidden[self._readout.places(batch)]
            if self._family.head.pooler:
                pooler = self.model.get_submodule(self._family.head.pooler)
                assert isinstance(pooler, Pooler)
                hidden = pooler.of(hidden)
            return self._readout(hidden, batch, smoothing)
        if decode is None:
            raise TypeError("Causal needs a batch or a decode")
        if self._routing is not None:
            self._routing.set(decode.owners, decode.tokens.device)
        inputs = {
            "input_ids": decode.tokens,
            "position_ids": decode.positions,
            "attention_mask": decode.mask,
            "past_key_values": decode.cache,
            "use_cache": True,
        }
        if self._family.own_logits:
            return (self.model(**inputs).logits[:, -1],)
        return (self.model.lm_head(body(**inputs).last_hidden_state[:, -1]),)

    def _inputs(self, batch: MicroBatch) -> dict[str, Any]:
        family = self._family
        inputs: dict[str, Any] = {"input_ids": batch.tokens, "position_ids": batch.positions + self._first_position, "use_cache": False}
        # Right padding needs no mask where attention is causal and ours.
        needs_mask = batch.layout is None and (family.encoder or not family.packs)
        inputs["attention_mask"] = batch.mask if needs_mask else no_mask(batch.layout, batch.tokens.device)
        if family.packs:
            inputs["layout"] = batch.layout
        if self._token_types:
            inputs["token_type_ids"] = batch.types
        return inputs


def _loss_of(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the smoothed and of the plain loss of logits [M, V], as `head_loss` gives them."""
    logits = logits.float()
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    return loss, nn.functional.cross_entropy(logits.detach(), labels, reduction="sum")
