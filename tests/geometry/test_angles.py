import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from subspan.geometry import expected_overlap, principal_angles, principal_vectors, subspace_distance, subspace_overlap
from subspan.geometry.grassmann import random_basis


def planted(angles, d=40, seed=0):
    """Two randomly rotated bases with known principal angles."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.tensor(angles, dtype=torch.float64)
    k = len(angles)
    q = random_basis(d, 2 * k, generator=generator)
    a, b = q[:, :k], q[:, :k] * theta.cos() + q[:, k:] * theta.sin()
    turn = [random_basis(k, k, generator=generator) for _ in range(2)]
    return a @ turn[0], b @ turn[1], theta


@pytest.mark.parametrize(
    "angles",
    [
        [0.0, 1e-10, 1e-7, 1e-3, 0.7, 1.2],
        [0.3, 0.3, 0.3, 1.5],
        [math.pi / 2 - 1e-9, math.pi / 2],
        [1e-8],
        [0.0, 0.0, 0.0],
        [math.pi / 4 - 1e-12, math.pi / 4, math.pi / 4 + 1e-12],
    ],
)
def test_planted_angles_are_found_at_both_ends(angles):
    a, b, theta = planted(angles)
    u, v, found = principal_vectors(a, b)
    eye = torch.eye(len(angles), dtype=torch.float64)
    # 1e-14 absolute: far below the 1.5e-8 that an arccos of a rounded cosine gives near zero.
    torch.testing.assert_close(found, theta, atol=1e-14, rtol=1e-9)
    torch.testing.assert_close(u.mT @ u, eye, atol=1e-12, rtol=0)
    torch.testing.assert_close(v.mT @ v, eye, atol=1e-12, rtol=0)
    torch.testing.assert_close((u * v).sum(0), theta.cos(), atol=1e-12, rtol=0)


BOTH_ENDS = [0.0, 1e-9, 1e-7, 1e-5, 1e-3, 0.5, math.pi / 4, 1.0, math.pi / 2 - 1e-5, math.pi / 2 - 1e-7, math.pi / 2]


@pytest.mark.parametrize("d", [40, 1536])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-7), (torch.bfloat16, 1e-2)]
)
def test_angles_are_as_accurate_as_the_bases(d, dtype, tolerance):
    a, b, theta = planted(BOTH_ENDS, d=d)
    u, v, found = principal_vectors(a.to(dtype), b.to(dtype))
    assert found.dtype == u.dtype == v.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float((found.double() - theta).abs().max()) < tolerance
    # The bare arccos of the cosines would not do.
    plain = torch.linalg.svdvals(a.mT @ b).clamp(0, 1).acos()
    assert float((plain - theta).abs().max()) > 1e-9


def test_bases_of_two_precisions():
    a, b, theta = planted([0.0, 1e-6, 1.0])
    for one, other in ((a.float(), b), (a, b.float()), (a.half(), b)):
        found = principal_angles(one, other)
        assert found.dtype == torch.float64
        assert float((found - theta).abs().max()) < (1e-7 if one.dtype != torch.float16 else 1e-2)
        assert float(subspace_overlap(one, other)) == pytest.approx(float(theta.cos().square().mean()), abs=1e-3)


@given(p=st.integers(1, 6), q=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_angles_do_not_depend_on_the_basis_or_the_order(p, q, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = random_basis(12, p, generator=generator), random_basis(12, q, generator=generator)
    angles = principal_angles(a, b)
    turned = principal_angles(a @ random_basis(p, p, generator=generator), b @ random_basis(q, q, generator=generator))
    torch.testing.assert_close(turned, angles, atol=1e-10, rtol=0)
    torch.testing.assert_close(principal_angles(b, a), angles, atol=1e-10, rtol=0)
    world = random_basis(12, 12, generator=generator)
    torch.testing.assert_close(principal_angles(world @ a, world @ b), angles, atol=1e-10, rtol=0)
    assert bool((angles.diff() >= -1e-12).all())


def test_batched_equals_single():
    pairs = [planted([0.1, 0.5, 1.0], seed=s) for s in range(4)]
    a, b = torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])
    together = principal_angles(a, b)
    for i in range(4):
        torch.testing.assert_close(together[i], principal_angles(a[i], b[i]))


def test_distances_match_their_projector_forms():
    a, b, theta = planted([0.2, 0.9, 1.3])
    difference = a @ a.mT - b @ b.mT
    torch.testing.assert_close(subspace_distance(a, b, metric="projection"), torch.linalg.matrix_norm(difference))
    torch.testing.assert_close(subspace_distance(a, b, metric="spectral"), torch.linalg.matrix_norm(difference, ord=2))
    torch.testing.assert_close(subspace_distance(a, b), theta.norm())
    u, _, vh = torch.linalg.svd(a.mT @ b)
    torch.testing.assert_close(subspace_distance(a, b, metric="procrustes"), torch.linalg.matrix_norm(a @ u @ vh - b))
    determinant = torch.linalg.det(a.mT @ b).abs()
    torch.testing.assert_close(subspace_distance(a, b, metric="fubini-study"), torch.acos(determinant))
    torch.testing.assert_close(subspace_distance(a, b, metric="binet-cauchy"), (1 - determinant**2).sqrt())
    torch.testing.assert_close(subspace_distance(a, b, metric="maximum"), theta.max())
    torch.testing.assert_close(subspace_distance(a, b, metric="chordal"), theta.sin().norm())


def test_unequal_dimensions():
    a, b, _ = planted([0.2, 0.9, 1.3])
    small = b[:, :2]
    difference = a @ a.mT - small @ small.mT
    torch.testing.assert_close(subspace_distance(a, small, metric="projection"), torch.linalg.matrix_norm(difference))
    assert float(subspace_distance(a, small, metric="spectral")) == 1.0


def test_overlap_of_random_subspaces_has_its_expectation():
    generator = torch.Generator().manual_seed(3)
    a = random_basis(30, 4, batch=(4000,), generator=generator)
    b = random_basis(30, 7, batch=(4000,), generator=generator)
    overlaps = subspace_overlap(a, b)
    standard_error = float(overlaps.std() / 4000**0.5)
    assert abs(float(overlaps.mean()) - expected_overlap(4, 7, 30)) < 5 * standard_error


def test_complex_bases():
    generator = torch.Generator().manual_seed(0)
    a = random_basis(10, 3, generator=generator, dtype=torch.complex128)
    phase = torch.exp(1j * torch.rand(3, generator=generator, dtype=torch.float64))
    assert float(principal_angles(a, a * phase).max()) < 1e-12


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="b: the subspaces live in different dimensions, 5 and 6"):
        principal_angles(random_basis(5, 2), random_basis(6, 2))
    with pytest.raises(ValueError, match="metric: unknown"):
        subspace_distance(random_basis(5, 2), random_basis(5, 2), metric="euclid")
