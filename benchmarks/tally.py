"""What one rank of a measured way says of itself: when each step ended, its loss, what was sent in it, memory. The same for every way.

Written as JSON when the last step has been taken: `ends` (seconds since the epoch), `cpu_s` (the process' processor time until then) and
`losses` of the steps; `gathers` (calls), `gathered_bytes` and `sent_bytes` (all collectives) in each; `peak_bytes` (VmHWM) of the process,
`peak_steps_bytes` of the steps after the first; `gpu_peak_bytes` allocated there; `base_bytes` that the process holds of the base.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from torch import nn
from wire import Wire


class Tally:
    def __init__(self, out: Path) -> None:
        """Counts collectives from now on: before DeepSpeed joins its ranks."""
        self._out, self._wire = out, Wire()
        self._before: tuple[int, int, int] = (0, 0, 0)
        self._report: dict[str, list[float]] = {
            "ends": [],
            "cpu_s": [],
            "losses": [],
            "gathers": [],
            "gathered_bytes": [],
            "sent_bytes": [],
        }
        self._scalars: dict[str, int] = {}

    def base(self, root: nn.Module) -> None:
        """Counts what this process holds of the base: of sharded parameters their shards, all else as it is; nothing twice."""
        self._scalars["base_bytes"] = base_bytes(root)
        self._before = self._sent()

    def took(self, loss: float) -> None:
        """A step has ended."""
        self._report["ends"].append(time.time())
        self._report["cpu_s"].append(time.process_time())
        self._report["losses"].append(loss)
        now = self._sent()
        for name, total, before in zip(("gathers", "gathered_bytes", "sent_bytes"), now, self._before, strict=True):
            self._report[name].append(total - before)
        self._before = now
        if len(self._report["ends"]) == 1:
            self._scalars["peak_first_bytes"] = peak_bytes()
            # The kernel forgets the peak, so that loading's does not hide that of the steps.
            Path("/proc/self/clear_refs").write_text("5")

    def write(self) -> None:
        self._scalars["peak_steps_bytes"] = peak_bytes()
        self._scalars["peak_bytes"] = max(self._scalars["peak_steps_bytes"], self._scalars["peak_first_bytes"])
        self._scalars["gpu_peak_bytes"] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        self._out.write_text(json.dumps(self._report | self._scalars), encoding="utf-8")

    def _sent(self) -> tuple[int, int, int]:
        return *self._wire.gathered(), self._wire.bytes.total()


def base_bytes(root: nn.Module) -> int:
    storages: dict[int, int] = {}
    for module in root.modules():
        for value in [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]:
            if isinstance(value, torch.Tensor) and not value.requires_grad:
                shard = getattr(value, "ds_tensor", value)
                storages[shard.untyped_storage().data_ptr()] = shard.numel() * shard.element_size()
    return sum(storages.values())


def peak_bytes() -> int:
    """The most resident memory of this process, mapped files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
