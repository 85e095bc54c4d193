"""Blocks of factors: terms of the loss written out, edits of planted images, and what is refused."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from subspan.edit import leace
from subspan.geometry import CoordinateSubspace
from subspan.represent import LatentPosterior, XFactors, XFactorsLoss, XFactorsVAE
from subspan.statistics import GroupedMoments

pytest.importorskip("lightning")
TWO = {"row": 2, "tone": 2}
VALUES = {"row": 4, "tone": 2, "column": 4}


def planted(n, seed=0):
    """Rows with a bump for the value of each of three factors."""
    random = np.random.default_rng(seed)
    factors = {name: random.integers(count, size=n) for name, count in VALUES.items()}
    bumps = [np.eye(count)[factors[name]] for name, count in VALUES.items()]
    return 50 + 4 * np.hstack([*bumps, 0.3 * random.normal(size=(n, 2)), np.zeros((n, 1))]), factors


def read(rows):
    """The values that rows show."""
    ends = np.cumsum([0, *VALUES.values()])
    return {name: rows[:, a:b].argmax(1) for name, a, b in zip(VALUES, ends[:-1], ends[1:])}


def images(n, side=8):
    """Images of noise with factors that say nothing of them."""
    random = np.random.default_rng(0)
    return random.random((n, 1, side, side), np.float32), {name: np.arange(n) % c for name, c in VALUES.items()}


def small(**options):
    given = {"residual_dim": 4, "width": 2, "random_state": 0, "epochs": 1, "factor_dim": TWO}
    return XFactors(**{**given, **options})


@pytest.fixture(scope="module")
def fitted():
    options = {"epochs": 15, "batch_size": 32, "learning_rate": 1e-2, "width": 8, "initial_log_variance": -6.0}
    return small(kl_weight=6e-3, **options).fit(*planted(512))


# ---------------------------------------------------------------------- the loss


def contrast_by_hand(z, labels, temperature):
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    s = z @ z.T / temperature
    found = []
    for b in range(len(z)):
        others = [n for n in range(len(z)) if n != b]
        near = [math.exp(s[b, p]) for p in others if labels[p] == labels[b]]
        if near:
            found.append(-math.log(sum(near) / sum(math.exp(s[b, n]) for n in others)))
    return sum(found) / len(found)


def test_the_contrast_is_the_sum_inside_the_logarithm_and_drops_rows_alone():
    z = torch.randn(9, 3, dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 3, 1, 1])  # 2 and 3 are alone
    loss = XFactorsLoss(temperature=0.5)
    expected = contrast_by_hand(z.numpy(), labels.tolist(), 0.5)
    assert float(loss.contrast(z, labels, "a")) == pytest.approx(expected, rel=1e-6)
    without = torch.arange(9) != 3
    alone = contrast_by_hand(z.numpy()[without], labels[without].tolist(), 0.5)
    assert expected > alone  # a row with a value of its own is a rival and nothing else
    unknown = torch.where(without, labels, -1)
    assert float(loss.contrast(z, unknown, "a")) == pytest.approx(alone, rel=1e-6)


def test_the_contrast_is_nothing_at_opposite_ends_and_where_no_value_repeats():
    angle = torch.tensor([0.0, 0.0, math.pi, math.pi])
    ends = torch.stack([angle.cos(), angle.sin()], 1) * torch.tensor([1.0, 5.0, 0.1, 2.0])[:, None]
    loss = XFactorsLoss()
    assert float(loss.contrast(ends, torch.tensor([0, 0, 1, 1]), "a")) < 1e-6
    z = ends.clone().requires_grad_()
    nothing = loss.contrast(z, torch.arange(4), "a")
    nothing.backward()
    assert nothing.item() == 0
    assert float(z.grad.abs().max()) == 0
    assert loss.idle == {"a": 1}
    loss.eval().contrast(ends, torch.arange(4), "a")
    assert loss.idle == {"a": 1}
    zero = torch.zeros(4, 2, requires_grad=True)
    loss.contrast(zero, torch.tensor([0, 0, 1, 1]), "a").backward()
    assert bool(zero.grad.isfinite().all())
    half = torch.randn(8, 2)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss.contrast(half, torch.arange(8) % 2, "a")
    assert loss.contrast(half.bfloat16(), torch.arange(8) % 2, "a").dtype == torch.float32
    assert float(mixed) == pytest.approx(float(loss.contrast(half, torch.arange(8) % 2, "a")), rel=1e-6)


def test_terms_are_weighted_and_of_their_blocks():
    model = XFactorsVAE((6,), {"a": 2, "b": 3}, residual_dim=4, width=2).eval()
    x, labels = torch.randn(12, 6), torch.stack([torch.arange(12) % 2, torch.arange(12) % 3], 1)
    options = {"kl_weight": 0.1, "beta_residual": 2.0, "beta_factors": 3.0, "correlation_weight": 0.7}
    torch.manual_seed(5)
    total, terms = XFactorsLoss(**options)(model, (x, labels))
    torch.manual_seed(5)
    found = model(x)
    prior = Normal(torch.zeros(()), torch.ones(()))
    kl = kl_divergence(Normal(found.posterior.mean, (found.posterior.log_variance / 2).exp()), prior)
    torch.testing.assert_close(found.posterior.divergence(), kl)
    mean = found.posterior.mean
    correlation = torch.corrcoef(mean.T)[:4, 4:].norm()
    expected = {
        "reconstruction": (found.x - x).square().mean(),
        "kl_residual": 0.1 * 2 * kl[:, :4].sum(1).mean(),
        "kl_factors": 0.1 * 3 * kl[:, 4:].sum(1).mean(),
        "contrast_a": 0.05 * contrast_by_hand(found.z[:, 4:6].detach().numpy(), labels[:, 0].tolist(), 0.03),
        "contrast_b": 0.05 * contrast_by_hand(found.z[:, 6:].detach().numpy(), labels[:, 1].tolist(), 0.03),
        "correlation": 0.7 * correlation,
    }
    assert list(terms) == list(expected)
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(torch.as_tensor(value).item(), rel=1e-4), name
    assert total.item() == pytest.approx(sum(torch.as_tensor(value).item() for value in expected.values()), rel=1e-4)
    assert "contrast_a" not in XFactorsLoss(contrast_weight=0.0)(model, (x, labels))[1]


def test_a_lost_term_is_named():
    model = XFactorsVAE((6,), {"a": 2}, residual_dim=2, width=2)
    x, labels = torch.randn(4, 6), torch.tensor([[0], [0], [1], [1]])
    with torch.no_grad():
        model.encoders[0][-1].bias[:2] = torch.nan  # means of the residual
    with pytest.raises(ValueError, match=r"loss: reconstruction, kl_residual not finite"):
        XFactorsLoss()(model, (x, labels))
    for wrong in (labels[:, 0], labels.float(), labels[:2]):
        with pytest.raises(ValueError, match=r"labels: expected \(4, 1\) whole numbers"):
            XFactorsLoss()(model, (x, wrong))


# ---------------------------------------------------------------------- the module


def test_encoders_share_nothing():
    model = XFactorsVAE((1, 8, 8), TWO, residual_dim=3, width=4).eval()
    z = model.means(torch.rand(5, 1, 8, 8))
    z[:, :3].sum().backward()
    assert not any(bool(part.grad.any()) for part in model.encoders[1].parameters())
    assert any(bool(part.grad.any()) for part in model.encoders[0].parameters())


def test_swaps_and_turns_are_those_of_coordinates():
    shown = {"encoder": torch.nn.Linear(7, 14), "decoder": torch.nn.Identity()}
    model = XFactorsVAE((7,), TWO, residual_dim=3, **shown).eval()
    x, donor = torch.randn(5, 7), torch.randn(5, 7)
    z, other = model.means(x), model.means(donor)
    torch.testing.assert_close(model.swap(x, donor, "row", "residual"), torch.cat([other[:, :5], z[:, 5:]], 1))
    way = model.traverse(x, "tone", 4)
    torch.testing.assert_close(way[:, 0], z)
    torch.testing.assert_close(way[:, 1], torch.stack([*z.T[:5], -z[:, 6], z[:, 5]], 1))
    torch.testing.assert_close(way[:, 2], z * torch.tensor([1.0, 1, 1, 1, 1, -1, -1]))
    one = XFactorsVAE((6,), {"a": 1}, residual_dim=2, width=2).eval()
    rows = torch.randn(3, 6)
    ends = one.blocks.join({"residual": one.means(rows)[:, :2], "a": torch.full((3, 1), 2.0)})
    torch.testing.assert_close(one.traverse(rows, "a", 3)[:, 2], one.decode(ends))


def test_directions_alone_are_decoded_where_asked():
    for directions in (False, True):
        model = XFactorsVAE((6,), TWO, residual_dim=2, width=2, decode_directions=directions).eval()
        z = torch.randn(4, 6)
        longer = z * torch.tensor([1.0, 1, 3, 3, 1, 1])
        assert torch.allclose(model.decode(z), model.decode(longer), atol=1e-6) == directions
        assert not torch.allclose(model.decode(z), model.decode(z * torch.tensor([3.0, 1, 1, 1, 1, 1])))


def test_draws_have_their_mean_and_variance_and_a_generator():
    posterior = LatentPosterior(torch.full((4000, 1), 2.0), torch.full((4000, 1), math.log(9.0)))
    first, second = (posterior.draw(torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(first, second)
    assert float(first.mean()) == pytest.approx(2, abs=0.2)
    assert float(first.std()) == pytest.approx(3, abs=0.15)
    model = XFactorsVAE((2,), {"a": 1}, residual_dim=1, encoder=torch.nn.Linear(2, 4))
    with torch.no_grad():
        model.encoders[0].bias[2:] = 1e4
    assert bool(model(torch.randn(3, 2)).x.isfinite().all())  # log variances are cut at 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factors": {}}, "factors: at least one"), ({"factors": {"residual": 2}}, "none named 'residual'"),
        ({"factors": {"a": 0}}, "a: must be at least 1"), ({"residual_dim": 0}, "residual_dim: must"),
        ({"input_shape": (1, 12, 16)}, "multiples of 8 without resize"), ({"input_shape": (4, 4)}, "input_shape: exp"),
    ],
)  # fmt: skip
def test_modules_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        XFactorsVAE(**{"input_shape": (1, 8, 8), "factors": TWO, "width": 2, **options})
    assert XFactorsVAE((1, 12, 9), TWO, width=2, resize=True)(torch.rand(2, 1, 12, 9)).x.shape == (2, 1, 12, 9)


@pytest.mark.parametrize("name", ["temperature", "kl_weight", "contrast_weight", "correlation_weight"])
def test_losses_that_cannot_be_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}: must be"):
        XFactorsLoss(**{name: -1.0})
    with pytest.raises(ValueError, match="temperature: must be positive, got 0"):
        XFactorsLoss(temperature=0)


def test_another_encoder_must_give_all_blocks():
    model = XFactorsVAE((6,), TWO, residual_dim=2, encoder=torch.nn.Linear(6, 10))
    with pytest.raises(ValueError, match="encoder: expected 2 x 6 numbers a row"):
        model.encode(torch.randn(2, 6))


# ---------------------------------------------------------------------- the estimator


def test_swapped_blocks_follow_the_donor_and_the_rest_stays(fitted):
    (x, own), (donor, other) = planted(200, seed=1), planted(200, seed=2)
    assert fitted.losses_[-1] < fitted.losses_[0] / 3
    for name in [*TWO, "residual"]:
        told = read(fitted.swap(x, donor, name))
        changed = "column" if name == "residual" else name
        for each in VALUES:
            expected = other if each == changed else own
            assert (told[each] == expected[each]).mean() > 0.85, (name, each)
    found = fitted.leakage(x, own)
    assert found["row"]["row"].score > 0.95
    assert found["row"]["column"].score < 0.6
    assert list(found) == ["residual", "|residual|", "row", "|row|", "tone", "|tone|"]


def test_samples_have_the_values_that_were_asked_for(fitted):
    told = read(fitted.sample(100, {"row": 3, "tone": 0}, random_state=0))
    assert (told["row"] == 3).mean() > 0.8
    assert (told["tone"] == 0).mean() > 0.8
    assert len(set(told["column"])) == 4
    np.testing.assert_array_equal(fitted.sample(4, random_state=0), fitted.sample(4, random_state=0))
    with pytest.raises(ValueError, match="there is no factor 'column'"):
        fitted.sample(2, {"column": 1})
    with pytest.raises(ValueError, match=r"'row' has no value 9; it has \[0, 1, 2, 3\]"):
        fitted.sample(2, {"row": 9})


def test_coordinates_go_back_and_their_subspaces_serve_elsewhere(fitted):
    x, factors = planted(300, seed=1)
    z = fitted.transform(x)
    back = fitted.inverse_transform(z)
    np.testing.assert_allclose(back, fitted.swap(x, x, "row"), rtol=1e-5)
    assert np.square(back - x)[:, :10].mean() < 0.3 * x[:, :10].var(0).mean()
    np.testing.assert_allclose(back[:, -1], 50, atol=0.2)  # a flat column is neither divided by 0 nor lost
    assert all(isinstance(each, CoordinateSubspace) for each in fitted.subspaces_)
    residual, row, tone = fitted.subspaces_
    assert residual.union(row).complement().indices.tolist() == tone.indices.tolist() == [6, 7]
    way = fitted.traverse(x[:3], "row", 5)
    assert way.shape == (3, 5, 13)
    np.testing.assert_allclose(way[:, 0], back[:3], rtol=1e-4)
    # What erases a concept elsewhere moves rows inside the block that was found for it.
    rows = torch.from_numpy(z).double()
    change = rows - leace(GroupedMoments(8).update(rows, torch.from_numpy(factors["tone"]))).map(rows)
    scaled = change.square().mean(0) / rows.var(0)
    assert float(scaled[tone.indices].max()) > 5 * float(scaled[tone.complement().indices].max())


def test_images_keep_their_kind_and_every_length_is_free_where_directions_are_decoded():
    x, factors = images(48)
    model = small(decode_directions=True, factor_dim=2).fit(torch.from_numpy(x), pd.DataFrame(factors))
    assert model.blocks_.sizes == {"residual": 4, "row": 2, "tone": 2, "column": 2}
    z = model.transform(x)
    assert z.dtype == np.float32
    torch.testing.assert_close(model.transform(torch.from_numpy(x)), torch.from_numpy(z))
    longer = model.blocks_.join({**model.blocks_.split(z), "row": 7 * z[:, 4:6]})
    back = model.inverse_transform(longer)
    assert back.shape == x.shape
    np.testing.assert_allclose(back, model.inverse_transform(z), atol=1e-5)
    assert model.traverse(x[:2], "residual", 3).shape == (2, 3, 1, 8, 8)
    again = small(decode_directions=True, factor_dim=2).fit(x, pd.DataFrame(factors))
    np.testing.assert_array_equal(again.transform(x), z)


def test_features_are_split_on_a_frozen_encoder():
    x, factors = planted(256)
    frozen = torch.nn.Linear(13, 32).requires_grad_(False)
    encoder = torch.nn.Sequential(frozen, torch.nn.ReLU(), torch.nn.Linear(32, 16))
    before, head = frozen.weight.clone(), encoder[2].weight.clone()
    model = small(encoder=encoder, epochs=15, batch_size=32, learning_rate=1e-2, initial_log_variance=-6.0)
    model.fit(x, factors)
    assert torch.equal(model.network_.encoders[0][0].weight, before)
    assert not torch.equal(model.network_.encoders[0][2].weight, head)
    assert torch.equal(encoder[2].weight, head)  # the one that was given is left as it is
    found = model.leakage(x, factors)
    assert found["row"]["row"].score > 0.7
    assert found["tone"]["tone"].score > 0.8


def test_a_factor_that_rarely_repeats_is_warned_of():
    x, factors = planted(64)
    with pytest.warns(UserWarning, match=r"factor 'own' was repeated in \d+ of \d+ batches"):
        small(batch_size=4, factor_dim={"own": 2}).fit(x, {"own": np.arange(64) // 2, **factors})


def test_unbalanced_and_many_valued_factors_are_taught_together():
    x, _ = planted(128)
    rare = (np.arange(128) < 3).astype(int)
    model = small(factor_dim=2).fit(x, {"rare": rare, "many": np.arange(128) % 40, "name": np.array(list("ab"))[rare]})
    assert {name: len(values) for name, values in model.classes_.items()} == {"rare": 2, "many": 40, "name": 2}
    assert np.isfinite(model.transform(x)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x, {**y, "row": np.linspace(0, 1, len(x))}), "'row' has another number in each row.*digitize"),
        (lambda x, y: (x, {"row": y["row"]}), r"factor_dim: y has no factors \['tone'\]"),
        (lambda x, y: (x, {**y, "tone": y["tone"][:5]}), "factor 'tone': y: expected 48 labels"),
        (lambda x, y: (x, {**y, "tone": 0 * y["tone"]}), "factor 'tone': y: at least 2 classes"),
        (lambda x, y: (x, None), "requires y to be passed"), (lambda x, y: (x, {}), "y: has no factors"),
        (lambda x, y: (255 * x, y), "pixels must lie in .* divide bytes by 255"),
        (lambda x, y: (np.where(np.arange(8) == 3, np.nan, x), y), "NaN"),
        (lambda x, y: (x[..., :6], y), "multiples of 8"), (lambda x, y: (x, np.zeros((48, 2, 2))), "got shape"),
    ],
)  # fmt: skip
def test_wrong_images_and_factors_are_refused(change, message):
    x, y = change(*images(48))
    with pytest.raises(ValueError, match=message):
        small().fit(x, y)


def test_wrong_donors_and_blocks_are_refused(fitted):
    x, _ = planted(6)
    for call, message in (
        (lambda: fitted.swap(x, x[:2], "row"), "donor: expected 6 items"),
        (lambda: fitted.swap(x, x), "say which blocks"), (lambda: fitted.swap(x, x, "size"), "no block 'size'"),
        (lambda: fitted.traverse(x, "size"), "no block 'size'"), (lambda: fitted.traverse(x, "row", 0), "steps: at"),
        (lambda: fitted.inverse_transform(np.zeros((2, 5))), "Z"), (lambda: fitted.transform(x[:, :5]), "features"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
