"""Map by map, layer by layer: what each delta adds (dW), how it lies in the base's own weight (W), and how two deltas' subspaces overlap.

One part of one tensor of the base is in memory at a time, in fp32, and its SVD in fp64. W is of a bf16 or fp16 base exactly.
dW = (alpha / R) B A, or W' - W of a trained copy W'. Shapes: W [D, K], A [R, K], B [D, R], U [D, R], V [K, R].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.analyze.maps import Map
from pipeline.analyze.subspace import (
    directions,
    directions_for,
    effective_rank,
    projected,
    random_basis,
    right_basis,
    similarity,
)
from pipeline.deltas.lowrank import svd_of, svd_of_pair
from pipeline.job.errors import JobError
from pipeline.weights.index import Checkpoint, Entry
from pipeline.weights.read import Reader

EXACT_SIDE = 4096
"""A matrix whose shorter side is longer takes minutes for all its singular vectors."""
BASES = ("a", "b", "right", "left")
"""Right singular vectors of A, left ones of B, both of dW."""
_TOP_SHARE = 0.1
"""Of W's directions, in which those of dW are looked for: figure 8 goes as far."""
_ROLES = ("q", "k", "v", "q+k+v", "o", "mlp_gate", "mlp_in", "mlp_out")
_GRID = 32
"""Places on the axis of W's directions."""
_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Update:
    """dW of one map."""

    rank: int | None
    """LoRA's; None: a trained copy."""
    spectrum: torch.Tensor
    """Singular values, as far as they are known."""
    norm: float
    right: torch.Tensor
    """[K, N], of dW."""
    left: torch.Tensor
    """[D, N]"""
    a: torch.Tensor | None
    """Right singular vectors of A [K, N]."""
    b: torch.Tensor | None
    """Left singular vectors of B [D, N]."""
    exact: bool

    @property
    def bases(self) -> dict[str, torch.Tensor]:
        """Those that it has, by `BASES`."""
        found = zip(BASES, (self.a, self.b, self.right, self.left), strict=True)
        return {name: basis for name, basis in found if basis is not None}


def walk(deltas: Sequence[Sequence[Map]], checkpoint: Checkpoint | None, limit: int, exact: bool) -> Iterator[dict[str, Any]]:
    """A row of numbers for each map.

    Args:
        deltas: maps of one or two.
        checkpoint: the base.
        limit: directions that subspaces are compared up to.
        exact: large matrices by all singular vectors too.

    Raises:
        JobError: a tensor of the base that has values which are not finite, maps of one name and different sizes.
    """
    by_key = [{one.key: one for one in maps} for maps in deltas]
    with Reader() as reader:
        for key in keys_of(deltas):
            yield _row([maps.get(key) for maps in by_key], checkpoint, reader, limit, exact)


def keys_of(deltas: Iterable[Iterable[Map]]) -> list[tuple[int, str]]:
    """Layer and role of every map, layer by layer; roles as a forward pass meets them, those that are paths behind."""
    keys = dict.fromkeys(one.key for maps in deltas for one in maps)
    return sorted(keys, key=lambda key: (key[0], _ROLES.index(key[1]) if key[1] in _ROLES else len(_ROLES)))


def read_weight(reader: Reader, entry: Entry, one: Map) -> torch.Tensor:
    """A map's own rows of its tensor [D, K], fp32.

    Raises:
        JobError: a value that is not finite.
    """
    places, wide = one.places, one.out_features
    columns = entry.numel // wide
    weight = torch.empty(len(places), columns)
    if one.transposed:
        step = max(1, _BLOCK_ELEMENTS // wide)
        for first in range(0, columns, step):
            block = torch.empty(min(step, columns - first), wide)
            reader.read(entry, first * wide, block.view(-1))
            weight[:, first : first + len(block)] = block[:, places].T
    else:
        count = one.rows.count
        for first in range(0, len(places), count):
            reader.read(entry, int(places[first]) * columns, weight[first : first + count].view(-1))
    if not bool(weight.isfinite().all()):
        raise JobError(f'{entry.file}: tensor "{entry.name}" has values that are not finite. Fetch the base again.')
    return weight


def _row(maps: list[Map | None], checkpoint: Checkpoint | None, reader: Reader, limit: int, exact: bool) -> dict[str, Any]:
    one = next(found for found in maps if found)
    w = read_weight(reader, checkpoint.entries[one.tensor], one) if checkpoint else None
    updates = [_update(found, w, limit, exact) if found else None for found in maps]
    known = [update for update in updates if update]
    name = f"{one.module}:{one.role}"
    row: dict[str, Any] = {"layer": one.layer, "role": one.role, "module": one.module, "w": None}
    row["shape"] = [len(known[0].left), len(known[0].right)] if known else list(_shape(one))
    if any([len(update.left), len(update.right)] != row["shape"] for update in known):
        raise JobError(f"{one.module}: is of different sizes in the two deltas. Is one of them damaged, or of another base?")
    row["deltas"] = [_figures(update) if update else None for update in updates]
    if w is not None and known:
        row["w"] = _within(w, updates, row["deltas"], name, exact)
    row["similarity"] = _between(updates, name, limit) if known and len(known) == len(updates) else None
    return row


def _shape(one: Map) -> tuple[int, int]:
    columns = one.copy.numel() // one.out_features if one.copy is not None else one.pair[0].shape[1] if one.pair else 0
    return len(one.places), columns


def _update(one: Map, w: torch.Tensor | None, limit: int, exact: bool) -> Update | None:
    """None: it is the base's own."""
    if one.copy is None:
        assert one.pair is not None
        a, b, scale = one.pair
        svd = svd_of_pair(a, b, scale)
        count = directions(svd.s, len(svd.s))
        right, left = right_basis(a), right_basis(b.T)
        return Update(a.shape[0], svd.s, _norm(svd.s), svd.v[:, :count], svd.u[:, :count], right, left, True) if count else None
    assert w is not None
    difference = (one.copy.T if one.transposed else one.copy)[one.places].double() - w
    if one.pair:
        a, b, scale = one.pair
        difference += b.double() @ a.double() * scale
    exact = exact or min(difference.shape) <= EXACT_SIDE
    svd = svd_of(difference if exact else difference.float(), limit, exact)
    count = directions(svd.s, min(difference.shape))
    norm = float(torch.linalg.matrix_norm(difference))
    return Update(None, svd.spectrum, norm, svd.v[:, :count], svd.u[:, :count], None, None, exact) if count else None


def _norm(spectrum: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(spectrum.double()))


def _figures(update: Update) -> dict[str, Any]:
    s = update.spectrum
    return {
        "rank": update.rank,
        "directions": update.right.shape[1],
        "norm": update.norm,
        "svd": "exact, fp64" if update.exact else "randomised, fp32",
        "singular_values": s.tolist(),
        # Of leading values alone they would say nothing.
        "effective_rank": effective_rank(s) if update.exact else None,
        # ||dW||_F^2 / ||dW||_2^2
        "stable_rank": (update.norm / float(s[0])) ** 2,
        "directions_for_90_percent": directions_for(s, 0.9) if update.exact else None,
        "amplification": None,
        "w_similarity": None,
    }


def _within(w: torch.Tensor, updates: list[Update | None], figures: list[Any], name: str, exact: bool) -> dict[str, Any]:
    """Of W; and into each delta's figures, how its dW lies in it."""
    side = min(w.shape)
    exact = exact or side <= EXACT_SIDE
    most = max(update.right.shape[1] for update in updates if update)
    top = max(1, round(_TOP_SHARE * side))
    if exact:
        w = w.double()
    svd = svd_of(w, max(top, most), exact)
    grid = sorted({round(1 + place * (top - 1) / (_GRID - 1)) for place in range(_GRID)})
    for update, found in zip(updates, figures, strict=True):
        if update is None:
            continue
        count = update.right.shape[1]
        control = [random_basis(size, count, f"{name}:{which}") for size, which in zip(w.shape, ("left", "right"), strict=True)]
        of_dw = projected(update.left, w, update.right)
        largest = _norm(update.spectrum[:count])
        found["amplification"] = {
            "directions": count,
            "w_in_dw": of_dw,
            "w_in_w": _norm(svd.s[:count]),
            "w_in_random": projected(control[0], w, control[1]),
            "dw_norm": largest,
            "factor": largest / of_dw if of_dw else None,
        }
        pairs = {"right": (svd.v, update.right), "left": (svd.u, update.left), "random": (svd.v, control[1])}
        found["w_similarity"] = {"i": grid} | {
            which: _rounded(similarity(*two)[[place - 1 for place in grid]]) for which, two in pairs.items()
        }
    return {"norm": float(torch.linalg.matrix_norm(w)), "svd": "exact, fp64" if exact else "randomised, fp32", "top_directions": top}


def _between(updates: list[Update | None], name: str, limit: int) -> dict[str, Any]:
    """phi of the two deltas' bases, or of one's and random ones; and of random ones alone."""
    known = [update for update in updates if update]
    first, other = known[0], known[1] if len(known) > 1 else None
    found: dict[str, Any] = {}
    for which, basis in first.bases.items():
        size, count = basis.shape
        against = other.bases.get(which) if other else random_basis(size, count, f"{name}:{which}:second")
        if against is not None:
            found[which] = _rounded(similarity(basis[:, :limit], against[:, :limit]))
    right = [update.right if update.a is None else update.a for update in (first, other or first)]
    control = [random_basis(len(basis), min(limit, basis.shape[1]), f"{name}:control {n}") for n, basis in enumerate(right)]
    return {which: found.get(which) for which in BASES} | {"random": _rounded(similarity(*control))}


def _rounded(values: torch.Tensor) -> list[list[float]]:
    return [[round(value, 6) for value in row] for row in values.tolist()]
