"""`zlora export --format dense`: what a delta adds to each tensor of its base, W' - W in fp32, in one file, a run of rows at a time.

W' is the base with the delta in fp32, before any rounding to the base's dtype; where LoRA alone adds to W, its product is what is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pipeline.deltas.changes import Change
from pipeline.deltas.mixture import Mixture
from pipeline.job.errors import JobError
from pipeline.weights.atomic import new_folder
from pipeline.weights.index import Entry
from pipeline.weights.read import Reader, byte_view

DENSE = "difference.safetensors"
_BLOCK_ELEMENTS = 1 << 20


def write_dense(mixture: Mixture, out: Path) -> None:
    """Of all tensors that change, by their names in the checkpoint.

    Args:
        mixture: the base and the delta.

    Raises:
        JobError: a head or added tokens, for which the base has nothing that they differ from.
    """
    for what, there in (("a head", mixture.head), ("added tokens", mixture.added)):
        if there:
            raise JobError(
                f"{mixture.shares[0].folder}: brings {what}, which the base has not, so there is no difference. Merge it: zlora merge."
            )
    changed = {name: entry for name, entry in mixture.checkpoint.entries.items() if name in mixture.changes}
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt", "base_digest": mixture.asked["base"]}}
    place = 0
    for name, entry in changed.items():
        header[name] = {"dtype": "F32", "shape": list(entry.shape), "data_offsets": [place, place + 4 * entry.numel]}
        place += 4 * entry.numel
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with new_folder(out) as partial, (partial / DENSE).open("wb") as stream, Reader() as reader:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, entry in changed.items():
            for run in _runs(reader, entry, mixture.changes[name]):
                stream.write(byte_view(run.contiguous()))


def _runs(reader: Reader, entry: Entry, change: Change) -> Iterator[torch.Tensor]:
    rows = entry.shape[0] if entry.shape else 1
    columns = entry.numel // rows
    step = max(1, _BLOCK_ELEMENTS // columns)
    for first in range(0, rows, step):
        stored = torch.zeros((min(rows, first + step) - first) * columns)
        if change.replaced:
            reader.read(entry, first * columns, stored)
        base = stored.view(-1, columns)
        yield change.rows(base, first, rows)[0] - base
