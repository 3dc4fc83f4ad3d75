"""GPUs by name: what one holds, computes and is connected by. A GPU is one row.

Figures are the makers': dense tensor-core rates, links in one direction. `ATTAINED` is what of them a transformer's training step
reaches; it is an assumption, and the one number to correct by a measured step.
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.job.errors import JobError

GIB = 1 << 30
ATTAINED = 0.4
"""Share of the peak rate of matrix products."""


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_bytes: int
    half_flops: float
    """Per second, bf16 or fp16."""
    single_flops: float
    """Per second, fp32 as torch computes it by default (no TF32)."""
    bf16: bool
    peers_bytes_s: float
    """To the other GPUs of its node."""
    node_bytes_s: float
    """Between nodes, of a whole node."""
    per_node: int
    host_bytes_s: float = 12e9
    """To main memory, of one GPU."""
    disk_bytes_s: float = 3e9
    """From a node's own NVMe disk, of all its GPUs together: an assumption."""
    context_bytes: int = 3 * GIB // 2
    """CUDA context, kernels, cuBLAS's workspace and NCCL's buffers: an assumption."""
    fragmentation: float = 0.05
    """Share of what is allocated that the caching allocator wastes: an assumption."""
    shares_memory: bool = False
    """Its ranks are all on one machine, and have the memory together."""

    def nodes_for(self, ranks: int) -> int:
        """As few as hold the ranks."""
        return 1 if self.shares_memory else -(-ranks // self.per_node)

    def shared_by(self, ranks: int) -> Gpu:
        """One of so many ranks on a machine."""
        return replace(self, memory_bytes=main_memory_bytes() // ranks) if self.shares_memory else self


def main_memory_bytes() -> int:
    """Of this machine, or what of it a batch system lets this process have (control groups, of both versions)."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    groups = Path("/proc/self/cgroup")
    for line in groups.read_text(encoding="ascii").splitlines() if groups.exists() else []:
        _, controller, place = line.split(":", 2)
        if controller in ("", "memory"):
            folder = Path("/sys/fs/cgroup", controller, place.lstrip("/"))
            limits = [each / name for each in (folder, *folder.parents) for name in ("memory.max", "memory.limit_in_bytes")]
            found += [int(text) for limit in limits if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()).isdigit()]
    return min(found)


def cpu_name() -> str:
    """Of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _cpu() -> Gpu:
    memory, cores = main_memory_bytes(), os.cpu_count() or 1
    # gloo moves about 1 GB/s; interpreter and libraries of a rank that has trained hold 0.45 GiB of anonymous memory.
    return Gpu("cpu", memory, 2e10, 5e10, True, 1e9, 1e9, cores, 1e10, context_bytes=int(0.45 * GIB), shares_memory=True)


def gpus() -> dict[str, Gpu]:
    """All rows by name. `cpu` is this machine: its ranks share its memory."""
    rows = (
        Gpu("v100-16g", 16 * GIB, 125e12, 15.7e12, False, 150e9, 50e9, 8),
        Gpu("v100-32g", 32 * GIB, 125e12, 15.7e12, False, 150e9, 50e9, 8),
        Gpu("a100-40g", 40 * GIB, 312e12, 19.5e12, True, 300e9, 200e9, 8, 25e9),
        Gpu("a100-80g", 80 * GIB, 312e12, 19.5e12, True, 300e9, 200e9, 8, 25e9),
        Gpu("h100-80g", 80 * GIB, 989e12, 67e12, True, 450e9, 400e9, 8, 50e9),
        Gpu("h200-141g", 141 * GIB, 989e12, 67e12, True, 450e9, 400e9, 8, 50e9),
        Gpu("l40s-48g", 48 * GIB, 362e12, 91.6e12, True, 25e9, 50e9, 8, 25e9),
        _cpu(),
    )
    return {row.name: row for row in rows}


def gpu_of(name: str) -> Gpu:
    """The row of a name, with or without the memory's unit: "a100-80g", "A100-80", "h200".

    Raises:
        JobError: no such row, or several.
    """
    rows, asked = gpus(), name.lower()
    found = [row for key, row in rows.items() if asked in (key, key.removesuffix("g"), key.split("-")[0])]
    if len(found) != 1:
        raise JobError(f"--gpu {name}: {'several' if found else 'none'} of that name. Use one of {', '.join(rows)}.")
    return found[0]


def named(device: str, memory_bytes: int) -> Gpu | None:
    """The row of a GPU by its driver's name for it, "NVIDIA A100-SXM4-80GB"; None: there is none."""
    models = re.findall(r"[A-Z]+\d+[A-Z]?", device.upper())
    alike = [row for row in gpus().values() if row.name.split("-")[0].upper() in models]
    return min(alike, key=lambda row: abs(row.memory_bytes - memory_bytes), default=None)


def without_kernels(name: str, capability: tuple[int, int], built: tuple[str, ...], torch_version: str) -> str | None:
    """Why a torch build cannot compute on a GPU, and the repair; None where it can.

    Args:
        built: the architectures that it has kernels for: "sm_80", ...
    """
    major, minor = capability
    # Kernels run on later chips of the same generation too.
    if not built or any(f"sm_{major}{older}" in built for older in range(minor + 1)):
        return None
    return (
        f"{name} (sm_{major}{minor}): torch {torch_version} has no kernels for it, "
        f"only for {', '.join(built)}. Install a build that has them: make setup TORCH=..., a cu126 one for V100."
    )


def computes_bf16(capability: tuple[int, int]) -> bool:
    """Whether a GPU does, rather than imitate it."""
    return capability >= (8, 0)
