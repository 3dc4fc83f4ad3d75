"""What a file of loralib's does not hold: alpha, the parts of fused maps, classes, the base. A JSON file that lies beside it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.job.errors import JobError
from pipeline.weights.parse import read_json

LORALIB = "lora.bin"
SETTINGS = "loralib.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class LoralibSettings:
    lora_alpha: float
    parts: tuple[str, ...]
    """Roles that the pairs of fused maps are of, in their order; none where no map is fused."""
    labels: tuple[str, ...] | None
    """Names of the classes of its head."""
    base: str
    base_digest: str

    def as_json(self) -> dict[str, Any]:
        told = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {"schema_version": SCHEMA_VERSION} | told


def read_settings(file: Path) -> LoralibSettings:
    """Raises:
    JobError: it does not say what `zlora export` writes."""
    try:
        found = read_json(file)
        if found["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema_version {found['schema_version']!r}; this zlora reads {SCHEMA_VERSION}")
        alpha, base, digest = found["lora_alpha"], found["base"], found["base_digest"]
        if type(alpha) not in (int, float) or not math.isfinite(alpha) or alpha < 0:
            raise ValueError(f"lora_alpha {alpha!r}")
        if not isinstance(base, str) or not isinstance(digest, str):
            raise ValueError("base or base_digest: not a text")
        return LoralibSettings(float(alpha), _texts(found["parts"]), found["labels"] and _texts(found["labels"]), base, digest)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise JobError(f"{file}: cannot be read ({error!r}). Export the delta again, or move the file away and give --alpha.") from None


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{str(values)[:80]}: not a list of texts")
    return tuple(values)
