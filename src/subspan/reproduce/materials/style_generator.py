"""A small style-modulated generator with its encoder, pictures for it, and distances by an installed network."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.datasets import is_installed, load, load_model

from ..training import shuffled, train
from .image_features import labelled_images

WIDTHS = (64, 48, 32, 16)
"""Channels at 4, 8, 16 and 32 pixels."""


class ModulatedConv(nn.Module):
    """3 x 3 convolution whose input channels a latent scales through a linear map, then demodulated (StyleGAN2).

    Scaling the input, and the output by the weight's norm, is scaling the weight, without one weight a picture.
    """

    def __init__(self, latent: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.style = nn.Linear(latent, inputs)
        nn.init.normal_(self.style.weight, std=latent**-0.5)
        nn.init.ones_(self.style.bias)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3) / (3 * inputs**0.5))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Float[Tensor, "n i h w"], w: Float[Tensor, "n l"]) -> Float[Tensor, "n o h w"]:
        """The modulated maps, after a leaky ReLU."""
        scale = self.style(w)
        norm = (scale.square() @ self.weight.square().sum((2, 3)).mT + 1e-8).rsqrt()
        out = F.conv2d(x * scale[..., None, None], self.weight, padding=1) * norm[..., None, None]
        return 2**0.5 * F.leaky_relu(out + self.bias[:, None, None], 0.2)


class StyleGenerator(nn.Module):
    """Latents w (n, l), or one for each of the `first` convolutions and w for the rest, → pictures (n, c, 32, 32).

    A constant of 4 x 4, then at 8, 16 and 32 pixels an upsampling and a second modulated convolution, with skips to
    the picture. `edited` moves the latent of one resolution's upsampling convolution alone.
    """

    def __init__(self, channels: int, latent: int = 64) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.randn(1, WIDTHS[0], 4, 4))
        self.start = ModulatedConv(latent, WIDTHS[0], WIDTHS[0])
        self.first = nn.ModuleList(ModulatedConv(latent, a, b) for a, b in pairwise(WIDTHS))
        self.second = nn.ModuleList(ModulatedConv(latent, b, b) for b in WIDTHS[1:])
        self.picture = nn.ModuleList(nn.Conv2d(b, channels, 1) for b in WIDTHS)

    def forward(self, w: Float[Tensor, "n l"], moved: Float[Tensor, "n r l"] | None = None) -> Float[Tensor, "n c h w"]:
        """Pictures; moved (n, 3, l): the latents of the three upsampling convolutions, in place of w."""
        x = self.start(self.constant.expand(len(w), -1, -1, -1), w)
        picture = self.picture[0](x)
        for index, (first, second, out) in enumerate(zip(self.first, self.second, list(self.picture)[1:])):
            # Nearest neighbours: forward derivatives of bilinear maps are not everywhere to be had.
            x = F.interpolate(x, scale_factor=2)
            x = second(first(x, w if moved is None else moved[:, index]), w)
            picture = F.interpolate(picture, scale_factor=2) + out(x)
        return picture


class StyleAutoencoder(nn.Module):
    """Pictures (n, c, 32, 32) → a Gaussian code z → mapping network → latent w → `StyleGenerator`."""

    def __init__(self, channels: int, latent: int = 64) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for a, b in zip((channels, 24, 48), (24, 48, 64)):
            parts += [nn.Conv2d(a, b, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        self.encoder = nn.Sequential(*parts, nn.Flatten(), nn.Linear(64 * 16, 2 * latent))
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Linear(latent, latent), nn.LeakyReLU(0.2)]
        self.mapping = nn.Sequential(*layers[:-1])
        self.generator = StyleGenerator(channels, latent)

    def code(self, images: Float[Tensor, "n c h w"]) -> tuple[Tensor, Tensor]:
        """Mean and log variance of z."""
        mean, log_variance = self.encoder(images).chunk(2, 1)
        return mean, log_variance.clamp(-10, 4)

    def latents(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n l"]:
        """w of pictures, at the mean of their codes."""
        return self.mapping(self.code(images)[0])

    def loss(self, images: Float[Tensor, "n c h w"], distance: FeatureDistance, *, beta: float) -> Float[Tensor, ""]:
        """Squared error of pixels, distance of features and beta times the divergence of the code from N(0, I)."""
        mean, log_variance = self.code(images)
        z = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        made = self.generator(self.mapping(z))
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        return F.mse_loss(made, images) + distance(made, images).mean() + beta * divergence


class FeatureDistance(nn.Module):
    """Squared distance (n,) of pictures: of channels at unit length, a mean over places, summed over maps (as LPIPS).

    The maps are those of EfficientNet-Lite0 after its stem and its blocks 0, 2 and 4 on 32 pixels; without that model,
    squared differences of pixels. `name` says which.
    """

    def __init__(self) -> None:
        super().__init__()
        self.name = "squared difference of pixels"
        self.blocks: nn.ModuleList | None = None
        if is_installed("efficientnet-lite0"):
            model: Any = load_model("efficientnet-lite0").requires_grad_(False)
            self.stem = nn.Sequential(model._conv_stem, model._bn0, nn.ReLU6())
            self.blocks = nn.ModuleList(model._blocks[:5])
            self.name = "unit-length features of EfficientNet-Lite0, stem and blocks 0, 2 and 4"
        self.eval()

    def train(self, mode: bool = True) -> FeatureDistance:
        """Its batch statistics never change."""
        return super().train(False)

    def maps(self, images: Float[Tensor, "n c h w"]) -> list[Tensor]:
        """The maps, of pixels from -1 to 1."""
        x = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        if self.blocks is None:
            return [x]
        found = [self.stem(x)]
        for index, block in enumerate(self.blocks):
            x = block(found[0] if index == 0 else x)
            if index in (0, 2, 4):
                found.append(x)
        return found

    def forward(self, a: Float[Tensor, "n c h w"], b: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
        """Squared distances."""
        total = a.new_zeros(len(a))
        for x, y in zip(self.maps(a), self.maps(b)):
            if self.blocks is not None:
                x, y = (v * (v.square().sum(1, keepdim=True) + 1e-6).rsqrt() for v in (x, y))
            total = total + (x - y).square().sum(1).flatten(1).mean(1)
        return total


class Pictures(NamedTuple):
    """Name, training and held-out pictures of 32 pixels from -1 to 1, and the factors of each (n, f), or None."""

    name: str
    train: Tensor
    test: Tensor
    factors: dict[str, Any] | None


def garments(train: int, test: int) -> Pictures:
    """Fashion-MNIST, or handwritten digits where the data folder lacks it."""
    data = labelled_images("fashion_mnist")
    order = np.random.default_rng(0).permutation(data.train)[:train]
    shown, held_out = (
        _at_32(torch.from_numpy(np.asarray(data.images[index]))[:, None].float()) for index in (order, data.test[:test])
    )
    return Pictures(data.name, shown, held_out, None)


def sprites(test: int) -> Pictures:
    """Game characters with seven known factors."""
    data = load("lpc_sprites")
    order = np.random.default_rng(0).permutation(len(data["x"]))
    x = _at_32(torch.from_numpy(data["x"][order]).movedim(-1, 1).float())
    factors = torch.from_numpy(data["factors"][order].astype(np.int64))
    n = len(x) - test
    known = {"sizes": data["factor_sizes"].tolist(), "train": factors[:n], "test": factors[n:]}
    return Pictures("lpc_sprites", x[:n], x[n:], known)


def _at_32(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h2 w2"]:
    """Bytes as -1 to 1 at 32 pixels: cut in half, or framed by black."""
    x = x / 127.5 - 1
    if x.shape[-1] > 32:
        return F.avg_pool2d(x, x.shape[-1] // 32)
    if x.shape[-1] < 16:
        x = F.interpolate(x, scale_factor=32 // x.shape[-1])
    margin = (32 - x.shape[-1]) // 2
    return F.pad(x, (margin,) * 4, value=-1.0)


class FactorNetwork(nn.Module):
    """Predicts every factor of a sprite."""

    def __init__(self, channels: int, sizes: list[int]) -> None:
        super().__init__()
        self.sizes = sizes
        parts: list[nn.Module] = []
        for a, b in zip((channels, 24, 48), (24, 48, 64)):
            parts += [nn.Conv2d(a, b, 4, stride=2, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*parts, nn.Flatten(), nn.Linear(64 * 16, sum(sizes)))

    def forward(self, images: Float[Tensor, "n c h w"]) -> tuple[Tensor, ...]:
        """Logits, one tensor a factor."""
        return self.layers(images).split(self.sizes, 1)


def factor_network(data: Pictures, epochs: int, seed: int) -> tuple[FactorNetwork, float]:
    """The network, and its mean held-out accuracy."""
    assert data.factors is not None
    torch.manual_seed(seed)
    network = FactorNetwork(data.train.shape[1], data.factors["sizes"])

    def loss(model: Any, batch: Any) -> Tensor:
        return torch.stack([F.cross_entropy(z, y) for z, y in zip(model(batch[0]), batch[1].T)]).sum()

    batches = shuffled(data.train, data.factors["train"], batch_size=64, seed=seed)
    train(network, loss, batches, epochs=epochs, learning_rate=2e-3)
    with torch.no_grad():
        right = [(z.argmax(1) == y).float().mean() for z, y in zip(network(data.test), data.factors["test"].T)]
    return network, float(torch.stack(right).mean())
