"""What a run ran on: versions, hosts, devices, and the commit where the package is a checkout."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pipeline.cluster.launch import batch_job

_PACKAGES = ("zlora", "torch", "deepspeed", "transformers", "safetensors", "tokenizers", "datasets")


def environment(ranks: int, device: torch.device) -> dict[str, Any]:
    """For `environment.json`."""
    return {
        "schema_version": 1,
        "python": sys.version.split()[0],
        "packages": {name: version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(),
        "host": platform.node(),
        "system": platform.platform(),
        "ranks": ranks,
        "commit": _commit(),
        "started_by": batch_job(),
    }


def started_by(run: Path) -> str | None:
    """The batch job that began or went on with the run last; None where none did."""
    try:
        return json.loads((run / "environment.json").read_text(encoding="utf-8"))["started_by"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _commit() -> str | None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    answer = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None
