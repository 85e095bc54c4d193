from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.models import FeatureGrid, ImagePreprocessing, token_grid

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

IMAGES = list(np.random.default_rng(0).integers(0, 256, (5, 40, 32, 3), dtype=np.uint8))
PREPROCESSING = ImagePreprocessing(32, resize="squash")


@pytest.fixture(scope="module")
def pyramid() -> nn.Module:
    torch.manual_seed(0)
    widths, strides = (3, 4, 4, 6), (2, 1, 2)
    return nn.Sequential(
        *(nn.Conv2d(a, b, 3, stride=s, padding=1) for a, b, s in zip(widths, widths[1:], strides)), nn.Flatten()
    )


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=8, image_size=32, patch_size=8
    )
    return transformers.ViTModel(config).eval()


def test_maps_of_equal_width_are_averaged_and_widths_concatenated(pyramid: nn.Module) -> None:
    grid = FeatureGrid(pyramid, ["0", "1", "2"], preprocessing=PREPROCESSING)(IMAGES)
    with torch.no_grad():
        first = pyramid[0](PREPROCESSING.batch(IMAGES))
        second = pyramid[1](first)
        third = F.interpolate(pyramid[2](second), size=(16, 16), mode="bilinear", align_corners=False)
    expected = torch.cat([(first + second) / 2, third], dim=1).movedim(1, -1)
    torch.testing.assert_close(grid, expected)


def test_layers_are_concatenated_or_grouped(pyramid: nn.Module) -> None:
    concatenated = FeatureGrid(pyramid, ["0", "1", "2"], aggregate="concat", preprocessing=PREPROCESSING)(IMAGES)
    assert concatenated.shape == (5, 16, 16, 14)
    grouped = FeatureGrid(
        pyramid, ["0", "1", "2"], aggregate="group", groups=[["0", "1"], "2"], preprocessing=PREPROCESSING
    )(IMAGES)
    averaged = FeatureGrid(pyramid, ["0", "1", "2"], preprocessing=PREPROCESSING)(IMAGES)
    assert torch.equal(grouped, averaged)


def test_a_stream_gives_the_same_rows(pyramid: nn.Module) -> None:
    grid = FeatureGrid(pyramid, ["1", "2"], preprocessing=PREPROCESSING)
    whole = grid(IMAGES)
    torch.testing.assert_close(torch.cat(list(grid.iterate(iter(IMAGES), batch_size=2))), whole)
    torch.testing.assert_close(torch.cat(list(grid.rows(IMAGES, batch_size=3))), whole.flatten(0, 2))


def test_a_prepared_batch_is_taken_as_it_is(pyramid: nn.Module) -> None:
    grid = FeatureGrid(pyramid, "1", preprocessing=PREPROCESSING)
    assert torch.equal(grid(PREPROCESSING.batch(IMAGES)), grid(IMAGES))


def test_tokens_become_a_grid_without_the_class_token(vit: nn.Module) -> None:
    grid = FeatureGrid(vit, [1, 2], preprocessing=PREPROCESSING)(IMAGES)
    assert grid.shape == (5, 4, 4, 8)
    with torch.no_grad():
        hidden = vit(PREPROCESSING.batch(IMAGES), output_hidden_states=True).hidden_states
    expected = (hidden[2] + hidden[3])[:, 1:].reshape(5, 4, 4, 8) / 2
    torch.testing.assert_close(grid, expected)


def test_a_token_is_where_its_patch_is(vit: nn.Module) -> None:
    images = torch.zeros(1, 3, 32, 32)
    changed = images.clone()
    changed[..., 8:16, 24:32] = 1
    grid = FeatureGrid(vit, "**.patch_embeddings")
    difference = (grid(changed) - grid(images)).norm(dim=-1)[0]
    assert torch.nonzero(difference).tolist() == [[1, 3]]


def test_the_model_keeps_its_mode_and_no_gradients_are_kept(pyramid: nn.Module) -> None:
    pyramid.train()
    features = FeatureGrid(pyramid, "1", preprocessing=PREPROCESSING)(IMAGES)
    assert not features.requires_grad
    assert pyramid.training
    pyramid.eval()


class Patches(nn.Module):
    """Tokens of a model which says nothing about its patch size: 5 leading ones, then patches of 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Conv2d(3, 2, 8, stride=8)
        self.block = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        patches = self.tokens(images).flatten(2).mT
        return self.block(torch.cat([torch.zeros(len(images), 5, 2), patches], 1))


@pytest.mark.parametrize("size", [(32, 32), (32, 64)])
def test_leading_tokens_are_counted_where_the_model_does_not_tell(size: tuple[int, int]) -> None:
    model, images = Patches(), torch.rand(2, 3, *size)
    drop = None if size == (32, 32) else 5
    features = FeatureGrid(model, "block", drop_tokens=drop)(images)
    torch.testing.assert_close(features.movedim(-1, 1), model.tokens(images).detach())


@pytest.mark.parametrize(
    ("tokens", "size", "drop", "expected"),
    [(197, (224, 224), None, (14, 14, 1)), (201, (224, 224), None, (14, 14, 5)), (256, (224, 224), None, (16, 16, 0)),
     (128, (64, 32), 0, (16, 8, 0)), (129, (64, 32), 1, (16, 8, 1)), (1, (8, 8), None, (1, 1, 0))],
)  # fmt: skip
def test_token_grids(tokens: int, size: tuple[int, int], drop: int | None, expected: tuple[int, int, int]) -> None:
    assert token_grid(nn.Identity(), tokens, size, drop) == expected


def test_tokens_that_make_no_grid_are_refused(vit: nn.Module) -> None:
    with pytest.raises(ValueError, match="18 tokens do not make a grid for a 32×32 input"):
        token_grid(vit, 18, (32, 32), 1)
    with pytest.raises(ValueError, match="do not make a grid"):
        token_grid(vit, 3, (32, 32))
    with pytest.raises(ValueError, match="do not make a grid"):
        token_grid(nn.Identity(), 130, (64, 32), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregate": "group"}, "groups: needed"),
        ({"groups": [["0"]]}, "groups: needed"),
        ({"aggregate": "group", "groups": [["2"]]}, r"\['2'\] are not among the layers"),
    ],
)
def test_wrong_options_are_named(pyramid: nn.Module, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureGrid(pyramid, ["0", "1"], **options)


def test_a_layer_without_positions_is_refused(pyramid: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"tokens .* or a map .* are needed"):
        FeatureGrid(pyramid, "3", preprocessing=PREPROCESSING)(IMAGES)
    with pytest.raises(ValueError, match="at least one image"):
        FeatureGrid(pyramid, "1")([])


def test_the_packaged_network_gives_stride_8_features() -> None:
    from subspan.datasets import image_preprocessing, is_installed, load_model

    if not is_installed("efficientnet-lite0"):
        pytest.skip("the efficientnet-lite0 weights are not installed: subspan models install efficientnet-lite0")
    preprocessing = ImagePreprocessing(**{**image_preprocessing("efficientnet-lite0"), "size": 64})
    layers = ["_blocks.3", "_blocks.4", "_blocks.8", "_blocks.9", "_blocks.10"]
    grid = FeatureGrid(load_model("efficientnet-lite0"), layers, preprocessing=preprocessing)
    assert grid(IMAGES[:2]).shape == (2, 8, 8, 40 + 112)
