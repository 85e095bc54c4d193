from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse

from subspan.datasets import ManifoldZoo
from subspan.nn import SAEAdapter
from subspan.probe import TopKSAE, sparse_codes

pytest.importorskip("lightning", reason="Lightning is not installed (extra: train)")

ROWS = ManifoldZoo(("circle", "disk"), variants=2, ambient_dim=8, random_state=0).sample(2000, 1).x


def error(sae: TopKSAE, x: torch.Tensor = ROWS) -> float:
    return float((sae.inverse_transform(sae.transform(x)) - x).square().sum() / x.square().sum())


@pytest.mark.parametrize(("variant", "most"), [("topk", 0.15), ("batchtopk", 0.25), ("matching-pursuit", 0.1)])
def test_planted_manifolds_are_rebuilt_from_few_atoms(variant: Any, most: float) -> None:
    sae = TopKSAE(n_atoms=32, k=2, variant=variant, epochs=8, random_state=0).fit(ROWS)
    assert error(sae) < most
    codes = sae.transform(ROWS)
    assert float((codes > 0).float().sum(1).mean()) == pytest.approx(2, abs=0.5)
    torch.testing.assert_close(sae.decoder_.norm(dim=1), torch.ones(32))
    assert sae.losses_[-1] < 0.5 * sae.losses_[0]
    assert not any(parameter.requires_grad for parameter in sae.sae_.parameters())


def test_dead_atoms_are_woken() -> None:
    far = torch.cat([ROWS + 3 * torch.eye(8)[0], ROWS - 3 * torch.eye(8)[0]])
    dead = [
        int(TopKSAE(n_atoms=96, k=1, dead_weight=weight, epochs=6, random_state=0).fit(far).dead_.sum())
        for weight in (0.0, 0.5)
    ]
    assert dead[1] < dead[0]


def test_units_of_the_rows_do_not_matter_and_the_seed_does() -> None:
    options: dict[str, Any] = {"n_atoms": 16, "k": 2, "epochs": 1}
    one, again, other = (TopKSAE(**options, random_state=seed).fit(ROWS) for seed in (0, 0, 1))
    assert torch.equal(one.decoder_, again.decoder_)
    assert not torch.equal(one.decoder_, other.decoder_)
    moved = TopKSAE(**options, random_state=0).fit(500 * ROWS + 40)
    torch.testing.assert_close(moved.decoder_, one.decoder_, atol=5e-3, rtol=0)
    assert TopKSAE(k=2, epochs=1).fit(ROWS.half()).decoder_.shape == (32, 8)


def test_codes_of_many_rows_stay_sparse() -> None:
    sae = TopKSAE(n_atoms=16, k=2, epochs=1, random_state=0).fit(ROWS)
    found = sparse_codes(sae.sae_, ROWS, batch_size=300)
    assert isinstance(found, sparse.csr_matrix)
    np.testing.assert_allclose(found.toarray(), sae.transform(ROWS), rtol=1e-6)
    np.testing.assert_array_equal(sparse_codes(sae.sae_, iter(ROWS.split(77))).toarray(), found.toarray())
    assert found.nnz <= 2 * len(ROWS)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="k: must lie in"):
        TopKSAE(n_atoms=3, k=4).fit(ROWS)
    sae = TopKSAE(n_atoms=16, k=2, epochs=1).fit(ROWS)
    with pytest.raises(ValueError, match="Z: expected 16 columns"):
        sae.inverse_transform(torch.zeros(2, 15))
    with pytest.raises(ValueError, match="x: expected 8 columns"):
        sparse_codes(sae.sae_, torch.zeros(5, 9))
    for encode, said in (
        (lambda x: x[:, :3], r"sae: codes \(n, 4\)"),
        (lambda x: torch.full((len(x), 4), torch.nan), "sae: .*NaN"),
    ):
        with pytest.raises(ValueError, match=said):
            sparse_codes(SAEAdapter(encode, lambda z: z, torch.eye(4)), torch.zeros(5, 4))
    with pytest.raises(ValueError, match="no rows"):
        sparse_codes(sae.sae_, iter([]))
