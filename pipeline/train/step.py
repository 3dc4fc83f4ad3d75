"""One optimizer step, which means the same whatever the hardware: loss = sum over target tokens / target tokens of the step.

The sum runs over all ranks and micro-batches. Nothing averages by rank, micro-batch or accumulation: the loss of each
micro-batch is divided by the whole step's count, and gradients are summed by one flat all-reduce (those of a sharded base's own
matrices by a reduce-scatter each: pipeline/methods/subset.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pipeline.job.errors import JobError
from pipeline.job.spec import Train
from pipeline.methods.attach import Delta
from pipeline.methods.subset import BaseParameter
from pipeline.model.causal import Causal
from pipeline.model.zero3 import run_of
from pipeline.tasks.batch import MicroBatch
from pipeline.train.engine import Engine, Ranks
from pipeline.weights.state import Progress

_FIRST_SCALE = 65536.0
_GROWTH_STEPS = 2000
_KINDS = ("weight", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StepResult:
    loss: float
    """Per target token, smoothed as trained."""
    grad_norm: float
    """Before clipping. Where it or the loss is not finite, the step was skipped: the weights are as they were before it."""
    loss_scale: float
    bad: bool
    """Skipped for more than fp16's range: a smaller loss scale would not have saved it."""
    suspects: tuple[int, ...]
    """Of a bad step: this rank's micro-batches whose own loss is not finite."""
    stop: bool
    """Some rank was asked to stop."""


class Stepper:
    """Holds the optimizer and the flat gradient buffer; one call is one step.

    The buffer's last two slots carry the loss and the vote on stopping, so that one all-reduce sums everything.
    """

    def __init__(self, engine: Engine, root: Causal, delta: Delta, train: Train, ranks: Ranks, fp16: bool) -> None:
        self._engine, self._root, self._delta, self._train, self._ranks = engine, root, delta, train, ranks
        self._tensors, self._shards = delta.tensors(), delta.shards()
        runs = [shard.master for shard in self._shards.values()]
        # What every rank has whole is summed by one all-reduce; a sharded matrix's gradient comes summed into the ranks' runs.
        self._flat = _flat_gradient(list(self._tensors.values()), 2, ranks)
        self._flat_runs = _flat_gradient(runs, 0, ranks)
        tensors = [*self._tensors.values(), *runs]
        self.optimizer = torch.optim.AdamW(
            tensors, lr=train.learning_rate, betas=train.adam_betas, eps=train.adam_eps, weight_decay=train.weight_decay, fused=True
        )
        # From the start, so that a state can be taken and put back before the first step too.
        for tensor in tensors:
            self.optimizer.state[tensor] = {
                "step": torch.zeros((), device=tensor.device),
                "exp_avg": torch.zeros_like(tensor),
                "exp_avg_sq": torch.zeros_like(tensor),
            }
        self._scale = _FIRST_SCALE if fp16 else None
        self._good_steps = self._optimizer_steps = self._skipped_steps = 0

    def __call__(self, step: int, micro_batches: list[MicroBatch], target_tokens: int, learning_rate: float) -> StepResult:
        """Takes a step.

        Args:
            step: counted from 0; draws of dropout depend on it.
            micro_batches: this rank's share, as many on every rank.
            target_tokens: of the whole step over all ranks.
        """
        scale = self._scale or 1.0
        self._flat.zero_()
        self._flat_runs.zero_()
        self._delta.clock.step = step
        losses = []
        for number, batch in enumerate(micro_batches, 1):
            self._ranks.watch.at(f"micro-batch {number} of {len(micro_batches)}")
            self._delta.clock.keys = batch.keys
            loss, *_ = self._root(batch=batch, smoothing=self._train.label_smoothing)
            self._engine.before_backward(again=number < len(micro_batches))
            (loss * (scale / target_tokens)).backward()
            self._engine.after_backward()
            losses.append(loss.detach())
            # With its graph goes the embeddings' gradient that recomputing leaves behind.
            del loss
            self._flat[-2] += losses[-1] / target_tokens
        self._delta.clock.keys = None
        # As late as can be: what comes after this waits for the next step.
        self._flat[-1] = float(self._ranks.stop.asked)
        self._ranks.watch.at("all-reduce of the gradient")
        dist.all_reduce(self._flat)
        self._ranks.watch.at("updating the delta")
        gradients = (self._flat[:-2], self._flat_runs)
        for gradient in gradients:
            gradient /= scale
        norm = self._norm()
        loss, stop = self._flat[-2:].tolist()
        if math.isfinite(norm) and math.isfinite(loss):
            self._update(gradients, norm, learning_rate)
            return StepResult(loss, norm, scale, False, (), bool(stop))
        bad = not math.isfinite(loss) or self._scale is None or self._scale <= 1.0
        suspects = tuple(number for number, own in enumerate(losses) if not math.isfinite(own)) if bad else ()
        self._skip(lower_scale=not bad)
        return StepResult(loss, norm, scale, bad, suspects, bool(stop))

    def rehearse(self, batch: MicroBatch) -> None:
        """A micro-batch forward and back, as in a step, which changes nothing."""
        self._delta.clock.keys = batch.keys
        loss, *_ = self._root(batch=batch, smoothing=self._train.label_smoothing)
        (loss * 0.0).backward()
        self._engine.after_backward()
        self._delta.clock.keys = None

    def held(self) -> dict[str, list[torch.Tensor]]:
        """What this rank has of the master weights, of their gradients and of the moments."""
        weights = [*self._tensors.values(), *(shard.master for shard in self._shards.values())]
        moments = [self.optimizer.state[tensor][kind] for tensor in weights for kind in _KINDS[1:]]
        return {"delta": weights, "gradients": [self._flat, self._flat_runs], "optimizer": moments}

    def progress(self) -> dict[str, Any]:
        """The counters that belong to the optimizer, by their names in a state's `Progress`."""
        return {
            "optimizer_steps": self._optimizer_steps,
            "skipped_steps": self._skipped_steps,
            "loss_scale": self._scale,
            "good_steps": self._good_steps,
        }

    def capture(self) -> dict[str, torch.Tensor]:
        """Copies of the master weights and both moments, whole and in main memory, by kind/name: 3 x the trained elements.

        On the first rank; nothing on the others, which hand over their runs of what is sharded.
        """
        return {f"{kind}/{name}": part for kind in _KINDS for name, part in self._captured(kind).items()}

    def capture_weights(self) -> dict[str, torch.Tensor]:
        """Copies of the master weights alone, by name."""
        return self._captured("weight")

    def restore(self, tensors: dict[str, torch.Tensor] | None, progress: Progress) -> None:
        """Puts back what `capture` took.

        Args:
            tensors: on the first rank, which hands them to the others.

        Raises:
            JobError: the state has other tensors than the job trains.
        """
        for kind in _KINDS:
            # What is whole goes in one piece.
            flat = self._one_piece(kind)
            for name, part in self._parts(flat):
                _take(part, f"{kind}/{name}", tensors)
            dist.broadcast(flat, 0)
            for name, part in self._parts(flat):
                self._of(kind, self._tensors[name]).copy_(part)
            for name, shard in self._shards.items():
                whole = torch.empty(shard.shape, device=shard.master.device)
                _take(whole, f"{kind}/{name}", tensors)
                dist.broadcast(whole, 0)
                first, held = run_of(shard.parameter)
                self._of(kind, shard.master)[:held].copy_(whole.view(-1)[first : first + held])
        self._delta.publish()
        for state in self.optimizer.state.values():
            state["step"].fill_(float(progress.optimizer_steps))
        self._optimizer_steps, self._skipped_steps = progress.optimizer_steps, progress.skipped_steps
        if self._scale is not None:
            self._scale, self._good_steps = progress.loss_scale or _FIRST_SCALE, progress.good_steps

    def _of(self, kind: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach() if kind == "weight" else self.optimizer.state[tensor][kind]

    def _captured(self, kind: str) -> dict[str, torch.Tensor]:
        runs = {name: self._whole(shard, self._of(kind, shard.master)) for name, shard in self._shards.items()}
        if not self._ranks.first:
            return {}
        # One copy to main memory for all that is whole.
        parts = dict(self._parts(self._one_piece(kind).to("cpu")))
        return parts | {name: whole for name, whole in runs.items() if whole is not None}

    def _one_piece(self, kind: str) -> torch.Tensor:
        """A flat copy of all that is whole."""
        nothing = torch.empty(0, device=self._ranks.device)
        return torch.cat([nothing, *(self._of(kind, tensor).reshape(-1) for tensor in self._tensors.values())])

    def _parts(self, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The whole tensors in a flat buffer of them, by name."""
        place = 0
        for name, tensor in self._tensors.items():
            yield name, flat[place : place + tensor.numel()].view_as(tensor)
            place += tensor.numel()

    def _whole(self, shard: BaseParameter, run: torch.Tensor) -> torch.Tensor | None:
        """A sharded tensor from all ranks' runs, in the first one's main memory."""
        if self._ranks.first:
            runs = [torch.empty_like(run) for _ in range(self._ranks.count)]
            dist.gather(run, runs)
            return torch.cat([part.to("cpu") for part in runs])[: torch.Size(shard.shape).numel()].view(shard.shape)
        dist.gather(run)
        return None

    def _norm(self) -> float:
        """Of the whole gradient, the same on every rank."""
        norm = self._flat[:-2].norm()
        if not self._shards:
            return float(norm)
        others = self._flat_runs.norm() ** 2
        dist.all_reduce(others)
        return float((norm**2 + others).sqrt())

    def _update(self, gradients: tuple[torch.Tensor, ...], norm: float, learning_rate: float) -> None:
        if self._train.clip_norm and norm > self._train.clip_norm:
            for gradient in gradients:
                gradient *= self._train.clip_norm / norm
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self._delta.publish()
        self._optimizer_steps += 1
        self._good_steps += 1
        if self._scale is not None and self._good_steps % _GROWTH_STEPS == 0:
            self._scale *= 2.0

    def _skip(self, lower_scale: bool) -> None:
        self._skipped_steps += 1
        self._good_steps = 0
        if self._scale is not None and lower_scale:
            self._scale /= 2.0


def _take(part: torch.Tensor, name: str, tensors: dict[str, torch.Tensor] | None) -> None:
    """Copies a stored tensor, on the rank that has them.

    Raises:
        JobError: it is not there, or of another shape.
    """
    if tensors is None:
        return
    stored = tensors.get(name)
    if stored is None or stored.shape != part.shape:
        raise JobError(f"the state has no {name} with shape {list(part.shape)}. Put the job back, or use --fresh.")
    part.copy_(stored)


def _flat_gradient(tensors: list[torch.Tensor], more: int, ranks: Ranks) -> torch.Tensor:
    """One buffer that holds the gradients of all, with so many slots more at its end."""
    flat, place = torch.zeros(sum(tensor.numel() for tensor in tensors) + more, device=ranks.device), 0
    for tensor in tensors:
        tensor.grad = flat[place : place + tensor.numel()].view_as(tensor)
        place += tensor.numel()
    return flat
