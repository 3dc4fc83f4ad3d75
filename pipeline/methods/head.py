"""A head on the base: from the last token's hidden state to one score a class, or to one number.

The same map that transformers puts on decoders for sequence classification (`score`, without a bias), so an exported model is an
ordinary one. Trained with the delta, in fp32, outside ZeRO's hands.
Shapes: E examples, D width, C classes (1 for a number).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from pipeline.job.errors import JobError
from pipeline.methods.dropout import DropoutClock, keyed_dropout
from pipeline.tasks.batch import MicroBatch
from pipeline.weights.delta import HEAD_TENSOR

NAME = HEAD_TENSOR
_STANDARD_DEVIATION = 0.02
"""As transformers draws a new head."""
_LAYER = -1
"""Tells its dropout from those of the layers."""


@dataclass(frozen=True)
class TaskHead:
    weight: torch.Tensor
    """[C, D]"""
    labels: tuple[str, ...] | None
    """Names of the classes; None: the output is a number."""
    architecture: str
    """transformers' name of the model with such a head."""
    dropout: float
    clock: DropoutClock

    def __call__(self, hidden: torch.Tensor, batch: MicroBatch, smoothing: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sums of the smoothed and of the plain loss over the examples, and the outputs [E, C] in fp32.

        Cross entropy for classes, squared error for a number.

        Args:
            hidden: [E, D] of each example's last token.
        """
        clock = self.clock if self.clock.keys is None else replace(self.clock, keys=self.clock.keys[batch.label_index])
        outputs = nn.functional.linear(keyed_dropout(hidden.float(), self.dropout, clock, _LAYER), self.weight)
        if self.labels is None:
            loss = (outputs[:, 0] - batch.labels).square().sum()
            return loss, loss.detach(), outputs.detach()
        # A withheld label's loss is nobody's to know.
        wanted, known = batch.labels.nan_to_num().long(), batch.labels.isfinite()
        loss = nn.functional.cross_entropy(outputs[known], wanted[known], reduction="sum", label_smoothing=smoothing)
        plain = nn.functional.cross_entropy(outputs[known].detach(), wanted[known], reduction="sum")
        return loss, plain, outputs.detach()


def draw_head(
    config: PretrainedConfig, labels: tuple[str, ...] | None, seed: int, dropout: float, clock: DropoutClock, device: torch.device
) -> TaskHead:
    """A new head, the same on every rank.

    Raises:
        JobError: transformers has no such model for this architecture.
    """
    architecture = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(config.model_type)
    if architecture is None:
        raise JobError(f'task.kind: a base of architecture "{config.model_type}" has no head for labels. Use another base.')
    digest = hashlib.sha256(f"{seed}:{NAME}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    outputs = 1 if labels is None else len(labels)
    weight = torch.empty(outputs, config.hidden_size).normal_(0.0, _STANDARD_DEVIATION, generator=generator)
    return TaskHead(weight.to(device).requires_grad_(), labels, architecture, dropout, clock)
