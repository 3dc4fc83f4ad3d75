"""The deltas that one base answers with: read, checked, and how each of them sees a prompt.

Under None: the only delta where it has no name, else the base alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.deltas.mixture import refuse_not_finite
from pipeline.job.errors import JobError
from pipeline.job.spec import Dtype
from pipeline.methods.mixed import refuse_unmixable
from pipeline.model.build import TORCH_DTYPES
from pipeline.model.routing import BASE
from pipeline.tasks.encode import Encoder
from pipeline.tasks.specials import Specials
from pipeline.tasks.tokens import Tokens
from pipeline.weights.delta import StoredDelta, read_delta
from pipeline.weights.index import Checkpoint
from pipeline.weights.manifest import Manifest, delta_folder


@dataclass(frozen=True)
class Found:
    """A delta as it lies in its files."""

    folder: Path
    stored: StoredDelta
    separator: str
    """Behind its prompts."""


@dataclass(frozen=True)
class Served:
    """What answers a prompt."""

    name: str | None
    given: Path | None
    """As the delta was named; None: the base alone."""
    manifest: Manifest | None
    separator: str
    encoder: Encoder
    specials: Specials | None
    """What stands around every prompt, by the delta's methods."""
    number: int = BASE
    """Of the delta among those that are mixed."""

    def report(self) -> dict[str, str | int | None]:
        return {
            "name": self.name,
            "delta": str(self.given) if self.given else None,
            "step": self.manifest.step if self.manifest else None,
            "separator": self.separator,
        }


def read_deltas(given: dict[str | None, Path], separator: str | None) -> dict[str | None, Found]:
    """Args:
        separator: of all; None: each delta's own.

    Raises:
        JobError: no such delta, one with a head for labels or a value that is not finite, one whose separator is not known,
            one that does not mix with others.
    """
    found: dict[str | None, Found] = {}
    for name, path in given.items():
        folder = delta_folder(path)
        stored = read_delta(folder)
        refuse_not_finite(stored, folder)
        if stored.manifest.head:
            raise JobError(f"{folder}: has a head for labels and generates no text. Score it with zlora evaluate.", everywhere=True)
        if name is not None:
            refuse_unmixable(stored, folder)
        found[name] = Found(folder, stored, _separator(separator, stored.manifest, folder))
    return found


def serve(
    given: dict[str | None, Path],
    found: dict[str | None, Found],
    specials: dict[str | None, Specials | None],
    tokens: Tokens,
    vocabulary: int,
    separator: str | None,
) -> dict[str | None, Served]:
    """By the name that a prompt asks for.

    Args:
        separator: of the base alone; None: none.
    """

    def encoder(between: str, chat: bool) -> Encoder:
        return Encoder(tokens, between, 0, vocabulary, chat=chat)

    alone = separator or ""
    served: dict[str | None, Served] = {None: Served(None, None, None, alone, encoder(alone, False), None)}
    for number, (name, one) in enumerate(found.items()):
        manifest = one.stored.manifest
        asked = encoder(one.separator, manifest.chat)
        served[name] = Served(name, given[name], manifest, one.separator, asked, specials[name], number)
    return served


def dtype_of(found: dict[str | None, Found], checkpoint: Checkpoint, device: torch.device) -> Dtype:
    """As the deltas were trained, else as most bytes of the base are stored, where the device has it.

    Raises:
        JobError: they were trained in different ones.
    """
    names: dict[str, Dtype] = {"fp32": "fp32", "bf16": "bf16", "fp16": "fp16"}
    trained = {one.stored.manifest.dtype: name for name, one in found.items() if one.stored.manifest.dtype in names}
    if len(trained) > 1:
        said = ", ".join(f"{name} in {dtype}" for dtype, name in trained.items())
        raise JobError(f"--delta: were trained on bases of different dtypes ({said}). Choose one for all with --dtype.", everywhere=True)
    stored: dict[torch.dtype, int] = {}
    for entry in checkpoint.entries.values():
        stored[entry.dtype] = stored.get(entry.dtype, 0) + entry.bytes
    most = max(stored, key=lambda dtype: stored[dtype])
    own = next(iter(trained), None) or next((name for name, dtype in TORCH_DTYPES.items() if dtype == most), "fp32")
    if device.type == "cpu":
        return names["fp32" if own == "fp16" else own]
    return names["fp16" if own == "bf16" and torch.cuda.get_device_capability(device) < (8, 0) else own]


def _separator(asked: str | None, manifest: Manifest, folder: Path) -> str:
    if asked is not None:
        return asked
    if manifest.separator is None:
        raise JobError(
            f"{folder}: what ends a prompt is not known (trained on several kinds, or of another tool or an older zlora). Give it: "
            "--separator '<|endoftext|>' for E2E, WebNLG and DART with GPT-2, --separator '' for none."
        )
    return manifest.separator
