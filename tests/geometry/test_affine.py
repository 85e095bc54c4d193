import numpy as np
import pytest
import torch

from subspan.base import normalize_rows
from subspan.geometry import AffineMap, gaussian_transport, inverse_sqrt, oas_shrinkage, procrustes
from subspan.geometry.grassmann import random_basis
from subspan.statistics import JointMoments, Moments


def pairs(n=500, d_x=8, d_y=8, noise=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(2, 0.5, d_x, dtype=torch.float64)
    x = torch.randn(n, d_x, generator=generator, dtype=torch.float64) * scale + 4
    q = random_basis(max(d_x, d_y), min(d_x, d_y), generator=generator)
    q = q.mT if d_x > d_y else q
    y = 2.5 * (x - x.mean(0)) @ q.mT + 1 + noise * torch.randn(n, d_y, generator=generator, dtype=torch.float64)
    return x, y, q


@pytest.mark.parametrize(("d_x", "d_y"), [(8, 8), (6, 9)])
def test_scaled_procrustes_recovers_the_planted_map(d_x, d_y):
    x, y, q = pairs(d_x=d_x, d_y=d_y)
    moments = JointMoments(d_x, d_y).update(x, y)
    found = moments.procrustes(scale=True)
    torch.testing.assert_close(found.matrix, 2.5 * q)
    torch.testing.assert_close(found.map(x), y)
    plain = moments.procrustes()
    torch.testing.assert_close(plain.matrix, q)
    assert plain.orthogonality_defect < 1e-12


def test_scaled_procrustes_is_optimal_when_the_target_is_smaller():
    x, y, _ = pairs(d_x=9, d_y=6, noise=0.5)
    moments = JointMoments(9, 6).update(x, y)
    best = moments.procrustes(scale=True)

    def error(factor):
        scaled = AffineMap(best.matrix * factor)
        centred_x, centred_y = x - x.mean(0), y - y.mean(0)
        return float((scaled.map(centred_x) - centred_y).square().sum())

    assert error(1.0) < min(error(0.99), error(1.01))


@pytest.mark.parametrize("sign", [1, -1])
def test_procrustes_determinant(sign):
    x, y, _ = pairs(noise=0.1)
    cov = JointMoments(8, 8).update(x, y).cov_xy
    fixed = procrustes(cov, determinant=sign)
    assert abs(float(torch.linalg.det(fixed.matrix)) - sign) < 1e-9
    free = procrustes(cov)
    if float(torch.linalg.det(free.matrix)) * sign > 0:
        torch.testing.assert_close(fixed.matrix, free.matrix)
    else:
        assert float((fixed.matrix @ cov).trace()) <= float((free.matrix @ cov).trace())


def test_ridge_matches_least_squares_and_shrinks():
    x, y, _ = pairs(d_x=7, d_y=5, noise=0.3)
    moments = JointMoments(7, 5).update(x, y)
    design = np.column_stack([x.numpy(), np.ones(len(x))])
    exact = np.linalg.lstsq(design, y.numpy(), rcond=None)[0]
    found = moments.ridge(alpha=0.0)
    np.testing.assert_allclose(found.matrix.numpy(), exact[:-1].T, atol=1e-9)
    np.testing.assert_allclose(found.bias.numpy(), exact[-1], atol=1e-8)
    assert float(moments.ridge(alpha=10.0).matrix.norm()) < float(found.matrix.norm())


def test_cca_whitens_and_finds_the_planted_correlation():
    generator = torch.Generator().manual_seed(0)
    n = 20000
    shared = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    x[:, 2:3] = 0.8**0.5 * shared + 0.2**0.5 * x[:, 2:3]
    y[:, 1:2] = 0.8**0.5 * shared + 0.2**0.5 * y[:, 1:2]
    result = JointMoments(6, 4).update(x, y).cca(shrinkage=0.0)
    assert abs(float(result.correlations[0]) - 0.8) < 0.02
    assert float(result.correlations[1]) < 0.05
    a, b = result.transform_x(x), result.transform_y(y)
    torch.testing.assert_close(torch.cov(a.mT), torch.eye(4, dtype=torch.float64), atol=1e-8, rtol=0)
    torch.testing.assert_close((a * b).sum(0) / (n - 1), result.correlations, atol=1e-8, rtol=0)
    assert result.shared_dimensions() == 1
    space, _ = result.truncate(1).subspaces()
    assert float(space.basis[2].abs()) > 0.99


def test_shrinkage_by_default_keeps_small_samples_honest():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(60, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    moments = JointMoments(40, 40).update(x, y)
    assert float(moments.cca(shrinkage=0.0).correlations[0]) > 0.99
    assert float(moments.cca().correlations[0]) < 0.3


def test_oas_against_scikit_learn():
    from sklearn.covariance import OAS

    x = np.random.default_rng(0).standard_normal((40, 15)) * np.linspace(0.5, 2, 15)
    reference = OAS().fit(x)
    moments = Moments(15).update(x)
    ours = oas_shrinkage(moments.covariance(ddof=0), 40)
    # scikit-learn leaves out the 2/d terms of the published formula.
    assert abs(ours - reference.shrinkage_) < 0.01


@pytest.mark.parametrize("method", ["zca", "pca", "cholesky"])
def test_whitening(method):
    x, _, _ = pairs()
    white = Moments(8).update(x).whitening(method=method).map(x)
    torch.testing.assert_close(torch.cov(white.mT), torch.eye(8, dtype=torch.float64), atol=1e-9, rtol=0)
    assert float(white.mean(0).abs().max()) < 1e-9


@pytest.mark.parametrize("method", ["coral", "optimal"])
def test_gaussian_transport_matches_the_target_moments(method):
    x, _, _ = pairs()
    y = torch.randn(400, 8, generator=torch.Generator().manual_seed(9), dtype=torch.float64) @ torch.randn(
        8, 8, generator=torch.Generator().manual_seed(8), dtype=torch.float64
    )
    a, b = Moments(8).update(x), Moments(8).update(y)
    moved = gaussian_transport(a.covariance(), b.covariance(), mean_x=a.mean, mean_y=b.mean, method=method).map(x)
    torch.testing.assert_close(torch.cov(moved.mT), b.covariance(), atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(moved.mean(0), b.mean)


def test_optimal_transport_moves_less():
    x, y, _ = pairs(noise=0.4)
    a, b = Moments(8).update(x), Moments(8).update(y)
    cost = {
        m: float((gaussian_transport(a.covariance(), b.covariance(), method=m).map(x - a.mean) - x + a.mean).norm())
        for m in ("coral", "optimal")
    }
    assert cost["optimal"] < cost["coral"]


def test_inverse_sqrt_on_a_singular_matrix():
    basis = random_basis(6, 3, generator=torch.Generator().manual_seed(0))
    matrix = basis @ torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)) @ basis.mT
    root = inverse_sqrt(matrix)
    torch.testing.assert_close(root @ matrix @ root, basis @ basis.mT)


def test_composition_inverse_module_and_file(tmp_path):
    x, y, _ = pairs()
    forward = JointMoments(8, 8).update(x, y).procrustes(scale=True)
    torch.testing.assert_close(forward.inverse().map(forward.map(x)), x)
    torch.testing.assert_close((forward.inverse() @ forward).map(x), x)
    torch.testing.assert_close(forward.to_module()(x), forward.map(x))
    assert forward.map(x.float()).dtype == torch.float32
    forward.save(tmp_path / "map.safetensors")
    assert torch.equal(AffineMap.load(tmp_path / "map.safetensors").matrix, forward.matrix)
    torch.testing.assert_close(AffineMap.identity(8).map(x), x)
    with pytest.raises(ValueError, match="expected 8 columns"):
        forward.map(x[:, :3])
    with pytest.raises(ValueError, match="NaN"):
        AffineMap(torch.full((2, 2), torch.nan))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
def test_maps_keep_the_dtype_and_sum_in_float32(dtype, bias):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, 4096, generator=generator, dtype=torch.float64)
    affine = AffineMap(matrix, torch.randn(5, generator=generator, dtype=torch.float64) if bias else None)
    x = torch.randn(7, 4096, generator=generator).to(dtype)
    exact = x.double() @ matrix.mT + (affine.bias if bias else 0)
    found = affine.map(x)
    assert found.dtype == dtype
    # One rounding of the result; with the matrix and the sums in half precision it would be a hundred times more.
    error = (found.double() - exact).abs() / exact.abs().clamp_min(1)
    assert float(error.max()) < max(torch.finfo(dtype).eps, 1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_maps_take_any_leading_shape(bias):
    affine = AffineMap(torch.ones(3, 4), torch.ones(3) if bias else None)
    for shape in ((4,), (0, 4), (2, 0, 4), (2, 5, 4)):
        assert affine.map(torch.ones(shape)).shape == (*shape[:-1], 3)
    assert affine.map(np.ones((2, 4), np.float16)).dtype == torch.float32
    for wrong in (torch.ones(2, 3), torch.ones(3), torch.ones(2, 0), np.float64(1)):
        with pytest.raises(ValueError, match="x: expected 4 columns"):
            affine.map(wrong)
    with pytest.raises(TypeError, match="x: expected a numeric array"):
        affine.map(np.array([["a", "b", "c", "d"]]))


def test_bad_maps_are_refused():
    square = torch.eye(3)
    for call, message in [
        (lambda: AffineMap(torch.ones(3, 4)) @ AffineMap(torch.ones(5, 2)), "other: maps into 5 dimensions, 4"),
        (lambda: AffineMap(square, torch.full((3,), torch.inf)), "bias: contains NaN or infinity"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_faiss_transform_gives_the_same_vectors():
    faiss = pytest.importorskip("faiss", reason="faiss is an optional extra")
    x, y, _ = pairs()
    found = JointMoments(8, 8).update(x, y).ridge()
    transform = found.to_faiss()
    assert isinstance(transform, faiss.LinearTransform)
    np.testing.assert_allclose(transform.apply(x.float().numpy()), found.map(x).float().numpy(), rtol=1e-4, atol=1e-4)
    assert not transform.is_orthonormal
    narrow, turn = AffineMap(found.matrix[:3]), JointMoments(8, 8).update(x, y).procrustes()
    np.testing.assert_allclose(
        narrow.to_faiss().apply(x.float().numpy()), narrow.map(x).float().numpy(), rtol=1e-4, atol=1e-4
    )
    assert turn.to_faiss().is_orthonormal
    # An index behind the transform finds for x what an index of the mapped rows finds.
    inner = faiss.IndexFlatL2(3)
    index = faiss.IndexPreTransform(narrow.to_faiss(), inner)
    index.add(x.float().numpy())
    nearest = index.search(x[:20].float().numpy(), 1)[1][:, 0]
    assert nearest.tolist() == list(range(20))


def test_normalize_rows_is_safe():
    x = torch.tensor([[3e38, 4e30], [1e-40, 0.0], [0.0, 0.0], [3.0, 4.0]])
    unit = normalize_rows(x)
    torch.testing.assert_close(unit.norm(dim=1), torch.tensor([1.0, 1.0, 0.0, 1.0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalize_rows(-x), -unit, atol=0, rtol=0)
    with pytest.raises(ValueError, match="1 rows are zero"):
        normalize_rows(x, keep_zero=False)


@pytest.mark.parametrize("shrinkage", [0.0, 0.1, "oas"])
def test_constant_and_repeated_columns_have_no_canonical_direction(shrinkage):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 300, 4, generator=generator, dtype=torch.float64)
    y[:, :2] += 2 * x[:, :2]
    plain = JointMoments(4, 4).update(x, y)
    odd = torch.cat([x, torch.full((300, 2), 7.0), x[:, :1]], 1)
    moments = JointMoments(7, 4).update(odd, y)
    found = moments.cca(shrinkage=shrinkage)
    for values in (found.x_directions, found.y_directions, found.correlations):
        assert bool(torch.isfinite(values).all())
    mapped = moments.through_canonical(found).map(odd)
    torch.testing.assert_close(mapped, plain.ridge(0.0).map(x), atol=0.05, rtol=0.05)
    if shrinkage == 0.0:
        assert len(found.correlations) == 4
        torch.testing.assert_close(found.correlations, plain.cca(shrinkage=0.0).correlations)
        few = JointMoments(4, 4).update(x[:3], y[:3]).cca(shrinkage=0.0)
        assert len(few.correlations) == 2
        with pytest.raises(ValueError, match=r"k: must lie in \[1, 2\], got 3"):
            JointMoments(4, 4).update(x[:3], y[:3]).cca(3, shrinkage=0.0)
    with pytest.raises(ValueError, match=r"cov_yy: is zero: the rows are constant"):
        JointMoments(4, 2).update(x, torch.ones(300, 2)).cca(shrinkage=shrinkage)
