"""State on disk: what a run needs to go on, unpartitioned, by parameter name, on any number of ranks. Nothing is unpickled.

`state/step-00000500/` holds `tensors.safetensors` (fp32: weight/NAME, exp_avg/NAME, exp_avg_sq/NAME; best/NAME),
`state.json` (`Record`) and `SHA256SUMS` of both, as `sha256sum -c` reads it. A state appears under its name when it is whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from pipeline.job.errors import JobError
from pipeline.weights.atomic import new_folder, remove_folder, write_text
from pipeline.weights.digest import sha256_of
from pipeline.weights.record import DataFile, Row
from pipeline.weights.tensors import load_tensors, save_tensors

SCHEMA_VERSION = 1
RECORD = "state.json"
TENSORS = "tensors.safetensors"
SUMS = "SHA256SUMS"
_OTHER_VERSION = "It was written by another version of zlora; use that one."


class Progress(Row):
    """How far training has come."""

    step: int = 0
    """Steps taken, skipped ones included."""
    position_examples: int = 0
    """Examples taken from the endless stream of epochs."""
    optimizer_steps: int = 0
    """Steps that changed the weights: Adam's count."""
    skipped_steps: int = 0
    loss_scale: float | None = None
    """fp16 only."""
    good_steps: int = 0
    """In a row; the loss scale is doubled after 2,000."""
    bad_steps: int = 0
    """In a row, up to this one."""
    seconds: float = 0.0
    """Of training, over all sittings."""


class Best(Row):
    """The scores so far, as `evaluate.best_metric` sees them. The best delta's weights are in the state too, as best/NAME."""

    metric: str
    split: str
    step: int | None = None
    """Of the best score; None before the first that has a value."""
    value: float | None = None
    scored_step: int | None = None
    """Of the last scoring that is counted here."""
    scorings_since: int = 0
    """In a row that were no better than the best."""


class Record(Row):
    """`state.json`."""

    schema_version: int = SCHEMA_VERSION
    progress: Progress
    total_steps: int
    learning_rate: float
    """Of the last step, for readers: the schedule is a function of the job, the step and `total_steps`."""
    seed: int
    """The job's, for readers: with `progress`, all that randomness depends on."""
    ranks: int
    job: dict[str, Any]
    """Resolved."""
    job_digest: str
    base_digest: str | None
    """None where the base was not hashed yet when the state was written."""
    base_config: str
    """sha256 of its config.json."""
    data: tuple[DataFile, ...]
    best: Best | None = None
    """None where the job asks for no best delta."""


@dataclass(frozen=True)
class State:
    record: Record
    tensors: dict[str, torch.Tensor]


class Damaged(Exception):
    """A state that is not what was written: which file, and how."""


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def write_state(folder: Path, state: State, keep: int) -> Path:
    """Writes one state, whole or not at all, then removes all but the newest `keep`.

    Args:
        folder: `state/` of the run.
    """
    path = path_of(folder, state.record.progress.step)
    with new_folder(path, replace=True) as partial:
        save_tensors(partial / TENSORS, state.tensors)
        write_text(partial / RECORD, state.record.model_dump_json(indent=2) + "\n")
        write_text(partial / SUMS, "".join(_sum(partial / name) for name in (RECORD, TENSORS)))
    for older in states_of(folder)[keep:]:
        remove_folder(older)
    return path


def read_state(path: Path) -> State:
    """Raises:
    Damaged: anything about it is not as it was written.
    JobError: written by another version."""
    verify_state(path)
    try:
        record = Record.model_validate_json((path / RECORD).read_bytes())
        if record.schema_version != SCHEMA_VERSION:
            raise JobError(f"{path / RECORD}: schema_version {record.schema_version}; this zlora reads {SCHEMA_VERSION}. {_OTHER_VERSION}")
        return State(record, load_tensors(path / TENSORS))
    except ValidationError as error:
        # The sums are right, so this is what was written.
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise JobError(f"{path / RECORD}: {key}: {problem['msg']}. {_OTHER_VERSION}") from None
    except (OSError, ValueError) as error:
        raise Damaged(f"{path / TENSORS}: {error}") from None


def newest_state(folder: Path, warn: Callable[[str], None]) -> State | None:
    """The newest state that is as it was written; None where none was ever written.

    Args:
        warn: is told of each state that is passed over, and why.

    Raises:
        JobError: there are states, and none is whole.
    """
    damage: list[str] = []
    for path in states_of(folder):
        try:
            state = read_state(path)
        except Damaged as error:
            damage.append(str(error))
            continue
        for text in damage:
            warn(f"{text}. This state is passed over for the older {path.name}.")
        return state
    if damage:
        raise JobError(
            f"{damage[0]}. No state of this run is whole ({len(damage)} looked at). "
            "Put one back from a copy, or use --fresh to begin again."
        )
    return None


def tidy(folder: Path, step: int) -> None:
    """Before a run goes on from `step`: removes what a killed process left half-done, and renames later states, which are damaged."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in states_of(folder):
        if int(path.name.removeprefix("step-")) > step:
            aside = path.with_name(f"damaged-{path.name}")
            if aside.exists():
                shutil.rmtree(aside)
            path.rename(aside)


def states_of(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted((path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()), reverse=True)


def _sum(file: Path) -> str:
    return f"{sha256_of(file)}  {file.name}\n"


def verify_state(path: Path) -> None:
    """Compares all bytes of all files: the sums' own file must be exactly what the others' bytes make it."""
    try:
        told = (path / SUMS).read_bytes()
        found = []
        for name in (RECORD, TENSORS):
            found.append(_sum(path / name).encode())
            if found[-1] not in told.splitlines(keepends=True):
                raise Damaged(f"{path / name}: its sha256 is not the one in {SUMS}")
    except FileNotFoundError as error:
        raise Damaged(f"{error.filename}: is missing") from None
    except OSError as error:
        raise Damaged(f"{error.filename or path}: {error.strerror}") from None
    if b"".join(found) != told:
        raise Damaged(f"{path / SUMS}: was changed")
