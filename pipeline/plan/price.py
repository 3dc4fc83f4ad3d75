"""What an hour of a GPU costs, by the user's settings: $XDG_CONFIG_HOME/zlora/settings.toml (else ~/.config).

currency = "EUR"
[price_per_gpu_hour]
a100-80g = 1.9
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from pipeline.job.errors import JobError
from pipeline.plan.hardware import gpus

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_PRICES, _CURRENCY = "price_per_gpu_hour", "currency"


@dataclass(frozen=True)
class Price:
    per_gpu_hour: float
    currency: str
    source: str


def settings_file() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "zlora" / "settings.toml"


def price_of(gpu: str, asked: float | None) -> Price | None:
    """Args:
        asked: instead of the settings' price.

    Raises:
        JobError: the settings cannot be read, or have a key or a value that is none of theirs.
    """
    file = settings_file()
    prices, currency = _read(file) if file.is_file() else ({}, "")
    if asked is not None:
        return Price(asked, currency, "--price")
    return Price(prices[gpu], currency, str(file)) if gpu in prices else None


def _read(file: Path) -> tuple[dict[str, float], str]:
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JobError(f"{file}: not readable TOML ({error}). Correct it.") from None
    for key in found:
        if key not in (_PRICES, _CURRENCY):
            raise JobError(f'{file}: "{key}" is not a key of it. It has {_CURRENCY} and [{_PRICES}].')
    prices, currency = found.get(_PRICES, {}), found.get(_CURRENCY, "")
    if not isinstance(currency, str):
        raise JobError(f'{file}: {_CURRENCY} = {currency}: not a text. Write it as in {_CURRENCY} = "EUR".')
    if not isinstance(prices, dict):
        raise JobError(f"{file}: {_PRICES}: not a table. Write [{_PRICES}] and a line for each GPU.")
    for name, price in prices.items():
        if name not in gpus():
            raise JobError(f'{file}: {_PRICES}: "{name}" is not a GPU of the plan. Use {", ".join(gpus())}.')
        if isinstance(price, bool) or not isinstance(price, int | float) or price < 0:
            raise JobError(f"{file}: {_PRICES}.{name} = {price!r}: not a price. Write a number, such as 1.9.")
    return {name: float(price) for name, price in prices.items()}, currency
