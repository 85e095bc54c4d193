import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from subspan.geometry import Subspace
from subspan.geometry.grassmann import random_basis


def rows(n=400, d=24, k=5, noise=0.1, seed=0, offset=3.0):
    generator = torch.Generator().manual_seed(seed)
    basis = random_basis(d, k, generator=generator)
    z = torch.randn(n, k, generator=generator, dtype=torch.float64) * torch.linspace(3, 1, k, dtype=torch.float64)
    mean = offset * torch.randn(d, generator=generator, dtype=torch.float64)
    x = mean + z @ basis.mT + noise * torch.randn(n, d, generator=generator, dtype=torch.float64)
    return x, Subspace(basis, center=mean)


def test_planted_subspace_is_recovered():
    x, truth = rows(n=5000, d=64, k=8, noise=0.05)
    found = Subspace.fit(x, rank=8)
    assert math.degrees(float(found.angles(truth).max())) < 3
    exact, _ = rows(noise=0.0)
    assert Subspace.fit(exact, rank=0.999999).dim == 5


def test_fit_matches_the_svd_in_both_shapes():
    for n in (400, 15):
        x, _ = rows(n=n)
        found = Subspace.fit(x, rank=4)
        centred = x - x.mean(0)
        _, s, vh = torch.linalg.svd(centred, full_matrices=False)
        torch.testing.assert_close(found.variances, s[:4].square() / (n - 1))
        assert float(found.angles(Subspace(vh[:4].mT.contiguous())).max()) < 1e-6
        torch.testing.assert_close(found.leverage(x), torch.linalg.svd(centred)[0][:, :4].square().sum(-1))


@given(seed=st.integers(0, 10**6), k=st.integers(1, 9))
def test_pythagoras_and_basis_independence(seed, k):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20, 10, generator=generator, dtype=torch.float64)
    space = Subspace.random(10, k, generator=generator)
    z, residual = space.energies(x)
    torch.testing.assert_close(z.square().sum(-1) + residual, x.square().sum(-1))
    torch.testing.assert_close(space.project(x) + space.residual(x), x)
    turned = Subspace(space.basis @ random_basis(k, k, generator=generator))
    torch.testing.assert_close(turned.residual_energy(x), residual, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(turned.project(x), space.project(x))
    torch.testing.assert_close(space.project(space.project(x)), space.project(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_residuals_near_the_subspace_keep_their_digits(dtype):
    space = Subspace.random(50, 5, generator=torch.Generator().manual_seed(0), dtype=dtype)
    inside = 100 * torch.randn(8, 5, dtype=dtype) @ space.basis.mT
    normal = space.complement().basis[:, 0]
    size = 1e-3 if dtype == torch.float32 else 1e-9
    measured = space.residual_energy(inside + size * normal)
    # |x|^2 - |z|^2 alone would return noise of about |x|^2 eps = 6e-3 (or 1e-11) here.
    torch.testing.assert_close(measured, torch.full_like(measured, size**2), rtol=0.2, atol=0)


def test_complement_select_split_and_rotate():
    x, _ = rows()
    space = Subspace.fit(x, rank=6)
    rest = space.complement()
    torch.testing.assert_close(space.projector + rest.projector, torch.eye(24, dtype=torch.float64))
    chosen = space.select([4, 0])
    torch.testing.assert_close(chosen.basis, space.basis[:, [4, 0]])
    torch.testing.assert_close(chosen.residual_variance, (space.spectrum.sum() - space.variances[[4, 0]].sum()) / 22)
    parts = space.split([1, 3])
    assert [p.dim for p in parts] == [1, 2, 3]
    torch.testing.assert_close(sum(p.projector for p in parts), space.projector)
    target = Subspace(space.basis @ random_basis(6, 6, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(space.rotate_onto(target).basis, target.basis)


def test_union_and_intersection_of_planted_parts():
    q = random_basis(12, 6, generator=torch.Generator().manual_seed(0))
    a, b = Subspace(q[:, :4].contiguous()), Subspace(q[:, 2:6].contiguous())
    assert a.union(b).dim == 6
    assert float(a.union(b).angles(Subspace(q)).max()) < 1e-7
    common = a.intersection(b)
    assert common is not None
    assert common.dim == 2
    assert float(common.angles(Subspace(q[:, 2:4].contiguous())).max()) < 1e-7
    assert a.intersection(Subspace(q[:, 4:].contiguous())) is None
    assert a.union(a).dim == 4


def test_span_drops_dependent_columns_and_keeps_order():
    q = random_basis(9, 3, generator=torch.Generator().manual_seed(0))
    vectors = torch.cat([q, q @ torch.ones(3, 1, dtype=torch.float64)], dim=1)
    assert Subspace.span(vectors).dim == 3
    torch.testing.assert_close(Subspace.span(q * torch.tensor([1.0, 5.0, 2.0])).basis, q)


def test_batched_subspaces():
    generator = torch.Generator().manual_seed(0)
    many = Subspace.random(10, 3, batch=(4, 2), generator=generator)
    x = torch.randn(7, 10, generator=generator, dtype=torch.float64)
    assert many.residual_energy(x.expand(4, 2, 7, 10)).shape == (4, 2, 7)
    torch.testing.assert_close(
        many.residual_energy(x.expand(4, 2, 7, 10))[3, 1], Subspace(many.basis[3, 1]).residual_energy(x)
    )
    assert many.angles(many).shape == (4, 2, 3)


def test_complex_fit():
    generator = torch.Generator().manual_seed(0)
    basis = random_basis(12, 2, generator=generator, dtype=torch.complex128)
    z = torch.randn(200, 2, generator=generator, dtype=torch.complex128)
    found = Subspace.fit(z @ basis.mT, rank=2, center=False)
    assert float(found.angles(Subspace(basis)).max()) < 1e-7
    assert float(found.residual_energy(z @ basis.mT).max()) < 1e-20


@pytest.mark.parametrize("center", [True, False])
def test_files_round_trip(tmp_path, center):
    x, _ = rows()
    space = Subspace.fit(x.float(), rank=3, center=center)
    space.save(tmp_path / "space.safetensors")
    back = Subspace.load(tmp_path / "space.safetensors")
    assert torch.equal(back.basis, space.basis)
    assert back.count == space.count
    assert (back.center is None) == (not center)
    torch.testing.assert_close(back.leverage(x.float()), space.leverage(x.float()))


def test_dtype_and_kind_follow_the_input():
    x, _ = rows()
    assert Subspace.fit(x.float().numpy(), rank=2).basis.dtype == torch.float32
    space = Subspace.fit(x, rank=5).to(torch.float32)
    assert space.basis.dtype == torch.float32
    assert space.residual_energy(x.to(torch.bfloat16)).dtype == torch.float32
    read_only = x.numpy()
    read_only.flags.writeable = False
    assert Subspace.fit(read_only, rank=2).dim == 2
    assert Subspace.fit(x.numpy()[::-1], rank=2).dim == 2


def test_a_batch_has_members_and_one_subspace_has_none():
    one = [Subspace.fit(rows(seed=seed)[0], rank=3) for seed in range(3)]
    fields = ("basis", "center", "variances", "residual_variance", "spectrum")
    batch = Subspace(count=one[0].count, **{name: torch.stack([getattr(s, name) for s in one]) for name in fields})
    assert len(batch) == 3
    for place, member in enumerate(batch):
        for name in fields:
            assert torch.equal(getattr(member, name), getattr(one[place], name))
        assert member.count == one[place].count
    assert batch[-1].batch_shape == ()
    assert batch[1:].batch_shape == (2,)
    assert torch.equal(batch[[2, 0]].basis, batch.basis[[2, 0]])
    assert torch.equal(batch[np.int64(1)].basis, one[1].basis)
    with pytest.raises(IndexError, match="3 is out of range for 3 subspaces"):
        batch[3]
    for ask in (len, iter, lambda space: space[0]):
        with pytest.raises(TypeError, match="not a batch"):
            list(ask(one[0]))
    assert one[0]


def test_bad_input_is_named(tmp_path):
    x, _ = rows()
    broken = x.clone()
    broken[7, 3] = math.nan
    with pytest.raises(ValueError, match=r"x: 1 of 400 rows contain NaN or infinity \(the first is row 7\)"):
        Subspace.fit(broken)
    with pytest.raises(ValueError, match="total variance is zero"):
        Subspace.fit(torch.full((10, 4), 1e6))
    with pytest.raises(ValueError, match="at least 2 rows"):
        Subspace.fit(x[:1])
    with pytest.raises(TypeError, match="numeric"):
        Subspace.fit(np.array([["a", "b"]]))
    with pytest.raises(ValueError, match="not orthonormal"):
        Subspace(torch.ones(4, 2))
    with pytest.raises(ValueError, match="not orthonormal"):
        Subspace(torch.full((4, 2), math.nan))
    with pytest.raises(ValueError, match="k must lie in"):
        Subspace(torch.eye(3, 5))
    with pytest.warns(UserWarning, match="more than the"):
        assert Subspace.fit(x, rank=100).dim == 24
    space = Subspace.fit(x, rank=3)
    with pytest.raises(ValueError, match="expected 24 columns"):
        space.project(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="it has no variances"):
        Subspace.random(4, 2).mahalanobis(torch.zeros(1, 4))
    (tmp_path / "junk.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(ValueError, match="not a readable safetensors"):
        Subspace.load(tmp_path / "junk.safetensors")


def test_an_empty_batch_is_a_batch():
    none = Subspace.random(5, 2, batch=(3,))[torch.zeros(3, dtype=torch.bool)]
    assert (len(none), none.dim, none.projector.shape) == (0, 2, (0, 5, 5))


def complex_plane() -> Subspace:
    basis = random_basis(8, 2, dtype=torch.complex128)
    return Subspace(basis, variances=torch.tensor([2.0, 1.0]).double(), center=basis @ torch.ones(2, 1).to(basis)[:, 0])


def test_complex_planes_are_planes():
    plane = complex_plane()
    phase = torch.exp(1j * torch.tensor([0.3, 2.0], dtype=torch.float64))
    turned = Subspace(plane.basis * phase)
    assert float(plane.angles(turned).max()) < 1e-7
    assert float(plane.distance(turned, metric="projection")) < 1e-7
    assert float(plane.overlap(turned)) == pytest.approx(1)
    torch.testing.assert_close(turned.projector, plane.projector)
    torch.testing.assert_close(turned.rotate_onto(plane).basis, plane.basis)
    rows = torch.randn(5, 8, dtype=torch.complex128)
    inside = plane.project(rows)
    torch.testing.assert_close(plane.project(inside), inside)
    torch.testing.assert_close(plane.residual_energy(rows), (rows - inside).abs().square().sum(-1))
    assert float((plane.complement().basis.mH @ plane.basis).abs().max()) < 1e-12
    line = plane.truncate(1)
    assert plane.union(line).dim == 2
    assert float(plane.intersection(line).angles(line).max()) < 1e-7


def test_complex_planes_keep_their_phases_in_another_precision_and_in_files(tmp_path):
    plane = complex_plane()
    single = plane.to(torch.float32)
    assert (single.basis.dtype, single.variances.dtype) == (torch.complex64, torch.float32)
    assert float(single.angles(Subspace(plane.basis)).max()) < 1e-6
    assert plane.to(torch.complex64).variances.dtype == torch.float32
    for each in (plane, single):
        each.save(tmp_path / "plane.safetensors")
        kept = Subspace.load(tmp_path / "plane.safetensors")
        assert torch.equal(kept.basis, each.basis)
        assert torch.equal(kept.variances, each.variances)


def test_captured_energy_of_complex_directions_in_a_real_covariance():
    plane, rows = complex_plane(), torch.randn(30, 8, dtype=torch.float64)
    covariance = rows.mT @ rows
    wide = covariance.to(torch.complex128)
    torch.testing.assert_close(plane.captured_energy(covariance), plane.captured_energy(wide))
    assert not Subspace.random(8, 2).captured_energy(wide).is_complex()
