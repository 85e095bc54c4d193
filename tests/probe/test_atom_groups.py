from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.metrics import adjusted_rand_score, mutual_info_score

from subspan.edit import steer_subspace
from subspan.geometry import Subspace
from subspan.models import intervene
from subspan.nn import SAEAdapter
from subspan.probe import AtomGroups, IsingGraph, sparse_codes

pytest.importorskip("networkx", reason="networkx is not installed (extra: graph)")

BLOCKS = np.repeat([0, 1, 2], 3)


def blocks(n: int = 3000, seed: int = 0) -> torch.Tensor:
    """Three groups of three atoms that fire together in a third of the rows, nine in ten times each."""
    draw = torch.Generator().manual_seed(seed)
    on = (torch.rand(n, 3, generator=draw) < 0.3).repeat_interleave(3, 1)
    return on * (torch.rand(n, 9, generator=draw) < 0.9) * (0.5 + torch.rand(n, 9, generator=draw))


ATOMS = torch.linalg.qr(torch.randn(16, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q.T


@pytest.mark.parametrize("method", ["louvain", "spectral"])
@pytest.mark.parametrize("affinity", ["ising", "coactivation", "correlation", "mutual-information"])
def test_planted_groups_are_found_by_what_fires_together(affinity: Any, method: Any) -> None:
    groups = AtomGroups(affinity, method).fit(blocks(), ATOMS)
    assert adjusted_rand_score(BLOCKS, groups.labels_) == 1
    assert [group.atoms.tolist() for group in groups.groups_] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert len(groups.subspaces_) == 3
    for group in groups.groups_:
        assert float(group.subspace.angles(Subspace.span(ATOMS[group.atoms].T)).max()) < 1e-3
        assert group.regime == ("capture" if affinity == "ising" else None)


def test_cosine_groups_directions() -> None:
    draw = torch.Generator().manual_seed(0)
    centers = torch.linalg.qr(torch.randn(16, 3, generator=draw)).Q.T
    signs = torch.tensor([1.0, -1, 1] * 3).unsqueeze(1)  # opposite directions are of one axis
    atoms = signs * centers.repeat_interleave(3, 0) + 0.03 * torch.randn(9, 16, generator=draw)
    codes = torch.rand(500, 9, generator=draw) * (torch.rand(500, 9, generator=draw) < 0.3)
    groups = AtomGroups("cosine", least_weight=0.3).fit(codes, atoms)
    assert adjusted_rand_score(BLOCKS, groups.labels_) == 1
    unit = atoms / atoms.norm(dim=1, keepdim=True)
    np.testing.assert_allclose(groups.affinity_, (unit @ unit.T - torch.eye(9)).numpy(), atol=1e-6)


def test_affinities_are_what_they_say() -> None:
    codes = blocks(400)
    fires, dense = (codes > 0).double().numpy(), codes.double().numpy()
    together = AtomGroups("coactivation").fit(codes, ATOMS).affinity_
    wanted = (fires[:, 0] * fires[:, 4]).sum() * (1 / fires[:, 0].sum() + 1 / fires[:, 4].sum()) / 2
    assert together[0, 4] == pytest.approx(wanted)
    correlation = AtomGroups("correlation").fit(sparse.csr_matrix(dense), ATOMS).affinity_
    np.testing.assert_allclose(correlation, np.corrcoef(dense.T) - np.eye(9), atol=1e-9)
    information = AtomGroups("mutual-information").fit(codes, ATOMS).affinity_
    bins = []
    for column in dense.T:
        cuts = np.quantile(column[column > 0], np.arange(1, 8) / 8)
        bins.append(np.where(column > 0, 1 + np.searchsorted(cuts, column, side="right"), 0))
    for i, j in ((0, 1), (0, 5), (7, 3)):
        own = [mutual_info_score(bins[k], bins[k]) for k in (i, j)]
        assert information[i, j] == pytest.approx(mutual_info_score(bins[i], bins[j]) / np.sqrt(own[0] * own[1]))


def test_only_the_strongest_edges_are_kept() -> None:
    groups = AtomGroups("correlation", edges=9).fit(blocks(), ATOMS)
    cut = groups._cut(np.abs(groups.affinity_))
    assert np.count_nonzero(np.triu(cut)) == 9
    assert (cut[BLOCKS[:, None] == BLOCKS] > 0).sum() == 18
    none = AtomGroups("correlation", least_weight=2.0).fit(blocks(), ATOMS)
    assert none.groups_ == []
    assert set(none.labels_) == {-1}
    pair = AtomGroups("correlation", edges=1, min_size=3).fit(blocks(), ATOMS)
    assert pair.groups_ == []


def test_a_subspace_is_weighted_by_use_and_passes_through_the_origin() -> None:
    codes = blocks()
    codes[:, 2] *= 1e-3  # fires as often, adds next to nothing
    group = AtomGroups(rank=0.95).fit(codes, ATOMS).groups_[0]
    assert group.atoms.tolist() == [0, 1, 2]
    assert group.subspace.dim == 2
    assert group.subspace.center is None
    assert float(group.subspace.angles(Subspace.span(ATOMS[:2].T)).max()) < 0.01
    own = codes[:, :3].double() @ ATOMS[:3]
    rows = own[codes[:, :3].any(1)]
    assert float(group.subspace.explained_ratio) == pytest.approx(
        1 - float(group.subspace.residual(rows).square().sum() / rows.square().sum()), abs=1e-5
    )
    assert AtomGroups(rank=7).fit(codes, ATOMS).groups_[0].subspace.dim == 3


def test_regimes_follow_the_signs_of_couplings() -> None:
    angle = np.arange(1200) * 2 * np.pi / 1200
    tiles = np.eye(24).repeat(50, 0)
    atoms = np.stack([np.cos(angle[25::50]), np.sin(angle[25::50])], 1)
    (shattered,) = AtomGroups(ising=IsingGraph(lambdas=(1e-3,)), resolution=0.1).fit(tiles, atoms).groups_
    assert len(shattered.atoms) == 24
    assert shattered.regime == "shatter"
    assert shattered.validated
    assert shattered.subspace.dim == 2
    # Three atoms of a graph that is given: both signs.
    graph = IsingGraph().fit(blocks())
    first = graph.couplings_[0, 1]
    graph.couplings_[0, 1] = graph.couplings_[1, 0] = -first
    found = AtomGroups(ising=graph).fit(blocks(), ATOMS).groups_
    assert [group.regime for group in found] == ["dilution", "capture", "capture"]


def test_validation_asks_for_a_gap_and_three_atoms() -> None:
    codes = blocks()
    for group in AtomGroups().fit(codes, ATOMS).groups_:
        own = codes[:, group.atoms].double()
        values = torch.linalg.svdvals(own - own.mean(0))
        assert group.gap == pytest.approx(float((values[:-1] / values[1:]).max()), rel=1e-4)
        p = values.square() / values.square().sum()
        assert group.effective_rank == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-4)
        assert group.validated
        assert 1 < group.intrinsic_dimension < 3.5
    two = AtomGroups().fit(codes[:, [0, 1, 3, 4]], ATOMS[[0, 1, 3, 4]]).groups_
    assert [(group.validated, group.regime) for group in two] == [(False, "unvalidated")] * 2


def test_a_group_steers_and_erases_in_a_model() -> None:
    """What one group adds to a layer is taken out, and moved, and nothing of the others is touched."""
    codes = blocks()
    x = (codes.double() @ ATOMS).float()
    sae = SAEAdapter(lambda rows: (rows.double() @ ATOMS.T).relu().float(), lambda z: z @ ATOMS.float(), ATOMS.float())
    groups = AtomGroups(rank=0.999).fit(sparse_codes(sae, x), sae.decoder)
    space = groups.subspaces_[0]
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity())
    with intervene(model, "0", space.residual):
        erased = sae.encode(model(x))
    assert float(erased[:, :3].max()) < 1e-4
    torch.testing.assert_close(erased[:, 3:], codes[:, 3:], atol=1e-4, rtol=0)
    way = [2 * float(space.basis[:, 0].mean().sign()), *[0.0] * (space.dim - 1)]
    with intervene(model, "0", steer_subspace(space, way, add=True).map):
        steered = sae.encode(model(x))
    torch.testing.assert_close(steered[:, 3:], codes[:, 3:], atol=1e-4, rtol=0)
    assert float((steered - codes)[:, :3].abs().max()) > 1


def test_louvain_without_networkx_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(ImportError, match=r"subspan\[graph\]"):
        AtomGroups("correlation").fit(blocks(200), ATOMS)


def test_bad_input_is_refused() -> None:
    codes = blocks(200)
    for changed, atoms, said in (
        (codes, ATOMS[:8], "codes: 8 columns"),
        (-codes, ATOMS, "negative"),
        (codes * 0, ATOMS, "0 of 9 atoms fire"),
        (codes, ATOMS * torch.nan, "NaN"),
    ):
        for affinity in ("ising", "cosine"):
            with pytest.raises(ValueError, match=said):
                AtomGroups(affinity).fit(changed, atoms)  # pyright: ignore
    for options, said in (
        ({"method": "leiden"}, "method"),
        ({"affinity": "distance"}, "affinity"),
        ({"rates": (0.9, 0.1)}, "rates"),
        ({"rank": None}, "rank"),
        ({"ising": IsingGraph().fit(torch.cat([codes, codes], 1))}, "ising: was fitted to other codes"),
    ):
        with pytest.raises(ValueError, match=said):
            AtomGroups(**options).fit(codes, ATOMS)
