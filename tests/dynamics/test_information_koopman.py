"""Temporal information, entropy and the autoencoder that they shape: identities, naive forms, and effects."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from subspan.dynamics import (
    InformationKoopmanLoss,
    KoopmanAutoencoder,
    KoopmanNetwork,
    TemporalInfoNCE,
    VonNeumannEntropy,
    effective_dimension,
    gaussian_latent_information,
)
from subspan.dynamics.information_koopman import ridge_operator


def cross(d):
    return torch.cat([torch.eye(d), -torch.eye(d)]).double()


@pytest.mark.parametrize("d", [1, 3, 16])
def test_effective_dimension_counts_equal_directions(d):
    z = cross(d)
    assert effective_dimension(z) == pytest.approx(d)
    assert float(VonNeumannEntropy()(z).exp()) == pytest.approx(d, rel=1e-5)
    assert float(VonNeumannEntropy()(torch.cat([z[:, :1], 0 * z], 1)).exp()) == pytest.approx(1, abs=1e-5)
    turn = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
    spread = torch.randn(40, d, dtype=torch.float64) * torch.arange(1, d + 1)
    expected = VonNeumannEntropy()(spread)
    torch.testing.assert_close(VonNeumannEntropy()(3 * spread @ turn + 100), expected)
    torch.testing.assert_close(VonNeumannEntropy()(spread.reshape(5, 8, d)), expected)


@pytest.mark.parametrize("rows", [5, 12])
def test_entropy_is_that_of_the_covariance_and_has_its_slope(rows):
    z = torch.randn(rows, 7, dtype=torch.float64, requires_grad=True)
    share = torch.linalg.eigvalsh(torch.cov(z.T)).clamp_min(1e-12)
    share = share / share.sum()
    torch.testing.assert_close(VonNeumannEntropy()(z), -(share * share.log()).sum(), atol=1e-5, rtol=0)
    assert torch.autograd.gradcheck(VonNeumannEntropy(eps=1e-3), (z,))
    assert VonNeumannEntropy()(z.half()).dtype == torch.float32
    flat = torch.ones(6, 3, requires_grad=True)
    VonNeumannEntropy()(flat).backward()
    assert flat.grad.isfinite().all()


def naive(z, k, temperature, negatives, metric):
    """Anchor by anchor."""
    b, t, _ = z.shape
    z = F.normalize(z, dim=-1) if metric == "cosine" else z
    found = []
    for i in range(b):
        for n in range(k, t - k):
            near = [n + o for o in range(-k, k + 1) if o]
            own = torch.stack([torch.exp(z[i, n] @ z[i, j] / temperature) for j in near])
            if negatives == "sequence":
                others = [z[i, j] for j in range(t) if abs(j - n) > k]
            else:
                others = [z[c, j] for c in range(b) for j in range(t) if (c, j) != (i, n) and (c != i or j not in near)]
            rest = sum(torch.exp(z[i, n] @ other / temperature) for other in others)
            all_of_them = own.sum() + rest
            found.append(
                -(own.sum() / all_of_them).log() if negatives == "sequence" else -(own / all_of_them).log().mean()
            )
    return torch.stack(found).mean()


@pytest.mark.parametrize(("negatives", "metric"), [("sequence", "cosine"), ("batch", "cosine"), ("batch", "inner")])
@pytest.mark.parametrize(("k", "t"), [(1, 4), (2, 9)])
def test_contrast_is_the_naive_sum(negatives, metric, k, t):
    z = torch.randn(3, t, 5, dtype=torch.float64)
    found = TemporalInfoNCE(k, 0.5, negatives, metric)(z)
    torch.testing.assert_close(found, naive(z, k, 0.5, negatives, metric))


def test_contrast_of_identical_states_is_chance():
    z = torch.ones(4, 16, 8)
    assert float(TemporalInfoNCE(3)(z)) == pytest.approx(math.log(1 + 9 / 6), abs=1e-6)
    assert float(TemporalInfoNCE(3, negatives="batch")(z)) == pytest.approx(math.log(4 * 16 - 1), abs=1e-5)
    assert float(TemporalInfoNCE(2)(torch.randn(4, 16, 8).bfloat16())) > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TemporalInfoNCE(3)(torch.randn(2, 7, 3)), "7 steps do not hold anchors with 3 .* more than 7"),
        (lambda: TemporalInfoNCE(3, negatives="batch")(torch.randn(2, 6, 3)), "more than 6 are needed"),
        (lambda: TemporalInfoNCE(0), "neighbours: at least 1"),
        (lambda: TemporalInfoNCE(temperature=0), "temperature: must be positive"),
        (lambda: VonNeumannEntropy(eps=0), "eps: must be positive"),
        (lambda: KoopmanNetwork((3,), 0), "dim: at least 1"),
        (lambda: KoopmanNetwork((3,), 2, ridge=0), "ridge: must be positive"),
        (lambda: InformationKoopmanLoss(alpha=-1), "alpha: must be finite and 0 or more"),
        (lambda: InformationKoopmanLoss(gamma=math.nan), "gamma: must be finite, got nan"),
        (lambda: gaussian_latent_information(*[torch.eye(2)] * 3, 0), "n_steps: at least 1"),
        (lambda: gaussian_latent_information(torch.eye(2), torch.eye(2), torch.zeros(2, 2)), "positive definite"),
    ],
)
def test_what_does_not_fit_is_said(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_closed_form_information():
    for r in (0.3, 0.95):
        one = torch.tensor([[r]]).double()
        found = [float(gaussian_latent_information(one, torch.eye(1).double(), 1 - one**2, n)) for n in (1, 2, 5)]
        np.testing.assert_allclose(found, [-0.5 * math.log(1 - r ** (2 * n)) for n in (1, 2, 5)], rtol=1e-5)
    k, noise = torch.randn(4, 4).double() / 4, torch.cov(torch.randn(4, 30).double())
    c = noise
    for _ in range(200):
        c = k @ c @ k.T + noise
    values = [float(gaussian_latent_information(k, c, noise, n)) for n in range(1, 6)]
    assert all(a > b > 0 for a, b in pairwise(values))
    turn = torch.linalg.qr(torch.randn(4, 4).double()).Q
    turned = gaussian_latent_information(turn @ k @ turn.T, turn @ c @ turn.T, turn @ noise @ turn.T)
    assert float(turned) == pytest.approx(values[0])


@pytest.mark.parametrize("n", [4, 9, 30])
def test_operators_are_the_ridge_of_the_shorter_side(n):
    x, y = torch.randn(2, 5, n, 9, dtype=torch.float64)
    expected = torch.linalg.solve(x.mT @ x + 0.1 * torch.eye(9), x.mT @ y).mT
    torch.testing.assert_close(ridge_operator(x, y, 0.1), expected, atol=1e-6, rtol=0)
    plain = {"encoder": torch.nn.Identity(), "decoder": torch.nn.Identity()}
    windows = torch.randn(5, n + 1, 9, dtype=torch.float64)
    before, after = windows[:, :-1], windows[:, 1:]
    told = KoopmanNetwork((9,), 9, operator="batch_mean", **plain)(windows).told
    torch.testing.assert_close(told, before @ ridge_operator(before, after, 0.1).mean(0).mT)
    told = KoopmanNetwork((9,), 9, **plain)(windows).told
    torch.testing.assert_close(told, before @ ridge_operator(before.flatten(0, 1), after.flatten(0, 1), 0.1).mT)


@pytest.mark.parametrize("detach", [True, False])
def test_gradients_reach_the_encoder_past_the_operator(detach):
    network = KoopmanNetwork((3,), 4, detach_operator=detach, hidden=(8,)).double()
    x = torch.randn(2, 9, 3).double()
    found = network(x)
    expected = torch.autograd.grad(found.told.square().sum(), network.encoder[0].weight)[0]
    again = network(x)
    k = ridge_operator(again.before.flatten(0, 1), again.after.flatten(0, 1), 0.1)
    free = torch.autograd.grad(
        (again.before @ (k.detach() if detach else k).mT).square().sum(), network.encoder[0].weight
    )  # fmt: skip
    torch.testing.assert_close(expected, free[0])


def test_terms_of_the_loss_add_up_and_signs_differ():
    torch.manual_seed(0)
    network, x = KoopmanNetwork((3,), 4, operator="learned", hidden=(8,)), torch.randn(2, 9, 3)
    total, terms = InformationKoopmanLoss(2.0, 0.5, 0.1, 0.1)(network, (x,))
    found = network(x)
    torch.testing.assert_close(total, sum(terms.values()))
    torch.testing.assert_close(terms["information"], 2 * TemporalInfoNCE()(found.before))
    torch.testing.assert_close(terms["entropy"], -0.1 * VonNeumannEntropy()(found.before))
    told = network.decode(found.told.flatten(0, 1)).unflatten(0, (2, 8))
    torch.testing.assert_close(terms["forward"], (told - x[:, 1:]).square().mean((0, 2)).sum())
    torch.testing.assert_close(terms["consistency"], 0.5 * (found.told - found.after).square().sum() / 16)
    released = InformationKoopmanLoss(0.0, gamma=-0.1, id_weight=0.0)(network, (x,))[1]
    torch.testing.assert_close(released["entropy"], -terms["entropy"])
    assert list(released) == ["forward", "entropy"]
    with pytest.raises(ValueError, match=r"forward, identity.* not finite"):
        InformationKoopmanLoss()(network, (x * torch.nan,))


# ---------------------------------------------------------------------- the estimator


def turning(lengths=(60, 40, 30), seed=0):
    rng = np.random.default_rng(seed)
    phases = [np.arange(n) / 4 + rng.uniform(0, 6) for n in lengths]
    return [np.stack([100 + 3 * np.cos(t), 0.01 * np.sin(t), np.full(len(t), 7.0)], 1) for t in phases]


QUICK = {"dim": 6, "hidden": (24,), "window": 12, "random_state": 0}


def test_entropy_weight_orders_the_effective_dimension():
    x = torch.from_numpy(np.stack([part[:13] / [3, 0.01, 7] for part in turning([13] * 24)])).float()
    x = x - x.mean((0, 1))
    x = torch.cat([x, x[..., :1] * x[..., 1:2]], -1)
    found = []
    for gamma in (-0.5, 0.0, 0.5):
        torch.manual_seed(0)
        network, loss = KoopmanNetwork((4,), 8, hidden=(24,)), InformationKoopmanLoss(0.0, gamma=gamma)
        optimizer = torch.optim.Adam(network.parameters(), 3e-3)
        for _ in range(60):
            optimizer.zero_grad()
            loss(network, (x,))[0].backward()
            optimizer.step()
        found.append(effective_dimension(network.encode(x.flatten(0, 1)).detach()))
    assert found[0] + 0.3 < found[1] < found[2] - 0.3


def test_forecasts_come_in_the_units_of_the_data():
    pytest.importorskip("lightning")
    x = turning()
    options = {**QUICK, "gamma": 0.02, "alpha": 0.1, "learning_rate": 1e-2}
    model = KoopmanAutoencoder(epochs=9, trainer={"max_steps": 60}, **options).fit(x)
    found = model.predict(x[0][:20], 10)
    wanted = np.stack([x[0][i + 1 : i + 11] for i in range(20)])
    assert found.shape == (20, 10, 3)
    assert np.abs((found - wanted) / [3, 0.01, 1]).mean() < 0.2
    np.testing.assert_allclose(found[..., 2], 7, atol=0.5)
    assert model.score(x) > -0.2
    z = model.transform(x[0])
    np.testing.assert_allclose(model.dynamics_.predict(z[:1], 1)[0], z[:1] @ model.dynamics_.operator_.T, atol=1e-8)
    np.testing.assert_allclose(model.inverse_transform(z)[:, 0], x[0][:, 0], atol=1)
    assert (model.subspace_.dim, model.subspace_.ambient_dim, len(model.eigenvalues_)) == (6, 6, 6)


@pytest.mark.parametrize("operator", ["batch_mean", "learned"])
def test_the_same_seed_gives_the_same_answer(operator):
    pytest.importorskip("lightning")
    model = KoopmanAutoencoder(operator=operator, beta=1.0, epochs=1, **QUICK)
    x = turning((20,))
    np.testing.assert_array_equal(model.fit(x).transform(x[0]), model.fit(x).transform(x[0]))


def test_inputs_steer_the_forecast():
    pytest.importorskip("lightning")
    rng = np.random.default_rng(0)
    x, u = [], [rng.normal(size=(50, 1)) for _ in range(4)]
    for acts in u:
        rows = [rng.normal(size=2)]
        for act in acts[:-1, 0]:
            rows.append(0.9 * rows[-1] + np.array([1.0, -0.5]) * act)
        x.append(np.array(rows))
    plain = {"encoder": torch.nn.Identity(), "decoder": torch.nn.Identity(), "operator": "learned", "dim": 2}
    plain |= {"alpha": 0, "gamma": 0, "epochs": 1, "batch_size": 200}
    model = KoopmanAutoencoder(**plain).fit(x, inputs=u)
    found = model.predict(x[0][:1], 8, u[0][:8])[0]
    assert np.abs(found - x[0][1:9]).max() < 0.2
    other = model.predict(x[0][:1], 8, u[1][:8])[0]
    assert np.abs(found - other).max() > 0.5
    with pytest.raises(ValueError, match="fitted with 1 inputs, got none"):
        model.predict(x[0][:1], 2)
    with pytest.raises(ValueError, match=r"inputs: expected trajectories of \[50, 50, 50, 50\] rows"):
        model.fit(x, inputs=u[:2])
    with pytest.raises(ValueError, match="fitted without inputs"):
        KoopmanAutoencoder(**plain).fit(x).predict(x[0], 2, u[0])


def test_fields_and_what_a_window_needs():
    pytest.importorskip("lightning")
    fields = torch.randn(2, 12, 2, 16, 16)
    model = KoopmanAutoencoder(4, width=2, epochs=1, validation=0.5, random_state=0).fit(fields)
    assert model.predict(fields[0, :3], 4).shape == (3, 4, 2, 16, 16)
    assert model.inverse_transform(model.transform(fields[0])).shape == (12, 2, 16, 16)
    assert model.score(fields) < 0
    with pytest.raises(
        ValueError, match=r"window: 5 steps do not hold 3 neighbours .* at least 8, of trajectories of 9"
    ):
        KoopmanAutoencoder(window=5).fit(turning())
    with pytest.warns(UserWarning, match="2 of 3 trajectories are shorter than a window of 50 steps"):
        KoopmanAutoencoder(4, window=50, epochs=1).fit(turning())
    with pytest.raises(ValueError, match="leaves no trajectory of 1"):
        KoopmanAutoencoder(4, validation=0.5, epochs=1).fit(turning()[:1])
