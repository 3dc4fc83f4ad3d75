"""DeepSpeed's parameter coordinator on sizes alone: one micro-batch's fetches, prefetches, releases and reuse, and the most that is there.

In: the visits of modules and the settings of the memory configuration. It mirrors `PartitionedParameterCoordinator` of deepspeed 0.19.8
in the steps after it has recorded its trace.

Memory is counted as DeepSpeed allocates it: parameters are gathered one by one, each in place, but those that were asked for together are
held until the last of them has been used; where the configuration wants them in one flat buffer, or they come in 8 bits, they are made from
what came, and that lives as long.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Set
from dataclasses import dataclass, field

from pipeline.plan.prefetch import Prefetch
from pipeline.plan.visits import Visit


@dataclass
class Group:
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


class Follower:
    """One micro-batch; names as in DeepSpeed's coordinator."""

    def __init__(
        self,
        sizes: tuple[int, ...],
        visits: list[Visit],
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
        self._inflight: dict[int, Group] = {}
        self._holding: dict[int, Group] = {}
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

    def _fetch(self, visit: Visit) -> None:
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
        group = Group(set(parameters), flat, in_place)
        self._inflight.update(dict.fromkeys(parameters, group))
        self._holding.update(dict.fromkeys(parameters, group))
        count = sum(self._sizes[p] for p in parameters)
        self._live_elements += count
        self.fetched += parameters
        self._grow(flat)

    def _wait(self, group: Group, parameter: int) -> None:
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

    def _release(self, visit: Visit) -> None:
        leaving = self._leaving(visit) if self._decided is None else next(self._decided)
        self.decisions.append(leaving)
        self._drop(leaving)

    def _leaving(self, visit: Visit) -> set[int]:
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
