from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("lightning", reason="the protocol trains with Lightning")

from subspan.reproduce import stationary_simplex
from subspan.reproduce.materials.image_features import LabelledImages

pytestmark = pytest.mark.filterwarnings("ignore")


class PlantedImages(LabelledImages):
    """Ten classes whose features by each network are a map of their own of one latent vector."""

    def features(self, model="efficientnet-lite0", size=128):
        number = stationary_simplex.MODELS.index(model)
        mixing = torch.randn(20, 40, generator=torch.Generator().manual_seed(number))
        centers = torch.randn(10, 20, generator=torch.Generator().manual_seed(9))
        latent = centers[torch.as_tensor(self.labels)]
        latent = latent + 0.35 * torch.randn(latent.shape, generator=torch.Generator().manual_seed(5))
        return latent @ mixing


@pytest.fixture(scope="module")
def outcome():
    labels = np.arange(1200) % 10
    index = np.arange(1200)
    names = tuple("0123456789")
    data = PlantedImages("planted", None, labels, index[index % 30 < 20], index[index % 30 >= 20], names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stationary_simplex, "labelled_images", lambda source: data)
        patch.setattr(stationary_simplex, "VERTICES", 16)
        patch.setattr(stationary_simplex, "HIDDEN", 32)
        patch.setattr(stationary_simplex, "QUICK_EPOCHS", 18)
        return stationary_simplex.protocol(quick=True, seed=0, progress=lambda message, fraction: None)


def test_the_protocol_measures_every_arm(outcome):
    assert len(outcome.tables[0].rows) == 5
    assert set(outcome.baselines) == {row[0] for row in outcome.tables[0].rows} - {"simplex, HOC"}
    by_name = {check.name: check for check in outcome.checks}
    assert by_name["average accuracy"].holds == (by_name["average accuracy"].value > 1.5)
    assert outcome.holds == (outcome.ours >= 0.8)


def test_the_simplex_carries_models_across_replacements_and_a_free_head_does_not(outcome):
    rows = {row[0]: row for row in outcome.tables[0].rows}
    assert rows["learnable classifier (ER)"][2] == 0
    assert rows["simplex, cross entropy"][3] > rows["learnable classifier (ER)"][3] + 0.1


def test_roles_share_no_class():
    for classes in (10, 100):
        roles = stationary_simplex.plan(classes, 3)
        assert sorted([*roles.local, *roles.elsewhere, *roles.unseen]) == list(range(classes))
    assert len(roles.tasks) == 5
    assert len(roles.unseen) == 30


def test_procrustes_finds_the_rotation():
    x = torch.randn(50, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turn = torch.linalg.qr(torch.randn(15, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    found = stationary_simplex.procrustes(x, x @ turn.mT)
    torch.testing.assert_close(found.matrix, turn, atol=1e-10, rtol=0)


def test_across_counts_pairs_with_a_replacement_between():
    matrix = np.array([[0.5, np.nan, np.nan], [0.6, 0.5, np.nan], [0.4, 0.6, 0.5]])
    assert stationary_simplex.across(matrix, {0: 0, 2: 1}) == 0.5
