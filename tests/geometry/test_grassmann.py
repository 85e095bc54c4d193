import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from subspan.geometry import principal_angles, subspace_distance
from subspan.geometry.grassmann import (
    chordal_mean,
    geodesic,
    gram_geodesic,
    karcher_mean,
    logarithm,
    orthonormalize,
    parallel_transport,
    polar,
    random_basis,
    tangent_projection,
)


@given(d=st.integers(4, 15), k=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_logarithm_inverts_the_geodesic_and_measures_the_distance(d, k, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = random_basis(d, k, generator=generator), random_basis(d, k, generator=generator)
    tangent = logarithm(a, b)
    assert float((a.mT @ tangent).abs().max()) < 1e-10
    torch.testing.assert_close(torch.linalg.matrix_norm(tangent), subspace_distance(a, b), atol=1e-7, rtol=1e-7)
    assert float(principal_angles(geodesic(a, tangent), b).max()) < 1e-7
    half = geodesic(a, tangent, 0.5)
    torch.testing.assert_close(subspace_distance(a, half), subspace_distance(half, b), atol=1e-7, rtol=1e-7)


def test_transport_keeps_inner_products_and_carries_the_velocity():
    generator = torch.Generator().manual_seed(1)
    base = random_basis(20, 3, generator=generator)
    velocity = tangent_projection(base, torch.randn(20, 3, generator=generator, dtype=torch.float64)) * 0.2
    x, y = (tangent_projection(base, torch.randn(20, 3, generator=generator, dtype=torch.float64)) for _ in range(2))
    u, s, vh = torch.linalg.svd(velocity, full_matrices=False)
    end = (base @ vh.mT * s.cos() + u * s.sin()) @ vh  # the geodesic's own frame, before orthonormalisation
    moved = [parallel_transport(base, velocity, v) for v in (x, y)]
    for v in moved:
        assert float((end.mT @ v).abs().max()) < 1e-12
    torch.testing.assert_close((moved[0] * moved[1]).sum(), (x * y).sum())
    # A geodesic transports its own velocity: the finite-difference derivative at the end.
    step = 1e-6
    later = (base @ vh.mT * (s * (1 + step)).cos() + u * (s * (1 + step)).sin()) @ vh
    torch.testing.assert_close(parallel_transport(base, velocity, velocity), (later - end) / step, atol=1e-5, rtol=0)


@given(d=st.integers(3, 12), k=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_steps_from_the_small_gram_matrix_are_the_geodesic_and_its_transport(d, k, seed):
    generator = torch.Generator().manual_seed(seed)
    base = random_basis(d, k, batch=(2,), generator=generator)
    velocity, x = (
        tangent_projection(base, torch.randn(2, d, k, generator=generator, dtype=torch.float64)) for _ in range(2)
    )
    velocity[1] = 0
    t = torch.tensor([0.3, 2.0], dtype=torch.float64)
    moved, carried = gram_geodesic(base, velocity, t, x)
    torch.testing.assert_close(moved[0], geodesic(base[0], velocity[0], 0.3), atol=1e-10, rtol=0)
    torch.testing.assert_close(carried[0], parallel_transport(base[0], velocity[0], x[0], 0.3), atol=1e-10, rtol=0)
    torch.testing.assert_close(moved[1], base[1], atol=1e-14, rtol=0)
    torch.testing.assert_close(carried[1], x[1], atol=1e-14, rtol=0)
    assert gram_geodesic(base, velocity)[1] is None


def test_polar_has_a_gradient_where_singular_values_are_equal():
    x = random_basis(6, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(polar, x)
    general = torch.randn(5, 5, dtype=torch.complex128, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(polar, general)


def test_means_of_points_on_one_geodesic_are_its_middle():
    generator = torch.Generator().manual_seed(2)
    base = random_basis(15, 2, generator=generator)
    velocity = tangent_projection(base, torch.randn(15, 2, generator=generator, dtype=torch.float64)) * 0.1
    points = torch.stack([geodesic(base, velocity, t) for t in (-1.0, -0.5, 0.5, 1.0)])
    assert float(principal_angles(karcher_mean(points), base).max()) < 1e-8
    mean, values = chordal_mean(points)
    assert float(principal_angles(mean, base).max()) < 1e-8
    assert float(values.max()) <= 1 + 1e-12


def test_chordal_mean_is_the_top_eigenspace_of_the_mean_projector():
    generator = torch.Generator().manual_seed(4)
    bases = random_basis(12, 3, batch=(5,), generator=generator)
    weights = torch.tensor([1.0, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    spectra = torch.rand(5, 3, generator=generator, dtype=torch.float64)
    mean, values = chordal_mean(bases, 4, weights=weights, spectra=spectra)
    dense = sum(w * b @ s.diag() @ b.mT for w, b, s in zip(weights / weights.sum(), bases, spectra, strict=True))
    exact_values, exact = torch.linalg.eigh(dense)
    torch.testing.assert_close(values, exact_values.flip(0)[:4])
    assert float(principal_angles(mean, exact.flip(1)[:, :4]).max()) < 1e-10


@pytest.mark.parametrize("d", [4, 40], ids=["matrix", "factor"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_chordal_means_of_a_batch_are_those_of_its_members(d, dtype):
    bases, weights = random_basis(d, 2, batch=(6, 5), dtype=dtype), torch.rand(6, 5, dtype=torch.float64)
    spectra = torch.rand(6, 5, 2, dtype=torch.float64)
    means, values = chordal_mean(bases, 3, weights=weights, spectra=spectra)
    for place in range(6):
        mean, value = chordal_mean(bases[place], 3, weights=weights[place], spectra=spectra[place])
        torch.testing.assert_close(values[place], value)
        assert float(principal_angles(means[place], mean).max()) < 1e-7
        shares = weights[place] / weights[place].sum()
        dense = torch.einsum(
            "m,mdp,mp,mep->de", shares.to(dtype), bases[place], spectra[place].to(dtype), bases[place].conj()
        )
        torch.testing.assert_close(torch.linalg.eigvalsh(dense).flip(0)[:3], value)


def test_orthonormalize_is_unique_and_polar_is_nearest():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3, 10, 4, generator=generator, dtype=torch.float64)
    q = orthonormalize(x)
    torch.testing.assert_close(q.mT @ q, torch.eye(4, dtype=torch.float64).expand(3, 4, 4))
    assert bool(((q.mT @ x).diagonal(dim1=-2, dim2=-1) > 0).all())
    nearest = polar(x)
    for other in random_basis(10, 4, batch=(200,), generator=generator):
        assert float((x[0] - nearest[0]).norm()) <= float((x[0] - other).norm())


def test_a_spread_out_mean_and_wide_matrices_are_refused():
    with pytest.raises(ValueError, match="x: 4 columns cannot be independent in 3"):
        orthonormalize(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="weights: must be non-negative"):
        chordal_mean(random_basis(5, 2, batch=(2,)), weights=torch.tensor([-1.0, 2.0], dtype=torch.float64))
