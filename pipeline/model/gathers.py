"""Watching ZeRO-3's gathers from outside: how many, how much, how long, and whether the trace holds. Nothing of it is there otherwise.

Written against deepspeed 0.19.8: the coordinator's methods are private.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

_FETCH, _INVALIDATE, _GATHER = "fetch_sub_module", "_invalidate_trace", "_PartitionedParameterCoordinator__all_gather_params"


@dataclass
class Gathers:
    """Counted while they are watched."""

    calls: int = 0
    """Gathers that had something to bring."""
    elements: int = 0
    """Of the parameters that they made whole."""
    invalidations: int = 0
    """Times that the modules came in another order than the trace has, so that prefetching ended."""

    def __add__(self, other: Gathers) -> Gathers:
        return Gathers(self.calls + other.calls, self.elements + other.elements, self.invalidations + other.invalidations)


@contextmanager
def watched_gathers(fetching: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Iterator[Gathers]:
    """Counts while the block runs.

    Args:
        fetching: entered around all that gathers a module's parameters and waits for them.
    """
    originals = {name: getattr(Coordinator, name) for name in (_FETCH, _GATHER, _INVALIDATE)}
    counted = Gathers()

    def fetch(self: Any, *args: Any, **kwargs: Any) -> Any:
        with fetching():
            return originals[_FETCH](self, *args, **kwargs)

    def gather(self: Any, params: Any, forward: bool) -> Any:
        if missing := [p for p in params if p.ds_status is ZeroParamStatus.NOT_AVAILABLE]:
            counted.calls += 1
            counted.elements += sum(p.ds_numel for p in missing)
        return originals[_GATHER](self, params, forward)

    def invalidate(self: Any) -> Any:
        counted.invalidations += 1
        return originals[_INVALIDATE](self)

    try:
        for name, method in ((_FETCH, fetch), (_GATHER, gather), (_INVALIDATE, invalidate)):
            setattr(Coordinator, name, method)
        yield counted
    finally:
        for name, method in originals.items():
            setattr(Coordinator, name, method)
