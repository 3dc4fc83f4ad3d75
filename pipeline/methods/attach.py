"""What is trained: each method of the job put onto the model, and its tensors by name.

Saving, counting, optimising and resuming read `Delta` and need no method-specific code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from pipeline.job.errors import JobError
from pipeline.job.method import Lora
from pipeline.methods.dropout import DropoutClock
from pipeline.methods.head import TaskHead, draw_head
from pipeline.methods.lora import AdaptedLinear, attach_lora
from pipeline.model.families import Family


@dataclass(frozen=True)
class Delta:
    """The trained tensors: fp32, whole on every rank, equal on every rank, outside ZeRO's hands."""

    adapted: tuple[AdaptedLinear, ...]
    head: TaskHead | None
    """Where the task has labels."""
    clock: DropoutClock

    def tensors(self) -> dict[str, torch.Tensor]:
        """Name -> trained tensor, in model order."""
        pairs = {
            f"{branch.name}.{key}": tensor
            for adapted in self.adapted
            for branch in adapted.branches
            for key, tensor in (("a", branch.a), ("b", branch.b))
        }
        return pairs | (self.head.tensors if self.head else {})

    @property
    def parameters(self) -> int:
        """Trained elements."""
        return sum(tensor.numel() for tensor in self.tensors().values())


def attach(
    model: PreTrainedModel,
    family: Family,
    methods: tuple[Lora, ...],
    seed: int,
    device: torch.device,
    labels: tuple[str, ...] | None = (),
    head_dropout: float = 0.0,
) -> Delta:
    """Puts the job's methods onto the model.

    Args:
        labels: of the classes that a head tells apart; None: it puts out a number. Without any there is no head.

    Raises:
        JobError: a target that is not there, or two methods of one kind.
    """
    if len(methods) > 1:
        raise JobError(f"methods: lora is listed {len(methods)} times. List it once, with all its targets.")
    clock = DropoutClock(seed)
    head = None if labels == () else draw_head(model.config, family.head, labels, seed, head_dropout, clock, device)
    return Delta(tuple(attach_lora(model, family, methods[0], clock, seed, device)), head, clock)
