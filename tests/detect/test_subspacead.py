"""The image detector: maps, rotations, masks, windows, and the whole on a small convolutional backbone."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import nn

from subspan.detect import (
    AttentionForeground,
    NormalityForeground,
    RandomRotations,
    SubspaceAD,
    SubspaceDetector,
    tail_mean,
)
from subspan.detect.foreground import otsu_threshold, specular_confidence, suppress_specular
from subspan.detect.maps import aggregate, gaussian_blur, smooth, stitch, upsample, window_boxes
from subspan.detect.rotations import rotate
from subspan.measures import auroc
from subspan.models import FeatureGrid, ImagePreprocessing


class TwoStages(nn.Module):
    """A random convolutional network with two stages, of stride 2 and 4."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 4, stride=2, padding=1)
        self.second = nn.Conv2d(8, 8, 4, stride=2, padding=1)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def stripes(phase=0.0, size=48):
    """A striped image (3, size, size) with a little noise."""
    wave = torch.sin(torch.arange(size) * 0.9 + phase)
    noise = torch.rand(size, size, generator=torch.Generator().manual_seed(round(100 * phase)))
    image = 0.5 + 0.3 * wave + 0.02 * noise
    return image.expand(3, -1, -1).contiguous()


def spotted(size=48):
    image, mask = stripes(1.0, size), np.zeros((size, size), dtype=bool)
    image[:, 20:28, 12:20], mask[20:28, 12:20] = 0.95, True
    return image, mask


def detector(**settings_):
    options = {"image_size": 48, "augment": None, "blur": 1.0, "rank": 6} | settings_
    return SubspaceAD(options.pop("backbone", TwoStages()), ["first", "second"], **options)


def test_a_defect_is_found_and_located():
    image, mask = spotted()
    model = detector().fit([stripes(phase) for phase in (0, 0.7, 1.5)])
    result = model.predict([stripes(2.0), image])
    assert result.maps.shape == (2, 48, 48)
    assert result.maps.dtype == np.float32
    assert result.scores[1] > 2 * result.scores[0]
    assert auroc(result.maps[1], mask) > 0.95


def test_the_fit_is_that_of_all_patches_of_all_views():
    images = [stripes(phase) for phase in (0, 0.7, 1.5)]
    grid = FeatureGrid(TwoStages(), ["first", "second"], preprocessing=ImagePreprocessing(48, resize="squash"))
    rotations = RandomRotations(2)
    model = SubspaceAD(grid, augment=rotations, rank=5, random_state=3, batch_size=2).fit(images)
    assert model.n_views_ == 9
    generator = torch.Generator().manual_seed(3)
    views = [view for image in images for view in (image, *rotations.views(image, generator))]
    dense = SubspaceDetector(5, distance="residual").fit(torch.cat([grid([view]).flatten(0, 2) for view in views]))
    torch.testing.assert_close(model.subspace_.projector, dense.subspace_.projector, rtol=1e-4, atol=1e-5)
    features = SubspaceAD(grid, rank=5).fit_features(grid([view]) for view in views)
    torch.testing.assert_close(features.subspace_.projector, model.subspace_.projector, rtol=1e-4, atol=1e-5)
    shown = model.predict(images)
    taken = model.predict_features([grid(images)], (48, 48))
    np.testing.assert_allclose(shown.maps, taken.maps, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(shown.scores, taken.scores, rtol=1e-4)


def test_images_of_every_kind_give_the_same():
    images = [(stripes(phase) * 255).to(torch.uint8) for phase in (0, 0.7, 1.5, 2.0)]
    stack = torch.stack(images)
    arrays = np.ascontiguousarray(stack.permute(0, 2, 3, 1).numpy())
    labelled = torch.utils.data.TensorDataset(stack, torch.zeros(4))
    sources = {
        "list": images,
        "generator": (image for image in images),
        "tensor": stack,
        "arrays": arrays,
        "grey": [array[..., 0] for array in arrays],
        "opaque": [np.concatenate([array, np.full((48, 48, 1), 255, np.uint8)], -1) for array in arrays],
        "loader": torch.utils.data.DataLoader(labelled, 3),
        "pairs": labelled,
    }
    expected = detector().fit(images).subspace_.projector
    for name, source in sources.items():
        torch.testing.assert_close(detector().fit(source).subspace_.projector, expected, msg=name)


def test_any_function_is_a_backbone_and_half_precision_too():
    def halves(batch):
        return nn.functional.unfold(batch.mean(1, keepdim=True), 4, stride=4).mT.unflatten(1, (12, 12)).half()

    image, mask = spotted()
    model = SubspaceAD(halves, image_size=48, augment=None, rank=4, blur=1.0).fit([stripes(0.0)])
    result = model.predict([image])
    assert auroc(result.maps[0], mask) > 0.95


def test_images_that_are_not_square_and_of_several_sizes():
    tall = nn.functional.interpolate(stripes()[None], size=(70, 30))[0]
    result = detector().fit([stripes(), tall]).predict([tall, stripes()])
    assert result.maps.shape == (2, 48, 48)


def test_batched_zero_shot_finds_the_odd_one_out():
    image, _ = spotted()
    batch = [stripes(phase / 3) for phase in range(9)] + [image]
    model = detector(augment=RandomRotations(30)).fit_batch_zero_shot(batch)
    assert model.n_views_ == 10
    assert int(np.argmax(model.predict(batch).scores)) == 9


def test_calibrated_labels():
    image, _ = spotted()
    model = detector().fit([stripes(phase) for phase in (0, 0.7, 1.5)])
    assert model.predict([image]).labels is None
    model.calibrate([stripes(phase) for phase in np.linspace(0, 6, 20)], 0.1)
    assert model.predict([image, stripes(0.7)]).labels.tolist() == [-1, 1]


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("over", ["map", "patches"])
def test_saved_and_read_again(tmp_path, window, over):
    images = [stripes(phase) for phase in (0, 0.7, 1.5)]
    model = detector(window=window, over=over, normalize=True, augment=RandomRotations(1)).fit(images)
    model.calibrate(images)
    model.save(tmp_path / "model.safetensors")
    again = SubspaceAD.load(tmp_path / "model.safetensors", TwoStages())
    expected, found = model.predict([spotted()[0]]), again.predict([spotted()[0]])
    np.testing.assert_array_equal(found.maps, expected.maps)
    np.testing.assert_array_equal(found.labels, expected.labels)
    assert again.augment == RandomRotations(1)
    assert (tmp_path / "model.safetensors").stat().st_size < 10_000


def test_a_mask_that_was_a_function_is_asked_for(tmp_path):
    model = detector(mask=lambda images, features: torch.ones(features.shape[:3], dtype=torch.bool)).fit([stripes()])
    model.save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="used a function as mask"):
        SubspaceAD.load(tmp_path / "model.safetensors", TwoStages())


def test_masked_patches_score_nothing_and_are_left_out_of_the_fit():
    def left_half(images, features):
        mask = torch.zeros(features.shape[:3], dtype=torch.bool)
        mask[:, :, : features.shape[2] // 2] = True
        return mask

    model = detector(mask=left_half, blur=0.0).fit([stripes()])
    shown = model.predict([spotted()[0]]).maps[0]
    assert not shown[:, 26:].any()
    unmasked = model.set_params(mask=None).predict([spotted()[0]]).maps[0]
    np.testing.assert_array_equal(shown[:, :22], unmasked[:, :22])
    assert unmasked[:, 26:].any()
    features = FeatureGrid(TwoStages(), ["first", "second"], preprocessing=ImagePreprocessing(48, resize="squash"))
    half = features([stripes()])[:, :, :12].flatten(0, 2)
    assert model.detector_.moments_.count == len(half)
    everything = detector(mask=left_half, mask_normals=False).fit([stripes()])
    assert everything.detector_.moments_.count == 2 * len(half)
    nothing = detector(mask=lambda images, features: torch.zeros(features.shape[:3], dtype=torch.bool))
    with pytest.warns(UserWarning, match="without foreground|no foreground"):
        nothing.fit([stripes()])


# ---------------------------------------------------------------------------- as published


def test_the_defaults_are_those_of_the_published_benchmark():
    network = TwoStages()
    assert SubspaceAD(network).get_params(deep=False) == {
        "backbone": network,
        "layers": None,
        "aggregate": "mean",
        "normalize": False,
        "image_size": 224,
        "preprocessing": None,
        "augment": RandomRotations(30, degrees=(0.0, 345.0), padding="reflect", interpolation="bilinear"),
        "rank": 0.99,
        "distance": "residual",
        "drop_k": 0,
        "mask": None,
        "mask_normals": True,
        "blur": 4.0,
        "image_score": "tail",
        "tail": 0.01,
        "over": "map",
        "window": None,
        "overlap": 0.0,
        "specular": False,
        "batch_size": 16,
        "random_state": 0,
        "progress": False,
    }


def written_out(network, normals, tests, *, size, normalize=False):
    """The published method in numpy: maps and scores of `tests`, fitted to `normals` and 30 turned views of each."""
    generator = torch.Generator().manual_seed(0)
    views = []
    for image in normals:
        views.append(image)
        for _ in range(30):
            views.append(rotate(image, 345.0 * float(torch.rand((), generator=generator))))

    def patches(image):
        with torch.no_grad():
            first = network.first((image[None] - 0.5) / 0.5)
            second = network.second(torch.tanh(first))
        finer = nn.functional.interpolate(second, size=first.shape[-2:], mode="bilinear", align_corners=False)
        grid = ((first + finer) / 2)[0].movedim(0, -1).double().numpy()
        return grid / np.linalg.norm(grid, axis=-1, keepdims=True) if normalize else grid

    rows = np.concatenate([patches(view).reshape(-1, 8) for view in views])
    mean = rows.mean(0)
    values, vectors = np.linalg.eigh((rows - mean).T @ (rows - mean) / (len(rows) - 1))
    values, vectors = values[::-1], vectors[:, ::-1]
    rank = int(np.searchsorted(np.cumsum(values) / values.sum(), 0.99)) + 1
    kept = vectors[:, :rank]
    maps, scores = [], []
    for image in tests:
        centred = patches(image) - mean
        residual = np.square(centred - centred @ kept @ kept.T).sum(-1)
        at = np.clip((np.arange(size) + 0.5) * len(residual) / size - 0.5, 0, len(residual) - 1)
        pixels = ndimage.map_coordinates(residual, np.meshgrid(at, at, indexing="ij"), order=1)
        maps.append(ndimage.gaussian_filter(pixels, 4.0, mode="mirror", radius=12))
        scores.append(np.sort(maps[-1].ravel())[::-1][: int(0.01 * size**2)].mean())
    return rank, np.stack(maps), np.array(scores)


@pytest.mark.parametrize("normalize", [False, True])
def test_the_whole_is_the_published_method_written_out(normalize):
    normals, tests = [stripes(0.0), stripes(0.7)], [stripes(2.0), spotted()[0]]
    model = SubspaceAD(TwoStages(), ["first", "second"], image_size=48, normalize=normalize).fit(normals)
    result = model.predict(tests)
    rank, maps, scores = written_out(TwoStages(), normals, tests, size=48, normalize=normalize)
    assert model.n_views_ == 62
    assert model.subspace_.dim == rank
    assert 1 < rank < 8
    np.testing.assert_allclose(result.maps, maps, rtol=1e-3, atol=1e-3 * maps.max())
    np.testing.assert_allclose(result.scores, scores, rtol=1e-3)


def test_turned_parts_are_normal_where_turned_views_were_fitted():
    turned = rotate(stripes(0.7), 90)
    upright = detector(image_size=48, rank=0.99).fit([stripes()]).predict([turned]).scores[0]
    fitted = detector(image_size=48, rank=0.99, augment=RandomRotations(30)).fit([stripes()])
    assert fitted.predict([turned]).scores[0] < 0.1 * upright


@pytest.mark.parametrize("over", ["map", "patches"])
@pytest.mark.parametrize(("image_score", "tail"), [("tail", 0.01), ("tail", 0.2), ("max", 0.01), ("mean", 0.01)])
def test_an_image_scores_what_its_own_map_or_patches_say(over, image_score, tail):
    image = spotted()[0]
    model = detector(over=over, image_score=image_score, tail=tail).fit([stripes()])
    result = model.predict([image])
    patches = model.score_patches(model._prepare()[0]([image]))
    ordered = np.sort((result.maps[0] if over == "map" else patches.numpy()).ravel())[::-1]
    count = {"tail": max(1, int(tail * ordered.size)), "max": 1, "mean": ordered.size}[image_score]
    assert result.scores[0] == pytest.approx(ordered[:count].mean(), rel=1e-5)
    again = model.predict_features([model._prepare()[0]([image])], (48, 48))
    np.testing.assert_allclose(again.scores, result.scores, rtol=1e-5)


def test_maps_are_smoothed_by_the_given_width_in_pixels():
    image = spotted()[0]
    maps = {blur: detector(blur=blur).fit([stripes()]).predict([image]).maps[0] for blur in (0.0, 2.0, "official")}
    expected = ndimage.gaussian_filter(maps[0.0].astype(float), 2.0, mode="mirror", radius=6)
    np.testing.assert_allclose(maps[2.0], expected, rtol=1e-4, atol=1e-6)
    box = ndimage.gaussian_filter(maps[0.0].astype(float), 4.0, mode="mirror", radius=1)
    np.testing.assert_allclose(maps["official"], box, rtol=1e-4, atol=1e-6)


def test_unit_length_patches_do_not_see_their_length():
    grid = torch.rand(2, 5, 5, 8) + torch.arange(8)
    scaled = grid * torch.linspace(1, 9, 25).reshape(1, 5, 5, 1)
    plain, unit = (SubspaceAD(TwoStages(), normalize=n, rank=3).fit_features([grid]) for n in (False, True))
    torch.testing.assert_close(unit.score_patches(scaled), unit.score_patches(grid), rtol=1e-3, atol=1e-7)
    assert plain.score_patches(scaled).mean() > 2 * plain.score_patches(grid).mean()


def test_the_border_of_an_image_is_looked_at():
    def wide(defect=False):
        image = torch.cat([stripes(), stripes()], -1)
        if defect:
            image[:, 10:18, 86:94] = 0.95
        return image

    grid = FeatureGrid(TwoStages(), ["first", "second"], preprocessing=ImagePreprocessing(48))
    for settings_ in ({"backbone": grid}, {"preprocessing": ImagePreprocessing(48)}, {}):
        model = detector(**settings_).fit([wide()])
        good, defective = model.predict([wide(), wide(defect=True)]).scores
        assert defective > 2 * good
    cropped = detector(preprocessing=ImagePreprocessing(48, resize="crop"))
    with pytest.warns(UserWarning, match="cuts the border"):
        cropped.fit([wide()])
    good, defective = cropped.predict([wide(), wide(defect=True)]).scores
    assert defective == good


# ---------------------------------------------------------------------------- maps


def test_upsampling_and_the_official_blur_are_those_of_the_published_code():
    """cv2.resize(INTER_LINEAR), then GaussianBlur with a 3 × 3 kernel, sigma 4 and mirrored borders, written out."""
    patches = np.random.default_rng(0).random((5, 4))
    height, width = 20, 16
    y = np.clip((np.arange(height) + 0.5) * 5 / height - 0.5, 0, 4)
    x = np.clip((np.arange(width) + 0.5) * 4 / width - 0.5, 0, 3)
    expected = ndimage.map_coordinates(patches, np.meshgrid(y, x, indexing="ij"), order=1)
    raw = upsample(torch.from_numpy(patches)[None], (height, width))
    np.testing.assert_allclose(raw[0].numpy(), expected, atol=1e-12)
    weights = np.exp(-np.array([1.0, 0.0, 1.0]) / 32)
    weights /= weights.sum()
    padded = np.pad(expected, 1, mode="reflect")
    blurred = sum(weights[i] * weights[j] * padded[i : i + height, j : j + width] for i in range(3) for j in range(3))
    np.testing.assert_allclose(smooth(raw, "official")[0].numpy(), blurred, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.7, 2.0, 4.0])
def test_blur_is_a_gaussian(sigma):
    image = np.random.default_rng(0).random((60, 50))
    expected = ndimage.gaussian_filter(image, sigma, mode="mirror", radius=math.ceil(3 * sigma))
    np.testing.assert_allclose(gaussian_blur(torch.from_numpy(image)[None], sigma)[0].numpy(), expected, atol=1e-12)


def test_no_blur_and_tiny_maps():
    tiny = torch.rand(2, 1, 1)
    assert torch.equal(smooth(tiny, 4.0), tiny)
    assert torch.equal(smooth(torch.ones(1, 3, 3), 0), torch.ones(1, 3, 3))
    torch.testing.assert_close(smooth(torch.ones(1, 3, 3), 4.0), torch.ones(1, 3, 3))


@settings(max_examples=50)
@given(n=st.integers(1, 1000), fraction=st.floats(0.001, 1.0))
def test_tail_mean_truncates_as_published(n, fraction):
    scores = torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    count = max(1, int(fraction * n))
    assert float(tail_mean(scores, fraction)) == pytest.approx(
        float(scores.sort(descending=True).values[:count].mean())
    )


def test_aggregations():
    scores = torch.rand(3, 777, dtype=torch.float64)
    values = scores.numpy()
    np.testing.assert_allclose(aggregate(scores, "p99"), np.percentile(values, 99, axis=1))
    np.testing.assert_allclose(aggregate(scores, "max"), values.max(1))
    np.testing.assert_allclose(aggregate(scores, "mean"), values.mean(1))
    np.testing.assert_allclose(aggregate(scores, "top5"), np.sort(values, 1)[:, -5:].mean(1))


# ---------------------------------------------------------------------------- windows


@settings(max_examples=60)
@given(height=st.integers(5, 90), width=st.integers(5, 90), size=st.integers(4, 40), overlap=st.floats(0, 0.8))
def test_windows_cover_the_image_at_full_size(height, width, size, overlap):
    boxes = window_boxes(height, width, size, overlap)
    covered = np.zeros((height, width), dtype=int)
    for top, left, bottom, right in boxes:
        assert (bottom - top, right - left) == (min(size, height), min(size, width))
        covered[top:bottom, left:right] += 1
    assert covered.min() >= 1
    assert len(set(boxes)) == len(boxes)


def test_stitching_averages_overlaps():
    boxes = window_boxes(6, 10, 6, 0.5)
    whole = torch.rand(6, 10)
    pieces = [whole[t:b, l:r] for t, l, b, r in boxes]
    torch.testing.assert_close(stitch(pieces, boxes, (6, 10)), whole)
    constant = [torch.full((6, 6), float(index)) for index in range(2)]
    assert stitch(constant, [(0, 0, 6, 6), (0, 4, 6, 10)], (6, 10))[0].tolist() == [0] * 4 + [0.5] * 2 + [1] * 4


def test_windows_find_what_is_small_in_a_large_image():
    large = torch.cat([torch.cat([stripes()] * 3, -1)] * 2, -2)
    defective = large.clone()
    defective[:, 60:66, 100:106] = 0.95
    model = detector(window=48, overlap=0.25).fit([large])
    result = model.predict([defective, stripes()])
    assert [one.shape for one in result.maps] == [(96, 144), (48, 48)]
    y, x = np.unravel_index(result.maps[0].argmax(), result.maps[0].shape)
    assert 58 <= y < 68
    assert 98 <= x < 108


# ---------------------------------------------------------------------------- rotations


@pytest.mark.parametrize("quarter", [1, 2, 3])
def test_quarter_turns_are_exact(quarter):
    image = torch.rand(3, 20, 20, dtype=torch.float64)
    torch.testing.assert_close(rotate(image, 90 * quarter), torch.rot90(image, quarter, (-2, -1)))


@pytest.mark.parametrize("shape", [(40, 40), (31, 48)])
def test_official_rotation_is_that_of_pillow(shape):
    image_module = pytest.importorskip("PIL.Image", reason="needs pillow")
    pixels = np.random.default_rng(0).integers(1, 255, shape, dtype=np.uint8)
    tensor = torch.from_numpy(pixels)[None].float()
    for angle in (17.0, 133.0, 250.5):
        expected = np.asarray(image_module.fromarray(pixels).rotate(angle))
        found = rotate(tensor, angle, padding="zeros", interpolation="nearest")[0].numpy()
        # Ties of the nearest pixel may fall the other way.
        assert (found == expected).mean() > 0.99


def test_reflected_corners_hold_no_black():
    image = torch.full((3, 32, 32), 0.7)
    assert float(rotate(image, 45).min()) == pytest.approx(0.7)
    assert float(rotate(image, 45, padding="zeros").min()) == 0


def test_rotations_are_the_same_for_the_same_seed():
    image = torch.rand(3, 16, 16)
    views = [list(RandomRotations(3).views(image, torch.Generator().manual_seed(5))) for _ in range(2)]
    for first, second in zip(*views):
        assert torch.equal(first, second)
    assert not torch.equal(views[0][0], views[0][1])


# ---------------------------------------------------------------------------- masks


def test_normality_mask_finds_the_object_whatever_its_sign():
    features = 0.1 * torch.randn(2, 20, 20, 6)
    features[:, 5:15, 5:15] += torch.tensor([40.0, 0, 0, 0, 0, 0])
    features[1] *= -1
    mask = NormalityForeground()([], features)
    for one in mask:
        assert one[6:14, 6:14].all()
        assert one[4:16, 4:16].sum() == one.sum()


def test_attention_mask_of_a_transformer():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=16, num_hidden_layers=7, num_attention_heads=2, image_size=56, patch_size=14, num_register_tokens=4
    )
    torch.manual_seed(0)
    network = transformers.Dinov2WithRegistersModel._from_config(config, attn_implementation="eager").eval()
    preprocessing = ImagePreprocessing(56, resize="squash")
    images = [torch.rand(3, 56, 56) for _ in range(2)]
    foreground = AttentionForeground(network, preprocessing, layer=1, percentile=0.25)
    with torch.no_grad():
        attention = network(preprocessing.batch(images), output_attentions=True).attentions[1]
    expected = attention[:, :, 1:5, 5:].mean((1, 2)).reshape(2, 4, 4)
    torch.testing.assert_close(foreground.saliency(images, (4, 4)), expected)
    assert foreground(images, torch.zeros(2, 4, 4, 16)).flatten(1).sum(1).tolist() == [12, 12]
    model = SubspaceAD(network, [1, 2], image_size=56, augment=None, rank=4, mask="attention").fit(images)
    assert model.predict(images).maps.shape == (2, 56, 56)


def test_the_network_of_a_mask_is_asked_in_evaluation_mode():
    class Noisy(nn.Module):
        """Attention (b, heads, t, t) that is random in training mode, of a CLS token and a 2 × 2 grid."""

        def __init__(self):
            super().__init__()
            self.frozen, self.dropout = nn.Dropout(0.5).eval(), nn.Dropout(0.5)

        def forward(self, pixel_values, output_attentions):
            weights = self.dropout(torch.ones(len(pixel_values), 1, 5, 5)) * torch.arange(5.0)
            return SimpleNamespace(attentions=[weights])

    network = Noisy()
    foreground = AttentionForeground(network, ImagePreprocessing(28), layer=0)
    expected = torch.arange(1.0, 5.0).reshape(1, 2, 2)
    for _ in range(8):
        torch.testing.assert_close(foreground.saliency([torch.rand(3, 28, 28)], (2, 2)), expected)
    assert [network.training, network.dropout.training, network.frozen.training] == [True, True, False]


def test_attention_mask_without_weights_says_what_to_do():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    network = transformers.Dinov2WithRegistersModel._from_config(config, attn_implementation="sdpa").eval()
    foreground = AttentionForeground(network, ImagePreprocessing(28, resize="squash"), layer=0)
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        foreground([torch.rand(3, 28, 28)], torch.zeros(1, 2, 2, 16))


def test_otsu_splits_two_groups():
    low, high = torch.randn(300) * 0.1, torch.randn(100) * 0.1 + 3
    assert float(low.max()) <= otsu_threshold(torch.cat([low, high])) < float(high.min())


def test_highlights_are_damped_and_defects_are_not():
    image = torch.full((3, 40, 40), 0.4)
    image[0] = 0.6
    image[:, 10:14, 10:14] = 1.0
    confidence = specular_confidence(image)
    assert confidence[12, 12] < 0.5 < confidence[30, 30]
    scores = torch.full((40, 40), 0.1)
    scores[10:14, 10:14] = scores[30:34, 30:34] = 5.0
    damped = suppress_specular(scores, confidence)
    assert damped[12, 12] < 0.6 * damped[32, 32]
    assert bool((damped <= scores).all())
    model = detector(specular=True).fit([stripes()])
    assert model.predict([image]).scores[0] < detector().fit([stripes()]).predict([image]).scores[0]


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"blur": -1.0}, "blur"),
        ({"blur": "strong"}, "blur"),
        ({"tail": 0.0}, "tail"),
        ({"over": "pixels"}, "over"),
        ({"mask": "saliency"}, "mask"),
        ({"window": 0}, "window"),
        ({"window": 20, "overlap": 1.0}, "overlap"),
        ({"batch_size": 0}, "batch_size"),
        ({"rank": 1.5}, "ratio"),
        ({"drop_k": -2}, "drop_k"),
    ],
)
def test_settings_that_make_no_sense(settings_, message):
    with pytest.raises(ValueError, match=message):
        detector(**settings_).fit([stripes()])


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "at least one normal image"),
        (["a.png"], TypeError, "PIL image"),
        ("folder", TypeError, "iterable of images"),
        (torch.rand(3, 20, 20), ValueError, "4 dimensions"),
        ([torch.full((3, 20, 20), float("nan"))], ValueError, "finite"),
        ([torch.rand(3, 20, 20) * 255], ValueError, r"\[0, 1\]"),
        ([torch.rand(2, 20, 20)], ValueError, "shape"),
        ([torch.full((3, 48, 48), 0.5)], ValueError, "total variance is zero"),
    ],
)
def test_images_that_are_none(images, error, message):
    backbone = lambda batch: batch.movedim(1, -1)  # noqa: E731
    with pytest.raises(error, match=message):
        SubspaceAD(backbone, image_size=48, augment=None).fit(images)


def test_no_test_images():
    with pytest.raises(ValueError, match="at least one image"):
        detector().fit([stripes()]).predict([])


def test_a_layer_that_is_not_there_and_a_missing_one():
    with pytest.raises(ValueError, match="no layer 'third'"):
        SubspaceAD(TwoStages(), ["third"], augment=None).fit([stripes()])
    with pytest.raises(ValueError, match="layers"):
        SubspaceAD(TwoStages(), augment=None).fit([stripes()])


def test_a_backbone_of_another_width_or_shape():
    model = detector().fit([stripes()])
    model.layers = ["first"]
    model.aggregate = "concat"
    with pytest.raises(ValueError, match=r"columns"):
        SubspaceAD(TwoStages(), ["first", "second"], aggregate="concat", image_size=48, augment=None, rank=4).fit(
            [stripes()]
        ).score_patches(torch.rand(1, 2, 2, 5))
    with pytest.raises(ValueError, match="features"):
        SubspaceAD(lambda batch: batch.mean((2, 3)), image_size=48, augment=None).fit([stripes()])
