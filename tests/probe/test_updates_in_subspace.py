"""What updates write into a subspace of the states: shares that were planted, chance, and what is refused."""

import pytest
import torch

from subspan.geometry import Subspace
from subspan.models import StateDelta
from subspan.probe import updates_in_subspace

D, K = 10, 3


def update(share, *, name="self_attn.o_proj.weight", layers=8, basis=None):
    """Matrices with a share of their energy in the first K columns of a basis."""
    generator = torch.Generator().manual_seed(round(100 * share))
    basis = torch.eye(D) if basis is None else basis
    tuned = {}
    for number in range(layers):
        inside, outside = torch.randn(K, 7, generator=generator), torch.randn(D - K, 7, generator=generator)
        tuned[f"layers.{number}.{name}"] = (
            basis[:, :K] @ (inside / inside.norm()) * share**0.5
            + basis[:, K:] @ (outside / outside.norm()) * (1 - share) ** 0.5
        )
    return StateDelta.between({each: torch.zeros(D, 7) for each in tuned}, tuned)


@pytest.mark.parametrize(
    ("shares", "verdict"),
    [({"a": 0.9, "b": 0.1}, "unequal"), ({"a": 0.6}, "beyond chance"), ({"a": K / D}, "at chance")],
)
def test_planted_shares_are_found_in_any_basis(shares, verdict):
    basis = torch.linalg.qr(torch.randn(D, D)).Q
    turned = basis[:, :K] @ torch.linalg.qr(torch.randn(K, K)).Q
    found = updates_in_subspace({n: update(s, basis=basis) for n, s in shares.items()}, Subspace(turned))
    assert found.verdict == verdict
    assert found.chance == pytest.approx(K / D)
    assert found.shares == pytest.approx(shares, abs=1e-5)
    assert found.layers()["a"] == pytest.approx({f"layers.{i}": shares["a"] for i in range(8)}, abs=1e-5)
    beyond = (shares["a"] - K / D) / (1 - K / D)
    assert found.beyond["a"].value == pytest.approx(beyond, abs=1e-5)


def test_only_what_writes_counts():
    space = Subspace(torch.eye(D)[:, :K])
    with pytest.raises(ValueError, match=r"matrices that write states have other names; give them as `writes`"):
        updates_in_subspace({"a": update(0.5, name="q_proj.weight")}, space)
    named = updates_in_subspace({"a": update(0.5, name="q_proj.weight")}, space, writes="q_proj")
    assert named.shares["a"] == pytest.approx(0.5, abs=1e-5)
    found = updates_in_subspace({"a": update(0.5), "nothing": update(0.5) * 0.0}, space)
    assert (list(found.shares), found.unmoved) == (["a"], ("nothing",))
    with pytest.raises(ValueError, match="all updates are zero"):
        updates_in_subspace({"nothing": update(0.5) * 0.0}, space)
    with pytest.raises(ValueError, match="has 4 dimensions, matrices that write states have 10 outputs"):
        updates_in_subspace({"a": update(0.5)}, Subspace(torch.eye(4)[:, :1]))
    with pytest.raises(ValueError, match="subspace: expected one, got a batch"):
        updates_in_subspace({"a": update(0.5)}, Subspace(torch.eye(D)[:, :K].expand(2, D, K)))
