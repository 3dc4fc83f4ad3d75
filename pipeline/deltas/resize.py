"""`zlora deltas resize`: a delta -> the same one with pairs of another rank, as near to it as that rank can be, and how near that is."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.deltas.lowrank import cut
from pipeline.deltas.mixture import refuse_not_finite
from pipeline.deltas.product import Pairs, write_product
from pipeline.job.errors import JobError
from pipeline.weights.atomic import refuse_filled
from pipeline.weights.delta import read_delta
from pipeline.weights.manifest import delta_folder

SCHEMA_VERSION = 1


def resize(given: Path, out: Path, rank: int | None, energy: float | None) -> dict[str, Any]:
    """Writes the new delta; a part that has no larger rank already stays as it is.

    Args:
        rank: of every pair, of each part of a fused map's.
        energy: in its place the share of each part's squared Frobenius norm that is kept, above 0 and at most 1.

    Returns:
        The report: by module and in total.

    Raises:
        JobError: neither or both of them, no LoRA in it, `out` is there already.
    """
    if (rank is None) == (energy is None):
        raise JobError("zlora deltas resize: needs --rank or --energy, and one of them. Give the rank, or the share to keep, such as 0.99.")
    if energy is not None and not 0 < energy <= 1:
        raise JobError(f"--energy {energy:g}: is a share of the squared norm. Give a number above 0 and at most 1, such as 0.99.")
    refuse_filled(out)
    folder = delta_folder(given)
    stored = read_delta(folder)
    refuse_not_finite(stored, folder)
    if not stored.pairs:
        raise JobError(f"{folder}: has no LoRA, so there is no rank to change. Name a delta that methods.kind = lora has trained.")
    pairs: Pairs = {}
    rows: dict[str, dict[str, Any]] = {}
    for module in stored.manifest.modules:
        a, b = stored.pairs[module.name]
        smaller = cut(a, b, module.alpha / module.rank, rank, energy)
        same = smaller.a.shape[0] >= module.rank
        new_rank = module.rank if same else smaller.a.shape[0]
        error = 0.0 if same else smaller.error
        pairs[module.name] = (module, a, b) if same else (replace(module, rank=new_rank, alpha=float(new_rank)), smaller.a, smaller.b)
        rows[module.name] = {"rank_before": module.rank, "rank": new_rank, "norm": smaller.norm, "error": error}
    report = {
        "schema_version": SCHEMA_VERSION,
        "made_by": "resize",
        "from": [{"delta": str(folder.resolve()), "sha256": stored.manifest.sha256}],
        "asked": {"rank": rank, "energy": energy},
        "modules": {name: row | {"relative_error": _share(row["error"], row["norm"])} for name, row in rows.items()},
        "total": total_of(rows),
    }
    write_product(out, stored, pairs, report)
    return report


def total_of(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Of all modules together, in the Frobenius norm."""
    norm, error = (math.sqrt(sum(row[key] ** 2 for row in rows.values())) for key in ("norm", "error"))
    return {"norm": norm, "error": error, "relative_error": _share(error, norm), "kept_energy": 1 - _share(error, norm) ** 2}


def _share(error: float, norm: float) -> float:
    return error / norm if norm else 0.0
