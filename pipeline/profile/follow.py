"""Memory through one step: what the parts hold, the most of each pass, and how it rises and falls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import nn

from pipeline.model.gathers import Gathers, watched_gathers
from pipeline.model.zero3 import held, shard_bytes
from pipeline.plan.layers import MicroBatch as Sizes
from pipeline.plan.memory import Memory, Setting, memory
from pipeline.profile.storages import GATHERED, WORKING, Storages, timeline
from pipeline.tasks.batch import MicroBatch


@dataclass(frozen=True)
class Followed:
    bytes: dict[str, int]
    """What the parts hold at their largest, by the plan's names; `kept` for the backward pass; the most in the forward pass, and of the
    whole step."""
    timeline: list[dict[str, float]]
    phases: list[tuple[float, str]]
    """When each phase begins, in seconds of the timeline."""
    sizes: tuple[Sizes, ...]
    """Of the step's micro-batches."""


class Follower:
    """Entered around one step.

    Args:
        trained: by the plan's names (pipeline/train/step.py).
        root: the model, with ZeRO-3's hooks.
    """

    def __init__(self, trained: dict[str, list[torch.Tensor]], root: nn.Module) -> None:
        self._root, self._storages, self._open = root, Storages(), ExitStack()
        self._bytes = {"base_shard": shard_bytes(root)} | {name: _bytes(tensors) for name, tensors in trained.items()}
        self.gathers = Gathers()
        self._fixed, self._forward, self._kept = sum(self._bytes.values()), 0, 0
        whole, shards = held(root)
        for tensors in (*trained.values(), shards):
            self._storages.know(tensors)
        self._storages.count(whole, GATHERED)

    def __enter__(self) -> None:
        handle = self._root.register_forward_hook(self._forward_over)
        self._open.callback(handle.remove)
        self.gathers = self._open.enter_context(watched_gathers(self._gathering))
        self._open.enter_context(self._storages)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.close()

    def found(self, begins: list[tuple[float, str]], batches: list[MicroBatch]) -> Followed:
        """Args:
        begins: when each phase began, by the processor's clock.
        """
        most, begin = self._storages, begins[0][0] if begins else 0.0
        passes = {"forward": self._forward + self._fixed, "backward": most.total + self._fixed}
        return Followed(
            self._bytes | {"gathered": most.most[GATHERED], "kept": self._kept} | passes,
            timeline(most.changes, begin),
            [(moment - begin, name) for moment, name in begins],
            tuple(sizes_of(batch) for batch in batches),
        )

    def _forward_over(self, *_: object) -> None:
        # A later micro-batch's forward pass is not told from the passes before it; the most of the step is the same.
        self._forward = self._forward or self._storages.total
        self._kept = max(self._kept, self._storages.live[WORKING])
        self._storages.keep()

    @contextmanager
    def _gathering(self) -> Iterator[None]:
        before, self._storages.maker = self._storages.maker, GATHERED
        try:
            yield
        finally:
            self._storages.maker = before


def sizes_of(batch: MicroBatch) -> Sizes:
    """What the plan knows a micro-batch by."""
    views = [tuple(view.shape) for view in batch.layout.to_padded] if batch.layout else [tuple(batch.tokens.shape)]
    return Sizes(
        tokens=batch.tokens.numel(),
        padded_tokens=sum(count * length for count, length in views),
        label_tokens=len(batch.labels),
        examples=sum(count for count, _ in views),
        longest=max(length for _, length in views),
        pairs=sum(count * length**2 for count, length in views),
    )


def expected(asked: Setting, sizes: tuple[Sizes, ...]) -> Memory:
    """The plan's memory for these micro-batches: that of the one which needs most."""
    return max((memory(asked, size) for size in sizes), key=lambda found: found.allocated["backward"])


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
