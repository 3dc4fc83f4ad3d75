"""Which examples a step has, and which rank computes which: pure functions, the same on every rank.

Position p of the stream of examples is entry p mod n of epoch p div n's permutation, so a position counter is all the state
there is. A step is the next `batch_examples` positions; nothing needs to divide evenly.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from pipeline.job.errors import JobError


def permutation(examples: int, seed: str, epoch: int) -> np.ndarray:
    """The order of an epoch's examples."""
    # Here, so that whoever only counts needs no torch.
    import torch

    # Hashed: torch's CPU generator looks at the low 32 bits of its seed only, so both must be in them.
    mixed = hashlib.sha256(f"{seed}:{epoch}".encode()).digest()[:4]
    generator = torch.Generator().manual_seed(int.from_bytes(mixed, "little"))
    # As few bytes as do: there may be a hundred million examples.
    return torch.randperm(examples, generator=generator, dtype=torch.int32 if examples < 1 << 31 else torch.int64).numpy()


@dataclass(frozen=True)
class Stream:
    """The endless stream of examples of one source or of several, which lie one behind the other."""

    sizes: tuple[int, ...]
    """Examples of each source."""
    seed: int
    weights: tuple[float, ...] = (1.0,)
    """How often each source's examples come in an epoch. What is left of a source in one epoch comes in the next."""

    @property
    def epoch(self) -> int:
        """Examples of an epoch."""
        return sum(self.counts)

    def end(self, epochs: float) -> int:
        """The position where so many epochs end: after one example at least, however small the share of an epoch."""
        return max(1, round(self.epoch * epochs))

    def examples(self, first: int, count: int) -> list[int]:
        """The examples at `count` positions from `first` on. Epochs run into one another, so every step but the last can be full."""
        return [self._at(position) for position in range(first, first + count)]

    @cached_property
    def counts(self) -> list[int]:
        """Examples of an epoch, of each source."""
        return [max(1, round(size * weight)) for size, weight in zip(self.sizes, self.weights, strict=True)]

    @cached_property
    def _permutation(self) -> Callable[[int, str, int], np.ndarray]:
        # Those that are looked into by turns: two epochs, and of every source as many rounds as an epoch has, and two.
        return lru_cache(maxsize=2 + sum(math.ceil(weight) + 2 for weight in self.weights))(permutation)

    def _at(self, position: int) -> int:
        place, passed = self._drawn(position, self.epoch, str(self.seed)), 0
        for number, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            if place < count:
                # A source's own stream goes on from epoch to epoch.
                own = position // self.epoch * count + place
                return passed + (place if count == size else self._drawn(own, size, f"{self.seed}:{number}"))
            place, passed = place - count, passed + size
        raise AssertionError("a place beyond its epoch")

    def _drawn(self, position: int, examples: int, seed: str) -> int:
        epoch, place = divmod(position, examples)
        return int(self._permutation(examples, seed, epoch)[place])


def refuse_longer(longest: int, micro_batch_tokens: int) -> None:
    """Raises:
    JobError: a single example does not fit a micro-batch."""
    if longest > micro_batch_tokens:
        raise JobError(
            f"train.micro_batch_tokens = {micro_batch_tokens}: the longest example has {longest} tokens. "
            f"Set it to {longest} or more, or limit examples with train.max_tokens."
        )


def deal(lengths: list[int], ranks: int, limit_tokens: int, packed: bool) -> list[list[list[int]]]:
    """Deals the examples of a step to ranks and micro-batches.

    Args:
        lengths: tokens of each example of the step.
        limit_tokens: of one micro-batch; a packed one costs the sum of its lengths, a padded one count x longest. An example
            longer than the limit, which training refuses, raises it to its own length.

    Returns:
        [rank][micro-batch] -> indices into `lengths`. Every rank gets the same number of micro-batches, as ZeRO-3's
        collectives need; some may be empty.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    limit_tokens = max([limit_tokens, *lengths])
    bins = (_balanced if packed else _alike)(order, lengths, ranks, limit_tokens)
    rounds = max(1, math.ceil(len(bins) / ranks))
    bins += [[] for _ in range(ranks * rounds - len(bins))]
    return [[sorted(bins[micro * ranks + rank]) for micro in range(rounds)] for rank in range(ranks)]


def _balanced(order: list[int], lengths: list[int], ranks: int, limit_tokens: int) -> list[list[int]]:
    """Longest first, each to the least filled of as few bins as do, a multiple of the ranks."""
    rounds = max(1, math.ceil(sum(lengths) / (ranks * limit_tokens)))
    while True:
        bins: list[list[int]] = [[] for _ in range(ranks * rounds)]
        heap = [(0, place) for place in range(len(bins))]
        for index in order:
            filled, place = heapq.heappop(heap)
            bins[place].append(index)
            heapq.heappush(heap, (filled + lengths[index], place))
        if max(heap)[0] <= limit_tokens:
            return bins
        rounds += 1


def _alike(order: list[int], lengths: list[int], ranks: int, limit_tokens: int) -> list[list[int]]:
    """Runs of examples of like length, so that little is padded; small enough that every rank has some."""
    limit_tokens = min(limit_tokens, max([math.ceil(sum(lengths) / ranks), *lengths]))
    bins: list[list[int]] = []
    for index in order:
        if not bins or lengths[bins[-1][0]] * (len(bins[-1]) + 1) > limit_tokens:
            bins.append([])
        bins[-1].append(index)
    return bins
