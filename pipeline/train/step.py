"""One optimizer step, which means the same whatever the hardware: loss = sum over target tokens / target tokens of the step.

The sum runs over all ranks and micro-batches. Nothing averages by rank, micro-batch or accumulation: the loss of each
micro-batch is divided by the whole step's count, and gradients are summed by one flat all-reduce.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pipeline.job.errors import Diverged
from pipeline.job.spec import Train
from pipeline.methods.attach import Delta
from pipeline.model.causal import Causal
from pipeline.tasks.batch import MicroBatch
from pipeline.train.engine import Engine

_FIRST_SCALE = 65536.0
_GROWTH_STEPS = 2000


@dataclass(frozen=True)
class StepResult:
    loss: float
    """Per target token, smoothed as trained."""
    grad_norm: float
    """Before clipping; not finite where the step was skipped."""
    loss_scale: float
    skipped: bool


class Stepper:
    """Holds the optimizer and the flat gradient buffer; one call is one step.

    The buffer's last slot carries the loss, so that one all-reduce sums everything.
    """

    def __init__(self, engine: Engine, root: Causal, delta: Delta, train: Train, fp16: bool) -> None:
        self._engine, self._root, self._delta, self._train = engine, root, delta, train
        tensors = list(delta.tensors().values())
        self._flat = torch.zeros(sum(t.numel() for t in tensors) + 1, device=tensors[0].device)
        place = 0
        for tensor in tensors:
            tensor.grad = self._flat[place : place + tensor.numel()].view_as(tensor)
            place += tensor.numel()
        self.optimizer = torch.optim.AdamW(
            tensors, lr=train.learning_rate, betas=train.adam_betas, eps=train.adam_eps, weight_decay=train.weight_decay, fused=True
        )
        self._scale = _FIRST_SCALE if fp16 else None
        self._good_steps = 0

    def __call__(self, step: int, micro_batches: list[MicroBatch], target_tokens: int, learning_rate: float) -> StepResult:
        """Takes a step.

        Args:
            step: counted from 0; draws of dropout depend on it.
            micro_batches: this rank's share, as many on every rank.
            target_tokens: of the whole step over all ranks.

        Raises:
            Diverged: gradients are not finite and no loss scale is left to lower.
        """
        scale = self._scale or 1.0
        self._flat.zero_()
        self._delta.clock.step = step
        for batch in micro_batches:
            self._delta.clock.keys = batch.keys
            loss, _ = self._root(batch=batch, smoothing=self._train.label_smoothing)
            (loss * (scale / target_tokens)).backward()
            self._engine.after_backward()
            self._flat[-1] += loss.detach() / target_tokens
        self._delta.clock.keys = None
        dist.all_reduce(self._flat)
        gradient = self._flat[:-1]
        gradient /= scale
        norm = float(gradient.norm())
        result = StepResult(float(self._flat[-1]), norm, scale, not math.isfinite(norm))
        if result.skipped:
            self._lower_scale(step, result)
            return result
        if self._train.clip_norm and norm > self._train.clip_norm:
            gradient *= self._train.clip_norm / norm
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self._raise_scale()
        return result

    def _lower_scale(self, step: int, result: StepResult) -> None:
        if self._scale is None or self._scale <= 1.0:
            raise Diverged(
                f"step {step + 1}: the gradient is not finite (loss {result.loss:.4g}). "
                "Lower train.learning_rate, set train.clip_norm, or use another base.dtype; a delta saved before is kept."
            )
        self._scale /= 2.0
        self._good_steps = 0

    def _raise_scale(self) -> None:
        self._good_steps += 1
        if self._scale is not None and self._good_steps % _GROWTH_STEPS == 0:
            self._scale *= 2.0
