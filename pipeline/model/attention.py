"""Causal attention over packed examples, without a mask and without work between examples.

Linear maps see the packed tokens [1, N]; only attention sees padded views [E, L] of examples of like length, together less than
twice N. Padding stands on the right, so with causal attention no real token ever looks at it: the fast kernels that refuse masks
(flash on A100, memory-efficient on V100, torch's own on CPU) do the work, and nothing of size N x N exists.

Shapes: q [1, H, N, d], k and v [1, Hkv, N, d], output [1, N, H, d].
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from pipeline.tasks.batch import Layout

NAME = "zlora"


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    layout: Layout | None = None,
    **options: object,
) -> tuple[torch.Tensor, None]:
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    flat = [part[0].transpose(0, 1) for part in (query, key, value)]
    outputs = []
    for index in layout.to_padded:
        padded = [part[index].transpose(1, 2) for part in flat]
        outputs.append(sdpa_attention_forward(module, *padded, None, **options)[0].flatten(0, 1))
    return torch.cat(outputs)[layout.to_flat][None], None


def register() -> None:
    """Makes `attn_implementation="zlora"` known to transformers. Padded and cached passes get its ordinary SDPA masks."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def no_mask(layout: Layout | None, device: torch.device) -> torch.Tensor | None:
    """What to hand transformers as attention mask: a packed pass needs none, and a 4-D tensor stops it from building one."""
    return None if layout is None else torch.empty(1, 1, 1, 1, dtype=torch.bool, device=device)
