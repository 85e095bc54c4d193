"""Projections of one update on what another spans, and overlaps of updates and of activations beside chance."""

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import nn

from subspan.geometry import EnergyRank, FractionOfDim, Subspace
from subspan.models import StateDelta, write_weights
from subspan.models.weights import as_matrix
from subspan.probe import activation_overlap, projected_update, subspace_overlaps, weight_subspaces

SHAPES = {"layers.0.q": (4, 7), "layers.0.k": (5, 7), "layers.0.norm": (6,), "filters": (3, 2, 2, 2), "embed": (9, 4)}


def state(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def update(seed):
    return StateDelta.between(state(100), state(seed))


def flat(delta):
    return torch.cat([delta[name].flatten().double() for name in SHAPES])


@pytest.mark.parametrize("kind", ["topk", "randomk", "random"])
def test_inside_and_outside_make_the_whole_and_cosines_are_cosines(kind):
    reference, delta = update(0), update(1)
    spaces = weight_subspaces(reference, FractionOfDim(0.5), kind=kind)
    same, orth, opp = (projected_update(reference, delta, spaces, mode) for mode in ("same", "orth", "opp"))
    u, v, p = flat(delta), flat(reference), flat(same.update)
    torch.testing.assert_close(p + flat(orth.update), u)
    torch.testing.assert_close(flat(opp.update), -p)
    assert same.energy_kept == pytest.approx(float(p @ p / (u @ u)), rel=1e-5)
    assert same.energy_kept + orth.energy_kept == pytest.approx(1, abs=1e-5)
    for part, sign in ((same, 1), (orth, 1), (opp, -1)):
        assert part.cosine == pytest.approx(sign * part.energy_kept**0.5, rel=1e-4)
        assert part.cosine_to_reference == pytest.approx(float(u @ v / u.norm() / v.norm()), rel=1e-5)
    for name, energy in same.energies.items():
        assert energy == pytest.approx(float((same.update[name].norm() / delta[name].norm()) ** 2), rel=1e-5)
    turned = projected_update(-reference, delta, spaces)
    assert turned.cosine_to_reference == pytest.approx(-same.cosine_to_reference, rel=1e-6)


def test_all_directions_give_the_tuned_model_and_a_vector_is_projected_on_the_one_that_it_has():
    reference, delta = update(0), update(1)
    wide = [name for name in SHAPES if name.startswith("layers") and name != "layers.0.norm"] + ["filters"]
    found = projected_update(reference, delta, weight_subspaces(reference, FractionOfDim(1.0)))
    tuned = found.update.added_to(state(100))
    for name in wide:
        torch.testing.assert_close(tuned[name], state(1)[name], rtol=1e-4, atol=1e-5)
    u, v = delta["layers.0.norm"], reference["layers.0.norm"]
    torch.testing.assert_close(found.update["layers.0.norm"], u @ v / (v @ v) * v)
    # Of a tensor that the reference leaves alone nothing is inside.
    part = reference.only(["embed"])
    alone = projected_update(part, delta, weight_subspaces(part, 2))
    assert not alone.update["filters"].any()
    assert alone.energies["filters"] == 0
    torch.testing.assert_close(
        projected_update(part, delta, weight_subspaces(part, 2), "orth").update["filters"], delta["filters"]
    )


def test_controls_have_the_rank_of_what_they_control():
    reference = update(0)
    whole = weight_subspaces(reference, FractionOfDim(1.0))
    top = weight_subspaces(reference, FractionOfDim(0.5))
    assert {name: space.dim for name, space in top.items()} == {
        "layers.0.q": 2, "layers.0.k": 2, "layers.0.norm": 1, "filters": 2, "embed": 2,
    }  # fmt: skip
    picked, drawn = (weight_subspaces(reference, FractionOfDim(0.5), kind=kind) for kind in ("randomk", "random"))
    for name in SHAPES:
        assert picked[name].dim == drawn[name].dim == top[name].dim
    assert top.overlap(whole)["embed"] == pytest.approx(1)
    assert picked.overlap(whole)["embed"] == pytest.approx(1, abs=1e-6)
    assert drawn.overlap(whole)["embed"] < 0.99
    seeds = [weight_subspaces(reference, 1, kind="randomk", random_state=seed)["layers.0.k"] for seed in range(30)]
    assert len({int((whole["layers.0.k"].basis.T @ each.basis).abs().argmax()) for each in seeds}) == 5
    for kind in ("topk", "randomk", "random"):
        once = weight_subspaces(reference.only(["embed"]), 3, kind=kind)["embed"]
        again = weight_subspaces(whole, 3, kind=kind)["embed"]
        torch.testing.assert_close(once.basis, again.basis)


@pytest.mark.parametrize(
    ("rank", "expected"), [(FractionOfDim(0.99), 2), (7, 2), (1, 1), (0.9, 2), (EnergyRank(0.7), 1)]
)
def test_there_are_no_more_directions_than_the_update_has(rank, expected):
    tuned = state(100)
    left = torch.linalg.qr(torch.randn(9, 2, generator=torch.Generator().manual_seed(0)))[0]
    tuned["embed"] = tuned["embed"] + left @ torch.tensor([[2.0, 0, 0, 0], [0, 1.0, 0, 0]])
    spaces = weight_subspaces(StateDelta.between(state(100), tuned), rank)
    assert {name: space.dim for name, space in spaces.items()} == {"embed": expected}


def test_files_give_what_memory_gives(tmp_path):
    for seed in (100, 0, 1):
        write_weights(state(seed, torch.bfloat16), tmp_path / f"{seed}", shard_bytes=100)
    stored = [StateDelta.between(tmp_path / "100", tmp_path / f"{seed}") for seed in (0, 1)]
    held = [StateDelta.between(state(100, torch.bfloat16), state(seed, torch.bfloat16)) for seed in (0, 1)]
    found = [projected_update(v, u, weight_subspaces(v, 0.7), "orth") for v, u in (stored, held)]
    assert torch.equal(flat(found[0].update), flat(found[1].update))
    assert found[0].energies == found[1].energies


def test_random_subspaces_overlap_by_chance():
    """200 pairs in 64 dimensions: the mean lies within three standard errors of max(p, q) / d."""
    zero = {f"{i}": torch.zeros(64, 16) for i in range(200)}
    generator = torch.Generator().manual_seed(0)
    delta = StateDelta.between(zero, {name: torch.randn(64, 16, generator=generator) for name in zero})
    few, many = (weight_subspaces(delta, k, kind="random", random_state=k) for k in (5, 12))
    overlaps = torch.tensor(list(few.overlap(many).values()))
    assert abs(float(overlaps.mean()) - 12 / 64) < 3 * float(overlaps.std()) / 200**0.5


def test_overlap_is_the_mean_squared_cosine_and_knows_its_chance():
    first, second = update(0), update(1)
    rows = subspace_overlaps(first, second, (0.5, 0.9))
    assert [row.name for row in rows] == [name for name in SHAPES for _ in range(2)]
    for row in rows:
        a, b = (each.subspaces(row.energy)[row.name] for each in (first, second))
        assert row.ranks == (a.dim, b.dim)
        assert row.overlap == pytest.approx(float(a.angles(b).cos().square().mean()), abs=1e-5)
        assert row.chance == pytest.approx(max(row.ranks) / len(as_matrix(first[row.name])))
    mirrored = subspace_overlaps(second, first, (0.5, 0.9))
    assert [row.overlap for row in mirrored] == pytest.approx([row.overlap for row in rows])
    # What stands to the right of the matrices is not looked at, and neither is their size.
    turn = torch.linalg.qr(torch.randn(7, 7))[0]
    turned = first.map(lambda name, value: 3 * value @ turn if value.shape[-1:] == (7,) else value)
    assert [row.overlap for row in subspace_overlaps(turned, second, (0.5, 0.9))] == pytest.approx(
        [row.overlap for row in rows], abs=1e-5
    )


@pytest.mark.parametrize(("columns", "expected"), [([0, 1], 1.0), ([1], 1.0), ([2, 3], 0.0), ([1, 2], 0.5)])
def test_nested_and_orthogonal_updates(columns, expected):
    base, eye = {"w": torch.zeros(6, 6)}, torch.eye(6)
    spread = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    first = StateDelta.between(base, {"w": eye[:, :2] @ spread[:2]})
    second = StateDelta.between(base, {"w": eye[:, columns] @ spread[columns]})
    (row,) = subspace_overlaps(first, second, (0.9999,))
    assert row.overlap == pytest.approx(expected, abs=1e-6)


def test_tensors_of_a_layer_are_stacked():
    first, second = update(0), update(1)
    rows = {row.name: row for row in subspace_overlaps(first, second, (0.8,), granularity="layer")}
    assert list(rows) == ["layers.0, 7 columns", "layers.0, 1 column", "filters", "embed"]
    stacked = [torch.cat([each["layers.0.q"], each["layers.0.k"]]) for each in (first, second)]
    a, b = (Subspace.from_factor(each.T, count=7.0, rank=0.8) for each in stacked)
    assert rows["layers.0, 7 columns"].overlap == pytest.approx(float(a.overlap(b)), abs=1e-5)


class Causal(nn.Module):
    """Blocks that see the mean of the past, with absolute positions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.positions = nn.Embedding(30, 8), nn.Embedding(12, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(4))

    def forward(self, input_ids, attention_mask=None):
        x = self.tokens(input_ids) + self.positions.weight[: input_ids.shape[1]]
        for layer in self.layers:
            past = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
            x = x + layer(past) + 1  # a mean that all states share
        return x


def padded(prompts, side):
    length = max(map(len, prompts))
    rows = [[0] * (length - len(p)) + p if side == "left" else p + [0] * (length - len(p)) for p in prompts]
    mask = [[int(token != 0) for token in row] for row in rows]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


def test_the_last_token_is_the_last_that_is_attended_to():
    model, generator = Causal(), torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 12, (2, 40), generator=generator).tolist()
    kinds = [[torch.randint(1, 30, (n,), generator=generator).tolist() for n in each] for each in lengths]
    found = {
        side: activation_overlap(
            model, *([padded(kind[:15], side), padded(kind[15:], side)] for kind in kinds), (0.5, 0.9), (0.6, 0.95)
        )
        for side in ("left", "right")
    }
    assert found["left"] == found["right"]
    assert [(row.name, row.centred) for row in found["left"][::2]] == [
        ("layers.2", False), ("layers.2", True), ("layers.3", False), ("layers.3", True),
    ]  # fmt: skip
    seen: list[torch.Tensor] = []
    model.layers[3].register_forward_hook(lambda _, args, output: seen.append(output[0, -1].detach().double()))
    for prompt in kinds[0] + kinds[1]:
        model(torch.tensor([prompt]))
    states = seen[:40], seen[40:]
    for row in found["left"][4:]:
        a, b = (Subspace.fit(torch.stack(each), rank=row.energy, center=row.centred) for each in states)
        assert row.ranks == (a.dim, b.dim)
        assert row.overlap == pytest.approx(float(a.overlap(b)), abs=1e-4)


def test_what_the_states_have_in_common_goes_with_their_mean():
    generator = torch.Generator().manual_seed(0)
    mean = 20 * torch.randn(32, generator=generator)
    first, second = (mean + torch.randn(1, 60, 32, generator=generator) * spread for spread in (
        torch.tensor([1.0] * 3 + [0.01] * 29), torch.tensor([0.01] * 29 + [1.0] * 3)
    ))  # fmt: skip
    plain, centred = activation_overlap(nn.Identity(), first, second, [""], (0.9,))
    assert plain.overlap > 0.99 > 10 * plain.chance
    assert centred.overlap < centred.chance


def test_bad_input_is_named():
    reference, delta = update(0), update(1)
    spaces = weight_subspaces(reference, 2)
    for call, said in (
        (lambda: weight_subspaces(reference, 2, kind="best"), "kind"),
        (lambda: weight_subspaces(0 * reference, 2), "delta: is zero"),
        (lambda: weight_subspaces(reference, 0), "rank"),
        (lambda: projected_update(reference, delta, spaces, "other"), "mode"),
        (lambda: projected_update(reference, 0 * delta, spaces), "delta: is zero"),
        (lambda: projected_update(0 * reference, delta, spaces), "reference: is zero"),
        (lambda: projected_update(reference, delta.only(["embed"]), spaces), "subspaces: the delta has no"),
        (lambda: subspace_overlaps(reference, delta, (1.5,)), "explained-variance ratio"),
        (lambda: subspace_overlaps(reference, delta, granularity="block"), "granularity"),
        (lambda: subspace_overlaps(reference, 0 * delta), "no tensor is changed"),
        (lambda: activation_overlap(Causal(), [], [], (0.3, 0.4)), "layers"),
    ):
        with pytest.raises((ValueError, TypeCheckError), match=said):
            call()
