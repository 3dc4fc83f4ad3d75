"""How ranks that failed tell why, and which of their words is the cause. A rank leaves a file, whoever started it reads it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from pipeline.cluster.stop import STOPPED
from pipeline.cluster.watchdog import RANK_FAILED

JOB_ERROR, DIVERGED = 2, 4
REPORTS = "ZLORA_REPORTS"
"""A folder that all ranks see."""
ATTENDED = "ZLORA_BATCH"
"""Set for what a batch script runs by `zlora batch`."""


@dataclass(frozen=True)
class Failure:
    """How a rank ended: its own words, or the signal that ended it."""

    rank: int
    exit_code: int
    message: str
    time: float
    echo: bool = False
    """It only says that another rank is gone."""


def report_failure(message: str, exit_code: int, terminal: TextIO, echo: bool = False) -> None:
    """Tells whoever started the ranks, or the terminal where nobody reads reports, why this rank ends.

    Args:
        echo: another rank's end is the reason, so that rank's own words are the better ones.
    """
    if folder := os.environ.get(REPORTS):
        rank = int(os.environ.get("RANK", "0"))
        partial = Path(folder) / f".failure.{rank}"
        partial.write_text(json.dumps(asdict(Failure(rank, exit_code, message, time.time(), echo))), encoding="utf-8")
        partial.rename(Path(folder) / f"failure.{rank}")
    else:
        print(message, file=terminal, flush=True)


def to_go_on(how: str) -> str:
    """What a person should do, after a blank; nothing where a batch script sees to it, and says what it does."""
    return "" if os.environ.get(ATTENDED) else f" {how}"


def reported(folder: Path) -> dict[int, Failure]:
    """By rank, those that have told."""
    told = (Failure(**json.loads(file.read_text(encoding="utf-8"))) for file in folder.glob("failure.*"))
    return {failure.rank: failure for failure in told}


def cause(failures: Sequence[Failure]) -> Failure:
    """The cause, not its echoes: a mistake of the user's, then a signal, then the earliest crash."""
    order = (JOB_ERROR, DIVERGED, RANK_FAILED)

    def place(failure: Failure) -> tuple[bool, bool, int, float]:
        rank = order.index(failure.exit_code) if failure.exit_code in order else len(order)
        return failure.echo, failure.exit_code == STOPPED, rank, failure.time

    return min(failures, key=place)
