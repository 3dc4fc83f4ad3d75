"""The one training loop: for every step, deal its examples, take the step, write it down; now and then save and evaluate.

Every rank knows every example's length, so the deal and the step's count of target tokens need no communication.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pipeline.job.errors import JobError
from pipeline.job.spec import Train
from pipeline.tasks.batch import collate
from pipeline.tasks.example import Sequence
from pipeline.tasks.order import deal, step_examples, total_steps
from pipeline.train.engine import Ranks
from pipeline.train.schedule import learning_rate
from pipeline.train.step import Stepper


@dataclass(frozen=True)
class Course:
    """What is trained on and for how long."""

    sequences: list[Sequence]
    train: Train

    @property
    def epochs(self) -> float | None:
        return None if self.train.steps else self.train.epochs or 1.0

    @property
    def steps(self) -> int:
        return total_steps(len(self.sequences), self.train.batch_examples, self.epochs, self.train.steps)

    def refuse_impossible(self) -> None:
        """Raises:
        JobError: a single example does not fit a micro-batch."""
        longest = max(map(len, self.sequences))
        if longest > self.train.micro_batch_tokens:
            raise JobError(
                f"train.micro_batch_tokens = {self.train.micro_batch_tokens}: the longest example has {longest} tokens. "
                f"Set it to {longest} or more, or limit examples with train.max_tokens."
            )


def run_course(
    course: Course,
    stepper: Stepper,
    ranks: Ranks,
    on_step: Callable[[int, dict[str, float]], None],
    on_save: Callable[[int], None],
    on_evaluate: Callable[[int], None],
    evaluate_every_steps: int | None,
) -> None:
    """Trains to the end of the course.

    Args:
        on_step, on_save, on_evaluate: called on every rank with the number of steps done.
    """
    train, total = course.train, course.steps
    skipped = 0
    for step in range(total):
        start = time.perf_counter()
        examples = step_examples(step, train.batch_examples, len(course.sequences), train.seed, course.epochs)
        sequences = [course.sequences[index] for index in examples]
        dealt = deal([len(s) for s in sequences], ranks.count, train.micro_batch_tokens, train.packing)
        micro_batches = [
            collate([sequences[i] for i in chosen], [examples[i] for i in chosen], train.packing, ranks.device)
            for chosen in dealt[ranks.rank]
        ]
        if train.dropout:
            # The base's own dropout: reproducible at the same number of ranks only.
            torch.manual_seed(hash((train.seed, step, ranks.rank)) & 0x7FFFFFFF)
        targets = sum(s.target_tokens for s in sequences)
        rate = learning_rate(train, step, total)
        result = stepper(step, micro_batches, targets, rate)
        skipped += result.skipped
        seconds = time.perf_counter() - start
        on_step(
            step + 1,
            {
                "loss": result.loss,
                "learning_rate": rate,
                "grad_norm": result.grad_norm,
                "loss_scale": result.loss_scale,
                "skipped_steps": skipped,
                "examples": len(examples),
                "tokens": sum(map(len, sequences)),
                "target_tokens": targets,
                "padding_share": _padding_share(dealt, [len(s) for s in sequences], train.packing),
                "target_tokens_per_s": targets / seconds,
                "examples_per_s": len(examples) / seconds,
                "step_s": seconds,
                "peak_memory_bytes": peak_memory_bytes(ranks.device),
            },
        )
        last = step + 1 == total
        if last or (step + 1) % train.save_every_steps == 0:
            on_save(step + 1)
        if last or (evaluate_every_steps and (step + 1) % evaluate_every_steps == 0):
            on_evaluate(step + 1)


def peak_memory_bytes(device: torch.device) -> int:
    """The most this process has held: device memory on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _padding_share(dealt: list[list[list[int]]], lengths: list[int], packed: bool) -> float:
    """Share of the computed tokens, over all ranks, that are padding."""
    if packed:
        return 0.0
    bins = [chosen for rank in dealt for chosen in rank if chosen]
    computed = sum(len(chosen) * max(lengths[i] for i in chosen) for chosen in bins)
    return 1.0 - sum(lengths) / computed
