"""A short training through the program's own front door, for tests that compare trajectories."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from pipeline.job.errors import Stopped
from pipeline.job.read import read_job
from pipeline.run import train
from pipeline.screen import Screen

WORDS = [
    "Blue",
    "Spice",
    "Italian",
    "French",
    "riverside",
    "city",
    "centre",
    "cheap",
    "high",
    "pub",
    "cafe",
    "near",
    "The",
    "Eagle",
    "Mill",
]
JOB = """
[base]
model = "{base}"
dtype = "fp32"
[[methods]]
kind = "lora"
targets = ["q", "v"]
rank = 3
alpha = 12
[task]
kind = "jsonl"
data = "{data}"
separator = " ->"
[train]
steps = 4
batch_examples = 6
learning_rate = 0.01
"""

LORA_DROPOUT = "methods.0.dropout=0.2"
LONG = ("train.steps=12", LORA_DROPOUT, "train.warmup_steps=3", "train.save_every_steps=5")
"""A course with something to go wrong at every step: dropout, warm-up, states at 5, 10 and 12."""
TIMES = {"target_tokens_per_s", "examples_per_s", "step_s", "data_s", "seconds", "peak_memory_bytes"}


@dataclass
class Trained:
    losses: list[float]
    steps: list[dict]
    tensors: dict[str, np.ndarray]


def write_examples(file: Path, count: int = 24) -> Path:
    """Examples of very different lengths, so that packing and dealing have something to do."""
    rng = np.random.default_rng(0)
    lines = []
    for number in range(count):
        words = [WORDS[i] for i in rng.integers(0, len(WORDS), 2 + number % 9)]
        lines.append(json.dumps({"prompt": " ".join(words[: 1 + number % 3]), "completion": " " + " ".join(words)}))
    file.write_text("\n".join(lines) + "\n")
    return file


def write_job(folder: Path, base: Path, name: str = "job.toml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    data = write_examples(folder / "train.jsonl")
    job = folder / name
    job.write_text(JOB.format(base=base, data=data))
    return job


def train_here(ranks, job: str, run: str, overrides: tuple[str, ...], **options) -> str:
    """On a rank of a pool; returns what the screen showed."""
    shown = io.StringIO()
    train(read_job(Path(job), overrides), Path(run), ranks, Screen(shown, shown=ranks.first), **options)
    return shown.getvalue()


def train_until(ranks, job: str, run: str, overrides: tuple[str, ...], step: int, asked_rank: int = 0, **options) -> str:
    """On a rank of a pool: one rank is asked to stop while it takes `step`, counted from 1. Returns the message."""
    from pipeline.train import step as steps

    real = steps.Stepper.__call__

    def taken(self, number, *arguments):
        if number + 1 == step and ranks.rank == asked_rank:
            ranks.stop.signal = "SIGTERM"
        return real(self, number, *arguments)

    steps.Stepper.__call__ = taken
    try:
        train_here(ranks, job, run, overrides, **options)
    except Stopped as stopped:
        return str(stopped)
    finally:
        steps.Stepper.__call__, ranks.stop.signal = real, None
    raise AssertionError("it was not stopped")


def trained(pool, job: Path, run: Path, *overrides: str) -> Trained:
    """Trains on a pool and reads back what the run folder says."""
    pool.run(train_here, str(job), str(run), overrides)
    return read_run(run)


def read_run(run: Path) -> Trained:
    """What a run folder says."""
    steps = [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row and "split" not in row]
    return Trained([row["loss"] for row in steps], steps, load_file(run / "delta" / "adapter_model.safetensors"))


def rows(run: Path) -> list[dict]:
    """Of steps, without what the clock says."""
    return [{key: value for key, value in row.items() if key not in TIMES} for row in read_run(run).steps]


def delta_bytes(run: Path) -> dict[str, bytes]:
    return folder_bytes(run / "delta")


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
