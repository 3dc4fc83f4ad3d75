"""Subspaces and spectra as section 7 and appendices G, H of Hu et al. 2021 have them. Mathematics alone: matrices in, numbers out.

A basis is a matrix [N, I] of orthonormal columns in order, the first of them most important: singular vectors, the largest value first.
phi(U, V, i, j) = ||U_i' V_j||_F^2 / min(i, j) of the first i columns of U and the first j of V: 1 where one subspace holds the other, 0
where they are orthogonal. It is the mean of the squared cosines of their principal angles, so 1 - phi is the squared Projection Metric
(Ham & Lee 2008) over min(i, j). The paper prints "1 - d^2" over it, where p - d^2 is meant, p = min(i, j).
Shapes: W [D, K], U [D, R], V [K, R], s [R].
"""

from __future__ import annotations

import math

import torch

from pipeline.methods.draw import generator_of

_SEED = 0


def similarity(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """phi at every i and j.

    Args:
        one: a basis [N, I]; `other` [N, J].

    Returns:
        [I, J]; [i - 1, j - 1] is phi(one, other, i, j).
    """
    squares = (one.double().T @ other.double()).square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, count + 1) for count in squares.shape)
    # Rounding alone leaves the range.
    return (squares / torch.minimum(i[:, None], j)).clamp(0.0, 1.0)


def projected(u: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> float:
    """||U' W V||_F: how much of W lies within the subspaces of the bases U and V. The paper writes V for our V'."""
    return float(torch.linalg.matrix_norm(u.T.to(w.dtype) @ w @ v.to(w.dtype)))


def random_basis(size: int, count: int, name: str) -> torch.Tensor:
    """The left singular vectors of a Gaussian matrix, or the right ones: each alike are spread evenly over all bases, as Q of its QR is.

    Args:
        name: the same gives the same; others are independent.
    """
    draw = torch.randn(size, min(count, size), generator=generator_of(_SEED, name), dtype=torch.float64)
    return torch.linalg.qr(draw).Q


def right_basis(a: torch.Tensor) -> torch.Tensor:
    """Right singular vectors of A [R, K] -> [K, up to R]; those of B' are the left ones of B."""
    _, s, vh = torch.linalg.svd(a.double(), full_matrices=False)
    return vh[: directions(s, min(a.shape))].T


def directions(s: torch.Tensor, side: int) -> int:
    """How many singular values are more than what rounding to fp32 would leave of zeros.

    Args:
        side: rank of the matrix at most.
    """
    if not len(s) or not s[0]:
        return 0
    return int((s > s[0] * math.sqrt(side) * torch.finfo(torch.float32).eps).sum())


def effective_rank(s: torch.Tensor) -> float:
    """exp of the entropy of s / sum(s) (Roy & Vetterli 2007): between 1 and len(s), which equal values give."""
    return float(torch.special.entr(s.double() / s.double().sum()).sum().exp())


def directions_for(s: torch.Tensor, share: float) -> int:
    """The fewest directions that have this share of the squared norm."""
    squares = s.double().square().cumsum(0)
    return min(len(s), int((squares < share * squares[-1]).sum()) + 1)
