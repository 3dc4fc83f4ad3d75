"""Where a run is written down: `metrics.jsonl`, one object a step, and TensorBoard. First rank only."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter

_TAGS = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "loss_scale": "train/loss_scale",
    "skipped_steps": "train/skipped_steps",
    "target_tokens_per_s": "speed/target_tokens_per_s",
    "examples_per_s": "speed/examples_per_s",
    "step_s": "speed/step_s",
    "padding_share": "speed/padding_share",
    "peak_memory_bytes": "memory/peak_bytes",
}


class Board:
    """Open for the length of a run."""

    def __init__(self, run: Path) -> None:
        self._metrics = (run / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
        self._events = SummaryWriter(str(run / "tensorboard"))

    def __enter__(self) -> Board:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._metrics.close()
        self._events.close()

    def step(self, step: int, values: dict[str, float]) -> None:
        """One step's values; `step` counts from 1."""
        self._record({"step": step, **values})
        for key, tag in _TAGS.items():
            self._events.add_scalar(tag, values[key], step)

    def evaluation(self, step: int, split: str, metrics: dict[str, float], samples: str) -> None:
        """Scores of a split and some of its texts, as Markdown."""
        self._record({"step": step, "split": split, **metrics})
        for key, value in metrics.items():
            self._events.add_scalar(f"{split}/{key}", value, step)
        self._events.add_text(f"{split}/samples", samples, step)

    def _record(self, row: dict[str, float | str]) -> None:
        # JSON has no infinity and no NaN; a skipped step's gradient norm is one of them.
        plain = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        self._metrics.write(json.dumps(plain) + "\n")

    def text(self, tag: str, text: str) -> None:
        self._events.add_text(tag, text)
