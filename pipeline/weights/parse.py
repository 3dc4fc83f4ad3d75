"""JSON of files that anybody may have written: parsed in bounded memory, or refused by ValueError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_LARGEST_BYTES = 100_000_000
"""As the safetensors library limits its headers."""


def parse_json(text: bytes | str) -> Any:
    """Raises:
    ValueError: not JSON, or nested without measure."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(file: Path) -> Any:
    """Raises:
    ValueError: not JSON, or larger than any that is meant.
    FileNotFoundError: no such file."""
    if (size := file.stat().st_size) > _LARGEST_BYTES:
        raise ValueError(f"{size:,} bytes; none of its kind has more than {_LARGEST_BYTES:,}")
    return parse_json(file.read_bytes())


def plain_name(name: Any) -> bool:
    """Of a file in the folder itself, and no hidden one."""
    return isinstance(name, str) and "/" not in name and "\0" not in name and not name.startswith(".") and name != ""
