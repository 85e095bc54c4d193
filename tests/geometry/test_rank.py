import numpy as np
import pytest
import torch

from subspan.geometry import (
    EffectiveRank,
    Elbow,
    EnergyRank,
    FixedRank,
    FractionOfDim,
    GavishDonoho,
    Subspace,
    coding_rate,
    effective_rank,
    participation_ratio,
    power_law_exponent,
    rank_rule,
)


def test_energy_takes_the_smallest_sufficient_rank():
    variances = np.array([5.0, 3.0, 1.0, 1.0])
    assert [EnergyRank(t)(variances, 10, 4) for t in (0.5, 0.51, 0.8, 0.9, 0.91, 1.0)] == [1, 2, 2, 3, 4, 4]


@pytest.mark.parametrize(
    ("share", "n", "d", "expected"),
    [(0.25, 100, 8, 2), (0.01, 5, 9, 1), (0.5, 5, 9, 2), (0.7, 5, 9, 4), (1.0, 5, 9, 5)],
)
def test_a_fraction_counts_directions_and_not_variances(share, n, d, expected):
    assert FractionOfDim(share)(np.linspace(9, 0, min(n, d)), n, d) == expected
    assert FractionOfDim(1.0)(np.ones(3), n, d) == 3
    for wrong in (0, 1.1):
        with pytest.raises(ValueError, match=r"\(0, 1\]"):
            FractionOfDim(wrong)


def test_elbow_and_effective_rank():
    variances = np.array([10.0, 9.5, 9.0, 0.1, 0.11, 0.09, 0.1])
    assert Elbow()(variances, 50, 7) == 3
    assert EffectiveRank()(np.array([1.0, 1, 1, 0, 0]), 50, 5) == 3


def test_names_and_arguments():
    assert rank_rule(3) == FixedRank(3)
    assert rank_rule(0.5) == EnergyRank(0.5)
    assert rank_rule("gavish-donoho") == GavishDonoho()
    for bad, error in [(0, ValueError), (1.5, ValueError), (True, TypeError), ("best", ValueError), (None, TypeError)]:
        with pytest.raises(error, match="rank"):
            rank_rule(bad)


def test_repeated_rows_fall_back_with_a_warning():
    x = np.repeat(np.eye(3, 30), 20, axis=0)
    with pytest.warns(UserWarning, match="median singular value is zero"):
        found = Subspace.fit(x, rank="gavish-donoho", center=False)
    assert found.dim == 3


def test_spectral_numbers():
    flat = torch.ones(7, dtype=torch.float64)
    assert abs(float(effective_rank(flat)) - 7) < 1e-12
    assert abs(float(participation_ratio(flat)) - 7) < 1e-12
    power = torch.arange(1, 200, dtype=torch.float64) ** -1.4
    assert abs(float(power_law_exponent(power)) - 1.4) < 1e-9
    z = torch.randn(50, 8, dtype=torch.float64)
    wide = torch.logdet(torch.eye(50, dtype=torch.float64) + 8 / (50 * 0.25) * z @ z.mT) / 2
    torch.testing.assert_close(coding_rate(z, epsilon=0.5), wide)
    with pytest.raises(ValueError, match="total variance is zero"):
        effective_rank(torch.zeros(4))
