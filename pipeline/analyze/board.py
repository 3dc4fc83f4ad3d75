"""An analysis in TensorBoard: a curve over the layers for each role, and the pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.image
from torch.utils.tensorboard import SummaryWriter


def write_board(report: dict[str, Any], pictures: list[Path], folder: Path) -> None:
    """One event file in the folder; the step of a curve is the layer."""
    with SummaryWriter(str(folder)) as board:
        for row in report["maps"]:
            role, layer = row["role"], row["layer"]
            for place, found in enumerate(row["deltas"], 1):
                if found is None:
                    continue
                values = {key: found[key] for key in ("norm", "effective_rank", "stable_rank")}
                values |= {key: (found["amplification"] or {}).get(key) for key in ("factor", "w_in_dw", "w_in_w", "w_in_random")}
                for key, value in values.items():
                    if value is not None:
                        board.add_scalar(f"delta_{place}_{key}/{role}", value, layer)
            for which, phi in (row["similarity"] or {}).items():
                if phi:
                    last = min(len(phi), len(phi[0])) - 1
                    board.add_scalar(f"phi_{which}/{role}", phi[last][last], layer)
        for picture in pictures:
            board.add_image(picture.stem, matplotlib.image.imread(picture)[..., :3], 0, dataformats="HWC")
