"""Files made side by side by threads, each file by one; reading, hashing, writing and torch's arithmetic let others run meanwhile."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

import torch

T = TypeVar("T")
Tick = Callable[[], None]
Progress = Callable[[Iterable[str]], Iterable[str]]
"""Wraps the iteration over what is done, for a progress bar."""


class _Ended(Exception):
    """Another file failed."""


def cores() -> int:
    return len(os.sched_getaffinity(0))


def side_by_side(
    items: Sequence[T], names: Sequence[str], work: Callable[[T, Tick], None], workers: int | None, progress: Progress = iter
) -> None:
    """Does `work` for every item; it calls its tick once for each of the names that belong to the item.

    Args:
        workers: at a time; None: as many as there are cores.

    Raises:
        whatever the first failing work raises; the others end at their next tick.
    """
    queue: SimpleQueue[Future[None] | None] = SimpleQueue()
    ended = threading.Event()

    def tick() -> None:
        if ended.is_set():
            raise _Ended
        queue.put(None)

    threads = torch.get_num_threads()
    # torch's own threads would only wait for one another beside these.
    with ThreadPoolExecutor(max(1, min(workers or cores(), len(items))), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            left = len(items)
            for item in items:
                pool.submit(work, item, tick).add_done_callback(queue.put)
            bar = iter(progress(names))
            while left:
                if (found := queue.get()) is None:
                    next(bar, None)
                    continue
                found.result()
                left -= 1
            for _ in bar:
                pass
        finally:
            ended.set()
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(threads)
