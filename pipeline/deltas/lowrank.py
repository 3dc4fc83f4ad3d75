"""A pair B A as the sum of its blocks, and the best approximation of one of smaller rank, without ever making the product.

A fused map's pair (GPT-2's q, k and v in one matrix) has one block for each part that is trained: columns of B that are zero outside the
part's rows. Blocks are made smaller each by itself, so that what was not trained stays zero and a job can go on from the result.
B = Q_b R_b and A' = Q_a R_a (QR), then the SVD of R_b R_a' [R, R] is that of B A: cutting it is optimal (Eckart and Young 1936).
Shapes: A [R, K], B [D, R], W [D, K].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

_PARTS = 3
"""Of a fused map at most: q, k and v."""
_MORE, _ROUNDS = 16, 4
"""Of the randomised SVD: directions beyond the rank, and power iterations."""


@dataclass(frozen=True)
class Block:
    """Columns of B, the same rows of A; outside `rows` B is zero there."""

    columns: tuple[int, ...]
    rows: torch.Tensor
    """Numbers of the rows of B that are not zero, ascending."""


@dataclass(frozen=True)
class Cut:
    """What a pair became."""

    a: torch.Tensor
    b: torch.Tensor
    norm: float
    """Frobenius, of the map before."""
    error: float
    """Frobenius, of the difference."""


def blocks_of(b: torch.Tensor) -> list[Block]:
    """The parts of a fused map's pair, in the order of their first columns; the whole where there are none."""
    nonzero = b != 0
    links = nonzero.float().T @ nonzero.float() > 0
    left, groups = list(range(b.shape[1])), []
    while left:
        found, fresh = set[int](), {left[0]}
        while fresh:
            found |= fresh
            fresh = {other for one in fresh for other in links[one].nonzero().flatten().tolist()} - found
        groups.append(sorted(found))
        left = [column for column in left if column not in found]
    # A column of zeros adds nothing, wherever it is counted.
    filled = [group for group in groups if bool(links[group[0], group[0]])]
    if not filled or len(filled) > _PARTS:
        return [Block(tuple(range(b.shape[1])), torch.arange(b.shape[0]))]
    for group in groups:
        if group not in filled:
            min(filled, key=lambda one: abs(one[0] - group[0])).extend(group)
    return [Block(tuple(sorted(group)), nonzero[:, group].any(1).nonzero().flatten()) for group in filled]


@dataclass(frozen=True)
class Svd:
    """M = U diag(s) V', the largest first; the leading directions alone."""

    u: torch.Tensor
    """[D, N], columns of norm 1."""
    s: torch.Tensor
    """[N]"""
    v: torch.Tensor
    """[K, N]"""
    spectrum: torch.Tensor
    """All singular values of M as far as they are known: min(D, K), or only s."""


def svd_of_pair(a: torch.Tensor, b: torch.Tensor, scale: float) -> Svd:
    """Of `scale` B A, all R directions, in fp64."""
    inner_b, outer_b = torch.linalg.qr(b.double())
    inner_a, outer_a = torch.linalg.qr(a.T.double())
    u, s, v = torch.linalg.svd(outer_b @ outer_a.T * scale, full_matrices=False)
    return Svd(inner_b @ u, s, inner_a @ v.T, s)


def cut(a: torch.Tensor, b: torch.Tensor, scale: float, rank: int | None = None, energy: float | None = None) -> Cut:
    """The best pair of each block with `rank` rows, or with as few as keep the share `energy` of its squared norm.

    Returns:
        A pair whose scale is 1, in fp32; norm and error in fp64.
    """
    parts = []
    norm = error = 0.0
    for block in blocks_of(b):
        columns = list(block.columns)
        svd = svd_of_pair(a[columns], b[block.rows][:, columns], scale)
        s, squares = svd.s, svd.s.square()
        kept = len(s) if rank is None else min(rank, len(s))
        if energy is not None:
            kept = int((squares.cumsum(0) < energy * squares.sum()).sum()) + 1
        kept = max(1, min(kept, len(s)))
        whole = b.new_zeros(b.shape[0], kept, dtype=torch.float64)
        whole[block.rows] = svd.u[:, :kept] * s[:kept].sqrt()
        parts.append(((svd.v[:, :kept] * s[:kept].sqrt()).T, whole))
        norm += float(squares.sum())
        error += float(squares[kept:].sum())
    new_a, new_b = torch.cat([one for one, _ in parts]), torch.cat([one for _, one in parts], dim=1)
    return Cut(new_a.float().contiguous(), new_b.float().contiguous(), math.sqrt(norm), math.sqrt(error))


def stacked(pairs: list[tuple[torch.Tensor, torch.Tensor, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact sum of pairs with their scales: ranks beside each other, blocks of the same part together; its scale is 1."""
    a = torch.cat([a for a, _, _ in pairs])
    b = torch.cat([b * scale for _, b, scale in pairs], dim=1)
    order = [column for block in blocks_of(b) for column in block.columns]
    return a[order].contiguous(), b[:, order].contiguous()


def svd_of(matrix: torch.Tensor, count: int, exact: bool) -> Svd:
    """The `count` leading directions of a matrix M [D, K] of numbers.

    Args:
        exact: by all eigenvectors of M M' or M' M, whichever is smaller, in fp64: thirty times as fast as an SVD, and as good to
            half of fp64's digits. Else a randomised SVD in fp32 (Halko et al. 2011).
    """
    count = min(count, *matrix.shape)
    if not exact:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, min(count + _MORE, *matrix.shape), niter=_ROUNDS)
        return Svd(u[:, :count], s[:count], v[:, :count], s[:count])
    tall = matrix.shape[0] > matrix.shape[1]
    wide = (matrix.T if tall else matrix).double()
    squares, u = (found.flip(-1) for found in torch.linalg.eigh(wide @ wide.T))
    u = u[:, :count]
    v = wide.T @ u
    s = v.norm(dim=0)
    v = v / s.clamp_min(torch.finfo(s.dtype).tiny)
    return Svd(*((v, s, u) if tall else (u, s, v)), squares.clamp_min(0.0).sqrt())


def best_of(difference: torch.Tensor, rank: int, exact: bool) -> Cut:
    """The best pair of a matrix M [D, K] of numbers, or (not `exact`) a near one with its error counted truly."""
    svd = svd_of(difference, rank, exact)
    norm = float(difference.double().square().sum())
    # U is of orthonormal columns, so what is left is what is not within them.
    outside = max(0.0, norm - float(svd.s.double().square().sum()))
    error = float(svd.spectrum[len(svd.s) :].square().sum()) if exact else outside
    root = svd.s.sqrt()
    a, b = (svd.v * root).T, svd.u * root
    return Cut(a.float().contiguous(), b.float().contiguous(), math.sqrt(norm), math.sqrt(error))
