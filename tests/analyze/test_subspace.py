"""Closed cases, and scipy's principal angles, SVD and entropy as an independent computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

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

EYE = torch.eye(20, dtype=torch.float64)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_angles(one, other) -> np.ndarray:
    """phi from scipy's principal angles, pair of subspaces by pair."""
    (i, j), (left, right) = (one.shape[1], other.shape[1]), (one.numpy(), other.numpy())
    angles = [[scipy.linalg.subspace_angles(left[:, : n + 1], right[:, : m + 1]) for m in range(j)] for n in range(i)]
    return np.array([[np.mean(np.cos(angle) ** 2) for angle in line] for line in angles])


def test_a_subspace_holds_itself_and_nothing_of_what_is_orthogonal_to_it():
    assert torch.equal(similarity(EYE[:, :5], EYE[:, :9]), torch.ones(5, 9, dtype=torch.float64))
    assert not similarity(EYE[:, :5], EYE[:, 5:12]).any()


def test_a_known_number_of_common_directions():
    phi = similarity(EYE[:, :6], EYE[:, 4:12])
    for i in range(1, 7):
        for j in range(1, 9):
            assert phi[i - 1, j - 1] == len(set(range(i)) & set(range(4, 4 + j))) / min(i, j)


def test_known_angles():
    angles = torch.tensor([0.1, 0.5, 1.0, 1.4], dtype=torch.float64)
    turned = EYE[:, :4] * angles.cos() + EYE[:, 4:8] * angles.sin()
    phi = similarity(EYE[:, :4], turned)
    for i in range(1, 5):
        for j in range(1, 5):
            assert phi[i - 1, j - 1] == pytest.approx(float(angles[: min(i, j)].cos().square().mean()))
    # The Projection Metric of Ham & Lee is the sines' norm.
    assert 4 * (1 - float(phi[3, 3])) == pytest.approx(float(angles.sin().square().sum()))


def test_it_is_the_mean_square_of_scipys_cosines():
    one, other = random_basis(30, 4, "one"), random_basis(30, 7, "other")
    np.testing.assert_allclose(similarity(one, other), by_angles(one, other), atol=1e-12)
    np.testing.assert_allclose(similarity(one, other).T, similarity(other, one), atol=1e-12)


def test_random_directions_overlap_as_much_as_chance_has_it():
    size, i, j = 200, 8, 40
    phi = torch.stack([similarity(random_basis(size, i, f"a{n}"), random_basis(size, j, f"b{n}")) for n in range(40)]).mean(0)
    # E ||U_i' V_j||^2 = i j / N.
    assert float(phi[-1, -1]) == pytest.approx(j / size, rel=0.02)
    assert float(phi[3, 9]) == pytest.approx(10 / size, rel=0.1)
    w = drawn(200, 120)
    found = [projected(random_basis(200, 8, f"u{n}"), w, random_basis(120, 8, f"v{n}")) ** 2 for n in range(60)]
    # GPT-3 in the paper's table: 4 * 61.95 / 12288 = 0.02, 64 * 61.95 / 12288 = 0.32.
    assert math.sqrt(np.mean(found)) == pytest.approx(8 * float(torch.linalg.matrix_norm(w)) / math.sqrt(200 * 120), rel=0.03)


def test_random_ones_are_the_same_by_name():
    assert torch.equal(random_basis(9, 3, "one"), random_basis(9, 3, "one"))
    assert not torch.equal(random_basis(9, 3, "one"), random_basis(9, 3, "other"))
    torch.testing.assert_close(random_basis(9, 3, "one").T @ random_basis(9, 3, "one"), EYE[:3, :3])
    assert random_basis(3, 9, "one").shape == (3, 3)


@pytest.mark.parametrize(("rank", "rows", "columns"), [(3, 12, 17), (17, 12, 9)])
def test_a_pair_has_the_directions_of_its_product(rank, rows, columns):
    a, b = drawn(rank, columns), drawn(rows, rank, seed=1)
    svd = svd_of_pair(a, b, 2.0)
    u, s, vh = scipy.linalg.svd((2 * b @ a).numpy(), full_matrices=False)
    count = min(rank, rows, columns)
    np.testing.assert_allclose(svd.s, s[:count], rtol=1e-10)
    np.testing.assert_allclose(similarity(svd.u, torch.from_numpy(u[:, :count])).diag(), 1, atol=1e-10)
    np.testing.assert_allclose(similarity(svd.v, torch.from_numpy(vh[:count].T.copy())).diag(), 1, atol=1e-10)
    np.testing.assert_allclose((svd.u * svd.s) @ svd.v.T, 2 * b @ a, atol=1e-10)
    # A's own right singular vectors span the same, in another order.
    np.testing.assert_allclose(similarity(svd.v, right_basis(a))[-1, -1], 1, atol=1e-10)


@pytest.mark.parametrize("shape", [(12, 17), (17, 12)])
def test_the_leading_directions_of_a_matrix(shape):
    m = drawn(*shape)
    u, s, vh = scipy.linalg.svd(m.numpy())
    for exact in (True, False):
        svd = svd_of(m if exact else m.float(), 5, exact)
        np.testing.assert_allclose(svd.s, s[:5], rtol=1e-5)
        np.testing.assert_allclose(similarity(svd.u, torch.from_numpy(u[:, :5].copy())).diag(), 1, atol=1e-5)
        np.testing.assert_allclose(similarity(svd.v, torch.from_numpy(vh[:5].T.copy())).diag(), 1, atol=1e-5)
        np.testing.assert_allclose(svd.spectrum, s if exact else s[:5], rtol=1e-5)


def test_w_within_its_own_directions_has_its_largest_singular_values():
    w = drawn(12, 17)
    svd = svd_of(w, 4, exact=True)
    assert projected(svd.u, w, svd.v) == pytest.approx(float(np.linalg.norm(scipy.linalg.svdvals(w.numpy())[:4])))
    # Within dW's, W = dW is all of it; and nothing is left of what is orthogonal.
    assert projected(EYE[:, :3], EYE[:, :3] @ EYE[:, :3].T, EYE[:, :3]) == pytest.approx(math.sqrt(3))
    assert projected(EYE[:, :3], EYE[:, 3:6] @ EYE[:, 3:6].T, EYE[:, :3]) == 0


def test_ranks():
    assert effective_rank(torch.ones(6)) == pytest.approx(6)
    assert effective_rank(torch.tensor([2.0, 0.0, 0.0])) == pytest.approx(1)
    s = torch.tensor([5.0, 3.0, 1.0, 0.1])
    assert effective_rank(s) == pytest.approx(math.exp(scipy.stats.entropy(s.numpy())), rel=1e-6)
    assert [directions_for(s, share) for share in (0.5, 0.9, 0.98, 1.0)] == [1, 2, 3, 4]
    assert [directions(torch.tensor(values), 4) for values in ([3.0, 1.0, 1e-5], [1.0, 1e-8], [0.0, 0.0], [])] == [3, 1, 0, 0]
