"""A variational autoencoder with a small block of coordinates for each factor, taught by contrast (XFactors, 2026)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.geometry import Blocks
from subspan.nn import MLP, ConvDecoder, ConvEncoder, cross_correlation, info_nce

RESIDUAL = "residual"
"""Name of the block that has no factor."""
_LARGEST_LOG_VARIANCE = 20.0


class LatentPosterior(NamedTuple):
    """Independent normal coordinates a row.

    Attributes
    ----------
    mean, log_variance
        (n, d) each.
    """

    mean: Float[Tensor, "n d"]
    log_variance: Float[Tensor, "n d"]

    def draw(self, generator: torch.Generator | None = None) -> Float[Tensor, "n d"]:
        """A draw of each row."""
        noise = torch.empty_like(self.mean).normal_(generator=generator)
        return self.mean + (self.log_variance / 2).exp() * noise

    def divergence(self) -> Float[Tensor, "n d"]:
        """Kullback-Leibler divergence from the standard normal, of each coordinate, in nats."""
        return (self.mean.square() + self.log_variance.exp() - 1 - self.log_variance) / 2


class Reconstruction(NamedTuple):
    """What an `XFactorsVAE` makes of a batch.

    Attributes
    ----------
    x
        What the decoder makes of `z`.
    posterior
        Of the encoders.
    z
        (n, d) drawn from it.
    """

    x: Tensor
    posterior: LatentPosterior
    z: Float[Tensor, "n d"]


class XFactorsVAE(nn.Module):
    """Images (n, c, h, w), or vectors (n, p), to blocks of coordinates, one a factor and one for the rest, and back.

    The residual and the factors have an encoder each, with no weights in common; one decoder reads all blocks.

    Parameters
    ----------
    input_shape
        (c, h, w) of images, or (p,) of vectors.
    factors
        Dimension of each factor's block, by name.
    residual_dim
        Dimension of the block of all else.
    width
        Channels of the first convolution; of vectors, hidden layers have 8 times as many units.
    block
        "residual" or "plain", as in `ConvEncoder`.
    decode_directions
        The decoder sees the direction of a factor's block alone, as the contrast does: nothing else can hide in its
        length.
    initial_log_variance
        Added to the log variances of the factors' blocks. Where it is low, a short training is not spent on taking
        noise out of them, while the residual still starts as noise and has to add what they lack.
    resize
        As in `ConvDecoder`.
    encoder
        Any module from what comes in to 2 d numbers a row, all means before all log variances, in place of the two.
    decoder
        Any module from d numbers a row to what came in.

    Raises
    ------
    ValueError
        For a factor named "residual", no factor, sizes below 1, and sides of images that do not fit; in use for an
        encoder that gives another number of values.

    References
    ----------
    XFactors, arXiv 2601.21688, and the code ICML26-anon/XFactors. Decoded directions and other encoders are ours.

    Examples
    --------
    >>> import torch
    >>> from subspan.represent import XFactorsVAE
    >>> model = XFactorsVAE((1, 16, 16), {"shape": 2, "size": 2}, residual_dim=4, width=4).eval()
    >>> x, donor = torch.rand(3, 1, 16, 16), torch.rand(3, 1, 16, 16)
    >>> model.encode(x).mean.shape, model.swap(x, donor, "shape").shape, model.traverse(x, "size", 5).shape
    (torch.Size([3, 8]), torch.Size([3, 1, 16, 16]), torch.Size([3, 5, 1, 16, 16]))
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        factors: Mapping[str, int],
        *,
        residual_dim: int = 126,
        width: int = 48,
        block: Literal["residual", "plain"] = "residual",
        decode_directions: bool = False,
        initial_log_variance: float = 0.0,
        resize: bool = False,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not factors or RESIDUAL in factors:
            raise ValueError(f"factors: at least one is needed, and none named {RESIDUAL!r}, got {list(factors)}")
        for name, size in {"residual_dim": residual_dim, "width": width, **factors}.items():
            if size < 1:
                raise ValueError(f"{name}: must be at least 1, got {size}")
        if len(input_shape) not in (1, 3):
            raise ValueError(f"input_shape: expected (c, h, w) or (p,), got {tuple(input_shape)}")
        self.blocks = Blocks({RESIDUAL: residual_dim, **factors})
        self.decode_directions, self.initial_log_variance = decode_directions, initial_log_variance
        sizes = (residual_dim, self.blocks.dim - residual_dim)
        shape: Any = tuple(input_shape)
        hidden = (8 * width, 8 * width)
        vectors: dict[str, Any] = {"norm": "batch", "activation": "leaky_relu"}

        def encode(dim: int) -> nn.Module:
            if len(shape) == 1:
                return MLP((*shape, *hidden, 2 * dim), **vectors)
            return ConvEncoder(shape, 2 * dim, width=width, block=block)

        self.encoders = nn.ModuleList([encode(size) for size in sizes] if encoder is None else [encoder])
        if decoder is not None:
            self.decoder = decoder
        elif len(shape) == 1:
            self.decoder = MLP((self.blocks.dim, *hidden, *shape), **vectors)
        else:
            self.decoder = ConvDecoder(self.blocks.dim, shape, width=width, block=block, resize=resize)

    @property
    def factors(self) -> list[str]:
        """Names of the factors, in the order of their blocks."""
        return [name for name in self.blocks.sizes if name != RESIDUAL]

    def encode(self, x: Float[Tensor, "n p *s"]) -> LatentPosterior:
        """Means and log variances of all blocks."""
        parts = [encoder(x).chunk(2, -1) for encoder in self.encoders]
        mean, log_variance = (torch.cat(part, -1) for part in zip(*parts))
        if mean.shape[-1] != self.blocks.dim or log_variance.shape != mean.shape:
            given = mean.shape[-1] + log_variance.shape[-1]
            raise ValueError(f"encoder: expected 2 x {self.blocks.dim} numbers a row, for all blocks, got {given}")
        if self.initial_log_variance:
            rest = self.blocks.sizes[RESIDUAL]
            log_variance = torch.cat([log_variance[:, :rest], log_variance[:, rest:] + self.initial_log_variance], 1)
        return LatentPosterior(mean, log_variance.clamp(-_LARGEST_LOG_VARIANCE, _LARGEST_LOG_VARIANCE))

    def means(self, x: Float[Tensor, "n p *s"]) -> Float[Tensor, "n d"]:
        """Means of all blocks: the representation of x."""
        return self.encode(x).mean

    def decode(self, z: Float[Tensor, "n d"]) -> Float[Tensor, "n p *s"]:
        """What coordinates stand for."""
        if self.decode_directions:
            parts = self.blocks.split(z)
            turned = {name: part if name == RESIDUAL else F.normalize(part, dim=-1) for name, part in parts.items()}
            z = self.blocks.join(turned)
        return self.decoder(z)

    def forward(self, x: Float[Tensor, "n p *s"]) -> Reconstruction:
        """A draw of the posterior, decoded; in evaluation too, as in the authors' code."""
        posterior = self.encode(x)
        z = posterior.draw()
        return Reconstruction(self.decode(z), posterior, z)

    def swap(self, x: Float[Tensor, "n p *s"], donor: Float[Tensor, "n p *s"], *names: str) -> Float[Tensor, "n p *s"]:
        """Each x with the named blocks of its donor."""
        return self.decode(self.blocks.swap(self.means(x), self.means(donor), *names))

    def traverse(self, x: Float[Tensor, "n p *s"], name: str, steps: int = 8) -> Float[Tensor, "n t p *s"]:
        """Each x with a block turned once about 0, in the plane of its first two coordinates, from where it is.

        A block of one coordinate takes `steps` values from -2 to 2.
        """
        if steps < 1:
            raise ValueError(f"steps: at least 1, got {steps}")
        z = self.means(x)
        parts = self.blocks.split(z)
        way = []
        for step in range(steps):
            block = parts[name].clone() if name in parts else self.blocks.coordinates(z, name)
            if block.shape[-1] == 1:
                block.fill_(-2 + 4 * step / max(1, steps - 1))
            else:
                angle = 2 * math.pi * step / steps
                first, second = block[:, 0].clone(), block[:, 1].clone()
                block[:, 0] = math.cos(angle) * first - math.sin(angle) * second
                block[:, 1] = math.sin(angle) * first + math.cos(angle) * second
            way.append(self.decode(self.blocks.join({**parts, name: block})))
        return torch.stack(way, 1)


class XFactorsLoss(nn.Module):
    """Reconstruction, divergence and, in each factor's block, contrast of rows with equal values of the factor.

    ``loss(model, (x, labels))`` of an `XFactorsVAE`, so that ``Objective(model, XFactorsLoss(…))`` trains it. Labels
    are (n, k) whole numbers, in the order of the factors; a negative one is unknown, and its row does not count for
    that factor.

    Parameters
    ----------
    temperature
        Of the cosines of a block.
    kl_weight
        Of all divergence.
    beta_residual, beta_factors
        Of the divergence of the residual block and of the factors', times `kl_weight`.
    contrast_weight
        Of each factor's contrast; None for 0.1 over their number.
    correlation_weight
        Of the Frobenius norm of the correlations between the residual's means and the factors'.

    Attributes
    ----------
    batches, idle
        Batches in training, and in how many of them no value of a factor was repeated, so that it was not taught.

    Raises
    ------
    ValueError
        For a temperature that is not positive and weights below 0; in use for labels that do not fit, and for a term
        that is not finite, by its name.

    Notes
    -----
    One near row of the same value satisfies the contrast: the sum over positives is inside the logarithm. The authors
    cut the norm of correlations at 1, from where on it has no gradient; here it is not cut.

    References
    ----------
    XFactors, arXiv 2601.21688, and the code ICML26-anon/XFactors.

    Examples
    --------
    >>> import torch
    >>> from subspan.represent import XFactorsLoss, XFactorsVAE
    >>> model = XFactorsVAE((6,), {"shape": 2}, residual_dim=2, width=2)
    >>> value, terms = XFactorsLoss()(model, (torch.randn(8, 6), torch.arange(8)[:, None] % 2))
    >>> list(terms)
    ['reconstruction', 'kl_residual', 'kl_factors', 'contrast_shape']
    """

    def __init__(
        self,
        *,
        temperature: float = 0.03,
        kl_weight: float = 1e-6,
        beta_residual: float = 1.0,
        beta_factors: float = 1.0,
        contrast_weight: float | None = None,
        correlation_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature: must be positive, got {temperature}")
        weights = {"kl_weight": kl_weight, "beta_residual": beta_residual, "beta_factors": beta_factors}
        weights |= {"contrast_weight": contrast_weight or 0.0, "correlation_weight": correlation_weight}
        for name, value in weights.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: must be 0 or more and finite, got {value}")
        self.temperature, self.kl_weight = temperature, kl_weight
        self.beta_residual, self.beta_factors = beta_residual, beta_factors
        self.contrast_weight, self.correlation_weight = contrast_weight, correlation_weight
        self.batches = 0
        self.idle: dict[str, int] = {}

    def forward(
        self, model: XFactorsVAE, batch: Sequence[Tensor]
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The loss of a batch, and its terms by name, weighted."""
        x, labels = batch[0], batch[1]
        if labels.shape != (len(x), len(model.factors)) or labels.is_floating_point():
            wanted = f"({len(x)}, {len(model.factors)}) whole numbers, a column for each of {model.factors}"
            raise ValueError(f"labels: expected {wanted}, got {tuple(labels.shape)} of {labels.dtype}")
        found = model(x)
        terms = dict(self._terms(model.blocks, found, x, labels))
        total = torch.stack(list(terms.values())).sum()
        if not bool(total.detach().isfinite()):
            lost = [name for name, term in terms.items() if not bool(term.detach().isfinite())]
            raise ValueError(f"loss: {', '.join(lost)} not finite; lower learning_rate, or look for NaN in the batch")
        return total, terms

    def _terms(
        self, blocks: Blocks, found: Reconstruction, x: Tensor, labels: Tensor
    ) -> Iterator[tuple[str, Float[Tensor, ""]]]:
        yield "reconstruction", F.mse_loss(found.x.float(), x.float())
        drawn, means = blocks.split(found.z), blocks.split(found.posterior.mean)
        names = [name for name in blocks.sizes if name != RESIDUAL]
        divergence = blocks.split(found.posterior.divergence())
        taught = torch.cat([divergence[name] for name in names], -1)
        yield "kl_residual", self.kl_weight * self.beta_residual * divergence[RESIDUAL].sum(-1).mean()
        yield "kl_factors", self.kl_weight * self.beta_factors * taught.sum(-1).mean()
        weight = 0.1 / len(names) if self.contrast_weight is None else self.contrast_weight
        self.batches += self.training
        for place, name in enumerate(names):
            if weight:
                yield f"contrast_{name}", weight * self.contrast(drawn[name], labels[:, place], name)
        if self.correlation_weight:
            factors = torch.cat([means[name] for name in names], -1)
            yield "correlation", self.correlation_weight * cross_correlation(means[RESIDUAL], factors).norm()

    def contrast(self, z: Float[Tensor, "n d"], labels: Int[Tensor, " n"], name: str) -> Float[Tensor, ""]:
        """The contrast of one block; 0, with a graph, where no value is repeated."""
        known = labels >= 0
        z, labels = z[known].float(), labels[known]
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        positives = (labels[:, None] == labels) & ~itself
        if not bool(positives.any()):
            self.idle[name] = self.idle.get(name, 0) + self.training
            return 0.0 * z.sum()
        with torch.autocast(z.device.type, enabled=False):
            return info_nce(z, z, positives, itself, temperature=self.temperature, combine="log-sum")

    def extra_repr(self) -> str:
        """Shown by print."""
        betas = f"beta_residual={self.beta_residual:g}, beta_factors={self.beta_factors:g}"
        return f"temperature={self.temperature:g}, kl_weight={self.kl_weight:g}, {betas}"
