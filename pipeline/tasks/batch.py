"""Sequences -> the tensors of one micro-batch, packed end to end or padded on the right.

Shapes: N tokens of the micro-batch (all of it, padding included), E examples, L longest example, M label tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.tasks.example import Sequence


@dataclass(frozen=True)
class Layout:
    """Where packed examples lie, for attention: rows of a padded view [E, L] <-> the flat tokens [N]."""

    to_padded: torch.Tensor
    """[E, L] index into the flat tokens; padding points at token 0 and is never read back."""
    to_flat: torch.Tensor
    """[N] index into the flattened padded view."""


@dataclass(frozen=True)
class MicroBatch:
    tokens: torch.Tensor
    """[1, N] packed, [E, L] padded: token ids."""
    positions: torch.Tensor
    """Same shape: position of each token in its own example."""
    label_index: torch.Tensor
    """[M] index into the flattened tokens whose next token is a target."""
    labels: torch.Tensor
    """[M] the target ids."""
    keys: torch.Tensor
    """[N] int32: what identifies a token wherever it is computed, for dropout: a mix of example id and position."""
    layout: Layout | None
    """None when padded: right padding with causal attention needs no mask."""
    real_tokens: int
    """Tokens that are not padding."""


def collate(sequences: list[Sequence], example_ids: list[int], packed: bool, device: torch.device) -> MicroBatch:
    """One micro-batch. With no sequences: one token without a label, so that an idle rank can join the collectives."""
    if not sequences:
        sequences, example_ids = [Sequence((0,), 1)], [0]
    lengths = torch.tensor([len(s) for s in sequences])
    count, longest = len(sequences), int(lengths.max())
    within = torch.arange(longest).expand(count, longest)
    real = within < lengths[:, None]
    padded = torch.zeros(count, longest, dtype=torch.long)
    padded[real] = torch.tensor([token for s in sequences for token in s.tokens])
    starts = torch.tensor([s.target_start for s in sequences])
    # Token t predicts token t + 1: positions target_start - 1 ... length - 2 carry a label.
    labelled = (within >= starts[:, None] - 1) & (within < lengths[:, None] - 1)
    next_token = padded.roll(-1, dims=1)
    keys = _keys(torch.tensor(example_ids)[:, None], within)
    if packed:
        offsets = lengths.cumsum(0) - lengths
        layout = Layout(
            torch.where(real, offsets[:, None] + within, 0).to(device),
            (torch.arange(count)[:, None] * longest + within)[real].to(device),
        )
        fields = [padded[real][None], within[real][None], labelled[real].nonzero()[:, 0], next_token[real][labelled[real]], keys[real]]
    else:
        layout = None
        flat = labelled.flatten()
        fields = [padded, within, flat.nonzero()[:, 0], next_token.flatten()[flat], keys.flatten()]
    tokens, positions, label_index, labels, keys = (field.to(device) for field in fields)
    return MicroBatch(tokens, positions, label_index, labels, keys, layout, int(lengths.sum()))


def _keys(example_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Odd multipliers (from splitmix64 and xxHash) spread neighbouring ids and positions over 32 bits."""
    mixed = (example_ids * 0x9E3779B1 + positions * 0x85EBCA77) & 0xFFFFFFFF
    return torch.where(mixed >= 1 << 31, mixed - (1 << 32), mixed).to(torch.int32)
