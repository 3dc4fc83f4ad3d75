"""What files hold: the sha256 of each, of a base's weights or of data, computed once and remembered by path, size and time of change."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from pipeline.weights.atomic import write_json

_CHUNK_BYTES = 1 << 22


def file_digests(files: tuple[Path, ...]) -> dict[str, str]:
    """File name -> sha256. A hub cache's own blob name is the sha256 and is taken as it is."""
    return {file.name: digest_of(file) for file in files}


def digest_of(file: Path) -> str:
    """sha256 of a file, remembered by path, size and time of change."""
    target = file.resolve()
    if file.is_symlink() and re.fullmatch("[0-9a-f]{64}", target.name):
        return target.name
    stat = target.stat()
    key, memory = f"{target}:{stat.st_size}:{stat.st_mtime_ns}", _remembered()
    if key not in memory:
        memory[key] = sha256_of(target)
        # At once: a process that ends early has not hashed for nothing.
        _remember(memory)
    return memory[key]


def base_digest(digests: dict[str, str]) -> str:
    """One sha256 for the whole base, from the digests of its files."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def sha256_of(file: Path) -> str:
    sha = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            sha.update(chunk)
    return sha.hexdigest()


def cache_folder() -> Path:
    """What is kept between runs and can be made again."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "zlora"


def _memory_file() -> Path:
    return cache_folder() / "digests.json"


def _remembered() -> dict[str, str]:
    try:
        memory = json.loads(_memory_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return memory if isinstance(memory, dict) else {}


def _remember(memory: dict[str, str]) -> None:
    # The memory is a convenience: a read-only home folder must not stop a run.
    try:
        write_json(_memory_file(), memory)
    except OSError:
        return
