"""Sequences -> the tensors of one micro-batch, packed end to end or padded on the right.

Shapes: N tokens of the micro-batch (all of it, padding included), E examples, L longest example, M label tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch

from pipeline.tasks.example import Sequence


@dataclass(frozen=True)
class Layout:
    """Where packed examples lie, for attention: padded views of examples of like length <-> the flat tokens [N].

    One view of all would let a single long example pad every short one to its length.
    """

    to_padded: tuple[torch.Tensor, ...]
    """For each group, [E, L]: index into the flat tokens; padding points at token 0 and is never read back."""
    to_flat: torch.Tensor
    """[N] index into the flattened views laid end to end."""
    real: tuple[torch.Tensor | None, ...]
    """For each group, [E, L] which are no padding; None where there is none. Attention that looks ahead needs it."""


@dataclass(frozen=True)
class MicroBatch:
    tokens: torch.Tensor
    """[1, N] packed, [E, L] padded: token ids."""
    positions: torch.Tensor
    """Same shape: position of each token in its own example."""
    label_index: torch.Tensor
    """[M] index into the flattened tokens whose next token is a target; of labelled texts, the last token of each."""
    labels: torch.Tensor
    """[M] the target ids; of labelled texts [E] the labels as fp32, NaN where they are withheld."""
    keys: torch.Tensor
    """[N] int32: what identifies a token wherever it is computed, for dropout: a mix of example id and position."""
    layout: Layout | None
    """None when padded: right padding with causal attention needs no mask."""
    mask: torch.Tensor | None
    """[E, L] of a padded one: 1 where a token is real."""
    types: torch.Tensor
    """Shape of the tokens: 1 from the second text of a pair on, as BERT's family is told."""
    first_index: torch.Tensor
    """Of labelled texts, [E] the first token of each: what encoders judge a text by."""


def collate(sequences: list[Sequence], example_ids: list[int], packed: bool, device: torch.device) -> MicroBatch:
    """One micro-batch. With no sequences: one token without a label, so that an idle rank can join the collectives."""
    judged = bool(sequences) and not any(sequence.spans for sequence in sequences)
    if not sequences:
        sequences, example_ids = [Sequence((0,), ())], [0]
    lengths = torch.tensor([len(s) for s in sequences])
    count, longest = len(sequences), int(lengths.max())
    within = torch.arange(longest).expand(count, longest)
    real = within < lengths[:, None]
    padded = torch.zeros(count, longest, dtype=torch.long)
    padded[real] = torch.tensor([token for s in sequences for token in s.tokens])
    labelled = within == lengths[:, None] - 1 if judged else _learnt(sequences, longest)
    index = (labelled[real] if packed else labelled.flatten()).nonzero()[:, 0]
    if judged:
        labels = torch.tensor([float("nan") if s.label is None else s.label for s in sequences])
    else:
        labels = padded.roll(-1, dims=1)[labelled]
    keys = _keys(torch.tensor(example_ids)[:, None], within)
    types = (within >= torch.tensor([s.texts[1][0] if len(s.texts) > 1 else longest for s in sequences])[:, None]).long()
    starts = (lengths.cumsum(0) - lengths if packed else torch.arange(count) * longest)[: count * judged]
    if packed:
        layout, mask = _layout(lengths.tolist(), device), None
        fields = [padded[real][None], within[real][None], index, labels, keys[real], types[real][None], starts]
    else:
        layout, mask = None, real.long().to(device)
        fields = [padded, within, index, labels, keys.flatten(), types, starts]
    tokens, positions, index, labels, keys, types, starts = (field.to(device) for field in fields)
    return MicroBatch(tokens, positions, index, labels, keys, layout, mask, types, starts)


def _learnt(sequences: list[Sequence], longest: int) -> torch.Tensor:
    """Token t predicts token t + 1: for a span of learnt tokens, the positions one before each carry a label."""
    labelled = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        for first, end in sequence.spans:
            labelled[row, first - 1 : end - 1] = True
    return labelled


def _layout(lengths: list[int], device: torch.device) -> Layout:
    starts, groups = [0, *accumulate(lengths)], alike(lengths)
    views, masks, to_flat, place = [], [], torch.empty(starts[-1], dtype=torch.long), 0
    for group in groups:
        longest = lengths[group[0]]
        view = torch.zeros(len(group), longest, dtype=torch.long)
        for row, example in enumerate(group):
            first, length = starts[example], lengths[example]
            view[row, :length] = torch.arange(first, first + length)
            to_flat[first : first + length] = torch.arange(place, place + length)
            place += longest
        views.append(view.to(device))
        own = torch.tensor([lengths[example] for example in group])[:, None]
        masks.append((torch.arange(longest) < own).to(device) if int(own.min()) < longest else None)
    return Layout(tuple(views), to_flat.to(device), tuple(masks))


def alike(lengths: list[int]) -> list[list[int]]:
    """Groups examples, the longest first, so that no padded view of a group has more than twice the tokens of its examples."""
    groups: list[list[int]] = []
    for example in sorted(range(len(lengths)), key=lambda e: -lengths[e]):
        if not groups or lengths[example] * 2 < lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(example)
    return groups


def _keys(example_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Odd multipliers (from splitmix64 and xxHash) spread neighbouring ids and positions over 32 bits."""
    mixed = (example_ids * 0x9E3779B1 + positions * 0x85EBCA77) & 0xFFFFFFFF
    return torch.where(mixed >= 1 << 31, mixed - (1 << 32), mixed).to(torch.int32)
