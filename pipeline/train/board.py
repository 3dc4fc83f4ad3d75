"""Where a run is written down: `metrics.jsonl`, one object a step, and TensorBoard. First rank only."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from pipeline.runs.folder import read_rows
from pipeline.screen import finite, json_text
from pipeline.weights.atomic import write_text

_TAGS = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "loss_scale": "train/loss_scale",
    "skipped_steps": "train/skipped_steps",
    "target_tokens_per_s": "speed/target_tokens_per_s",
    "examples_per_s": "speed/examples_per_s",
    "step_s": "speed/step_s",
    "data_s": "speed/data_s",
    "padding_share": "speed/padding_share",
}
_IDLE = {"loss_scale": 1.0, "skipped_steps": 0, "padding_share": 0.0}
"""What says nothing: a curve begins where it is something else."""


class Board:
    """Open for one sitting of a run.

    Args:
        after: the step from which the run goes on. What an earlier sitting wrote of later steps is taken back.
    """

    def __init__(self, run: Path, after: int) -> None:
        file = run / "metrics.jsonl"
        rows = [row for row in read_rows(file) if row["step"] <= after]
        self.evaluated = {
            (row["step"], row["split"]): {key: value for key, value in row.items() if key not in ("step", "split")}
            for row in rows
            if "split" in row
        }
        """Scores by step and split."""
        self.last: dict[str, Any] = next((row for row in reversed(rows) if "loss" in row and "split" not in row), {})
        """The newest step's row."""
        if file.exists():
            write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
        # Unbuffered: a row is in the file or refused, never left for later.
        self._file, self._metrics = file, file.open("ab", buffering=0)
        # TensorBoard too forgets what came after.
        self._folder = run / "tensorboard"
        with _named(self._folder):
            self._events = SummaryWriter(str(self._folder), purge_step=after + 1)
        self._spectra_step, self._shown = -1, {key for row in rows for key, idle in _IDLE.items() if row.get(key, idle) != idle}

    def close(self) -> None:
        self._metrics.close()
        with _named(self._folder):
            self._events.close()

    def step(self, step: int, values: dict[str, float]) -> None:
        """One step's values; `step` counts from 1."""
        self.last = {"step": step, **values}
        self._record(self.last)
        with _named(self._folder):
            for key, tag in _TAGS.items():
                if key in self._shown or values[key] != _IDLE.get(key):
                    self._shown.add(key)
                    self._events.add_scalar(tag, values[key], step)
            self._events.add_scalar("memory/peak_GiB", values["peak_memory_bytes"] / 2**30, step)

    def evaluation(self, step: int, split: str, metrics: dict[str, float], samples: str) -> None:
        """Scores of a split and some of its texts, as Markdown."""
        self._record({"step": step, "split": split, **metrics})
        self.evaluated[step, split] = finite(metrics)
        folder = _group(split)
        with _named(self._folder):
            for key, value in metrics.items():
                self._events.add_scalar(f"{folder}/{key}", value, step)
            self._events.add_text(f"{folder}/samples", samples, step)

    def saved(self, step: int, stall_s: float, waited_s: float) -> None:
        """A state was taken: training stood still for `stall_s`, of which `waited_s` for the write before."""
        self._record({"step": step, "save_stall_s": stall_s, "save_waited_s": waited_s})
        with _named(self._folder):
            self._events.add_scalar("speed/save_stall_s", stall_s, step)

    def last_values(self) -> dict[str, Any]:
        """Of the newest step, for the result; None where a value is not there or not finite."""
        return finite({key: self.last.get(key) for key in ("loss", "skipped_steps", "seconds", "peak_memory_bytes")})

    def sync(self) -> None:
        """Has the rows on disk: a state must not be there before the steps that led to it."""
        os.fsync(self._metrics.fileno())

    def _record(self, row: dict[str, float | str]) -> None:
        line = json_text(row).encode() + b"\n"
        with _named(self._file):
            if self._metrics.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def text(self, tag: str, text: str, step: int) -> None:
        """Markdown, in the group `run`."""
        with _named(self._folder):
            self._events.add_text(f"run/{tag}", text, step)

    def warning(self, step: int, text: str) -> None:
        """What leaves the plan."""
        self._record({"step": step, "warning": text})
        self.text("warnings", text, step)

    def singular_values(self, step: int, found: dict[str, torch.Tensor]) -> None:
        """Of each role of each layer. The same step's are written once."""
        if step == self._spectra_step:
            return
        self._spectra_step = step
        with _named(self._folder):
            for name, values in found.items():
                if len(values):
                    self._events.add_histogram(f"weight_update/{name}.singular_values", values, step)

    def settings(self, asked: dict[str, str | float], split: str, metrics: tuple[str, ...]) -> None:
        """What tells runs apart beside what they score, and a page of the curves that matter most.

        Args:
            split: that is scored.
        """
        scores = {name: f"{_group(split)}/{name}" for name in metrics}
        first = sorted(metrics, key=lambda name: name != "loss")
        charts = {name: ["Multiline", [*(["train/loss"] if name == "loss" else []), scores[name]]] for name in first}
        page = {
            "learning": charts,
            "machine": {"target tokens/s": ["Multiline", ["speed/target_tokens_per_s"]], "peak GiB": ["Multiline", ["memory/peak_GiB"]]},
        }
        with _named(self._folder):
            self._events.add_custom_scalars(page)
            # SummaryWriter's own add_hparams would make a run of it, in a folder of its own.
            for summary in hparams(asked, dict.fromkeys(("train/loss", *scores.values()), 0.0)):
                self._events._get_file_writer().add_summary(summary)


def _group(split: str) -> str:
    # The steps have train/loss.
    return "train_split" if split == "train" else split


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Says which file it was that the system refused."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
