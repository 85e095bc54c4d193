"""What comes in at the door of arrays and estimators: results are finite or there is an error."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse

from sources import SOURCE, nodes_of, source_files
from subspan.align import ModalityGap, ReAlign, SpaceMap, UpgradeMap
from subspan.base.arrays import as_tensor, check_finite, check_matrix
from subspan.detect import SubspaceDetector
from subspan.geometry import AffineMap, Subspace
from subspan.measures import kernel_cka, local_kernel_cka, mutual_information
from subspan.select import LeverageSelector, reconstruction_error, retention
from subspan.select.baselines import herding, k_center, k_medoids
from subspan.statistics import CovarianceSketch, JointMoments, Moments, fit_moments, is_stream
from subspan.statistics.spread import Spread

GENERATOR = np.random.default_rng(0)
X, Y = (GENERATOR.normal(size=(60, 6)).astype(np.float32) for _ in range(2))
GIVEN = Subspace.fit(X, rank=3)
DETECTOR = SubspaceDetector(3).fit(X)
MAP = SpaceMap().fit(X, Y)


def joint(x: Any, y: Any) -> JointMoments:
    return JointMoments(6, 6).update(x, y)


# Every entry takes two tables of paired rows, and gives numbers.
DOORS: dict[str, Callable[[Any, Any], Any]] = {
    "Subspace.fit": lambda x, y: Subspace.fit(x, rank=3).variances,
    "Subspace.energies": lambda x, y: GIVEN.energies(x)[1],
    "Subspace.mahalanobis": lambda x, y: GIVEN.mahalanobis(x),
    "Subspace.residual": lambda x, y: GIVEN.residual(x),
    "AffineMap.map": lambda x, y: AffineMap.identity(6).map(x),
    "Moments": lambda x, y: Moments(6).update(x).subspace(2, dtype=torch.float32).variances,
    "fit_moments": lambda x, y: fit_moments(x).covariance(),
    "JointMoments.procrustes": lambda x, y: joint(x, y).procrustes(scale=True).matrix,
    "JointMoments.ridge": lambda x, y: joint(x, y).ridge().matrix,
    "JointMoments.cca": lambda x, y: joint(x, y).cca().x_directions,
    "JointMoments.cka": lambda x, y: joint(x, y).cka(),
    "JointMoments.local_cka": lambda x, y: joint(X, Y).local_cka(x, y),
    "kernel_cka": kernel_cka,
    "kernel_cka, rbf": lambda x, y: kernel_cka(x, y, "rbf"),
    "local_kernel_cka": lambda x, y: local_kernel_cka(x, y, X[:2], Y[:2]),
    "mutual_information": lambda x, y: mutual_information(x, y, bins=3),
    "CovarianceSketch": lambda x, y: CovarianceSketch(6, 4).update(x).subspace(2).variances,
    "Spread": lambda x, y: Spread(6).update(x).trace,
    "LeverageSelector": lambda x, y: LeverageSelector(5, rank=2).fit(x).scores_,
    "LeverageSelector, standardised": lambda x, y: (
        LeverageSelector(5, rank=2, standardize=True, row_norm=True).fit(x).scores_
    ),
    "retention": lambda x, y: retention(x, [1, 2, 3], 2),
    "reconstruction_error": lambda x, y: reconstruction_error(x, [1, 2, 3], 2),
    "k_center": lambda x, y: k_center(x, 5, random_state=0),
    "k_medoids": lambda x, y: k_medoids(x, 5, random_state=0),
    "herding": lambda x, y: herding(x, 5),
    "SubspaceDetector.fit": lambda x, y: SubspaceDetector(3).fit(x).score_samples(x),
    "SubspaceDetector.score_samples": lambda x, y: DETECTOR.score_samples(x),
    "SubspaceDetector, mahalanobis": lambda x, y: SubspaceDetector(3, distance="mahalanobis").fit(x).score_samples(x),
    "SubspaceDetector, cosine": lambda x, y: SubspaceDetector(3, distance="cosine").fit(x).score_samples(x),
    "SpaceMap.fit": lambda x, y: SpaceMap("ridge").fit(x, y).transform(x),
    "SpaceMap.transform": lambda x, y: MAP.transform(x),
    "ReAlign": lambda x, y: ReAlign().fit(x, y).transform(x),
    "ReAlign, lengths kept": lambda x, y: ReAlign(normalize=False).fit(x, y).transform(x),
    "UpgradeMap": lambda x, y: UpgradeMap("procrustes", folds=3).fit(x, y).transform(x),
    "ModalityGap": lambda x, y: list(ModalityGap().fit(x, y).table_.values()),
}
COMPLEX = {name for name in DOORS if name.startswith("Subspace.") or name == "AffineMap.map"}
parametrized = pytest.mark.parametrize("name", DOORS)


def used(name: str, x: Any, y: Any) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = DOORS[name](x, y)
    return np.asarray(found.detach() if isinstance(found, torch.Tensor) else found, dtype=np.float64)


@parametrized
def test_large_single_precision_gives_finite_numbers(name: str) -> None:
    for scale in (1e25, 3e37):
        large = X * np.float32(scale), Y * np.float32(scale)
        assert np.isfinite(large[0]).all()
        assert np.isfinite(used(name, *large)).all()


@parametrized
def test_large_single_precision_is_double_precision(name: str) -> None:
    large = X * np.float32(1e25), Y * np.float32(1e25)
    wide = tuple(rows.astype(np.float64) for rows in large)
    expected = used(name, *wide)
    np.testing.assert_allclose(used(name, *large), expected, rtol=2e-5, atol=1e-6 * np.abs(expected).max())


@parametrized
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(name: str, value: float) -> None:
    if name in {"Subspace.residual", "AffineMap.map"}:
        pytest.skip("one product: NaN stays where it was")
    rows = X.copy()
    rows[7, 2] = value
    with pytest.raises(ValueError, match=r"NaN|infinity|finite"):
        used(name, rows, Y)


@parametrized
def test_what_is_no_table_of_real_numbers_is_refused(name: str) -> None:
    masked = np.ma.masked_array(X, mask=False)
    masked[3, 2] = np.ma.masked
    with pytest.raises(ValueError, match="masked"):
        used(name, masked, Y)
    for matrix in (sparse.csr_matrix(X), sparse.csr_array(X), torch.from_numpy(X).to_sparse()):
        with pytest.raises(TypeError, match=r"[Ss]parse"):
            used(name, matrix, Y)
    if name not in COMPLEX:
        for values in (X + 1j, torch.from_numpy(X) + 1j):
            with pytest.raises(ValueError, match=r"[Cc]omplex|real"):
                used(name, values, Y)


@parametrized
def test_a_gradient_and_an_unmasked_mask_change_nothing(name: str) -> None:
    expected = used(name, torch.from_numpy(X), torch.from_numpy(Y))
    given = (torch.from_numpy(rows).clone().requires_grad_() for rows in (X, Y))
    np.testing.assert_array_equal(used(name, *given), expected)
    np.testing.assert_array_equal(used(name, np.ma.masked_array(X), Y), used(name, X, Y))


def test_values_beyond_double_precision_are_refused() -> None:
    with pytest.raises(ValueError, match="x: values are so large that their squares overflow float64"):
        check_finite(torch.full((3, 2), 1e200, dtype=torch.float64))
    assert check_finite(torch.full((3, 2), 1e25)).dtype == torch.float64
    assert check_finite(torch.full((3, 2), 1e18)).dtype == torch.float32
    assert check_finite(torch.full((3, 2), 6e4, dtype=torch.float16)).dtype == torch.float16
    assert check_finite(torch.full((3, 2), 1e25, dtype=torch.complex64)).dtype == torch.complex128


def test_kinds_of_arrays() -> None:
    assert as_tensor(np.ones((2, 2), np.longdouble)).dtype == torch.float64
    assert check_matrix(torch.ones(2, 2, requires_grad=True)).requires_grad is False
    assert as_tensor(torch.ones(2, 2, requires_grad=True)).requires_grad
    assert not is_stream(sparse.eye_array(3))
    frozen = np.full((4, 2), 1e25, np.float32)
    frozen.flags.writeable = False
    assert SubspaceDetector(1).fit(X).score_samples(np.repeat(frozen, 3, axis=1)).dtype == np.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mean_far_from_the_origin_costs_no_digits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64)).Q
    spread = torch.linspace(3, 1, 16, dtype=torch.float64)
    far = (torch.randn(400, 16, generator=generator, dtype=torch.float64) * spread) @ basis.T + 3e6
    rows = far.to(dtype)
    expected = Subspace.fit(rows.double(), rank=5)
    for found in (Subspace.fit(rows, rank=5), Moments(16).update(rows).subspace(5, dtype=dtype)):
        assert found.basis.dtype == dtype
        torch.testing.assert_close(
            found.residual_energy(rows).double(), expected.residual_energy(rows.double()), rtol=1e-4, atol=0
        )
    scores = SubspaceDetector(5, distance="residual").fit(rows.numpy()).anomaly_score(rows.numpy())
    np.testing.assert_allclose(scores, expected.residual_energy(rows.double()), rtol=1e-4)


def test_scikit_learn_is_entered_by_one_door() -> None:
    found = [
        path.relative_to(SOURCE).as_posix()
        for path, source in source_files().items()
        for node in nodes_of(source)
        if isinstance(node, ast.ImportFrom)
        and str(node.module).startswith("sklearn.utils")
        and {"validate_data", "check_array", "check_X_y"} & {alias.name for alias in node.names}
    ]
    assert found == []
