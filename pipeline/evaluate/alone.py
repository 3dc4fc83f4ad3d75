"""Work of the first rank alone (METEOR takes a minute) while the others wait: no collective times out, and a request to stop is heard."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch.distributed as dist

from pipeline.job.errors import JobError
from pipeline.train.engine import Ranks, StopAgreed

T = TypeVar("T")
_BEAT_S = 0.5


def on_first_rank(ranks: Ranks, phase: str, work: Callable[[], T]) -> T:
    """Runs `work` on the first rank, beside its main thread; every rank gets the answer.

    Args:
        phase: for the watchdog.

    Raises:
        JobError: `work` did; on every rank.
        StopAgreed: a rank was asked to stop; `work` is left to itself.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix=phase)
    working: Future[T] | None = thread.submit(work) if ranks.first else None
    thread.shutdown(wait=False)
    while True:
        ranks.watch.at(phase)
        if working is not None:
            wait([working], _BEAT_S)
        goes_on, stop = ranks.any(working is not None and not working.done(), ranks.stop.asked)
        if not goes_on:
            break
        if stop:
            raise StopAgreed
    told: list[Any] = [None, None]
    if working is not None:
        try:
            told[0] = working.result()
        except JobError as error:
            told[1] = str(error)
    dist.broadcast_object_list(told)
    if told[1]:
        raise JobError(told[1], everywhere=True)
    answer: T = told[0]
    return answer
