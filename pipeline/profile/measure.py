"""A few real steps, looked at in turn: as they are and by the clock, by memory, by module, and as a trace.

Each look costs, so none is taken at what another measures, and speed is of steps that nobody looks at.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from pipeline.model.gathers import Gathers, watched_gathers
from pipeline.profile.follow import Followed, Follower
from pipeline.profile.modules import ModuleTime, slowest, timed_modules
from pipeline.profile.stopwatch import GATHER, Key, Places, Stopwatch
from pipeline.profile.trace import traced
from pipeline.runs.session import Session
from pipeline.tasks.batch import MicroBatch
from pipeline.train.loop import Course, take_steps
from pipeline.train.step import Stepper, StepResult

FIRST = 2
"""Steps in which ZeRO-3 takes down the order of the modules, and gathers without looking ahead."""
LOOKS = 3
"""Steps for memory, modules and the trace, one each."""


class Watched(Stepper):
    """Keeps the micro-batches that it was given."""

    batches: list[MicroBatch]

    def __call__(self, step: int, micro_batches: list[MicroBatch], target_tokens: int, learning_rate: float) -> StepResult:
        self.batches = micro_batches
        return super().__call__(step, micro_batches, target_tokens, learning_rate)


@dataclass(frozen=True)
class Measured:
    """On one rank."""

    first_s: float
    """Of the first step."""
    steps: dict[str, tuple[dict[str, float], ...]]
    """Look -> values of its steps, as `metrics.jsonl` has them; `plain` are those that nobody looked at."""
    seconds: dict[Key, float]
    """Of all steps by the clock together, by phase and what in it."""
    micro_batches: tuple[int, ...]
    """Of each of them, on this rank."""
    gathers: Gathers
    """In all of them together."""
    capture_s: float
    """Training stands still for so long at a save."""
    followed: Followed
    """Memory."""
    modules: list[ModuleTime]


def measure(session: Session, course: Course, places: Places, steps: int, trace: Path | None) -> Iterator[str | Measured]:
    """Yields what it has done, once a step, and in the end what came out.

    Args:
        steps: as they are, and so many by the clock.
        trace: a file; None on the ranks that write none.
    """
    device, root = session.ranks.device, session.root
    stepper = Watched(session.engine, root, session.delta, course.train, session.ranks, session.job.base.dtype == "fp16")
    taken = (one.values for one in take_steps(course, stepper, session.ranks))
    first_s = next(taken)["step_s"]
    yield "first step"
    for _ in range(FIRST - 1):
        next(taken)
        yield "a first step"
    stopwatch, gathers = Stopwatch(device), Gathers()
    plain, timed, counts = [], [], []
    # In turn: a machine is not equally fast all the time.
    for _ in range(steps):
        plain.append(next(taken))
        yield "a step as it is"
        with _phases(root, places, stopwatch), watched_gathers(lambda: stopwatch.of(GATHER)) as counted, _reducing(stopwatch):
            timed.append(next(taken))
        gathers += counted
        counts.append(len(stepper.batches))
        yield "a step by the clock"
    follower, by_processor = Follower(stepper.held(), root), Stopwatch()
    with _phases(root, places, by_processor), follower:
        followed = next(taken)
    memory = follower.found(by_processor.begins(), stepper.batches)
    yield "memory"
    of_modules = Stopwatch(device)
    with _phases(root, places, of_modules), watched_gathers(lambda: of_modules.of(GATHER)), timed_modules(root, of_modules):
        modules = next(taken)
    yield "modules"
    with traced(root, device, trace):
        seen = next(taken)
    yield "trace"
    saving = Stopwatch(device)
    saving.phase("save")
    stepper.capture()
    saving.stop()
    yield Measured(
        first_s=first_s,
        steps={"plain": tuple(plain), "clock": tuple(timed), "memory": (followed,), "modules": (modules,), "trace": (seen,)},
        seconds=stopwatch.seconds(),
        micro_batches=tuple(counts),
        gathers=gathers,
        capture_s=sum(saving.seconds().values()),
        followed=memory,
        modules=slowest(of_modules.seconds()),
    )


@contextmanager
def _phases(root: nn.Module, places: Places, stopwatch: Stopwatch) -> Iterator[None]:
    """The places of the loop begin the stopwatch's phases, and the end of a forward pass the backward one."""
    handle = root.register_forward_hook(lambda *_: stopwatch.phase("backward"))
    places.stopwatch = stopwatch
    try:
        yield
    finally:
        stopwatch.stop()
        places.stopwatch = None
        handle.remove()


@contextmanager
def _reducing(stopwatch: Stopwatch) -> Iterator[None]:
    """Gradients of a sharded base's own matrices are summed in the backward pass (pipeline/methods/subset.py)."""
    original = dist.reduce_scatter_tensor

    def reduce(*args: Any, **kwargs: Any) -> Any:
        with stopwatch.of("reduce"):
            return original(*args, **kwargs)

    dist.reduce_scatter_tensor = reduce
    try:
        yield
    finally:
        dist.reduce_scatter_tensor = original
