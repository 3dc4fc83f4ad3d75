"""What a run ran on: versions, every rank's host and device, and the commit where the package is a checkout."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.cluster.launch import batch_job
from pipeline.plan.hardware import cpu_name, main_memory_bytes
from pipeline.train.engine import Ranks

_PACKAGES = ("zlora", "torch", "deepspeed", "transformers", "safetensors", "tokenizers", "datasets")
_VARIABLES = re.compile(
    r"(NCCL|TORCH_NCCL|GLOO|OMP|MKL|MALLOC)_\w+|CUDA_VISIBLE_DEVICES|CUDA_LAUNCH_BLOCKING|CUBLAS_WORKSPACE_CONFIG|PYTORCH_(CUDA_)?ALLOC_CONF"
    r"|DS_ACCELERATOR|HF_(HOME|HUB_OFFLINE)|SLURM_(JOB_ID|JOB_NODELIST|NODELIST|NNODES|NTASKS|CPUS_PER_TASK|RESTART_COUNT)"
)
"""Those that change what a run does or how fast. No others: an environment has secrets in it."""
_SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASS|AUTH|CREDENTIAL", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\b(hf_|sk-|gh[a-z]_|AKIA|eyJ)\w{8,}|://[^/\s]*@")


def environment(ranks: Ranks) -> dict[str, Any]:
    """For `environment.json`, the same on every rank. A collective."""
    found: list[Any] = [None] * ranks.count
    dist.all_gather_object(found, _rank(ranks))
    commit, dirty = _commit()
    return {
        "schema_version": 1,
        "python": sys.version.split()[0],
        "packages": {name: version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if ranks.device.type == "cuda" else None,
        "device": found[0]["device"]["name"],
        "host": found[0]["host"],
        "system": platform.platform(),
        "ranks": ranks.count,
        "hosts": _hosts(found),
        "variables": chosen_variables(dict(os.environ)),
        "commit": commit,
        "dirty": dirty,
        "started_by": batch_job(),
    }


def chosen_variables(variables: dict[str, str]) -> dict[str, str]:
    """Of the environment, what may matter and is no secret."""
    return {
        name: value
        for name, value in sorted(variables.items())
        if _VARIABLES.fullmatch(name) and not _SECRET_NAME.search(name) and not _SECRET_VALUE.search(value)
    }


def started_by(run: Path) -> str | None:
    """The batch job that began or went on with the run last; None where none did."""
    try:
        return json.loads((run / "environment.json").read_text(encoding="utf-8"))["started_by"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _rank(ranks: Ranks) -> dict[str, Any]:
    """One rank and what it sees of its machine."""
    if ranks.device.type == "cuda":
        card = torch.cuda.get_device_properties(ranks.device)
        device = {"rank": ranks.rank, "name": card.name, "memory_bytes": card.total_memory}
    else:
        device = {"rank": ranks.rank, "name": cpu_name(), "threads": torch.get_num_threads()}
    return {
        "host": platform.node(),
        "device": device,
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "cores_allowed": len(os.sched_getaffinity(0)),
            "memory_bytes": main_memory_bytes(),
            "driver": _driver(),
        },
    }


def _hosts(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The machines in the order of their first ranks, each with its ranks' devices."""
    hosts: dict[str, dict[str, Any]] = {}
    for rank in found:
        host = hosts.setdefault(rank["host"], {"host": rank["host"], **rank["machine"], "devices": []})
        host["devices"].append(rank["device"])
    return list(hosts.values())


def _driver() -> str | None:
    """Of NVIDIA's kernel module."""
    try:
        line = Path("/proc/driver/nvidia/version").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", line)
    return found.group() if found else None


def _commit() -> tuple[str | None, bool | None]:
    """Of the checkout that the package is in, and whether tracked files differ from it."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None, None
    commit = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return (commit.strip() if commit else None), (None if changed is None else bool(changed.strip()))


def _git(root: Path, *words: str) -> str | None:
    try:
        # Without taking the index's lock: somebody may be working there.
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(root), *words], capture_output=True, text=True, check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
