"""On every rank of an allocation: how fast ranks talk; whether nodes are alike, agree on the time and share the run folder.

Bandwidth is what one direction of a link carries: of an all-gather (n - 1) / n of its output, of an all-reduce twice that of its
input, by its time. Within a node: of one rank. Between nodes: of a whole node, all ranks with one local number talking at once.
"""

from __future__ import annotations

import fcntl
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pipeline.doctor.network import Link, Network, Place
from pipeline.model.build import require_dtype
from pipeline.plan.hardware import gpu_of, named
from pipeline.train.engine import Ranks

T = TypeVar("T")
_TIMES = {1 << 20: 20, 16 << 20: 6, 64 << 20: 3}
"""Bytes of a collective -> how often it is timed."""
_TIMES_ON_GPUS = {256 << 20: 5}
_PINGS = 5
_MEASURED = count()
"""A name in the store is used once."""
_SEEN_S = 5.0
"""A file server may tell of a new file so late."""


def measure(ranks: Ranks, host: str, run: Path, clock: Callable[[], float] = time.time) -> dict[str, Any]:
    """A collective; `Network` as a dict, the same on every rank.

    Args:
        host: of this rank; ranks with the same one are on one node.
        run: where runs are to be written.
        clock: this node's, in seconds.
    """
    # A build without kernels for this GPU says so here, before it fails in words of its own.
    require_dtype("fp16", ranks.device)
    hosts = _told(ranks, host)
    nodes = tuple(dict.fromkeys(hosts))
    local = hosts[: ranks.rank].count(host)
    leaders = [hosts.index(node) for node in nodes]
    within, rail = _groups(hosts, nodes, ranks.rank, local)
    timed = _TIMES | (_TIMES_ON_GPUS if ranks.device.type == "cuda" else {})
    links = [*_links(ranks, within, "within", timed), *_links(ranks, rail, "between", timed)]
    gpu = _gpu(ranks)
    joined = _told(ranks, ranks.joined_s)
    found = Network(
        backend=str(dist.get_backend()),
        ranks=ranks.count,
        nodes=nodes,
        row=gpu[1],
        joined_s=min(joined),
        waited_s=max(joined),
        links=tuple(links),
        clocks=_clocks(ranks, hosts, leaders, clock),
        machines=dict(zip(hosts, _told(ranks, (gpu[0], platform.python_version(), *_versions())), strict=True)),
        folder=str(run),
        **_sharing(ranks, hosts, leaders, run),
    )
    return asdict(found)


def _told(ranks: Ranks, mine: T) -> list[T]:
    """Every rank's, in rank order."""
    everyones: list[Any] = [None] * ranks.count
    dist.all_gather_object(everyones, mine)
    return everyones


def _groups(hosts: list[str], nodes: tuple[str, ...], rank: int, local: int) -> tuple[list[int], list[int]]:
    """This rank's two groups: its node's ranks, and the ranks with its local number, of which every node has one (else none)."""
    members = [[place for place, host in enumerate(hosts) if host == node] for node in nodes]
    within = next(group for group in members if rank in group)
    fewest = min(map(len, members))
    return within, [group[local] for group in members] if local < fewest else []


def _gpu(ranks: Ranks) -> tuple[str, str | None]:
    """What this rank computes on, and its row of the plan's table."""
    if ranks.device.type == "cpu":
        return "CPU", gpu_of("cpu").name
    properties = torch.cuda.get_device_properties(ranks.device)
    row = named(properties.name, properties.total_memory)
    return properties.name, row.name if row else None


def _versions() -> tuple[str, ...]:
    return tuple(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))


def _links(ranks: Ranks, members: list[int], place: Place, timed: dict[int, int]) -> list[Link]:
    """Both collectives over groups of ranks that are all at it together; nothing where no group has two."""
    # Everyone takes part in making every group, and in the same order.
    groups = sorted({tuple(each) for each in _told(ranks, members) if len(each) > 1})
    made = {group: dist.new_group(list(group)) for group in groups}
    own = made.get(tuple(members))
    links = [_timed(ranks, own, len(members), place, *size) for size in timed.items()] if made else []
    if own is not None:
        dist.destroy_process_group(own)
    # A node's rails add up.
    return [replace(link, bytes_s=link.bytes_s * (1 if place == "within" else len(made))) for pair in links for link in pair]


def _timed(ranks: Ranks, group: dist.ProcessGroup | None, count: int, place: Place, nbytes: int, times: int) -> tuple[Link, Link]:
    """Of the slowest rank. One that has no group only waits for the others."""
    part = torch.zeros(nbytes // 4 // max(1, count), device=ranks.device)
    whole = torch.zeros(part.numel() * count, device=ranks.device)

    def gather() -> None:
        dist.all_gather_into_tensor(whole, part, group=group)

    def reduce() -> None:
        dist.all_reduce(whole, group=group)

    rates = []
    for work, moved in ((gather, 1.0), (reduce, 2.0)):
        if group is not None:
            # The first one also makes the connections.
            work()
            _settle(ranks)
        dist.barrier()
        begun = time.perf_counter()
        if group is not None:
            for _ in range(times):
                work()
            _settle(ranks)
        seconds = (time.perf_counter() - begun) / times
        rates.append(moved * whole.nbytes * (count - 1) / count / seconds if group is not None else math.inf)
    gathered, reduced = (min(column) for column in zip(*_told(ranks, rates), strict=True))
    return Link(place, "all-gather", nbytes, gathered), Link(place, "all-reduce", nbytes, reduced)


def _settle(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)


def _clocks(ranks: Ranks, hosts: list[str], leaders: list[int], clock: Callable[[], float]) -> dict[str, tuple[float, float]]:
    """Node -> how far its clock is ahead of the first rank's, and by how much that may be wrong at most: half of the round trip.

    By way of the store, whatever the ranks compute on: the midpoint between sending and hearing is when the other one answered.
    """
    store, found, measured = dist.distributed_c10d._get_default_store(), {hosts[0]: (0.0, 0.0)}, next(_MEASURED)
    for leader in leaders[1:]:
        best = (0.0, float("inf"))
        for ping in range(_PINGS):
            name = f"clock {measured} {leader} {ping}"
            if ranks.first:
                sent, begun = clock(), time.perf_counter()
                store.set(f"{name} asked", "")
                store.wait([f"{name} answered"])
                trip = time.perf_counter() - begun
                theirs = float(store.get(f"{name} answered"))
                best = min(best, (theirs - sent - trip / 2, trip / 2), key=lambda pair: pair[1])
            elif ranks.rank == leader:
                store.wait([f"{name} asked"])
                store.set(f"{name} answered", repr(clock()))
        if ranks.first:
            found[hosts[leader]] = best
    return _told(ranks, found)[0]


def _sharing(ranks: Ranks, hosts: list[str], leaders: list[int], run: Path) -> dict[str, tuple[str, ...]]:
    """Nodes that do not see what the first rank writes where runs are to be, and nodes that its lock there does not keep away."""
    folder = next(each for each in (run.absolute(), *run.absolute().parents) if each.is_dir())
    held, own = None, None
    if ranks.first:
        with suppress(OSError):
            own, name = tempfile.mkstemp(prefix=".zlora-doctor-", dir=folder)
            held = Path(name)
            fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        # A folder that cannot be written is the disks' finding.
        if (file := _told(ranks, held)[0]) is None:
            return {"unshared": (), "unlocked": ()}
        state = _other_side(file) if ranks.rank in leaders[1:] else ""
        states = _told(ranks, state)
        return {key: tuple(hosts[leader] for leader in leaders if states[leader] == key) for key in ("unshared", "unlocked")}
    finally:
        if own is not None:
            os.close(own)
        if held is not None:
            held.unlink(missing_ok=True)


def _other_side(file: Path) -> str:
    deadline = time.monotonic() + _SEEN_S
    while not file.exists():
        if time.monotonic() > deadline:
            return "unshared"
        time.sleep(0.1)
    try:
        with file.open("rb+") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return ""
    except OSError:
        return "unlocked"
    return "unlocked"
