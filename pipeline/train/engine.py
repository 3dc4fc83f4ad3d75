"""Ranks and DeepSpeed: the process group, and ZeRO-3's hooks on the frozen base. The only `deepspeed.initialize`.

DeepSpeed is given no optimizer: it shards, gathers, prefetches and releases the base, and nothing else.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from pipeline.cluster.stop import StopRequest
from pipeline.cluster.watchdog import Watchdog
from pipeline.job.errors import JobError
from pipeline.job.zero import for_deepspeed, zero_stage
from pipeline.model.zero3 import Keeping, release_rows

T = TypeVar("T")
_LONG = timedelta(days=1)
_DONE = "done"
_FETCHES = count()
_EVER = timedelta(days=365)
_LOST = re.compile(r"connection (closed|reset|refused)|broken pipe|timed out|remote process|socket|nccl|gloo", re.IGNORECASE)


@dataclass(frozen=True)
class Ranks:
    """This process as one of many."""

    rank: int
    count: int
    local: int
    """Rank on its machine."""
    device: torch.device
    watch: Watchdog = field(default_factory=Watchdog)
    """Is told where this rank is."""
    stop: StopRequest = field(default_factory=StopRequest)
    joined_s: float = 0.0
    """It took to meet the others; the last one to come did not wait for any."""

    @property
    def first(self) -> bool:
        return self.rank == 0

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether some rank has it set. A collective."""
        votes = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(votes)
        return tuple(bool(vote) for vote in votes.tolist())


class StopAgreed(Exception):
    """Raised on every rank at the same place: some rank was asked to stop."""


def join_ranks(timeout_s: float = 1800.0, stop: StopRequest | None = None, watch: Watchdog | None = None) -> Ranks:
    """Joins the process group that the environment describes (ours, torchrun's or Slurm's).

    Args:
        timeout_s: how long a rank may get no further. The watchdog keeps to it; collectives give up later, so that it reports first.
        stop, watch: of this rank, where it trains.

    Raises:
        JobError: there are GPUs, and torch cannot use them.
    """
    rank, count, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    cuda = torch.cuda.is_available()
    if not cuda and int(os.environ.get("ZLORA_GPUS", "0")):
        raise JobError(
            f"this machine shows {os.environ['ZLORA_GPUS']} GPUs, but torch {torch.__version__} can use none of them. "
            "Install a torch build for their driver (make setup TORCH=...), or set CUDA_VISIBLE_DEVICES= to train on the CPU."
        )
    device = torch.device("cpu")
    if cuda:
        # A batch system may show each task its own GPU only, which then is number 0. DeepSpeed reads LOCAL_RANK too.
        device = torch.device("cuda", local if local < torch.cuda.device_count() else 0)
        os.environ["LOCAL_RANK"] = str(device.index)
        torch.cuda.set_device(device)
        # On standard output, which is logs/rank<N>.txt, unless the user has named a file (NCCL_DEBUG_FILE).
        os.environ.setdefault("NCCL_DEBUG", "WARN")
    rendezvous, begun = os.environ.get("ZLORA_RENDEZVOUS", "env://"), time.perf_counter()
    dist.init_process_group(
        "nccl" if cuda else "gloo", rendezvous, rank=rank, world_size=count, timeout=timedelta(seconds=2 * timeout_s + 60)
    )
    joined_s = time.perf_counter() - begun
    # DeepSpeed would compile a shared-memory all-reduce here, which needs a compiler and a minute, and which nothing below calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False)
    return Ranks(rank, count, local, device, watch or Watchdog(rank), stop or StopRequest(), joined_s)


def first_rank_alone(ranks: Ranks, name: str, work: Callable[[], None]) -> None:
    """Runs `work` on the first rank, while the others wait; however long it takes."""
    store = dist.distributed_c10d._get_default_store()
    if ranks.first:
        work()
        store.set(name, "done")
    else:
        # A collective would give up on long work.
        store.wait([name], _LONG)
    # The first rank has the store: it must not leave while somebody still asks.
    ranks.any(False)


def one_rank_first(ranks: Ranks, fetch: Callable[[], T]) -> T:
    """Fetches on the first rank of each machine, then on the others, which find its work in the cache; however long it takes.

    Raises:
        JobError: on every rank, what one of them raised.
    """
    # All ranks come here equally often.
    store, host, what = dist.distributed_c10d._get_default_store(), platform.node(), f"fetch {next(_FETCHES)}"

    def answer(name: str) -> None:
        store.wait([name], _LONG)
        if refused := store.get(name).decode().removeprefix(_DONE):
            raise JobError(refused, everywhere=True)

    if ranks.local != 0:
        answer(f"{what} on {host}")
    told = _DONE
    try:
        fetched = fetch()
    except JobError as error:
        # Whoever waits must hear of it: it will not find what it waits for.
        told = str(error)
        raise
    finally:
        store.set(f"{what} by {ranks.rank}", told)
        if ranks.local == 0:
            store.set(f"{what} on {host}", told)
    for rank in range(ranks.count):
        answer(f"{what} by {rank}")
    return fetched


def from_first(ranks: Ranks, name: str, text: Callable[[], str]) -> str:
    """The first rank's text on every rank, however long it takes to come (a person may type it).

    Args:
        name: used once.
    """
    store = dist.distributed_c10d._get_default_store()
    if ranks.first:
        store.set(name, text())
    else:
        # A collective would give up, and on a GPU it would keep the processor busy.
        store.wait([name], _EVER)
    return store.get(name).decode()


def lost_peer(error: BaseException) -> bool:
    """Whether a collective failed for another rank's sake, rather than for a fault of this one."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None)


def leave_ranks() -> None:
    """Ends the process group: without it a finished run can abort on its way out."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Engine:
    """The root module with ZeRO-3's hooks, or as it is where the base is whole on every rank."""

    def __init__(self, root: nn.Module, zero: dict[str, Any]) -> None:
        self.root = root
        self._offload = deepspeed.initialize(model=root, config=for_deepspeed(zero))[0].optimizer if zero_stage(zero) == 3 else None
        self._keeping = Keeping(root, zero) if self._offload is not None else None
        release_rows(root)

    def before_backward(self, again: bool) -> None:
        """Args:
        again: another micro-batch of the step follows.
        """
        if self._keeping is not None:
            self._keeping.before_backward(again)

    def after_backward(self) -> None:
        """Releases blocks whose post-backward hook never fired: their input needs no gradient."""
        if self._offload is not None:
            self._offload.release_backward_leftovers()

    def release(self) -> None:
        """Back to shards only. Evaluation leaves weights gathered; nothing else may count on that."""
        if self._offload is not None:
            self._offload.partition_all_parameters()
