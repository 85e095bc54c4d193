from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from subspan.geometry import Subspace
from subspan.nn import PublishedSAE, SAEAdapter
from subspan.probe import AtomGroup, ManifoldCapture

ANGLE = torch.arange(200) * 2 * torch.pi / 200
PLANE = torch.linalg.qr(torch.randn(10, 2, generator=torch.Generator().manual_seed(0))).Q.T
CIRCLE = torch.stack([ANGLE.cos(), ANGLE.sin()], 1) @ PLANE


def sae_of(atoms: Tensor, sharpness: float = 0.0) -> SAEAdapter:
    """Atoms that fire where the product is above a threshold."""
    return SAEAdapter(lambda x: torch.where(x @ atoms.T > sharpness, x @ atoms.T, 0.0), lambda z: z @ atoms, atoms)


AXES = torch.cat([PLANE, -PLANE, torch.eye(10)])


def test_an_axis_pair_captures_a_circle() -> None:
    found = ManifoldCapture(max_atoms=12).fit(sae_of(AXES[:4]), CIRCLE, labels=range(200))
    assert found.geometric_.atoms_needed() == 2
    assert found.statistical_.atoms_needed() == 4
    assert found.affine_.explained[-1] == pytest.approx(1, abs=1e-5)
    assert found.dilution_ == 2
    assert found.diagnostics_.regime == "capture"
    assert float(found.subspace_.angles(Subspace.span(PLANE.T)).max()) < 1e-3
    assert found.tuning_ is not None
    assert found.tuning_.labels == list(range(200))
    assert sorted(found.atoms_) == [0, 1, 2, 3]


def test_tiles_shatter_and_many_wide_atoms_dilute() -> None:
    around = torch.stack([ANGLE[::10].cos(), ANGLE[::10].sin()], 1) @ PLANE
    tiles = ManifoldCapture(max_atoms=20).fit(sae_of(around, 0.9), CIRCLE)
    assert tiles.diagnostics_.regime == "shatter"
    assert tiles.diagnostics_.spread < 0.4
    assert tiles.tuning_ is None
    wide = ManifoldCapture(max_atoms=20).fit(sae_of(around / 5**0.5), CIRCLE)
    assert wide.diagnostics_.regime == "dilution"
    assert wide.dilution_ is not None
    assert wide.dilution_ > 3
    # Half of what is there, spread over all atoms: the autoencoder never holds 95 %.
    weak = ManifoldCapture(max_atoms=20).fit(sae_of(around / 4), CIRCLE)
    assert weak.dilution_ is None
    assert 0.2 < weak.statistical_.explained[-1] < 0.8


def test_contributions_are_the_points_where_they_are_known() -> None:
    noise = torch.randn(200, 10, generator=torch.Generator().manual_seed(1))
    noise = Subspace.span(PLANE.T).residual(noise)
    whole = ManifoldCapture(max_atoms=4).fit(sae_of(AXES[:4]), CIRCLE + noise, contributions=CIRCLE)
    assert whole.affine_.explained[-1] == pytest.approx(1, abs=1e-5)
    assert whole.subspace_.dim == 2
    plain = ManifoldCapture(max_atoms=4).fit(sae_of(AXES[:4]), CIRCLE + noise)
    assert plain.subspace_.dim > 2
    # Without them the points on the concept's own subspace are asked for: what else is in them is not.
    quiet = ManifoldCapture(max_atoms=4).fit(sae_of(AXES[:4]), CIRCLE + 0.05 * noise)
    assert quiet.subspace_.dim == 2
    assert quiet.affine_.explained[-1] > 0.999


def test_a_point_far_out_does_not_count_anywhere() -> None:
    x = torch.cat([CIRCLE, 100 * CIRCLE[:1]])
    found = ManifoldCapture(max_atoms=4).fit(sae_of(AXES[:4]), x, labels=[*range(200), 0])
    same = ManifoldCapture(max_atoms=4).fit(sae_of(AXES[:4]), CIRCLE, labels=range(200))
    assert found.codes_.shape == (201, 4)
    np.testing.assert_allclose(found.statistical_.explained, same.statistical_.explained, rtol=1e-6)
    assert found.tuning_ is not None
    assert same.tuning_ is not None
    np.testing.assert_allclose(found.tuning_.curves, same.tuning_.curves)


def test_rows_are_prepared_as_the_autoencoder_has_them() -> None:
    eye = torch.eye(10)
    w = {"W_enc": torch.cat([eye, -eye], 1), "W_dec": torch.cat([eye, -eye]), "b_dec": torch.zeros(10)}
    sae = PublishedSAE({**w, "b_enc": torch.zeros(20)}, {"normalize_activations": "constant_norm_rescale"})
    sized = CIRCLE * torch.linspace(1, 2, 200).unsqueeze(1)
    found = ManifoldCapture(max_atoms=20).fit(sae, sized)
    same = ManifoldCapture(max_atoms=20).fit(sae, CIRCLE)
    np.testing.assert_allclose(found.statistical_.explained, same.statistical_.explained, rtol=1e-4)
    assert found.statistical_.explained[-1] == pytest.approx(1, abs=1e-4)


def group(atoms: list[int], basis: Tensor) -> AtomGroup:
    return AtomGroup(np.array(atoms), Subspace.span(basis.T), "capture", 2.0, 2.0, 1.0, True, False)


def test_groups_are_matched_by_atoms_and_by_space() -> None:
    found = ManifoldCapture(max_atoms=12).fit(sae_of(AXES[:4]), CIRCLE)
    other = Subspace.span(PLANE.T).complement().basis.T[:2]
    matches = found.matches([group([7, 8], other), group([0, 1, 2], PLANE), group([3], PLANE[:1])])
    assert [match.group for match in matches] == [1, 2, 0]
    assert [match.held for match in matches] == [0.75, 0.25, 0]
    assert [match.overlap for match in matches] == pytest.approx([1, 0.5, 0], abs=1e-4)
    assert matches[0].largest_angle < 0.1
    assert matches[2].largest_angle == pytest.approx(90, abs=0.1)


def test_what_does_not_vary_has_empty_curves() -> None:
    found = ManifoldCapture(max_atoms=4).fit(sae_of(AXES[:4]), torch.ones(30, 10))
    assert len(found.geometric_.order) == len(found.statistical_.order) == len(found.atoms_) == 0
    assert found.dilution_ is None
    assert not hasattr(found, "subspace_")
    with pytest.raises(ValueError, match="no subspace"):
        found.matches([])


def test_bad_input_is_refused() -> None:
    sae = sae_of(AXES[:4])
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (sae, CIRCLE[:, :9], {}, "sae: is of width 10, X has 9"),
        (sae, CIRCLE[:9], {}, "X: 10 points"),
        (sae, CIRCLE * torch.nan, {}, "NaN"),
        (sae, CIRCLE, {"labels": [1, 2]}, "labels: 200"),
        (sae, CIRCLE, {"contributions": CIRCLE[1:]}, "contributions: expected shape"),
        (SAEAdapter(lambda x: x, lambda z: z, AXES[:4]), CIRCLE, {}, r"sae: codes \(n, 4\)"),
    ]
    for autoencoder, x, options, said in cases:
        with pytest.raises(ValueError, match=said):
            ManifoldCapture(max_atoms=4).fit(autoencoder, x, **options)
    with pytest.raises(ValueError, match="share"):
        ManifoldCapture(share=2.0).fit(sae, CIRCLE)
    found = ManifoldCapture().fit(sae, CIRCLE)
    with pytest.raises(ValueError, match="groups: 0 is of width 3"):
        found.matches([group([0], torch.eye(3)[:1])])
