"""What ZeRO-3 gathers in a micro-batch, and the most of it that is there at once in each pass: DeepSpeed followed on sizes alone."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.plan.adapted import Everywhere
from pipeline.plan.coordinator import Follower
from pipeline.plan.prefetch import Prefetch, sent_bytes
from pipeline.plan.shapes import Shape
from pipeline.plan.visits import left, trace


@dataclass(frozen=True)
class Gathered:
    """Elements on one rank; of one micro-batch where nothing else is said."""

    forward: int
    """The most at once."""
    start: int
    """The most before the layers, when nothing is kept yet: of the embeddings."""
    below: int
    """The most in layers below everything trained, which keep nothing."""
    layers: int
    """The most in the others."""
    head: int
    """The most when the head is fetched, and there are no logits yet."""
    loss: int
    """What is there while it is in use: the buffer that it came in is gone."""
    backward: int
    finish: int
    """The most behind the layers' backward pass, when nothing is kept any more."""
    between: int
    """What stays gathered from step to step: parameters below the persistence threshold."""
    fetched: int
    """Of whole parameters: how much is put together on each rank."""
    again: int = 0
    """Fetched by each micro-batch behind a step's first: what did not stay gathered for it."""
    vectors: int = 0
    vectors_again: int = 0
    """Norms and biases among these."""

    def in_step(self, micro_batches: int) -> int:
        """Fetched by so many."""
        return self.fetched + self.again * (micro_batches - 1)

    def bytes_in_step(self, micro_batches: int, element_bytes: int, int8: bool) -> int:
        """The same in bytes as they come."""
        return sent_bytes(self.in_step(micro_batches), self.vectors + self.vectors_again * (micro_batches - 1), element_bytes, int8)


def gathered(
    shape: Shape,
    adapted: Everywhere,
    prefetch: Prefetch,
    ranks: int,
    checkpointing: bool,
    labels: bool = False,
    several: bool = False,
    share: float = 1.0,
) -> Gathered:
    """Of any micro-batch in a step after the first two.

    Args:
        ranks: those that share one copy of the base. 1: it is copied from where it is, tensor by tensor.
        labels: a task's own head takes the place of the vocabulary projection.
        several: micro-batches make a step.
        share: of a parameter's bytes, those in which it comes (`sent`); it is made from them beside them.
    """
    sizes, visits, stale, vectors = trace(shape, adapted, prefetch, checkpointing, labels)
    small = {p: size for p, size in enumerate(sizes) if size <= prefetch.persistence}
    between = sum(size for p, size in small.items() if p not in stale)
    # DeepSpeed goes on releasing what it decided to release in the pass after the recorded one.
    first = Follower(sizes, visits, prefetch, ranks, share, small.keys() & left(visits) - stale)
    first.run()
    follower = Follower(sizes, visits, prefetch, ranks, share, small.keys() - stale, first.decisions)
    follower.run()
    # A micro-batch between two others. Nothing that a step has changed changes before the next one.
    kept = follower.behind_forward if prefetch.keeps(sum(sizes)) else frozenset[int]()
    later = Follower(sizes, visits, prefetch, ranks, share, small.keys() | kept, first.decisions, kept)
    later.run()
    most = {name: max(count, later.most[name]) for name, count in follower.most.items()} if several else follower.most
    forward = max(most["start"], most["below"], most["layers"], most["head"])
    fetched, again = (sum(sizes[p] for p in found.fetched) for found in (follower, later))
    of_vectors = [sum(sizes[p] for p in found.fetched if p in vectors) for found in (follower, later)]
    return Gathered(forward, **most, between=between, fetched=fetched, again=again, vectors=of_vectors[0], vectors_again=of_vectors[1])
