"""Updates beside a reference: shares that were planted, closed forms beside draws, and verdicts."""

import math
import re

import pytest
import torch

from subspan.geometry import FractionOfDim
from subspan.models import StateDelta
from subspan.probe import compare_updates, projected_update, weight_subspaces

D, K, LAYERS = 16, 4, 10


def deltas(shares, *, layers=LAYERS, noise=0.0):
    """A reference of falling singular values, and updates with a share of their energy in its first quarter.

    noise: how far shares go up and down from layer to layer, in turns.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    zero, reference = {}, {}
    tuned = {name: {} for name in shares}
    for number in range(layers):
        tensor = f"layers.{number}.w"
        basis = torch.linalg.qr(normal(D, D)).Q
        zero[tensor] = torch.zeros(D, 12)
        reference[tensor] = (basis[:, :12] * torch.linspace(3, 1, 12)) @ torch.linalg.qr(normal(12, 12)).Q
        for place, (name, share) in enumerate(shares.items()):
            share = min(1, max(0, share + noise * (-1) ** (number + place)))
            inside, outside = normal(3, 12), normal(D - 3, 12)
            tuned[name][tensor] = basis[:, :3] @ (inside / inside.norm()) * share**0.5
            tuned[name][tensor] += basis[:, 3:] @ (outside / outside.norm()) * (1 - share) ** 0.5
    return (
        StateDelta.between(zero, reference),
        {name: StateDelta.between(zero, value) for name, value in tuned.items()},
    )


# The first quarter of 12 directions of 16: chance is 3/16.
@pytest.mark.parametrize(
    ("shares", "noise", "verdict", "said"),
    [
        ({"a": 0.9, "b": 0.2}, 0.0, "unequal", "more of the update of 'a' than of that of 'b'"),
        ({"a": 0.2, "b": 0.9}, 0.0, "unequal", "more of the update of 'b' than of that of 'a'"),
        ({"a": 0.6, "b": 0.6}, 0.0, "alike", "0.2 is excluded"),
        ({"a": 0.6, "b": 0.65}, 0.0, "alike", "0.06 (0.06 to 0.06) more of the update of 'b'"),
        ({"a": 0.75, "b": 0.6}, 0.05, "no evidence", "0.2 is not excluded"),
        ({"a": 0.6, "b": 0.75}, 0.05, "no evidence", "0.2 is not excluded"),
        ({"a": 0.5, "b": 0.6}, 0.4, "no evidence", "0.2 is not excluded"),
        ({"a": 0.65, "b": 0.4}, 0.35, "no evidence", "0.2 is not excluded"),
        ({"a": 0.2, "b": 0.9, "c": 0.3}, 0.0, "unequal", "more of the update of 'b' than of that of 'a'"),
        ({"a": 0.6}, 0.0, "beyond chance", "0.51 (0.51 to 0.51)"),
        ({"a": 3 / 16}, 0.0, "at chance", "of the update of 'a'"),
    ],
)
def test_planted_shares_are_judged(shares, noise, verdict, said):
    reference, updates = deltas(shares, noise=noise)
    found = compare_updates(reference, updates)
    assert found.verdict == verdict, found.reason
    assert said in str(found)
    value, low, high = map(float, re.findall(r"(-?[\d.]+) \((-?[\d.]+) to (-?[\d.]+)\)", found.reason)[0])
    assert low <= value <= high
    if not noise:
        for name, share in shares.items():
            assert found.curves()[name]["kept"][1] == pytest.approx(share, abs=1e-5)
            assert found.beyond[name].value == pytest.approx((share - 3 / 16) / (13 / 16), abs=1e-5)


def test_closed_forms_are_the_means_of_draws():
    reference, updates = deltas({"a": 0.7}, layers=4)
    found = compare_updates(reference, updates, fractions=[0.5])
    curves = found.curves()["a"]
    for kind, key in (("topk", "kept"), ("randomk", "drawn"), ("random", "chance")):
        drawn = [
            projected_update(
                reference, updates["a"], weight_subspaces(reference, FractionOfDim(0.5), kind=kind, random_state=seed)
            ).energy_kept
            for seed in range(1 if kind == "topk" else 16)
        ]
        error = 1e-6 if kind == "topk" else 3 * torch.tensor(drawn).std() / math.sqrt(len(drawn))
        assert curves[key][1] == pytest.approx(sum(drawn) / len(drawn), abs=float(error))
    whole = compare_updates(reference, updates, fraction=1.0).curves()["a"]
    assert whole["kept"][-1] == pytest.approx(whole["drawn"][-1])
    assert found.cosines()["a"] == pytest.approx(reference.cosine(updates["a"]), abs=1e-6)


def test_pairs_are_those_of_the_subspaces_and_vectors_count():
    zero = {"layers.0.w": torch.zeros(8, 8), "layers.0.b": torch.zeros(8), "head": torch.zeros(8, 2)}
    eye = torch.eye(8)
    first = {"layers.0.w": eye[:, :2] @ eye[:2], "layers.0.b": eye[0], "head": torch.zeros(8, 2)}
    turned = torch.stack([eye[0], math.cos(math.radians(60)) * eye[1] + math.sin(math.radians(60)) * eye[2]], 1)
    second = {"layers.0.w": turned @ eye[:2], "layers.0.b": eye[0] + eye[1], "head": torch.ones(8, 2)}
    found = compare_updates(StateDelta.between(zero, first), {"x": StateDelta.between(zero, second)})
    (pair,) = found.pairs
    assert (pair.first, pair.second, pair.layer, pair.ranks) == ("aligned", "x", "layers.0", (2, 2))
    assert pair.overlap == pytest.approx((1 + 0.25) / 2)
    assert pair.chance == pytest.approx(2 / 8)
    assert (pair.smallest, pair.mean) == pytest.approx((0, 30), abs=1e-3)
    rows = {row.tensor: row for row in found.held}
    assert rows["layers.0.b"].kept == pytest.approx([0.5] * 5)
    assert rows["layers.0.b"].chance == pytest.approx([1 / 8] * 5)
    assert (rows["head"].rank, rows["head"].kept) == (0, (0.0,) * 5)
    assert found.verdict == "no evidence"  # too few tensors to draw from


def test_bad_input_is_named():
    reference, updates = deltas({"a": 0.7}, layers=2)
    nothing = reference - reference
    for given, said in (
        ((reference, {}), "at least one update"),
        ((reference, {"aligned": updates["a"]}), "give the model another"),
        ((reference, {"a": updates["a"].only(["layers.0.w"])}), "'a' has other tensors"),
        ((reference, {"a": nothing}), "update of 'a' is zero"),
        ((nothing, updates), "reference: changes no tensor"),
    ):
        with pytest.raises(ValueError, match=said):
            compare_updates(*given)
    for options, said in (({"fraction": 0.0}, r"\(0, 1\]"), ({"level": 1.0}, "level"), ({"margin": 0.0}, "margin")):
        with pytest.raises(ValueError, match=said):
            compare_updates(reference, updates, **options)
