"""A profile in TensorBoard, beside the run's own events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.image
from torch.utils.tensorboard import SummaryWriter


def write_board(report: dict[str, Any], picture: Path, folder: Path) -> None:
    """Scalars, the picture, and what the profile says; into the folder."""
    with SummaryWriter(str(folder)) as board:
        for name, seconds in report["time"]["split_s"].items():
            board.add_scalar(f"profile_time/{name}_s", seconds, 0)
        for name in ("examples_per_s", "tokens_per_s", "target_tokens_per_s", "model_flops_per_s"):
            board.add_scalar(f"profile_speed/{name}", report["speed"][name], 0)
        for name, part in report["memory"]["parts"].items():
            board.add_scalar(f"profile_memory/{name}_bytes", part["measured"], 0)
        board.add_text("profile", "\n".join(f"{place}. {text}" for place, text in enumerate(report["says"], 1)), 0)
        board.add_image("profile", matplotlib.image.imread(picture)[..., :3], 0, dataformats="HWC")
