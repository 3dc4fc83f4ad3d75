"""`zlora deltas combine`: LoRA deltas with weights -> one delta whose map is their weighted sum.

Exact: the ranks stand beside each other, sum w_i s_i B_i A_i = [w_1 s_1 B_1, w_2 s_2 B_2] [A_1; A_2]. With a rank: the nearest of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline.deltas.lowrank import cut, stacked
from pipeline.deltas.mixture import refuse_not_finite
from pipeline.deltas.product import Pairs, write_product
from pipeline.deltas.resize import total_of
from pipeline.job.errors import JobError
from pipeline.weights.atomic import refuse_filled
from pipeline.weights.delta import StoredDelta, read_delta
from pipeline.weights.manifest import Module, delta_folder

SCHEMA_VERSION = 1


def combine(given: Sequence[tuple[Path, float]], out: Path, rank: int | None = None) -> dict[str, Any]:
    """Writes the sum.

    Args:
        given: folders and weights.
        rank: of every pair of the result, of each part of a fused map's; the exact sum when absent.

    Returns:
        The report: by module and in total.

    Raises:
        JobError: deltas of different bases, one that is not of LoRA alone, heads that differ; `out` is there already.
    """
    refuse_filled(out)
    folders = [delta_folder(path) for path, _ in given]
    deltas = [read_delta(folder) for folder in folders]
    _refuse(folders, deltas)
    weights = [weight for _, weight in given]
    terms: dict[str, list[tuple[Module, torch.Tensor, torch.Tensor, float]]] = {}
    for stored, weight in zip(deltas, weights, strict=True):
        for module in stored.manifest.modules:
            terms.setdefault(module.name, []).append((module, *stored.pairs[module.name], weight * module.alpha / module.rank))
    pairs: Pairs = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, several in terms.items():
        a, b = stacked([(a, b, scale) for _, a, b, scale in several])
        whole = cut(a, b, 1.0, rank)
        if rank is not None and whole.a.shape[0] < a.shape[0]:
            a, b, error = whole.a, whole.b, whole.error
        else:
            error = 0.0
        pairs[name] = (replace(several[0][0], rank=a.shape[0], alpha=float(a.shape[0])), a, b)
        rows[name] = {"rank": a.shape[0], "norm": whole.norm, "error": error}
    report = {
        "schema_version": SCHEMA_VERSION,
        "made_by": "combine",
        "from": [
            {"delta": str(folder.resolve()), "sha256": stored.manifest.sha256, "weight": weight}
            for folder, stored, weight in zip(folders, deltas, weights, strict=True)
        ],
        "asked": {"rank": rank},
        "modules": rows,
        "total": total_of(rows),
    }
    first = deltas[0]
    told = [stored.manifest for stored in deltas]
    same = {
        "separator": first.manifest.separator if len({one.separator for one in told}) == 1 else None,
        "chat": all(one.chat for one in told),
        "dtype": first.manifest.dtype if len({one.dtype for one in told}) == 1 else None,
    }
    manifest = replace(first.manifest, step=0, **same)  # type: ignore[arg-type]
    write_product(out, replace(first, manifest=manifest), pairs, report)
    return report


def _refuse(folders: list[Path], deltas: list[StoredDelta]) -> None:
    first = deltas[0]
    for folder, stored in zip(folders, deltas, strict=True):
        manifest = stored.manifest
        if manifest.base_digest != first.manifest.base_digest:
            raise JobError(
                f"{folder}: is of a base with digest {manifest.base_digest[:12]}... ({manifest.base}), {folders[0]} of one with "
                f"{first.manifest.base_digest[:12]}... ({first.manifest.base}). Combine deltas of one base."
            )
        if manifest.replaced or manifest.added or manifest.other or not manifest.modules:
            what = (
                "trained parameters of the base"
                if manifest.replaced
                else "added tokens"
                if manifest.added
                else "adapters or special tokens"
                if manifest.other
                else "no LoRA"
            )
            raise JobError(f"{folder}: has {what}, and only LoRA adds up as one delta. Merge them: zlora merge BASE A:0.7 B:0.3.")
        equal = manifest.head == first.manifest.head and all(torch.equal(stored.head[name], first.head[name]) for name in first.head)
        if not equal:
            raise JobError(
                f"{folder}: its head is not that of {folders[0]}, and a delta has one. Combine deltas of one head, or of none; "
                "zlora merge takes one head of several deltas."
            )
        for name, tensors in stored.pairs.items():
            other = first.pairs.get(name)
            if other and (other[0].shape[1], other[1].shape[0]) != (tensors[0].shape[1], tensors[1].shape[0]):
                raise JobError(f"{folder}: {name} has another shape than in {folders[0]}. One of them is damaged; save it again.")
        refuse_not_finite(stored, folder)
