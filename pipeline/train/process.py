"""What this process holds and how busy its machine is, as the Linux kernel tells. Zeros where it does not."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Held:
    """Bytes of main memory."""

    anonymous: int
    """Its own, now: neither files nor libraries."""
    others: int
    """Files and what is shared, now."""
    peak: int
    """The most of both together, ever."""

    @property
    def anonymous_peak(self) -> int:
        """The most of its own, at the moment of `peak`, if files and libraries were then as they are now."""
        return self.peak - self.others


def held() -> Held:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    fields = {name: rest for name, _, rest in (line.partition(":") for line in lines)}
    anonymous, files, shared, peak = (int(fields.get(name, "0").split()[0]) << 10 for name in ("RssAnon", "RssFile", "RssShmem", "VmHWM"))
    return Held(anonymous, files + shared, peak)


def runnable() -> float:
    """Processes that want a core of this machine, on average over the last minute."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return 0.0
