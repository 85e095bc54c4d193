"""The sliced statistic and its subspaces: identities, the naive formula, gradients, processes, and what is refused."""

import pytest
import torch

from processes import in_processes
from subspan.dynamics import SlicedGaussianLoss, SubspaceGaussianRegularizer, epps_pulley
from subspan.geometry import effective_rank


def naive(z, directions, knots=17, t_max=3.0):
    """Direction by direction and knot by knot."""
    t = torch.linspace(0, t_max, knots, dtype=z.dtype)
    found = torch.zeros(*z.shape[:-2], directions.shape[-1], dtype=z.dtype)
    s = z @ directions
    for i in range(knots):
        weight = (1 if i in (0, knots - 1) else 2) * t_max / (knots - 1) * torch.exp(-(t[i] ** 2) / 2)
        apart = (s * t[i]).cos().mean(-2) - torch.exp(-(t[i] ** 2) / 2)
        found = found + weight * (apart**2 + (s * t[i]).sin().mean(-2) ** 2)
    return found * z.shape[-2]


def unit(*shape):
    drawn = torch.randn(*shape, dtype=torch.float64)
    return drawn / drawn.norm(dim=-2, keepdim=True)


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize(("shape", "columns"), [((9, 4), (4, 7)), ((3, 9, 4), (4, 7)), ((3, 2, 9, 4), (3, 1, 4, 7))])
def test_it_is_the_formula_and_so_is_its_gradient(shape, columns, chunk):
    z, directions = torch.randn(shape, dtype=torch.float64, requires_grad=True), unit(*columns)
    weights = torch.rand(*shape[:-2], columns[-1], dtype=torch.float64)
    expected = naive(z, directions, 11, 2.5)
    found = epps_pulley(z, directions, n_knots=11, t_max=2.5, chunk_size=chunk)
    torch.testing.assert_close(found, expected)
    (slope,) = torch.autograd.grad((expected * weights).sum(), z)
    torch.testing.assert_close(torch.autograd.grad((found * weights).sum(), z)[0], slope)


def test_floor_of_normal_samples_and_value_of_collapsed_ones():
    loss = SlicedGaussianLoss(num_proj=64)
    assert loss.floor == pytest.approx(1.0525, abs=1e-4)
    for n, d in ((8, 3), (64, 20)):
        drawn = torch.stack([loss(torch.randn(40, n, d)) for _ in range(8)])
        assert float(drawn.mean()) == pytest.approx(loss.floor, rel=0.04)
        assert float(loss(torch.zeros(n, d))) == pytest.approx(0.4020 * n, rel=1e-3)
    sub = SubspaceGaussianRegularizer(subspace_dim=5)
    drawn = torch.stack([sub(torch.randn(40, 32, 20)) for _ in range(8)])
    assert float(drawn.mean()) == pytest.approx(sub.floor, rel=0.04)


def test_one_subspace_of_all_dimensions_is_the_whole_space_turned():
    z = torch.randn(3, 16, 6)
    sub = SubspaceGaussianRegularizer(dim=6, subspace_dim=6, num_proj=50, generator=torch.Generator().manual_seed(1))
    state = sub.generator.get_state()
    found = sub(z)
    sub.generator.set_state(state)
    drawn = sub.directions(1, 1, 6, 50, like=z)[0, 0]
    torch.testing.assert_close(found, epps_pulley(z, sub.basis[0] @ drawn).mean())


def test_subspaces_stay_and_directions_change():
    sub = SubspaceGaussianRegularizer(dim=12, subspace_dim=3, num_proj=4)
    basis, z = sub.basis.clone(), torch.randn(30, 12)
    assert float(sub(z)) != float(sub(z))
    assert torch.equal(sub.basis, basis)
    assert sub.subspaces.basis.shape == (4, 12, 3)
    assert not list(sub.parameters())
    late = SubspaceGaussianRegularizer(subspace_dim=3, num_proj=4)
    with pytest.raises(ValueError, match="give dim"):
        _ = late.subspaces
    late.load_state_dict(sub.state_dict())
    assert torch.equal(late.basis, basis)
    assert torch.equal(late.project(z), sub.project(z))
    assert SubspaceGaussianRegularizer(dim=192).num_proj == 64
    assert SubspaceGaussianRegularizer(dim=12, subspace_dim=6).num_proj == 1024


def test_projections():
    made = {
        kind: SubspaceGaussianRegularizer(dim=40, subspace_dim=4, projection=kind)
        for kind in ("orthonormal", "gaussian", "trainable")
    }
    assert float(made["orthonormal"].orthogonality_loss()) < 1e-5
    lengths = made["gaussian"].basis.norm(dim=1)
    assert float(lengths.mean()) == pytest.approx(40**0.5, rel=0.1)
    trained = made["trainable"]
    (parameter,) = trained.parameters()
    assert float(trained.orthogonality_loss().detach()) < 1e-5
    trained(torch.randn(20, 40)).backward()
    assert parameter.grad is not None
    with torch.no_grad():
        parameter[0] *= 2
    assert float(trained.orthogonality_loss().detach()) == pytest.approx(0.1 * 3 * 4**0.5, abs=1e-4)


def test_samples_may_keep_to_few_dimensions_but_not_collapse():
    """Conditions on 4 of 24 dimensions, six times, are met by samples of rank 4, those on all 24 are not."""
    sub = SubspaceGaussianRegularizer(dim=24, subspace_dim=4, num_proj=200)
    factor = torch.randn(24, 5, requires_grad=True)
    optimizer = torch.optim.Adam([factor], lr=0.03)
    for _ in range(600):
        optimizer.zero_grad()
        inside = sub.basis.mT @ factor
        (inside @ inside.mT - torch.eye(4)).square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        z = torch.randn(30, 128, 5) @ factor.mT
        assert float(effective_rank(torch.linalg.svdvals(factor) ** 2)) < 5
        assert float(sub(z)) < 1.2 * sub.floor
        assert float(SlicedGaussianLoss(num_proj=200)(z)) > 2 * sub.floor
        assert float(sub(0.1 * z)) > 20 * sub.floor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_judged_in_single(dtype):
    z = torch.randn(64, 8).to(dtype)
    directions = unit(8, 20).float()
    found = epps_pulley(z, directions)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, epps_pulley(z.float(), directions))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(epps_pulley(z.float(), directions), found)


def test_processes_judge_their_samples_together():
    """Two processes with unequal numbers of samples: value and averaged gradient are those of one with all of them."""
    z, sizes = torch.randn(10, 6), (3, 7)
    torch.manual_seed(5)
    alone = SubspaceGaussianRegularizer(subspace_dim=3, num_proj=8, reduce_ranks=False)
    samples = z.clone().requires_grad_()
    expected = alone(samples)
    expected.backward()

    def work(rank):
        torch.manual_seed(5 + 100 * rank)
        part = z.split(sizes)[rank].clone().requires_grad_()
        loss = SubspaceGaussianRegularizer(subspace_dim=3, num_proj=8)
        found = loss(part)
        torch.testing.assert_close(found, expected)
        found.backward()
        torch.testing.assert_close(part.grad / 2, samples.grad.split(sizes)[rank])

    in_processes(work, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SlicedGaussianLoss(2), "knots: at least 3, got 2"),
        (lambda: SlicedGaussianLoss(17, 0), "num_proj: at least 1"),
        (lambda: SlicedGaussianLoss(t_max=0), "t_max: must be positive"),
        (lambda: SlicedGaussianLoss(chunk_size=0)(torch.ones(3, 2)), "chunk_size: at least 1"),
        (lambda: SlicedGaussianLoss()(torch.ones(1, 4)), "z: at least 2 samples"),
        (lambda: SlicedGaussianLoss()(torch.full((3, 4), float("nan"))), "z"),
        (lambda: SubspaceGaussianRegularizer(dim=4, subspace_dim=5), "subspace_dim: 5 is above"),
        (lambda: SubspaceGaussianRegularizer(subspace_dim=5)(torch.ones(8, 4)), "subspace_dim: 5 is above"),
        (lambda: SubspaceGaussianRegularizer(dim=4, subspace_dim=0), "subspace_dim: at least 1"),
        (lambda: SubspaceGaussianRegularizer(dim=8)(torch.ones(9, 7)), "z: expected a width of 8, got 7"),
        (lambda: SubspaceGaussianRegularizer(projection="trainable"), "dim: trainable subspaces"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_dimensions_without_a_condition_are_warned_of():
    with pytest.warns(UserWarning, match="leave 8 of 20 without any condition"):
        SubspaceGaussianRegularizer(dim=20, subspace_dim=6, n_subspaces=2)
