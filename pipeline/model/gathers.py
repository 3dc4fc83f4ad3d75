"""Watching ZeRO-3's gathers from outside: how many, how much, how long, and whether the trace holds. Nothing of it is there otherwise.

Written against deepspeed 0.19.8: the coordinator's methods are private.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import astuple, dataclass
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

from pipeline.model import vocabulary
from pipeline.model.rows import OwnRows

_EXCHANGES = ("all_gather", "all_to_all")
_FETCH, _INVALIDATE, _GATHER = "fetch_sub_module", "_invalidate_trace", "_PartitionedParameterCoordinator__all_gather_params"


@dataclass
class Gathers:
    """Counted while they are watched."""

    calls: int = 0
    """Gathers that had something to bring."""
    elements: int = 0
    """Of the parameters that they made whole."""
    vectors: int = 0
    """Of norms and biases among them."""
    exchanged_bytes: int = 0
    """That came from other ranks instead of tables of the vocabulary, or to put the head's together."""
    invalidations: int = 0
    """Times that the modules came in another order than the trace has, so that prefetching ended."""

    def __add__(self, other: Gathers) -> Gathers:
        return Gathers(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


@contextmanager
def watched_gathers(fetching: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Iterator[Gathers]:
    """Counts while the block runs.

    Args:
        fetching: entered around all that gathers a module's parameters and waits for them.
    """
    originals = {name: getattr(Coordinator, name) for name in (_FETCH, _GATHER, _INVALIDATE)}
    exchanges, counted = {name: getattr(vocabulary, name) for name in _EXCHANGES}, Gathers()

    def fetch(self: Any, *args: Any, **kwargs: Any) -> Any:
        with fetching():
            return originals[_FETCH](self, *args, **kwargs)

    def gather(self: Any, params: Any, forward: bool) -> Any:
        if missing := [p for p in params if p.ds_status is ZeroParamStatus.NOT_AVAILABLE]:
            counted.calls += 1
            counted.elements += sum(p.ds_numel for p in missing)
            counted.vectors += sum(p.ds_numel for p in missing if len(p.ds_shape) == 1)
        return originals[_GATHER](self, params, forward)

    def invalidate(self: Any) -> Any:
        counted.invalidations += 1
        return originals[_INVALIDATE](self)

    def exchanging(name: str) -> Callable[..., None]:
        def exchange(output: torch.Tensor, part: torch.Tensor, rows: OwnRows, *splits: list[int]) -> None:
            with fetching():
                exchanges[name](output, part, rows, *splits)
            own = splits[0][rows.rank] * output[:1].numel() if splits else output.numel() // rows.ranks
            counted.exchanged_bytes += (output.numel() - own) * output.element_size()

        return exchange

    try:
        for name in exchanges:
            setattr(vocabulary, name, exchanging(name))
        for name, method in ((_FETCH, fetch), (_GATHER, gather), (_INVALIDATE, invalidate)):
            setattr(Coordinator, name, method)
        yield counted
    finally:
        for name, method in originals.items():
            setattr(Coordinator, name, method)
        for name, exchange in exchanges.items():
            setattr(vocabulary, name, exchange)
