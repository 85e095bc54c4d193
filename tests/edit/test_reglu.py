"""ReGLU's plan, penalty and leakage: planted subspaces, the dense problem, and derivatives by hand."""

import math

import pytest
import torch
from torch import nn

from subspan.edit import (
    SubspaceOrthogonalityLoss,
    collect_output_moments,
    contrast_subspace,
    net_leakage,
    random_subspaces,
    reglu_plan,
)
from subspan.geometry import Subspace
from subspan.models import add_low_rank
from subspan.statistics import Moments

D = 40


def moments(rows):
    return Moments(rows.shape[1]).update(rows)


def kinds(count=15):
    """Rows of two kinds in R^40, of different energies in random directions."""
    return [
        torch.randn(count, D, dtype=torch.float64) * torch.linspace(*ends, D, dtype=torch.float64) + 0.3
        for ends in ((0.5, 2.0), (2.0, 0.5))
    ]


def dense(forget, retain, beta):
    """The contrast as the released code makes it, with its ridge: a d x d matrix of uncentred second moments."""
    c_forget, c_retain = (
        rows.T @ rows / len(rows) + 1e-4 * torch.eye(D, dtype=rows.dtype) for rows in (forget, retain)
    )
    return (1 - beta) * c_forget - beta * c_retain


def test_planted_directions_of_what_is_to_be_forgotten_are_found(planted):
    both = torch.linalg.qr(torch.randn(D, 8, dtype=torch.float64)).Q
    forget = torch.randn(16, 4, dtype=torch.float64) @ both[:, :4].T + torch.randn(16, 4).double() @ both[:, 4:].T
    retain = 10 * torch.randn(16, 4, dtype=torch.float64) @ both[:, 4:].T + 1e-3 * torch.randn(16, D).double()
    found, _, filled = contrast_subspace(moments(forget), moments(retain), 4)
    assert filled == 0
    assert float(found.angles(Subspace.span(both[:, :4])).max()) < math.radians(1)


@pytest.mark.parametrize("count", [15, 90])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.7, 1.0])
def test_the_rows_own_space_gives_the_dense_problem_and_no_frame_has_more(count, beta):
    """With 15 rows of each kind in their own space, with 90 by the matrix."""
    forget, retain = kinds(count)
    rank = 6 if beta < 1 else D
    found, values, _ = contrast_subspace(moments(forget), moments(retain), rank, beta=beta)
    matrix = dense(forget, retain, beta) - (1 - 2 * beta) * 1e-4 * torch.eye(D, dtype=torch.float64)
    whole = torch.linalg.eigvalsh(matrix).flip(0)
    trace = torch.trace(found.basis.T @ matrix @ found.basis)
    torch.testing.assert_close(trace, whole[:rank].sum())
    assert bool((values.diff() <= 0).all())
    drawn = Subspace.random(D, rank, batch=(200,)).basis
    assert bool(((drawn * (matrix @ drawn)).sum((-2, -1)) <= trace + 1e-9).all())


def test_the_ends_of_beta_are_main_and_minor_directions():
    forget, retain = kinds(60)
    main, _, _ = contrast_subspace(moments(forget), moments(retain), 5, beta=0.0)
    assert float(main.distance(moments(forget).subspace(5, center=False))) < 1e-6
    minor, _, filled = contrast_subspace(moments(forget), moments(retain), 5, beta=1.0)
    expected = torch.linalg.eigh(retain.T @ retain)[1][:, :5]
    assert float(minor.distance(Subspace(expected))) < 1e-6
    assert filled == 5


@pytest.mark.parametrize("d", [6, 12])
def test_with_few_texts_directions_that_none_reaches_come_before_those_of_what_stays(d):
    axes = torch.eye(d, dtype=torch.float64)
    forget, retain = moments(axes[[0, 0, 1]] * 2), moments(axes[[2, 3, 2]])
    found, values, filled = contrast_subspace(forget, retain, d - 1, beta=0.5)
    marks = torch.tensor([9.0, 9, -1, -1, *[0] * (d - 4)], dtype=torch.float64)
    assert (len(values), filled) == (4, d - 3)
    torch.testing.assert_close(found.basis.square().T @ marks, torch.tensor([9.0, 9, *[0] * (d - 4), -1]).double())
    with pytest.warns(UserWarning, match="1 of 1 layers have fewer than 5 directions"):
        reglu_plan({"a": forget}, {"a": retain}, rank=5, retain_rank=1)
    with pytest.warns(UserWarning, match="no contrast"):
        reglu_plan({"a": forget}, {"a": forget}, rank=1, beta=0.2, retain_rank=1)


def test_what_is_retained_is_its_main_directions_and_narrow_layers_keep_room():
    forget, retain = (moments(rows) for rows in kinds(90))
    whole = torch.linalg.eigh(retain.second_moment())[1].flip(1)
    plan = reglu_plan({"a": forget}, {"a": retain}, rank=3, retain_rank=0.9, retain_cap=0.1)["a"]
    assert plan.retain.dim == 4
    assert float(plan.retain.distance(Subspace(whole[:, :4]))) < 1e-6
    assert reglu_plan({"a": forget}, {"a": retain}, rank=3, retain_rank=12)["a"].retain.dim == 12
    cosines = torch.linalg.svdvals(plan.forget.basis.T @ plan.retain.basis)
    assert plan.overlap == pytest.approx(float(cosines.square().mean()))


class Texts(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(9, 6), nn.ModuleList([nn.Sequential(nn.Linear(6, 5)) for _ in range(2)])

    def forward(self, input_ids, attention_mask):
        return self.blocks[1](self.blocks[0](self.embed(input_ids))[..., [0, 1, 2, 3, 4, 0]])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out_of_the_sums_unless_it_is_asked_for(side):
    model = Texts()
    texts = [torch.randint(9, (length,)) for length in (3, 7, 5)]
    batch = {name: torch.zeros(3, 7, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    for row, ids in enumerate(texts):
        place = slice(7 - len(ids), 7) if side == "left" else slice(len(ids))
        batch["input_ids"][row, place], batch["attention_mask"][row, place] = ids, 1
    layer = model.blocks[0][0]
    sums = torch.stack([layer(model.embed(ids)).sum(0) for ids in texts]).double().detach()
    plain = collect_output_moments(model, [batch])["blocks.0.0"]
    torch.testing.assert_close(plain.second_moment(), sums.T @ sums / 3, atol=1e-5, rtol=1e-5)
    pads = torch.tensor([4, 0, 2])[:, None] * layer(model.embed(torch.tensor(0))).detach()
    padded = collect_output_moments(model, [batch], include_padding=True)["blocks.0.0"]
    torch.testing.assert_close(padded.mean, (sums + pads).mean(0), atol=1e-5, rtol=1e-5)


def changed():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    edit = add_low_rank(model, {"0": Subspace.random(8, 2), "2": Subspace.random(5, 2)}, alpha=4)
    for layer in edit.layers.values():
        layer.up.data += 0.3 * torch.randn(layer.up.shape)
    spaces = {"0": Subspace.random(8, 3), "2": Subspace.random(5, 2)}
    return edit, spaces


def test_the_penalty_is_a_sum_over_layers_with_the_derivative_by_hand():
    edit, spaces = changed()
    SubspaceOrthogonalityLoss(spaces)(edit.layers).backward()
    total = 0.0
    for name, layer in edit.layers.items():
        p, b = spaces[name].basis.float(), layer.up.detach()
        total += float((b.T @ p).square().sum())
        torch.testing.assert_close(layer.up.grad, 2 * p @ (p.T @ b), atol=1e-5, rtol=1e-4)
    assert SubspaceOrthogonalityLoss(spaces)(edit.layers).item() == pytest.approx(total, rel=1e-5)
    # Of orthonormal columns it is the sum of the squared cosines of the principal angles.
    q = Subspace.random(8, 2)
    edit.layers["0"].up.data.copy_(q.basis)
    edit.layers["2"].up.data.zero_()
    cosines = torch.cos(q.angles(spaces["0"])).square().sum()
    assert SubspaceOrthogonalityLoss(spaces)(edit.layers).item() == pytest.approx(float(cosines), rel=1e-4)
    with pytest.raises(ValueError, match="none is given for 2"):
        SubspaceOrthogonalityLoss({"0": spaces["0"]})(edit.layers)


def test_leakage_and_the_net_penalty_are_of_what_is_added_to_the_weights():
    edit, spaces = changed()
    before = {name: layer.base.weight.detach().double().clone() for name, layer in edit.layers.items()}
    net = SubspaceOrthogonalityLoss(spaces, of="net")(edit.layers).item()
    found = net_leakage(edit.layers, spaces)
    model = edit.merge()
    inside = whole = 0.0
    for name, old in before.items():
        change = model.get_submodule(name).weight.detach().double() - old
        part, size = float((spaces[name].basis.T @ change).norm()), float(change.norm())
        assert found.by_layer[name] == pytest.approx(part / size, rel=1e-4)
        inside, whole = inside + part**2, whole + size**2
    assert net == pytest.approx(inside, rel=1e-3)
    assert found.total == pytest.approx(math.sqrt(inside / whole), rel=1e-4)
    assert math.sqrt(3 / 8) < found.chance < math.sqrt(2 / 5)


def test_random_subspaces_are_of_the_same_sizes_and_follow_their_seed():
    _, spaces = changed()
    one, two = (random_subspaces(spaces, random_state=seed) for seed in (0, 1))
    assert {name: s.basis.shape for name, s in one.items()} == {name: s.basis.shape for name, s in spaces.items()}
    assert torch.equal(one["0"].basis, random_subspaces(spaces)["0"].basis)
    assert not torch.equal(one["0"].basis, two["0"].basis)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 41}, "a: rank: between 1 and 40"),
        ({"beta": 1.2}, "beta: must lie in"),
        ({"retain_cap": 0}, "retain_cap: must lie in"),
        ({"retain": {"b": moments(torch.ones(3, D))}}, "only one of them has a"),
        ({"retain": {"a": moments(torch.ones(3, 7))}}, "a: minus: has dimension 7"),
        ({"retain": {"a": moments(torch.ones(1, D))}}, "a: retain: at least 2 texts"),
        ({"retain": {"a": moments(torch.zeros(3, D))}, "forget": {"a": moments(torch.zeros(3, D))}}, "are zero"),
    ],
)
def test_plans_that_cannot_be_made(options, message):
    forget, retain = kinds()
    given = {"forget": {"a": moments(forget)}, "retain": {"a": moments(retain)}, "rank": 2, **options}
    with pytest.raises(ValueError, match=message):
        reglu_plan(given.pop("forget"), given.pop("retain"), **given)


def test_layers_that_cannot_be_planned():
    model = Texts()
    with pytest.raises(ValueError, match="linear one is needed, got Embedding"):
        collect_output_moments(model, [], "embed")
    model.blocks[0][0].weight = nn.Parameter(torch.zeros(5, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="int8, floating point is needed"):
        collect_output_moments(model, [])
