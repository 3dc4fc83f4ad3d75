"""BERT's pooler, called by the head for each text's first token instead of by the body for the first of a row.

Packed examples lie in one row. Takes over the original's parameters, and so their names.
Shapes: E texts, D width.
"""

from __future__ import annotations

import torch
from torch import nn


class Pooler(nn.Module):
    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.dense = original.get_submodule("dense")

    def forward(self, hidden: torch.Tensor) -> None:
        """The body's own call: nothing is to be done yet."""

    def of(self, first: torch.Tensor) -> torch.Tensor:
        """[E, D] of the texts' first tokens -> [E, D] for the head."""
        # The module is called, not its weight used: ZeRO-3's hooks stand on it.
        pooled: torch.Tensor = self.dense(first)
        return pooled.tanh()
