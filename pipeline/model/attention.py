"""Attention over packed examples, without work between examples, and without a mask where it is causal.

Linear maps see the packed tokens [1, N]; only attention sees padded views [E, L] of examples of like length, together less than
twice N. Padding stands on the right, so with causal attention no real token ever looks at it: the fast kernels that refuse masks
(flash on A100, memory-efficient on V100, torch's own on CPU) do the work, and nothing of size N x N exists. An encoder looks both ways
and is told by a mask of keys [E, 1, 1, L] what is padding, where there is some; a view longer than a sliding window has a mask [L, L].

Shapes: q [1, H, N, d], k and v [1, Hkv, N, d], output [1, N, H, d].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from pipeline.tasks.batch import Layout

NAME = "zlora"
Attend: TypeAlias = Callable[..., tuple[torch.Tensor, None]]


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    attend: Attend = sdpa_attention_forward if softcap is None else partial(_capped, softcap=softcap)
    if layout is None:
        return attend(module, query, key, value, attention_mask, **options)
    flat = [part[0].transpose(0, 1) for part in (query, key, value)]
    outputs = []
    for index, real in zip(layout.to_padded, layout.real, strict=True):
        padded = [part[index].transpose(1, 2) for part in flat]
        mask = _window(index, sliding_window) if module.is_causal else _keys(real)
        outputs.append(attend(module, *padded, mask, **options)[0].flatten(0, 1))
    return torch.cat(outputs)[layout.to_flat][None], None


def _keys(real: torch.Tensor | None) -> torch.Tensor | None:
    return None if real is None else real[:, None, None]


def _window(index: torch.Tensor, window: int | None) -> torch.Tensor | None:
    """[1, 1, L, L] of the keys that each query sees, where the window is shorter than the view: itself and those before it."""
    length = index.shape[1]
    if window is None or length <= window:
        return None
    place = torch.arange(length, device=index.device)
    distance = place[:, None] - place
    return ((distance >= 0) & (distance < window))[None, None]


def _capped(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    softcap: float,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Gemma 2: scores within +-softcap, which no fused kernel does. Scores [E, H, L, S] are held."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scaling / softcap)
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = nn.functional.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), None


def register() -> None:
    """Makes `attn_implementation="zlora"` known to transformers. Padded and cached passes get its ordinary SDPA masks."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def no_mask(layout: Layout | None, device: torch.device) -> torch.Tensor | None:
    """What to hand transformers as attention mask: a packed pass needs none, and a 4-D tensor stops it from building one."""
    return None if layout is None else torch.empty(1, 1, 1, 1, dtype=torch.bool, device=device)
