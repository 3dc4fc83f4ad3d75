"""The user's own file, $XDG_CONFIG_HOME/zlora/settings.toml (else ~/.config): what a GPU hour costs, and what a cluster is like.

currency = "EUR"
[price_per_gpu_hour]
a100-80g = 1.9
[cluster]
partition = "gpu"
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from pipeline.job.errors import JobError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRICES, CURRENCY, CLUSTER = "price_per_gpu_hour", "currency", "cluster"


def settings_file() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "zlora" / "settings.toml"


def read_settings() -> dict[str, Any]:
    """Its keys, none where there is no such file. What they hold is for whoever uses them to check.

    Raises:
        JobError: it cannot be read, or has a key that is none of its.
    """
    file = settings_file()
    if not file.is_file():
        return {}
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JobError(f"{file}: not readable TOML ({error}). Correct it.") from None
    for key in found:
        if key not in (PRICES, CURRENCY, CLUSTER):
            raise JobError(f'{file}: "{key}" is not a key of it. It has {CURRENCY} and the tables [{PRICES}] and [{CLUSTER}].')
    return found
