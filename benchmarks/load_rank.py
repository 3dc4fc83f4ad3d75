"""One rank of `load.py`: loads a checkpoint one way and writes what it cost as JSON.

    python benchmarks/load_rank.py WAY FOLDER CONFIG OUT      (with RANK, WORLD_SIZE, ... as pipeline/cluster/launch.py sets them)

Seconds are from a barrier after all imports to this rank's own end. Memory is read from /proc: VmHWM is the peak, mapped files
included. Collectives are counted by wrapping torch.distributed's functions before DeepSpeed binds them.
"""

from __future__ import annotations

import functools
import json
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
import transformers.models.llama.modeling_llama
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from pipeline.job.zero import deepspeed_config
from pipeline.model.config import read_config
from pipeline.model.load import load_base
from pipeline.train.engine import Ranks, join_ranks, leave_ranks

_COLLECTIVES = [
    "broadcast",
    "all_reduce",
    "reduce",
    "all_gather",
    "all_gather_into_tensor",
    "_all_gather_base",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "_reduce_scatter_base",
    "all_to_all",
    "all_to_all_single",
    "gather",
    "scatter",
    "send",
    "recv",
    "isend",
    "irecv",
]


class Wire:
    """Counts the calls of collectives and the bytes of the whole tensors they move."""

    def __init__(self) -> None:
        self.calls = self.bytes = 0
        self._inside = False
        for name in _COLLECTIVES:
            counted = self._counted(getattr(dist.distributed_c10d, name))
            setattr(dist.distributed_c10d, name, counted)
            if hasattr(dist, name):
                setattr(dist, name, counted)

    def _counted(self, function: Callable) -> Callable:
        @functools.wraps(function)
        def counting(*args: object, **kwargs: object) -> object:
            if self._inside:
                return function(*args, **kwargs)
            self.calls += 1
            self.bytes += max(map(_bytes_of, [*args, *kwargs.values()]))
            self._inside = True
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False

        return counting


def _bytes_of(argument: object) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.numel() * argument.element_size()
    return sum(map(_bytes_of, argument)) if isinstance(argument, list | tuple) else 0


class Memory:
    """Follows the two parts of resident memory: allocated (anonymous) and mapped from files."""

    def __init__(self) -> None:
        self.start = memory()
        self.allocated = self.mapped = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while not self._stop.wait(0.02):
            now = memory()
            self.allocated = max(self.allocated, now["RssAnon"] - self.start["RssAnon"])
            self.mapped = max(self.mapped, now["RssFile"] - self.start["RssFile"])

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def memory() -> dict[str, int]:
    """Bytes by name, from the kernel."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith(("VmHWM", "VmRSS", "RssAnon", "RssFile"))}


def bytes_through_read() -> int:
    """What this process got from read() and its kin; mapped files do not show here."""
    return int(Path("/proc/self/io").read_text().splitlines()[0].split()[1])


def load_ours(folder: Path, config: Path, ranks: Ranks, report: dict[str, float]) -> nn.Module:
    def built(names: Iterable[str]) -> Iterable[str]:
        report["rss_built"] = memory()["VmRSS"]
        return names

    base = load_base(folder, read_config(folder), torch.bfloat16, ranks.device, deepspeed_config(config), progress=built)
    report["counted"] = base.bytes_read
    return base.model


def load_transformers(folder: Path, config: Path) -> tuple[nn.Module, HfDeepSpeedConfig]:
    # As its DeepSpeed page says: the config object before the model, and kept alive; the dtype in both places.
    alive = HfDeepSpeedConfig({**deepspeed_config(config), "bf16": {"enabled": True}})
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), alive


def main(way: str, folder: Path, config: Path, out: Path) -> None:
    assert transformers.models.llama.modeling_llama  # Imported by both ways, here, so that neither is charged for it.
    torch.set_num_threads(1)
    wire = Wire()
    ranks = join_ranks()
    dist.barrier()
    report: dict[str, float] = {"rss_imports": memory()["VmRSS"], "hwm_imports": memory()["VmHWM"]}
    following, read_before = Memory(), bytes_through_read()
    calls, moved = wire.calls, wire.bytes
    start = time.perf_counter()
    model = load_ours(folder, config, ranks, report) if way == "ours" else load_transformers(folder, config)[0]
    report["seconds"] = time.perf_counter() - start
    following.stop()
    report |= {
        "rchar": bytes_through_read() - read_before,
        "peak": memory()["VmHWM"],
        "rss_end": memory()["VmRSS"],
        "allocated": following.allocated,
        "mapped": following.mapped,
        "calls": wire.calls - calls,
        "moved": wire.bytes - moved,
    }
    shards = {name: parameter.ds_tensor for name, parameter in model.named_parameters()}
    report["shard"] = sum(shard.numel() * shard.element_size() for shard in shards.values())
    crc = 0
    for name in sorted(shards):
        crc = zlib.crc32(shards[name].contiguous().view(torch.uint8).numpy().data, crc)
    report["crc"] = crc
    out.write_text(json.dumps(report), encoding="utf-8")
    dist.barrier()
    leave_ranks()


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
