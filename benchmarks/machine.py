"""What a result was measured on, for its record."""

from __future__ import annotations

import os
import platform
import sys
from datetime import date
from importlib.metadata import version

from pipeline.plan.hardware import cpu_name


def origin(script: str, *packages: str) -> list[str]:
    """Markdown lines: date, command, hardware, versions."""
    # A folder is another one on every machine.
    folders, words = ("--base", "--data", "--encoder", "--out"), sys.argv[1:]
    asked = ["FOLDER" if before in folders else word for before, word in zip(["", *words], words, strict=False)]
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return [
        f"- date: {date.today()}; command: `{' '.join(['python', f'benchmarks/{script}', *asked])}`",
        f"- hardware: {os.cpu_count()} cores of {cpu_name()}, {memory:.0f} GiB",
        f"- versions: Python {platform.python_version()}, {versions}",
    ]
