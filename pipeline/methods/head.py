"""A head on the base: from one token's hidden state to one score a class, or to one number.

The same maps that transformers puts there for sequence classification, so an exported model is an ordinary one: `score` on a
decoder's last token, `classifier` on an encoder's first. Trained with the delta, in fp32, outside ZeRO's hands.
Shapes: E examples, D width, C classes (1 for a number).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from pipeline.job.errors import JobError
from pipeline.methods.draw import generator_of
from pipeline.methods.dropout import DropoutClock, keyed_dropout
from pipeline.model.families import HeadForm
from pipeline.tasks.batch import MicroBatch

_STANDARD_DEVIATION = 0.02
"""As transformers draws a new head, where the config says nothing."""
_LAYER, _DENSE_LAYER = -1, -2
"""Tell its dropouts from those of the layers."""


@dataclass(frozen=True)
class TaskHead:
    form: HeadForm
    tensors: dict[str, torch.Tensor]
    """By their names in transformers' model; the last map's weight is [C, D]."""
    activation: Callable[[torch.Tensor], torch.Tensor]
    """Behind the map before the last, where there is one."""
    labels: tuple[str, ...] | None
    """Names of the classes; None: the output is a number."""
    architecture: str
    """transformers' name of the model with such a head."""
    dropout: float
    clock: DropoutClock

    def places(self, batch: MicroBatch) -> torch.Tensor:
        """[E] index into the flattened tokens: each example's first or last."""
        return batch.first_index if self.form.reads == "first" else batch.label_index

    def __call__(self, hidden: torch.Tensor, batch: MicroBatch, smoothing: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sums of the smoothed and of the plain loss over the examples, and the outputs [E, C] in fp32.

        Cross entropy for classes, squared error for a number.

        Args:
            hidden: [E, D] of the tokens that it reads.
        """
        outputs = self._outputs(hidden.float(), batch)
        if self.labels is None:
            loss = (outputs[:, 0] - batch.labels).square().sum()
            return loss, loss.detach(), outputs.detach()
        # A withheld label's loss is nobody's to know.
        wanted, known = batch.labels.nan_to_num().long(), batch.labels.isfinite()
        loss = nn.functional.cross_entropy(outputs[known], wanted[known], reduction="sum", label_smoothing=smoothing)
        plain = nn.functional.cross_entropy(outputs[known].detach(), wanted[known], reduction="sum")
        return loss, plain, outputs.detach()

    def _outputs(self, hidden: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        clock = self.clock if self.clock.keys is None else replace(self.clock, keys=self.clock.keys[self.places(batch)])
        if self.form.dense:
            if self.form.dropout_before_dense:
                hidden = keyed_dropout(hidden, self.dropout, clock, _DENSE_LAYER)
            hidden = self.activation(self._map(self.form.dense, hidden))
        return self._map(self.form.output, keyed_dropout(hidden, self.dropout, clock, _LAYER))

    def _map(self, path: str, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.tensors[f"{path}.weight"], self.tensors.get(f"{path}.bias"))


def draw_head(
    config: PretrainedConfig,
    form: HeadForm,
    labels: tuple[str, ...] | None,
    seed: int,
    dropout: float,
    clock: DropoutClock,
    device: torch.device,
) -> TaskHead:
    """A new head, the same on every rank.

    Raises:
        JobError: transformers has no such model for this architecture.
    """
    architecture = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(config.model_type)
    if architecture is None:
        raise JobError(f'task.kind: a base of architecture "{config.model_type}" has no head for labels. Use another base.')
    # OPT 350m's hidden states leave the model narrower.
    width, tensors = getattr(config, "word_embed_proj_dim", config.hidden_size), {}
    for path, rows in ((form.dense, width), (form.output, 1 if labels is None else len(labels))):
        if path:
            tensors[f"{path}.weight"] = _drawn(f"{path}.weight", (rows, width), config, seed)
        if path and form.bias:
            tensors[f"{path}.bias"] = torch.zeros(rows)
    activation = ACT2FN[getattr(config, form.activation, form.activation)]
    trained = {name: tensor.to(device).requires_grad_() for name, tensor in tensors.items()}
    return TaskHead(form, trained, activation, labels, architecture, dropout, clock)


def _drawn(name: str, shape: tuple[int, int], config: PretrainedConfig, seed: int) -> torch.Tensor:
    deviation = getattr(config, "initializer_range", _STANDARD_DEVIATION)
    return torch.empty(shape).normal_(0.0, deviation, generator=generator_of(seed, name))
