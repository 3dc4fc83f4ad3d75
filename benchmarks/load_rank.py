"""One rank of `load.py`: loads a checkpoint one way and writes what it cost as JSON.

    python benchmarks/load_rank.py WAY FOLDER CONFIG OUT      (with RANK, WORLD_SIZE, ... as pipeline/cluster/launch.py sets them)

Seconds are from a barrier after all imports to this rank's own end. Memory is read from /proc: VmHWM is the peak, mapped files
included. Collectives are counted by wrapping torch.distributed's functions before DeepSpeed binds them.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
import transformers.models.llama.modeling_llama
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig
from wire import Wire

from pipeline.job.zero import deepspeed_config
from pipeline.model.config import read_config
from pipeline.model.load import load_base
from pipeline.train.engine import Ranks, join_ranks, leave_ranks


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
    calls, moved = wire.calls.total(), wire.bytes.total()
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
        "calls": wire.calls.total() - calls,
        "moved": wire.bytes.total() - moved,
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
