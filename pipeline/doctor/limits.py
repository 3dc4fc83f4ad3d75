"""What the system lets a process have: open files, shared memory, locked memory, main memory. No torch."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path

from pipeline.doctor.finding import Finding, Group, State
from pipeline.plan.hardware import GIB, main_memory_bytes
from pipeline.screen import size_text

_GROUP: Group = "Limits"
_FILES_ALONE, _FILES_A_RANK = 256, 4
"""Libraries and mapped shards of one rank; the sockets that the first rank and gloo keep to each other one."""
_SHARED_BYTES, _AMPLE_SHARED_BYTES = 256 << 20, 1 << 30
"""NCCL's buffers between the GPUs of a node; its makers ask for 1 GiB, and a container has 64 MiB unless told otherwise."""
_MEMORY_BYTES = 2 * GIB
"""Two CPU ranks with their libraries and a small base."""


@dataclass(frozen=True)
class Limits:
    open_files: int
    """-1: no limit, as with locked memory."""
    most_open_files: int
    """To which the user may raise it."""
    locked_bytes: int
    infiniband: bool
    """There is such a network."""
    shared_bytes: int | None
    """Free in /dev/shm; None: there is none, or it cannot be written."""
    memory_bytes: int


def look_at_limits() -> Limits:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    network, shared = Path("/sys/class/infiniband"), Path("/dev/shm")
    counts = os.statvfs(shared) if shared.is_dir() and os.access(shared, os.W_OK) else None
    return Limits(
        soft,
        hard,
        resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        network.is_dir() and any(network.iterdir()),
        counts.f_bavail * counts.f_frsize if counts else None,
        main_memory_bytes(),
    )


def judge_limits(found: Limits, ranks: int, gpus: int) -> list[Finding]:
    """Args:
    ranks: that are to talk to each other, over all nodes.
    gpus: of this machine.
    """
    findings = [_open_files(found, ranks), _shared(found, gpus)]
    if found.infiniband:
        findings.append(_locked(found))
    few = found.memory_bytes < _MEMORY_BYTES
    repair = "Ask the batch system for more (--mem), or the container." if few else ""
    return [*findings, Finding(_GROUP, "main memory", size_text(found.memory_bytes), "problem" if few else "good", repair)]


def _open_files(found: Limits, ranks: int) -> Finding:
    needed = _FILES_ALONE + _FILES_A_RANK * ranks
    if found.open_files < 0:
        return Finding(_GROUP, "open files", "no limit")
    value = f"{found.open_files:,}, enough for {max(0, found.open_files - _FILES_ALONE) // _FILES_A_RANK:,} ranks"
    if found.open_files >= needed:
        return Finding(_GROUP, "open files", value)
    value = f"{found.open_files:,}, but {ranks} ranks need {needed:,}"
    if found.most_open_files < 0 or found.most_open_files >= needed:
        repair = f"ulimit -n {max(needed, min(found.most_open_files, 65536))} in the shell or batch script that starts zlora."
    else:
        repair = f"The hard limit is {found.most_open_files:,}: the administrator raises nofile in /etc/security/limits.conf, or slurmd's."
    return Finding(_GROUP, "open files", value, "problem", repair)


def _shared(found: Limits, gpus: int) -> Finding:
    repair = "Containers: --shm-size=1g or --ipc=host. Elsewhere: mount -o remount,size=8G /dev/shm, or remove what lies there."
    if found.shared_bytes is None:
        value = "/dev/shm is not there, or cannot be written"
        return Finding(_GROUP, "shared memory", value, "problem" if gpus > 1 else "warning", repair)
    value = f"/dev/shm: {size_text(found.shared_bytes)} free"
    # Only NCCL needs it, between GPUs of one machine.
    if gpus > 1 and found.shared_bytes < _AMPLE_SHARED_BYTES:
        state: State = "problem" if found.shared_bytes < _SHARED_BYTES else "warning"
        return Finding(_GROUP, "shared memory", f"{value}, for NCCL between {gpus} GPUs", state, repair)
    return Finding(_GROUP, "shared memory", value)


def _locked(found: Limits) -> Finding:
    if found.locked_bytes < 0:
        return Finding(_GROUP, "locked memory", "no limit, for InfiniBand")
    value = f"{size_text(found.locked_bytes)}, with InfiniBand here"
    repair = "Its drivers lock what they send: ulimit -l unlimited; under Slurm slurmd's LimitMEMLOCK=infinity."
    return Finding(_GROUP, "locked memory", value, "warning", repair)
