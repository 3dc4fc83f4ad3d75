"""A base and the deltas that go into it, each with its weight -> one `Mixture`, read and checked. Nothing is written.

`A:0.7` is the delta in folder A, its change taken 0.7 times. A folder whose whole name is `A:0.7` is that folder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.deltas.changes import Change, changes_of
from pipeline.job.errors import JobError
from pipeline.weights.delta import StoredDelta, read_delta
from pipeline.weights.digest import base_digest, file_digests, sha256_of
from pipeline.weights.index import Checkpoint, open_checkpoint
from pipeline.weights.manifest import MANIFEST, Added, Head, Manifest, delta_folder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Share:
    """One delta and how much of it."""

    folder: Path
    weight: float
    stored: StoredDelta


@dataclass(frozen=True)
class Mixture:
    checkpoint: Checkpoint
    digests: dict[str, str]
    """sha256 of each of the base's weight files."""
    shares: tuple[Share, ...]
    dtype: str | None
    """Of every tensor of floating-point numbers in the result; None: as the base stores each."""
    changes: dict[str, Change]
    """By the name of the tensor in the checkpoint."""

    @property
    def base(self) -> Path:
        return self.checkpoint.folder

    @property
    def head(self) -> Head | None:
        return next((one.stored.manifest.head for one in self.shares if one.stored.manifest.head), None)

    @property
    def head_tensors(self) -> dict[str, torch.Tensor]:
        return next((one.stored.head for one in self.shares if one.stored.head), {})

    @property
    def added(self) -> Added | None:
        return next((one.stored.manifest.added for one in self.shares if one.stored.manifest.added), None)

    def becomes(self, stored: torch.dtype) -> torch.dtype:
        """dtype of a tensor in the result."""
        return DTYPES[self.dtype] if self.dtype and stored.is_floating_point else stored

    @property
    def asked(self) -> dict[str, Any]:
        """What tells it from others, wherever its files are."""
        deltas = [
            {"sha256": one.stored.manifest.sha256, "manifest": sha256_of(one.folder / MANIFEST), "weight": one.weight}
            for one in self.shares
        ]
        return {"base": base_digest(self.digests), "deltas": deltas, "dtype": self.dtype}


def parse_share(text: str) -> tuple[Path, float]:
    """Folder and weight of `FOLDER` or `FOLDER:WEIGHT`.

    Raises:
        JobError: a weight that is no number, infinite or zero.
    """
    folder, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        weight = float(number)
    except ValueError:
        return Path(text), 1.0
    if not math.isfinite(weight) or weight == 0:
        raise JobError(f"{text}: a weight of {number} leaves nothing to merge. Give a finite number that is not 0, such as {folder}:0.5.")
    return Path(folder), weight


def mix(base: Path, given: Sequence[tuple[Path, float]], dtype: str | None = None) -> Mixture:
    """Reads and checks all of it but the base's tensors.

    Raises:
        JobError: another base than a delta's, a delta that does not fit it, deltas that cannot be added.
    """
    shares = []
    for path, weight in given:
        folder = delta_folder(path)
        stored = read_delta(folder)
        _refuse_unfolded(stored.manifest, folder)
        refuse_not_finite(stored, folder)
        shares.append(Share(folder, weight, stored))
    _refuse_unaddable(shares)
    checkpoint = open_checkpoint(base)
    digests = file_digests(checkpoint.files)
    for one in shares:
        refuse_other_base(base, digests, one.stored.manifest, one.folder)
        refuse_misfit(checkpoint, changes_of([(one.weight, one.stored)]), one.folder)
    return Mixture(checkpoint, digests, tuple(shares), dtype, changes_of((one.weight, one.stored) for one in shares))


def refuse_other_base(base: Path, digests: dict[str, str], manifest: Manifest, delta: Path) -> None:
    """Raises:
    JobError: the delta was trained on another base."""
    if base_digest(digests) != manifest.base_digest:
        raise JobError(
            f"{base}: its digest is {base_digest(digests)[:12]}..., the delta {delta} was trained on "
            f"{manifest.base_digest[:12]}... ({manifest.base}). Name the base that the delta was trained on."
        )


def _refuse_unfolded(manifest: Manifest, delta: Path) -> None:
    if not manifest.other:
        return
    kinds = [method["kind"] for method in manifest.methods if method["kind"] in ("adapter", "prefix_embed", "prefix_layer")]
    raise JobError(
        f"{delta}: was trained by {' and '.join(kinds)}, which puts into the model what no ordinary checkpoint has a place for. "
        "Use it as it is (zlora generate --delta, zlora evaluate), or train by a method that merges: lora, full, full_top, bitfit."
    )


def refuse_not_finite(stored: StoredDelta, delta: Path) -> None:
    """Raises:
    JobError: a tensor has such a value."""
    pairs = {f"{name}.lora_{part}": tensor for name, pair in stored.pairs.items() for part, tensor in zip("AB", pair, strict=True)}
    for name, tensor in (pairs | stored.head | stored.replaced | stored.added | stored.other).items():
        if not tensor.isfinite().all():
            raise JobError(f"{delta}: {name} has a value that is not finite. Its training diverged, or it is damaged; take an earlier one.")


def _refuse_unaddable(shares: Sequence[Share]) -> None:
    """What a sum of deltas has no meaning for."""
    copies: dict[str, list[Share]] = {}
    for what, has in (("a head", lambda one: one.head), ("added tokens", lambda one: one.added)):
        owners = [one for one in shares if has(one.stored.manifest)]
        if len(owners) > 1:
            raise JobError(
                f"{owners[0].folder} and {owners[1].folder}: each brings {what} of its own, and a model has one. Merge one of the two."
            )
        if owners and owners[0].weight != 1:
            raise JobError(
                f"{owners[0].folder}:{owners[0].weight:g}: brings {what}, which the base has no share of, so there is nothing between. "
                "Give it weight 1."
            )
    for one in shares:
        for replaced in one.stored.manifest.replaced:
            for tensor in replaced.tensors:
                copies.setdefault(tensor, []).append(one)
    for tensor, owners in copies.items():
        weights = [one.weight for one in owners]
        if len(owners) > 1 and (min(weights) < 0 or sum(weights) > 1 + 1e-9):
            raise JobError(
                f'{owners[0].folder} and {owners[1].folder}: each has a trained copy of "{tensor}", and copies mix only as shares of '
                f"one; their weights are {' and '.join(f'{weight:g}' for weight in weights)}. Give positive weights that sum to 1 at most, "
                "such as 0.5 and 0.5."
            )


def refuse_misfit(checkpoint: Checkpoint, changes: dict[str, Change], delta: Path) -> None:
    """Raises:
    JobError: a tensor that is not in the base, or of another shape."""
    for name, change in changes.items():
        entry = checkpoint.entries.get(name)
        shape = entry.shape if entry else ()
        for wanted in change.expected:
            fits = len(shape) == len(wanted) and all(size in (None, own) for size, own in zip(wanted, shape, strict=True))
            if entry is None or not fits:
                found = "not there" if entry is None else f"of shape {list(entry.shape)}"
                where = f'{delta}: adapts tensor "{name}" of shape {list(wanted)}'
                raise JobError(f"{where}, which in {checkpoint.folder} is {found}. Name the right base.")
        behind = [token for token in change.new[0] if token >= shape[0]] if change.new else []
        if behind and behind != list(range(shape[0], shape[0] + len(behind))):
            raise JobError(f'{delta}: adds rows {behind[0]} ... {behind[-1]} to "{name}", which has {shape[0]} rows. Name the right base.')
        if entry is not None and not entry.dtype.is_floating_point:
            raise JobError(f'{delta}: adapts tensor "{name}", which {checkpoint.folder} stores in {entry.dtype}. Name the right base.')
