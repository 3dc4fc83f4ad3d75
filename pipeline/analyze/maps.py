"""A delta -> the linear maps whose weight it changes, each part of a fused one (GPT-2's q, k, v) by itself, as the paper takes W_q and W_v.

What has no dW, or none with singular directions, is named with the reason. The base is not read. Shapes: A [R, K], B [P, R], W [D, K].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.deltas.lowrank import blocks_of
from pipeline.job.errors import JobError
from pipeline.methods.lora import Rows
from pipeline.model.families import FAMILIES, Role
from pipeline.model.linear import BaseLinear
from pipeline.weights.delta import StoredDelta

_NEEDS_BASE = "a trained copy: its dW is the difference to the base's"
_SHOWN = 3


@dataclass(frozen=True)
class Map:
    """A linear map of a layer, or a part of one, that a delta changes."""

    layer: int
    role: str
    """As a job names it; the path inside the layer where the family is not known."""
    module: str
    tensor: str
    """In the base's checkpoint."""
    transposed: bool
    """The checkpoint stores [K, D]."""
    rows: Rows
    """Which of the module's output rows it is."""
    out_features: int
    """Of the whole module."""
    pair: tuple[torch.Tensor, torch.Tensor, float] | None
    """A, B and alpha / R; of the part alone."""
    copy: torch.Tensor | None = None
    """What takes the place of the base's whole tensor, as the checkpoint stores it."""

    @property
    def places(self) -> torch.Tensor:
        """Of its rows in the module."""
        return self.rows.places(self.out_features)

    @property
    def key(self) -> tuple[int, str]:
        return self.layer, self.role


@dataclass(frozen=True)
class Left:
    """What is not analysed."""

    name: str
    why: str


def maps_of(stored: StoredDelta, folder: Path, heads: int | None, linears: Mapping[str, BaseLinear] | None) -> tuple[list[Map], list[Left]]:
    """Its maps in the order of the manifest, and what it has beside them.

    Args:
        heads: attention heads; None without a base. A map whose parts lie head by head (GPT-NeoX) is then taken as a whole.
        linears: the base's layers' linear maps; None without a base, and trained copies are then left out.

    Raises:
        JobError: nothing is left to analyse.
    """
    maps: list[Map] = []
    left = [Left(name, "a head of its own: the base has none") for name in stored.head]
    left += [Left(name, "rows of added tokens: the base has none") for name in stored.added]
    left += [Left(name, "of an adapter or of special tokens: it adds to no weight of the base") for name in stored.other]
    copies = {one.name: one.tensors[0] for one in stored.manifest.replaced}
    for module in stored.manifest.modules:
        a, b = stored.pairs[module.name]
        copy = f"{module.name}.weight" if f"{module.name}.weight" in copies else None
        if copy and linears is None:
            left.append(Left(module.name, _NEEDS_BASE))
            continue
        taken = copies.pop(copy) if copy else None
        found = _parts(module.name, module.tensor, module.transposed, b.shape[0], heads, folder)
        pairs = [_pair(one, a, b, module.alpha / module.rank) for one in found]
        values = stored.replaced[copy] if copy and taken else None
        maps += [_with(one, pair, values) for one, pair in zip(found, pairs, strict=True) if pair or values is not None]
        if not found:
            left.append(Left(module.name, "outside the layers"))
        elif values is None and not any(pairs):
            left.append(Left(module.name, "its B is zero: it adds nothing yet"))
    for name, tensor in copies.items():
        module_name = name.removesuffix(".weight")
        if stored.replaced[name].dim() != 2:
            left.append(Left(name, "a vector, which has no singular directions"))
        elif linears is None:
            left.append(Left(name, _NEEDS_BASE))
        elif (linear := linears.get(module_name)) is None:
            left.append(Left(name, "outside the layers' linear maps"))
        else:
            found = _parts(module_name, tensor, linear.transposed, linear.out_features, heads, folder)
            maps += [_with(one, None, stored.replaced[name]) for one in found]
    if not maps:
        raise JobError(_nothing(folder, left))
    return maps, left


def _parts(module: str, tensor: str, transposed: bool, rows: int, heads: int | None, folder: Path) -> list[Map]:
    """One for each role; none where it is in no layer."""
    if (found := re.match(r"(.+?)\.(\d{1,6})\.(.+)", module)) is None:
        return []
    layers, number, inner = found.groups()
    family = next((family for family in FAMILIES.values() if family.layers == layers), None)
    roles = {name: role for name, role in (family.roles if family else {}).items() if role.module == inner}
    if not roles or (heads is None and any(role.per_head for role in roles.values())):
        roles = {"+".join(roles) or inner: Role(inner)}
    maps = []
    for name, role in roles.items():
        groups = (heads or 1) if role.per_head else 1
        if rows % (groups * role.parts):
            raise JobError(f"{folder}: {module} has {rows} rows, which are not {role.parts} equal parts. Name another delta.")
        count = rows // groups // role.parts
        maps.append(Map(int(number), name, module, tensor, transposed, Rows(count * role.part, count, groups), rows, None))
    return maps


def _pair(one: Map, a: torch.Tensor, b: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """The part's own; None where it was not trained."""
    own = b[one.places]
    if not own.any():
        return None
    if len(own) == len(b):
        return a, own, scale
    # A fused map's pair has columns of its own for each part that was trained.
    columns = [column for block in blocks_of(b) if own[:, list(block.columns)].any() for column in block.columns]
    return a[columns], own[:, columns], scale


def _with(one: Map, pair: tuple[torch.Tensor, torch.Tensor, float] | None, copy: torch.Tensor | None) -> Map:
    return Map(one.layer, one.role, one.module, one.tensor, one.transposed, one.rows, one.out_features, pair, copy)


def _nothing(folder: Path, left: list[Left]) -> str:
    whys: dict[str, list[str]] = {}
    for one in left:
        whys.setdefault(one.why, []).append(one.name)
    told = "; ".join(f"{', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''} ({why})" for why, names in whys.items())
    repair = "Give --base." if _NEEDS_BASE in whys else "Name one that was trained by lora, full or full_top."
    return f"{folder}: has no dW to analyse: {told or 'it is empty'}. {repair}"
