"""A stored delta -> branches on the model, as it lies in its files: no job is needed, and nothing is trained.

A module's branches were stored as one pair, which is exactly the same map (see `lora.py`); it becomes one branch.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from pipeline.job.errors import JobError
from pipeline.methods.dropout import DropoutClock
from pipeline.methods.lora import LoraBranch, Rows
from pipeline.model.linear import FrozenLinear
from pipeline.weights.delta import Module


def attach_stored(
    model: nn.Module,
    modules: tuple[Module, ...],
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]],
    folder: Path,
    device: torch.device,
) -> None:
    """Puts every pair on its linear map.

    Args:
        pairs: by module name, A [R, K] and B [D, R].
        folder: of the delta, for messages.

    Raises:
        JobError: a module that the model does not have, or of another shape.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, FrozenLinear)}
    clock = DropoutClock(0)
    for place, module in enumerate(modules):
        linear, (a, b) = linears.get(module.name), pairs[module.name]
        if linear is None or (b.shape[0], a.shape[1]) != (linear.out_features, linear.in_features):
            raise JobError(f"{folder}: {module.name} of {b.shape[0]} x {a.shape[1]} is not in this base. Name the base it was trained on.")
        scale, rows = module.alpha / module.rank, Rows(0, b.shape[0])
        linear.branches.append(LoraBranch(module.name, a.to(device), b.to(device), scale, rows, dropout=0.0, layer=place, clock=clock))
