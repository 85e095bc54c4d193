"""Frame projections: terms of the loss, the two stages, features of planted series, files, and what is refused."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from torch.nn import functional as F

from subspan.geometry import Subspace
from subspan.nn import FourierView, FrameView, LatentMapper, MorletView, SeriesEncoder, nt_xent
from subspan.represent import CrossViewContrast, FrameNetwork, FrameViews, SeriesFeatures, mapping_loss, view_geometry

pytest.importorskip("lightning")


def tones(n, length=48, channels=2, seed=0):
    """Noisy tones with phases and strengths that say nothing, and their frequencies."""
    rng = np.random.default_rng(seed)
    frequency = rng.uniform(0.3, 1.5, n)
    angle = frequency[:, None, None] * np.arange(length) + rng.uniform(0, 2 * np.pi, (n, channels, 1))
    strength = rng.uniform(0.5, 2, (n, 1, 1))
    return np.sin(angle) * strength + 0.2 * rng.normal(size=(n, channels, length)), frequency


def small(**options):
    given = {"dim": 8, "width": 4, "n_scales": 8, "mapper_hidden": 4, "epochs": 1, "random_state": 0}
    return FrameViews(**{**given, **options})


@pytest.fixture(scope="module")
def fitted():
    return small(epochs=2).fit(tones(24)[0])


# ---------------------------------------------------------------------- the losses


def test_terms_are_those_of_all_pairs_and_of_both_maps():
    views = {"fourier": FourierView(), "morlet": MorletView(6, (1, 10))}
    network = FrameNetwork(2, 20, views=views, dim=6, width=4, mapper_hidden=3).eval()
    x = torch.randn(5, 2, 20)
    total, terms = CrossViewContrast(0.2, 0.5)(network, (x,))
    h = dict(zip(network.names, network.encode(x)))
    z = {name: F.normalize(network.projectors[name](rows), dim=1) for name, rows in h.items()}
    expected = {
        "contrast_time_fourier": nt_xent(z["time"], z["fourier"], temperature=0.2),
        "contrast_time_morlet": nt_xent(z["time"], z["morlet"], temperature=0.2),
        "contrast_fourier_morlet": nt_xent(z["fourier"], z["morlet"], temperature=0.2),
    }
    for name, mapper in network.embedding_mappers.items():
        expected[f"mapped_{name}"] = 0.5 * (mapper(z["time"]) - z[name]).abs().sum() / (5 * 6)
    assert list(terms) == list(expected)
    for name, value in expected.items():
        assert float(terms[name]) == pytest.approx(float(value), rel=1e-5)
    assert float(total) == pytest.approx(sum(map(float, expected.values())), rel=1e-5)
    assert "mapped_fourier" not in CrossViewContrast(mapper_weight=0)(network, (x,))[1]


def test_errors_of_the_second_stage_are_means():
    maps = torch.nn.ModuleDict({"a": LatentMapper(5), "b": LatentMapper(5)})
    own, a, b = torch.randn(3, 4, 5)
    found = mapping_loss(maps, (own, a, b))
    assert float(found["a"]) == pytest.approx(float((maps["a"](own) - a).abs().sum()) / 20, rel=1e-5)
    assert float(found["b"]) == pytest.approx(float((maps["b"](own) - b).abs().sum()) / 20, rel=1e-5)


def test_spaces_that_know_nothing_of_each_other_are_at_right_angles_and_not_isometric():
    x, y = torch.randn(2, 400, 128)
    apart = view_geometry(x, y)
    assert float(apart.angles.rad2deg().mean()) == pytest.approx(90, abs=1)
    assert float(apart.differences.std()) > 0.1
    assert float(apart.principal[0]) > math.pi / 4
    turn = torch.linalg.qr(torch.randn(128, 128)).Q
    same = view_geometry(x, x @ turn)
    assert len(same.differences) == 400 * 399 / 2
    assert float(same.differences.abs().max()) < 1e-4
    assert float(same.principal.max()) < 1e-3
    with pytest.raises(ValueError, match="same three samples or more"):
        view_geometry(x[:2], y[:2])


# ---------------------------------------------------------------------- the stages


def test_the_second_stage_leaves_encoders_as_they_are(monkeypatch):
    seen = {}
    train = FrameViews._train

    def watched(self, model, loss, columns, epochs):
        found = train(self, model, loss, columns, epochs)
        if isinstance(model, FrameNetwork):
            seen.update({name: value.clone() for name, value in model.state_dict().items()})
        return found

    monkeypatch.setattr(FrameViews, "_train", watched)
    model = small(epochs=4, mapper_epochs=5, learning_rate=1e-2).fit(tones(20)[0])
    after = model.network_.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, seen[name])}
    assert moved == {name for name in after if name.startswith("features.mappers.")}
    assert len(model.losses_) == 4
    assert model.losses_[-1] < 0.8 * model.losses_[0]
    assert len(model.mapper_losses_) == 5
    assert model.mapper_losses_[-1] < model.mapper_losses_[0]


def test_features_are_of_the_series_alone_and_the_file_holds_no_other_view(fitted, tmp_path):
    x = tones(10, seed=2)[0]
    found = fitted.transform(x)
    assert found.shape == (10, 24)
    module = fitted.to_module()
    own = module.encode(module.standardize(torch.from_numpy(x).float()))
    guessed = [mapper(own) for mapper in module.mappers.values()]
    np.testing.assert_allclose(found, torch.cat([own, *guessed], 1).numpy(), atol=1e-4)
    fitted.save(tmp_path / "model.safetensors")
    names = load_file(tmp_path / "model.safetensors")
    assert not [name for name in names if "view" in name or "projector" in name]
    again = FrameViews.load(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(again.transform(x), found)
    assert again.get_feature_names_out().tolist() == fitted.get_feature_names_out().tolist()
    with pytest.raises(ValueError, match=r"does not fit a saved frame-views.*no encoder"):
        FrameViews.load(tmp_path / "model.safetensors", encoder=SeriesEncoder(2, 8, width=4))


def test_the_same_seed_gives_the_same_answer_and_what_was_found_is_kept(fitted):
    x = tones(24)[0]
    state = torch.get_rng_state()
    again = small(epochs=2).fit(x)
    assert torch.equal(state, torch.get_rng_state())
    np.testing.assert_array_equal(again.transform(x), fitted.transform(x))
    assert isinstance(fitted.subspace_, Subspace)
    features = torch.from_numpy(fitted.transform(x))
    lost = fitted.subspace_.residual(features).square().sum() / (features - features.mean(0)).square().sum()
    assert float(lost) < 0.02
    assert list(fitted.geometry_) == [("time", "fourier"), ("time", "morlet"), ("fourier", "morlet")]
    assert fitted.geometry_["time", "fourier"].angles.shape == (24,)


# ---------------------------------------------------------------------- kinds of windows


@pytest.mark.parametrize(("length", "channels"), [(16, 1), (17, 3), (31, 2)])
def test_any_length_and_number_of_channels(length, channels):
    x = tones(6, length, channels)[0]
    assert small().fit(x).transform(x).shape == (6, 24)
    one = small(views=("fourier",)).fit(x)
    assert one.transform(x).shape == (6, 16)


def test_windows_of_unequal_lengths_are_filled_up_in_training_and_encoded_alone_in_use():
    x = tones(9, 40)[0]
    windows = [row[:, : 40 - 3 * (place % 4)] for place, row in enumerate(x)]
    model = small(normalize="window").fit(windows)
    found = model.transform(windows)
    assert model.length_ == 40
    np.testing.assert_array_equal(model.transform(windows[::-1])[::-1], found)
    np.testing.assert_allclose(model.transform(x[4:5]), found[4:5], atol=1e-6)
    standardized = SeriesFeatures(2, SeriesEncoder(2, 8, width=4), {}, per_window=True)
    filled, mask = torch.zeros(1, 2, 50), torch.arange(50)[None] < 40
    filled[0, :, :40] = torch.from_numpy(x[0])
    within = standardized.standardize(filled, mask)
    torch.testing.assert_close(within[:, :, :40], standardized.standardize(filled[:, :, :40]))
    assert float(within[:, :, 40:].abs().max()) == 0
    overall = SeriesFeatures(2, SeriesEncoder(2, 8, width=4), {})
    overall.set_scale(filled, mask)
    torch.testing.assert_close(overall.standardize(filled, mask), within)


def test_matrices_tensors_and_frames_are_windows_of_one_channel():
    x = tones(8, 30, 1)[0]
    model = small().fit(x[:, 0])
    assert model.n_features_in_ == 30
    found = model.transform(x[:, 0])
    np.testing.assert_array_equal(model.transform(x), found)
    tensors = model.transform(torch.from_numpy(x).float())
    assert tensors.dtype == torch.float32
    np.testing.assert_allclose(tensors.numpy(), found, atol=1e-4)
    with pytest.raises(ValueError, match="29 features"):
        model.transform(x[:, 0, :29])
    frame = pd.DataFrame(x[:, 0], columns=[f"t{i}" for i in range(30)])
    names = small().fit(frame).set_output(transform="pandas").transform(frame)
    assert names.columns[0] == "frameviews0"
    assert names.shape == (8, 24)


def test_constant_channels_and_levels_are_nothing():
    x = tones(8, 30)[0]
    x[:, 1] = 5.0
    for normalize in ("channel", "window"):
        model = small(normalize=normalize).fit(x)
        assert np.isfinite(model.transform(x)).all()
        assert float(model.to_module().standardize(torch.from_numpy(x).float())[:, 1].abs().max()) == 0
    model = small(normalize="window").fit(x)
    np.testing.assert_allclose(model.transform(100 + 7 * x), model.transform(x), atol=1e-3)


def test_views_and_encoders_of_ones_own():
    class Differences(FrameView):
        def forward(self, x):
            return x.diff(dim=-1).unsqueeze(1)

    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(60, 8))
    x = tones(8, 30)[0]
    model = small(views=(Differences(), "fourier"), encoder=encoder).fit(x)
    assert model.network_.names == ["time", "view 0", "fourier"]
    assert model.transform(x).shape == (8, 24)
    assert not torch.equal(model.to_module().encoder[1].weight, encoder[1].weight)
    with pytest.raises(ValueError, match="unequal lengths need one with a parameter `mask`"):
        small(encoder=encoder).fit([row[:, : 30 - i] for i, row in enumerate(x)])
    with pytest.raises(ValueError, match=r"encoder: expected vectors \(2, 8\) of two series, got \(2, 5\)"):
        small(encoder=torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(60, 5))).fit(x)


# ---------------------------------------------------------------------- conduct


def test_a_last_batch_of_one_window_is_left_out():
    x = tones(9)[0]
    assert math.isfinite(small(batch_size=4).fit(x).losses_[0])


def test_parameters_are_kept_and_checked():
    model = small(views=("fourier", MorletView(4, (1, 8))))
    assert clone(model).get_params()["dim"] == 8
    with pytest.raises(NotFittedError):
        model.transform(tones(4)[0])
    for name, value in {"dim": 0, "dropout": 2.0, "normalize": "rows", "temperature": 0.0, "epochs": 1.5}.items():
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            small(**{name: value}).fit(tones(4)[0])
    with pytest.raises(ValueError, match="views: expected 'fourier', 'morlet' or a FrameView, got 'haar'"):
        small(views=("haar",)).fit(tones(4)[0])
    with pytest.raises(ValueError, match="views: at least one"):
        small(views=()).fit(tones(4)[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x[:, :, :15], "16 samples or more, got one of shape \\(2, 15\\) at 0"),
        (lambda x: x[:1], "two windows or more, got 1"),
        (lambda x: np.where(np.arange(40) == 3, np.nan, x), "NaN"),
        (lambda x: np.where(np.arange(40) == 3, np.inf, x), "infinit"),
        (lambda x: [x[0], x[1][:1]], "windows of 2 channels .* got one of shape \\(1, 40\\) at 1"),
        (lambda x: x + 1j, "omplex"),
        (lambda x: x[None], "dimension"),
        (lambda x: x[:0], "no windows"),
    ],
)
def test_what_is_no_windows_is_refused(change, words):
    with pytest.raises((ValueError, TypeError), match=words):
        small().fit(change(tones(4, 40)[0]))


def test_windows_of_other_channels_are_refused_in_use(fitted):
    with pytest.raises(ValueError, match=r"windows of 2 channels and 16 samples or more, got one of shape \(3, 40\)"):
        fitted.transform(tones(4, 40, 3)[0])
    with pytest.raises(ValueError, match="2 channels"):
        fitted.transform(tones(4, 40, 1)[0][:, 0])
