"""What ZeRO-3 gathers and when: DeepSpeed's parameter coordinator, followed on sizes alone.

In: the order in which a micro-batch's forward and backward passes use the base's modules, and five settings of the memory
configuration. Out: the most that is gathered at once in each pass, what stays, and what is fetched. It mirrors
`PartitionedParameterCoordinator` of deepspeed 0.19.8 in the steps after it has recorded its trace: fetch, prefetch, release, reuse.

Memory is counted as DeepSpeed allocates it: parameters are gathered one by one, each in place, but those that were asked for together are
held until the last of them has been used; where the configuration wants them in one flat buffer, they are copied out of it, and the buffer
lives as long.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.job.zero import one_by_one
from pipeline.plan.adapted import Adapted, Everywhere
from pipeline.plan.shapes import Part, Shape
from pipeline.plan.tables import tables_of

INT8_GROUP = 128
"""So many elements share a scale where matrices come in 8 bits."""
Pass = Literal["forward", "recompute", "backward", "release"]


@dataclass(frozen=True)
class Prefetch:
    """Of `zero_optimization`, in elements, with DeepSpeed's defaults."""

    bucket: int
    persistence: int
    live: int
    reuse: int
    one_by_one: bool = True

    def keeps(self, elements: int) -> bool:
        """Whether all of a base of so many, but for its tables, may be gathered at once: then micro-batches hand it on."""
        return elements <= min(self.live, self.reuse)


def prefetch_of(zero: dict[str, Any]) -> Prefetch:
    section = zero["zero_optimization"]
    return Prefetch(
        int(section.get("stage3_prefetch_bucket_size", 50_000_000)),
        int(section.get("stage3_param_persistence_threshold", 100_000)),
        int(section.get("stage3_max_live_parameters", 1_000_000_000)),
        int(section.get("stage3_max_reuse_distance", 1_000_000_000)),
        one_by_one(zero),
    )


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


def sent(element_bytes: int, int8: bool) -> float:
    """Share of a matrix' bytes in which it comes.

    Args:
        int8: in 8 bits, with its scales in fp32.
    """
    return (1 + 4 / INT8_GROUP) / element_bytes if int8 else 1.0


def sent_bytes(elements: int, vectors: int, element_bytes: int, int8: bool) -> int:
    """Args:
    vectors: elements of norms and biases among them.
    """
    return round((elements - vectors) * element_bytes * sent(element_bytes, int8)) + vectors * element_bytes


@dataclass(frozen=True)
class _Visit:
    parameters: tuple[int, ...]
    passes: Pass
    layer: int
    leaves: bool = True
    """Backward: a post-backward hook fires, because the module's input has a gradient."""
    keeps: bool = True
    """Forward: something may be kept for a backward pass."""


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
    sizes, visits, stale, vectors = _trace(shape, adapted, prefetch, checkpointing, labels)
    small = {p: size for p, size in enumerate(sizes) if size <= prefetch.persistence}
    between = sum(size for p, size in small.items() if p not in stale)
    # DeepSpeed goes on releasing what it decided to release in the pass after the recorded one.
    first = _Follower(sizes, visits, prefetch, ranks, share, small.keys() & _left(visits) - stale)
    first.run()
    follower = _Follower(sizes, visits, prefetch, ranks, share, small.keys() - stale, first.decisions)
    follower.run()
    # A micro-batch between two others. Nothing that a step has changed changes before the next one.
    kept = follower.behind_forward if prefetch.keeps(sum(sizes)) else frozenset[int]()
    later = _Follower(sizes, visits, prefetch, ranks, share, small.keys() | kept, first.decisions, kept)
    later.run()
    most = {name: max(count, later.most[name]) for name, count in follower.most.items()} if several else follower.most
    forward = max(most["start"], most["below"], most["layers"], most["head"])
    fetched, again = (sum(sizes[p] for p in found.fetched) for found in (follower, later))
    of_vectors = [sum(sizes[p] for p in found.fetched if p in vectors) for found in (follower, later)]
    return Gathered(forward, **most, between=between, fetched=fetched, again=again, vectors=of_vectors[0], vectors_again=of_vectors[1])


def _trace(
    shape: Shape, adapted: Everywhere, prefetch: Prefetch, checkpointing: bool, labels: bool
) -> tuple[tuple[int, ...], list[_Visit], frozenset[int], frozenset[int]]:
    """Sizes of what is gathered; the visits of modules, in the order of a micro-batch; the matrices that a step changes; the vectors."""
    sizes: list[int] = []
    stale: set[int] = set()
    vectors: set[int] = set()
    apart = tables_of(shape, adapted, prefetch.persistence)

    def take(part: Part, trained: Adapted) -> tuple[int, ...]:
        first = len(sizes)
        sizes.extend(part.sizes)
        if trained.weights and part.matrices():
            stale.add(first)
        vectors.update(range(first + len(part.matrices()), len(sizes)))
        return tuple(range(first, len(sizes)))

    table = shape.embeddings.index(shape.table)
    embeddings = [() if apart.embedding and n == table else take(part, adapted.embeddings) for n, part in enumerate(shape.embeddings)]
    layers = [[take(part, trained) for part in shape.layer] for trained in adapted.layers]
    end = [take(part, adapted.end) for part in shape.end]
    head = embeddings[table] if shape.tied else take(shape.head, adapted.end) if shape.head and not apart.head else ()
    # The root and the body have no parameters of their own.
    visits = [_Visit((), "forward", -1)] * 2
    visits += [_Visit(each, "forward", -1) for n, each in enumerate(embeddings) if not (apart.embedding and n == table)]
    for number, layer in enumerate(layers):
        keeps = checkpointing or adapted.layers[number].reached or adapted.layers[number].any
        visits += [_Visit(each, "forward", number, keeps=keeps) for each in layer]
    visits += [_Visit(each, "forward", -1) for each in end]
    if not labels and not apart.head:
        # The head stands outside the graph (pipeline/model/head.py), so it is visited once.
        visits.append(_Visit(head, "forward", -1))
    visits += [_Visit((), "backward", -1)] * 2 + [_Visit(each, "backward", -1) for each in reversed(end)]
    for number in reversed(range(shape.layers)):
        pairs = list(zip(shape.layer, layers[number], strict=True))
        if checkpointing:
            # The layer itself is not recomputed: its backward hook stands outside.
            visits.append(_Visit((), "backward", number))
            visits += [_Visit(each, "recompute", number) for _, each in pairs[1:]]
            pairs = pairs[1:]
        trained = adapted.layers[number]
        for part, each in _backward(pairs):
            # Nothing before the first of what is trained has a gradient, unless checkpointing gives the embeddings one.
            inner = checkpointing or trained.precedes(part, shape)
            if inner or trained.of(part) or trained.own(part) or trained.behind(part):
                visits.append(_Visit(each, "backward", number, inner))
        if checkpointing:
            # What was recomputed belongs to the layer and leaves with it.
            visits.append(_Visit(tuple(p for each in layers[number] for p in each), "release", number))
    outside = adapted.embeddings
    pairs = list(zip(shape.embeddings, embeddings, strict=True))
    if checkpointing or outside.any:
        # What stands between the token embedding and the layers has a gradient too.
        for part, each in reversed(pairs[table + 1 :]):
            if part.inputs or part.keeps or outside.own(part):
                behind = checkpointing or bool(outside.weights or outside.replaces)
                visits.append(_Visit(each, "backward", -1, leaves=behind and (part.inputs > 0 or bool(part.keeps))))
        # Where its output has a gradient, a hook gathers it for a backward pass that does not need it; frozen, checkpointing makes it a
        # leaf that has one (pipeline/model/build.py).
        if not apart.embedding and (checkpointing or outside.weights or outside.replaces):
            visits.append(_Visit(embeddings[table], "backward", -1, leaves=False))
    return tuple(sizes), visits, frozenset(stale), frozenset(vectors)


def _backward(pairs: list[tuple[Part, tuple[int, ...]]]) -> list[tuple[Part, tuple[int, ...]]]:
    """The order in which backward hooks fire: last first, but a module before what is inside it."""
    blocks = []
    while pairs:
        (whole, _), count = pairs[0], 1 + pairs[0][0].inside
        blocks.append([pairs[0], *_backward(pairs[1:count])] if whole.inside else [pairs[0]])
        pairs = pairs[count:]
    return [pair for block in reversed(blocks) for pair in block]


def _left(visits: list[_Visit]) -> set[int]:
    """What the recorded pass leaves gathered if it is small: all else that it has used it releases, small or not."""
    left: set[int] = set()
    for visit in visits:
        if visit.passes == "release" or not visit.leaves:
            left.update(visit.parameters)
        else:
            left.difference_update(visit.parameters)
    return left


@dataclass
class _Group:
    """Parameters gathered together, and the buffer they came in."""

    parameters: set[int]
    flat: int
    """Elements of the buffers."""
    in_place: bool
    """Their memory is the buffers."""
    let_go: int = 0
    """Elements that were released and are held still."""
    arrived: bool = False
    waited: set[int] = field(default_factory=set)


class _Follower:
    """One micro-batch; names as in DeepSpeed's coordinator."""

    def __init__(
        self,
        sizes: tuple[int, ...],
        visits: list[_Visit],
        prefetch: Prefetch,
        ranks: int,
        share: float,
        available: Set[int],
        decisions: list[set[int]] | None = None,
        kept: Set[int] = frozenset(),
    ) -> None:
        """Args:
        available: gathered at the start. What a step changed is gathered again, however small (pipeline/model/zero3.py).
        decisions: what each release lets go. None: it is decided.
        kept: stays for the next micro-batch.
        """
        self._sizes, self._all, self._prefetch, self._ranks, self._share = sizes, visits, prefetch, ranks, share
        self._order = [visit for visit in visits if visit.passes != "release"]
        self._persistent = {p for p, size in enumerate(sizes) if size <= prefetch.persistence}
        self._decided = iter(decisions) if decisions is not None else None
        self.decisions: list[set[int]] = []
        """What each release let go."""
        self.behind_forward: frozenset[int] = frozenset()
        """Available when the forward pass ends."""
        self._kept = kept
        self._available = set(available)
        self._inflight: dict[int, _Group] = {}
        self._holding: dict[int, _Group] = {}
        """Groups of which some have not been used yet."""
        self._live_elements = 0
        self._queue = deque((p, place) for place, visit in enumerate(self._order) for p in visit.parameters)
        self._last_fetched_for = [-1] * len(sizes)
        self._step = 0
        self._layers = [place for place, visit in enumerate(visits) if visit.layer >= 0]
        """Visits of layers."""
        self._now = "start"
        self._elements = sum(sizes[p] for p in self._available)
        self.most = dict.fromkeys(("start", "below", "layers", "head", "loss", "backward", "finish"), self._elements)
        self.fetched: list[int] = []
        """Parameters, as often as they are."""
        self._passed = [0]
        for visit in self._order:
            self._passed.append(self._passed[-1] + sum(sizes[p] for p in visit.parameters))
        self._uses: dict[int, list[int]] = {}
        for place, visit in enumerate(self._order):
            for p in visit.parameters:
                self._uses.setdefault(p, []).append(place)

    def run(self) -> None:
        held: set[int] = set()
        last = max(place for place, visit in enumerate(self._all) if visit.passes == "forward")
        for place, visit in enumerate(self._all):
            self._now = self._moment(place, last)
            if visit.passes == "release":
                self._drop(set(visit.parameters) - self._persistent)
                held.clear()
                continue
            self._grow(0)
            self._fetch(visit)
            if place == last:
                self._now = "loss"
                self._grow(0)
            if visit.passes == "recompute":
                held.update(visit.parameters)
            elif visit.leaves and not held.intersection(visit.parameters):
                self._release(visit)
            if place == last:
                self.behind_forward = frozenset(self._available)

    def _moment(self, place: int, last: int) -> str:
        """Args:
        last: the place of the last visit of the forward pass.
        """
        if place < self._layers[0]:
            return "start"
        if place > self._layers[-1]:
            return "finish"
        if place >= last:
            return "head" if place == last else "backward"
        return "layers" if self._all[place].keeps else "below"

    def _fetch(self, visit: _Visit) -> None:
        missing = {p for p in visit.parameters if p not in self._available and p not in self._inflight}
        if missing:
            self._gather(missing)
        for p in visit.parameters:
            if group := self._inflight.pop(p, None):
                self._wait(group, p)
        fresh = {p for p in visit.parameters if self._last_fetched_for[p] < self._step}
        popped: set[int] = set()
        while self._queue and len(popped) < len(fresh):
            p, place = self._queue.popleft()
            self._last_fetched_for[p] = place
            popped.add(p)
        self._look_ahead()
        self._step += 1

    def _look_ahead(self) -> None:
        if self._prefetch.bucket <= 0:
            return
        room = min(self._prefetch.live - self._live_elements, self._prefetch.bucket)
        chosen: set[int] = set()
        count = 0
        while self._queue and count < room:
            p, place = self._queue.popleft()
            self._last_fetched_for[p] = max(self._last_fetched_for[p], place)
            if p not in self._available and p not in self._inflight and p not in chosen:
                chosen.add(p)
                count += self._sizes[p]
        if chosen:
            self._gather(chosen)

    def _gather(self, parameters: set[int]) -> None:
        # Padded so that every rank's part is the same.
        flat = sum(-(-self._sizes[p] // self._ranks) * self._ranks for p in parameters)
        in_place = self._prefetch.one_by_one or len(parameters) == 1 or self._ranks == 1
        if self._share < 1 and self._ranks > 1:
            flat, in_place = round(flat * self._share), False
        group = _Group(set(parameters), flat, in_place)
        self._inflight.update(dict.fromkeys(parameters, group))
        self._holding.update(dict.fromkeys(parameters, group))
        count = sum(self._sizes[p] for p in parameters)
        self._live_elements += count
        self.fetched += parameters
        self._grow(flat)

    def _wait(self, group: _Group, parameter: int) -> None:
        group.waited.add(parameter)
        if not group.arrived:
            group.arrived = True
            self._available |= group.parameters
            if not group.in_place:
                self._grow(sum(self._sizes[p] for p in group.parameters))
        if group.waited == group.parameters:
            self._elements -= group.let_go if group.in_place else group.flat
            for p in group.parameters:
                self._holding.pop(p, None)

    def _release(self, visit: _Visit) -> None:
        leaving = self._leaving(visit) if self._decided is None else next(self._decided)
        self.decisions.append(leaving)
        self._drop(leaving)

    def _leaving(self, visit: _Visit) -> set[int]:
        leaving = {p for p in visit.parameters if p not in self._persistent and self._last_fetched_for[p] <= self._step}
        for p in list(leaving):
            use = next((place for place in self._uses[p] if place >= self._step), None)
            if use is not None and self._passed[use] - self._passed[self._step] < self._prefetch.reuse:
                leaving.discard(p)
        return leaving

    def _drop(self, parameters: set[int]) -> None:
        for p in (parameters & self._available) - self._kept:
            self._available.discard(p)
            self._live_elements -= self._sizes[p]
            if (group := self._holding.get(p)) and group.in_place:
                group.let_go += self._sizes[p]
            else:
                self._elements -= self._sizes[p]

    def _grow(self, elements: int) -> None:
        self._elements += elements
        self.most[self._now] = max(self.most[self._now], self._elements)
