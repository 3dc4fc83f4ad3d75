"""What an hour of a GPU costs, by the user's settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.job.errors import JobError
from pipeline.job.settings import CURRENCY, PRICES, read_settings, settings_file
from pipeline.plan.hardware import gpus


@dataclass(frozen=True)
class Price:
    per_gpu_hour: float
    currency: str
    source: str


def price_of(gpu: str, asked: float | None) -> Price | None:
    """Args:
        asked: instead of the settings' price.

    Raises:
        JobError: the settings cannot be read, or have a key or a value that is none of theirs.
    """
    file = settings_file()
    prices, currency = _read(file)
    if asked is not None:
        return Price(asked, currency, "--price")
    return Price(prices[gpu], currency, str(file)) if gpu in prices else None


def _read(file: Path) -> tuple[dict[str, float], str]:
    found = read_settings()
    prices, currency = found.get(PRICES, {}), found.get(CURRENCY, "")
    if not isinstance(currency, str):
        raise JobError(f'{file}: {CURRENCY} = {currency}: not a text. Write it as in {CURRENCY} = "EUR".')
    if not isinstance(prices, dict):
        raise JobError(f"{file}: {PRICES}: not a table. Write [{PRICES}] and a line for each GPU.")
    for name, price in prices.items():
        if name not in gpus():
            raise JobError(f'{file}: {PRICES}: "{name}" is not a GPU of the plan. Use {", ".join(gpus())}.')
        if isinstance(price, bool) or not isinstance(price, int | float) or price < 0:
            raise JobError(f"{file}: {PRICES}.{name} = {price!r}: not a price. Write a number, such as 1.9.")
    return {name: float(price) for name, price in prices.items()}, currency
