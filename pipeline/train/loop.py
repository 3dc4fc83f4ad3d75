"""The one training loop: for every step, deal its examples, take the step, say what came of it. Saving and scoring are the caller's.

Every rank knows every example's length, so the deal and the step's count of target tokens need no communication.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

from pipeline.job.errors import Diverged, JobError
from pipeline.job.spec import Train
from pipeline.tasks.batch import collate
from pipeline.tasks.order import Stream, deal, refuse_longer
from pipeline.tasks.sequences import Sequences
from pipeline.train.engine import Ranks
from pipeline.train.schedule import learning_rate
from pipeline.train.step import Stepper, StepResult
from pipeline.weights.state import Progress

_NAMED = 8
"""Examples that a message names at most."""


@dataclass(frozen=True)
class Course:
    """What is trained on, from where, and for how long."""

    data: Sequences
    stream: Stream
    """The order of its examples."""
    train: Train
    start: Progress = field(default_factory=Progress)

    @property
    def end(self) -> int | None:
        """Position in the stream of examples where the epochs end; None where the job counts steps."""
        return None if self.train.steps else self.stream.end(self.train.epochs or 1.0)

    @property
    def steps(self) -> int:
        """Of the whole run, those before the start included."""
        if self.end is None:
            assert self.train.steps is not None
            return self.train.steps
        # A run that ended in a smaller step and now goes on for more epochs continues with the next example.
        return self.start.step + -(-(self.end - self.start.position_examples) // self.train.batch_examples)

    def examples(self, step: int) -> list[int]:
        """The examples of a step (counted from 0), in stream order."""
        first = self.start.position_examples + (step - self.start.step) * self.train.batch_examples
        count = self.train.batch_examples if self.end is None else min(self.train.batch_examples, self.end - first)
        return self.stream.examples(first, count)

    def refuse_impossible(self) -> None:
        """Raises:
        JobError: a single example does not fit a micro-batch, or the run is past its end already."""
        refuse_longer(self.data.longest, self.train.micro_batch_tokens)
        if self.steps < self.start.step:
            key = "steps" if self.train.steps else "epochs"
            raise JobError(
                f"train.{key} = {getattr(self.train, key)}: makes {max(0, self.steps)} steps, and the run has taken {self.start.step}. "
                "Set it higher, or use --run for another folder."
            )


@dataclass(frozen=True)
class Taken:
    """A step that was taken."""

    progress: Progress
    values: dict[str, float]
    """For the record: loss, speed, memory."""
    bad: bool
    """Loss or gradient was not finite, so nothing changed."""
    stop: bool
    """Some rank was asked to stop: all ranks see it at the same step."""


def rehearse(course: Course, stepper: Stepper, ranks: Ranks) -> None:
    """A micro-batch as full as they come, of the longest examples, forward and back, before anything is written: what does not fit is known
    now, and not when these examples come.

    Raises:
        JobError: it does not fit into this rank's GPU.
    """
    if course.steps == course.start.step:
        return
    ranks.watch.at("rehearsing the longest examples")
    chosen, train = _fullest(course, ranks), course.train
    try:
        stepper.rehearse(collate([course.data[index] for index in chosen], chosen, train.packing, ranks.device))
    except torch.OutOfMemoryError:
        tokens, most = sum(map(course.data.tokens, chosen)), torch.cuda.max_memory_allocated(ranks.device) / 2**30
        less = max(course.data.longest, train.micro_batch_tokens // 2)
        raise JobError(
            f"train.micro_batch_tokens = {train.micro_batch_tokens}: {tokens} tokens of the longest examples do not fit beside the "
            f"{most:.1f} GiB that were there when it failed. Set it to {less}, or memory.gradient_checkpointing = true, "
            "or see what zlora plan says."
        ) from None


def _fullest(course: Course, ranks: Ranks) -> list[int]:
    """Examples of the fullest micro-batch that this rank may get."""
    data, train = course.data, course.train
    lengths = data.lengths()
    longest = np.argsort(-lengths, kind="stable")[: train.batch_examples].tolist()
    dealt = deal([int(lengths[index]) for index in longest], ranks.count, train.micro_batch_tokens, train.packing)[ranks.rank]
    if len(dealt) == 1:
        return [longest[place] for place in dealt[0]]
    room = train.micro_batch_tokens
    if not train.packing:
        return longest[: max(1, room // int(lengths[longest[0]]))]
    # Where a step takes several, any examples may come together.
    chosen: list[int] = []
    counts = np.bincount(lengths)
    counts[0] = 0
    while len(chosen) < train.batch_examples and (fitting := np.flatnonzero(counts[: room + 1])).size:
        length = int(fitting[-1])
        taken = min(int(counts[length]), room // length, train.batch_examples - len(chosen))
        chosen += np.flatnonzero(lengths == length)[:taken].tolist()
        room -= taken * length
        counts[length:] = 0
    return chosen


def take_steps(course: Course, stepper: Stepper, ranks: Ranks) -> Iterator[Taken]:
    """Trains to the end of the course.

    Raises:
        Diverged: `train.stop_after_bad_steps` steps in a row were bad; names the first and its examples.
    """
    train, total, progress = course.train, course.steps, course.start
    streak = ["an earlier sitting"] * progress.bad_steps
    for step in range(course.start.step, total):
        start = time.perf_counter()
        ranks.watch.at("dealing examples", step + 1)
        examples = course.examples(step)
        lengths = [course.data.tokens(index) for index in examples]
        dealt = deal(lengths, ranks.count, train.micro_batch_tokens, train.packing)
        micro_batches = [
            collate([course.data[examples[i]] for i in chosen], [examples[i] for i in chosen], train.packing, ranks.device)
            for chosen in dealt[ranks.rank]
        ]
        if train.dropout:
            # The base's own dropout: reproducible at the same number of ranks only.
            torch.manual_seed(hash((train.seed, step, ranks.rank)) & 0x7FFFFFFF)
        targets = sum(course.data.targets(index) for index in examples)
        rate = learning_rate(train, step, total)
        data_s = time.perf_counter() - start
        result = stepper(step, micro_batches, targets, rate)
        seconds = time.perf_counter() - start
        if result.bad:
            streak.append(_suspects(course, step, examples, dealt, result, ranks))
            if len(streak) == train.stop_after_bad_steps:
                raise Diverged(_diverged(course, step, streak, result))
        else:
            streak.clear()
        progress = Progress(
            step=step + 1,
            position_examples=progress.position_examples + len(examples),
            seconds=progress.seconds + seconds,
            bad_steps=len(streak),
            **stepper.progress(),
        )
        values = {
            "loss": result.loss,
            "learning_rate": rate,
            "grad_norm": result.grad_norm,
            "loss_scale": result.loss_scale,
            "skipped_steps": progress.skipped_steps,
            "examples": len(examples),
            "tokens": sum(lengths),
            "target_tokens": targets,
            "padding_share": _padding_share(dealt, lengths, train.packing),
            "target_tokens_per_s": targets / seconds,
            "examples_per_s": len(examples) / seconds,
            "step_s": seconds,
            "data_s": data_s,
            "seconds": progress.seconds,
            "peak_memory_bytes": peak_memory_bytes(ranks.device),
        }
        yield Taken(progress, values, result.bad, result.stop)


def _suspects(course: Course, step: int, examples: list[int], dealt: list[list[list[int]]], result: StepResult, ranks: Ranks) -> str:
    """A bad step and the examples that may be the cause: those of micro-batches whose own loss is not finite, else all."""
    found: list[list[int]] = [[] for _ in range(ranks.count)]
    own = [examples[i] for number in result.suspects for i in dealt[ranks.rank][number]]
    dist.all_gather_object(found, own)
    names = [course.data.source(index) for index in sorted({index for part in found for index in part}) or sorted(set(examples))]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"step {step + 1} ({', '.join(names[:_NAMED])}{more})"


def _diverged(course: Course, step: int, streak: list[str], result: StepResult) -> str:
    what = f"the loss is {result.loss:.4g}" if not math.isfinite(result.loss) else f"the gradient norm is {result.grad_norm:.4g}"
    many = f" and in the {len(streak) - 1} steps after it" if len(streak) > 1 else ""
    return (
        f"step {step + 1}: {what}; so it was first in {streak[0]}{many}. The weights are as before that step, and the last state is kept. "
        "Mend the examples if they are the cause (then use another --run); or lower train.learning_rate or set train.clip_norm "
        "and go on with --accept-changes; or use another base.dtype."
    )


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
