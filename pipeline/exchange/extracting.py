"""`zlora deltas extract`: a base and a checkpoint that was trained whole -> the nearest LoRA delta of a rank, and what it leaves out.

W' - W of each target is cut by SVD (Eckart and Young 1936); one matrix is in memory at a time. What differs elsewhere is counted and named.
Shapes: W [D, K] as the map computes, A [R, K], B [D, R].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.deltas.lowrank import best_of
from pipeline.deltas.product import Pairs, write_product
from pipeline.job.errors import JobError
from pipeline.methods.lora import Rows, linears_of, rows_of
from pipeline.model.build import build
from pipeline.model.config import read_config
from pipeline.model.families import Family
from pipeline.model.linear import BaseLinear
from pipeline.model.names import find, match_names
from pipeline.weights.atomic import refuse_filled
from pipeline.weights.delta import StoredDelta
from pipeline.weights.digest import base_digest, file_digests
from pipeline.weights.hub import local_base
from pipeline.weights.index import Checkpoint, Entry, open_checkpoint
from pipeline.weights.manifest import Manifest, Module
from pipeline.weights.read import Reader

SCHEMA_VERSION = 1
_EXACT_SIDE = 4096
"""A matrix whose shorter side is longer takes minutes for all its singular vectors."""
_CHUNK_ELEMENTS = 1 << 22


def extract(
    base: str,
    finetuned: str,
    revision: str | None,
    rank: int,
    out: Path,
    targets: tuple[str, ...] = (),
    exact: bool = False,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> dict[str, Any]:
    """Writes the delta.

    Args:
        base: folder or hub id; `finetuned` likewise.
        rank: of every target.
        targets: roles or module paths, as in a job; all roles when absent.
        exact: large matrices by all singular vectors too.

    Returns:
        The report: by target, of what is left out, and in total.

    Raises:
        JobError: checkpoints of different models, targets that are not there or did not change; `out` is there already.
    """
    refuse_filled(out)
    ours, theirs = (open_checkpoint(local_base(name, revision if name == base else None)) for name in (base, finetuned))
    config = read_config(ours.folder)
    model, family = build(config, 0.0)
    linears = linears_of(model, family)
    if not targets and not (targets := tuple(family.roles)):
        raise JobError(f"{base}: the roles of a {config.model_type} are not known. Give --targets with paths of its linear maps.")
    wanted = rows_of(linears, family, targets, "--targets", config.num_attention_heads)
    matched = _matched(model, family, ours, theirs)
    pairs: Pairs = {}
    rows: dict[str, dict[str, Any]] = {}
    left: dict[str, float] = {}
    with Reader() as reader:
        for name in progress(list(matched)):
            before, after = matched[name]
            module = name.removesuffix(".weight")
            if module not in wanted or module == name:
                left[before.name] = _squared_distance(reader, before, after)
                continue
            found, elsewhere = _pair(reader, before, after, linears[module], wanted[module], rank, exact)
            rows |= {f"{module} ({target})": row for target, row in found.items()}
            left[f"{before.name} (rows of other targets)"] = elsewhere
            parts = [row.pop("pair") for row in found.values() if row["norm"]]
            if parts:
                a, b = torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], dim=1)
                adapted = Module(module, before.name, linears[module].transposed, a.shape[0], float(a.shape[0]))
                pairs[module] = (adapted, a.contiguous(), b.contiguous())
    for row in rows.values():
        row.pop("pair", None)
    if not pairs:
        raise JobError(f"{finetuned}: {', '.join(targets)} are the same in it as in {base}. Name other --targets, or another checkpoint.")
    used = {after.name for _, after in matched.values()}
    report = {
        "schema_version": SCHEMA_VERSION,
        "made_by": "extract",
        "from": [{"finetuned": str(theirs.folder.resolve()), "digest": base_digest(file_digests(theirs.files))}],
        "asked": {"rank": rank, "targets": list(targets), "exact": exact},
        "modules": rows,
        "left_out": _left_out(left, rows),
        "only_in_finetuned": sorted(set(theirs.entries) - used - set(ours.entries) - _tied(model)),
        "total": _total(rows, left),
    }
    digests = file_digests(ours.files)
    named = str(ours.folder.resolve()) if Path(base).is_dir() else base
    manifest = Manifest(named, base_digest(digests), digests, "", 0, 1, (), "")
    write_product(out, StoredDelta(manifest, {}, {}, {}, {}, {}), pairs, report)
    return report


def _matched(model: PreTrainedModel, family: Family, ours: Checkpoint, theirs: Checkpoint) -> dict[str, tuple[Entry, Entry]]:
    """Every parameter's tensor in both."""
    matched = {}
    aliases = dict(model.named_parameters(remove_duplicate=False))
    for name, before in match_names(model, family, ours).items():
        names = [name, *(other for other, parameter in aliases.items() if parameter is aliases[name] and other != name)]
        after = next((entry for one in names if (entry := find(one, family, theirs))), None)
        if after is None or after.shape != before.shape:
            there = f"has shape {list(after.shape)}, in the base {list(before.shape)}" if after else "is not in it"
            raise JobError(f'{theirs.folder}: "{before.name}" {there}. Name a checkpoint that was trained from this base.')
        matched[name] = (before, after)
    return matched


def _tied(model: PreTrainedModel) -> set[str]:
    """Tied names, which a checkpoint may hold twice."""
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


def _pair(
    reader: Reader, before: Entry, after: Entry, linear: BaseLinear, runs: list[tuple[str, Rows]], rank: int, exact: bool
) -> tuple[dict[str, dict[str, Any]], float]:
    """By target: its figures and its pair of the whole map; and the squared norm of what differs in other rows."""
    difference = torch.cat(list(_differences(reader, before, after))).view(before.shape)
    if linear.transposed:
        difference = difference.T
    found: dict[str, dict[str, Any]] = {}
    covered = 0.0
    for target, rows in sorted(runs, key=lambda run: run[1].first):
        places = rows.places(linear.out_features)
        part = difference[places]
        whole = exact or min(part.shape) <= _EXACT_SIDE
        cut = best_of(part, rank, whole)
        b = torch.zeros(linear.out_features, cut.b.shape[1])
        b[places] = cut.b
        found[target] = {
            "rank": cut.a.shape[0],
            "norm": cut.norm,
            "error": cut.error,
            "kept_energy": 1 - (cut.error / cut.norm) ** 2 if cut.norm else 1.0,
            "svd": "exact, fp64" if whole else "randomised, fp32",
            "pair": (cut.a, b),
        }
        covered += cut.norm**2
    all_of_it = float(difference.double().square().sum())
    return found, max(0.0, all_of_it - covered) if sum(rows.count * rows.groups for _, rows in runs) < linear.out_features else 0.0


def _differences(reader: Reader, before: Entry, after: Entry) -> Iterator[torch.Tensor]:
    """Runs of the flattened difference, fp32."""
    for first in range(0, before.numel, _CHUNK_ELEMENTS):
        old, new = (torch.empty(min(_CHUNK_ELEMENTS, before.numel - first), dtype=torch.float64) for _ in range(2))
        reader.read(before, first, old)
        reader.read(after, first, new)
        yield (new - old).float()


def _squared_distance(reader: Reader, before: Entry, after: Entry) -> float:
    return sum(float(run.double().square().sum()) for run in _differences(reader, before, after))


def _left_out(left: dict[str, float], rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What differs outside the targets, the largest first."""
    total = sum(left.values()) + sum(row["norm"] ** 2 for row in rows.values())
    found = sorted(((square, name) for name, square in left.items() if square), reverse=True)
    return [{"tensor": name, "norm": math.sqrt(square), "share": square / total} for square, name in found]


def _total(rows: dict[str, dict[str, Any]], left: dict[str, float]) -> dict[str, float]:
    """Of the whole difference, in the Frobenius norm."""
    within, lost = (sum(row[key] ** 2 for row in rows.values()) for key in ("norm", "error"))
    outside = sum(left.values())
    whole = within + outside
    return {
        "norm": math.sqrt(whole),
        "error": math.sqrt(lost + outside),
        "kept_energy": (within - lost) / whole,
        "lost_by_rank": lost / whole,
        "left_out": outside / whole,
    }
