"""Leading eigenspaces at gaps and in clusters, and their derivative."""

import pytest
import torch

from subspan.geometry.grassmann import random_basis
from subspan.solvers import leading_eigenspace


def symmetric(values, seed=0, dtype=torch.float64):
    values = torch.tensor(values, dtype=torch.float64)
    q = random_basis(len(values), len(values), dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return (q * values) @ q.mH, q


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_at_a_gap_it_is_what_was_planted(dtype):
    matrix, q = symmetric([5.0, 4.0, 4.0, 1.0, -7.0], dtype=dtype)
    found = leading_eigenspace(matrix, 3)
    torch.testing.assert_close(found.projector, q[:, :3] @ q[:, :3].mH)
    torch.testing.assert_close(found.spectrum, torch.tensor([5.0, 4.0, 4.0, 1.0, -7.0]).double())
    assert torch.equal(found.variances, found.spectrum[:3])


def test_a_cluster_is_not_cut_and_that_is_said():
    matrix, _ = symmetric([5.0, 4.0, 4.0, 4.0, 1.0])
    for cut, dim in (("widen", 4), ("narrow", 1)):
        with pytest.warns(UserWarning, match=f"eigenvalues 2 and 3 are equal.*; {dim} are given"):
            assert leading_eigenspace(matrix, 2, cut=cut).dim == dim
    assert leading_eigenspace(matrix, 2, cut="exact").dim == 2
    assert leading_eigenspace(matrix, 5).dim == 5
    assert leading_eigenspace(matrix, 4, cut="narrow").dim == 4
    assert leading_eigenspace(matrix, 1, tolerance=0.1).dim == 1
    with pytest.warns(UserWarning, match="equal to 0.3"):
        assert leading_eigenspace(matrix, 1, tolerance=0.3).dim == 4
    # Rounding below the tolerance does not tell eigenvalues apart.
    with pytest.warns(UserWarning, match="4 are given"):
        assert leading_eigenspace(matrix + 1e-10 * torch.diag(torch.arange(5.0).double()), 3).dim == 4
    with pytest.raises(ValueError, match="leaves none"):
        leading_eigenspace(torch.eye(3), 2, cut="narrow")


def test_a_batch_has_one_rank_or_is_refused():
    first, second = symmetric([5.0, 4.0, 4.0, 1.0])[0], symmetric([6.0, 3.0, 3.0, 1.0], 1)[0]
    with pytest.warns(UserWarning, match="3 are given"):
        found = leading_eigenspace(torch.stack([first, second]), 2)
    torch.testing.assert_close(found.basis[1], leading_eigenspace(second, 3).basis)
    with pytest.raises(ValueError, match=r"ranks \[2, 3\]"):
        leading_eigenspace(torch.stack([first, symmetric([5.0, 4.0, 2.0, 1.0])[0]]), 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("values", [[5.0, 4.0, 2.0, 1.0, 0.5], [5.0, 5.0, 1.0, 1.0, 1.0]])
def test_the_derivative_of_the_span_is_that_of_differences_also_among_equals(values, dtype):
    matrix, _ = symmetric(values, dtype=dtype)
    target, _ = symmetric([1.0, 2.0, 3.0, 4.0, 5.0], 3, dtype)
    step = symmetric([1.0, -1.0, 2.0, 0.5, 0.0], 4, dtype)[0]
    given = matrix.clone().requires_grad_()
    loss = lambda m: (leading_eigenspace(m, 2).projector * target.conj()).sum().real  # noqa: E731
    loss(given).backward()
    torch.testing.assert_close(given.grad, given.grad.mH)
    slope = (given.grad.conj() * step).sum().real
    with torch.no_grad():
        measured = (loss(matrix + 1e-5 * step) - loss(matrix - 1e-5 * step)) / 2e-5
    torch.testing.assert_close(slope, measured, rtol=1e-5, atol=1e-8)


def test_wrong_input_is_refused():
    for call, message in (
        (lambda: leading_eigenspace(torch.eye(3), 4), "rank"),
        (lambda: leading_eigenspace(torch.eye(3), 1, cut="up"), "cut"),
        (lambda: leading_eigenspace(torch.full((2, 2), float("nan")), 1), "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
