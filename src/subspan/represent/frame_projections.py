"""Frame projections: series seen in time, in an orthonormal basis and in an overcomplete frame, not augmented."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.geometry import Subspace
from subspan.nn import MLP, FrameView, LatentMapper, ScalogramEncoder, SeriesEncoder, SpectrumEncoder, nt_xent

TIME = "time"
"""Name of the series itself among its views."""
# A channel that varies less than this share of its size is constant.
_FLAT = 1e-6


class SeriesFeatures(nn.Module):
    """Series (b, c, l) → features (b, d + m d): an encoder's vector, and what m small maps make of it.

    This is all that is needed to use a trained `FrameNetwork`: the other views and their encoders are not.

    Parameters
    ----------
    channels
        c.
    encoder
        Series → vectors (b, d). Where it has a parameter `mask`, it is given the places (b, l) that are no filling.
    mappers
        Names of the views that are guessed, with the map to each: (b, d) → (b, d).
    per_window
        Each channel of each series is standardised by its own mean and deviation; without it by `mean` and `scale`.

    Attributes
    ----------
    mean, scale
        (c, 1) buffers; 0 and 1 until they are set.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import LatentMapper, SeriesEncoder
    >>> from subspan.represent import SeriesFeatures
    >>> module = SeriesFeatures(2, SeriesEncoder(2, 8, width=4), {"fourier": LatentMapper(8)}).eval()
    >>> module(torch.randn(3, 2, 40)).shape
    torch.Size([3, 16])
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self, channels: int, encoder: nn.Module, mappers: Mapping[str, nn.Module], *, per_window: bool = False
    ) -> None:
        super().__init__()
        self.channels, self.encoder, self.mappers = channels, encoder, nn.ModuleDict(mappers)
        self.per_window = per_window
        self.takes_mask = "mask" in inspect.signature(encoder.forward).parameters
        self.register_buffer("mean", torch.zeros(channels, 1))
        self.register_buffer("scale", torch.ones(channels, 1))

    def set_scale(self, x: Float[Tensor, "n c l"], mask: Bool[Tensor, "n l"] | None = None) -> None:
        """Take mean and deviation of each channel from these series; constant channels are left at 0."""
        wide = x.double().movedim(1, 0)
        rows = wide.flatten(1) if mask is None else wide[:, mask]
        mean, deviation = rows.mean(1, keepdim=True), rows.std(1, correction=0, keepdim=True)
        flat = deviation <= _FLAT * rows.abs().amax(1, keepdim=True)
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(flat, 1, deviation))

    def standardize(self, x: Float[Tensor, "b c l"], mask: Bool[Tensor, "b l"] | None = None) -> Float[Tensor, "b c l"]:
        """Series of mean 0 and deviation 1, filling at 0."""
        if x.shape[1] != self.channels:
            raise ValueError(f"x: expected {self.channels} channels, got {x.shape[1]}")
        kept = torch.ones_like(x[:, :1]) if mask is None else mask.unsqueeze(1).to(x)
        if not self.per_window:
            return (x - self.mean) / self.scale * kept
        count = kept.sum(-1, keepdim=True)
        mean = (x * kept).sum(-1, keepdim=True) / count
        deviation = (((x - mean) * kept).square().sum(-1, keepdim=True) / count).sqrt()
        flat = deviation <= _FLAT * (x * kept).abs().amax(-1, keepdim=True)
        return (x - mean) / torch.where(flat, 1, deviation) * kept

    def encode(self, x: Float[Tensor, "b c l"], mask: Bool[Tensor, "b l"] | None = None) -> Float[Tensor, "b d"]:
        """The encoder's vectors of series that are standardised."""
        return self.encoder(x, mask=mask) if self.takes_mask and mask is not None else self.encoder(x)

    def forward(self, x: Float[Tensor, "b c l"], mask: Bool[Tensor, "b l"] | None = None) -> Float[Tensor, "b m"]:
        """The encoder's vector, then the guess of each other view's."""
        own = self.encode(self.standardize(x, mask), mask)
        return torch.cat([own, *(mapper(own) for mapper in self.mappers.values())], 1)


class FrameNetwork(nn.Module):
    """Encoders of a series and of its views, projectors into one space, and the small maps between them.

    Parameters
    ----------
    channels, length
        c and l of the series; shorter ones are filled up to l.
    views
        Views by name.
    dim
        d, of all vectors.
    width
        Of the encoder of series and that of views along two axes; of views along one axis half of it.
    mapper_hidden
        Channels of each `LatentMapper`.
    dropout
        Of the encoder of series.
    encoder
        Any module from series (b, c, l) to vectors (b, d), in place of `SeriesEncoder`.
    per_window
        As in `SeriesFeatures`.

    Attributes
    ----------
    features
        The `SeriesFeatures` with the encoder of series and the maps of the second stage.

    Raises
    ------
    ValueError
        For no view, one named "time", and an encoder of another dimension.

    References
    ----------
    Demirel & Holz (2025), arXiv 2510.22655.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import FourierView, MorletView
    >>> from subspan.represent import FrameNetwork
    >>> views = {"fourier": FourierView(), "morlet": MorletView(12, (1, 20))}
    >>> network = FrameNetwork(2, 40, views=views, dim=16, width=4)
    >>> [h.shape for h in network.encode(torch.randn(3, 2, 40))], network(torch.randn(3, 2, 40)).shape
    ([torch.Size([3, 16]), torch.Size([3, 16]), torch.Size([3, 16])], torch.Size([3, 48]))
    """

    def __init__(
        self,
        channels: int,
        length: int,
        *,
        views: Mapping[str, FrameView],
        dim: int = 128,
        width: int = 32,
        mapper_hidden: int = 64,
        dropout: float = 0.5,
        encoder: nn.Module | None = None,
        per_window: bool = False,
    ) -> None:
        super().__init__()
        if not views or TIME in views:
            raise ValueError(f"views: at least one, and none named {TIME!r}, got {list(views)}")
        self.length, self.views = length, nn.ModuleDict(views)
        own = SeriesEncoder(channels, dim, width=width, dropout=dropout) if encoder is None else encoder
        silence = torch.zeros(2, channels, length)
        if encoder is not None and (found := tuple(encoder(silence).shape)) != (2, dim):
            raise ValueError(f"encoder: expected vectors (2, {dim}) of two series, got {found}")
        shapes = {name: tuple(view(silence).shape[1:]) for name, view in views.items()}
        self.view_encoders = nn.ModuleDict(
            {
                name: SpectrumEncoder(shapes[name], dim, width=max(1, width // 2))
                if view.dims == 1
                else ScalogramEncoder(shapes[name], dim, width=width)
                for name, view in views.items()
            }
        )
        self.projectors = nn.ModuleDict({name: MLP((dim, dim, dim), activation="relu") for name in (TIME, *views)})
        self.embedding_mappers = nn.ModuleDict({name: LatentMapper(dim, mapper_hidden) for name in views})
        mappers = {name: LatentMapper(dim, mapper_hidden) for name in views}
        self.features = SeriesFeatures(channels, own, mappers, per_window=per_window)

    @property
    def names(self) -> list[str]:
        """Of the series itself and of its views."""
        return [TIME, *self.views]

    def encode(self, x: Float[Tensor, "b c l"], mask: Bool[Tensor, "b l"] | None = None) -> list[Float[Tensor, "b d"]]:
        """Vectors h of the series and of each view of it; views are of the series with its filling of 0."""
        x = self.features.standardize(x, mask)
        seen = [self.view_encoders[name](view(x)) for name, view in self.views.items()]
        return [self.features.encode(x, mask), *seen]

    def forward(self, x: Float[Tensor, "b c l"], mask: Bool[Tensor, "b l"] | None = None) -> Float[Tensor, "b m"]:
        """Features, for which the series alone is looked at."""
        return self.features(x, mask)


class CrossViewContrast(nn.Module):
    """First stage: contrast of every pair of views, and maps that guess the other views' embeddings from the series'.

    ``loss(network, batch)`` of a `FrameNetwork`, so that ``Objective(network, CrossViewContrast())`` trains it; a batch
    is (x,), or (x, mask) with False where series are filled up.

    Parameters
    ----------
    temperature
        Of the cosines.
    mapper_weight
        Of the mean absolute error of guessed embeddings. Guesses are perfect where all embeddings are one point: the
        paper's weight, which sums over coordinates (d in place of 1), held them there in short trainings.

    Raises
    ------
    ValueError
        For a temperature that is not positive and a negative weight; in use for one series, which has no rivals.

    References
    ----------
    Demirel & Holz (2025), arXiv 2510.22655; the paper sums errors over the d coordinates, its
    code divides their mean by the size of the batch.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import FourierView
    >>> from subspan.represent import CrossViewContrast, FrameNetwork
    >>> network = FrameNetwork(1, 32, views={"fourier": FourierView()}, dim=8, width=4)
    >>> value, terms = CrossViewContrast()(network, (torch.randn(6, 1, 32),))
    >>> list(terms)
    ['contrast_time_fourier', 'mapped_fourier']
    """

    def __init__(self, temperature: float = 0.15, mapper_weight: float = 1.0) -> None:
        super().__init__()
        if not temperature > 0 or not mapper_weight >= 0:
            raise ValueError(
                f"temperature, mapper_weight: positive, and 0 or more, got {temperature} and {mapper_weight}"
            )
        self.temperature, self.mapper_weight = temperature, mapper_weight

    def forward(
        self, model: FrameNetwork, batch: Sequence[Tensor]
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The loss of a batch, and its terms by name."""
        encoded = dict(zip(model.names, model.encode(*batch)))
        z = {name: F.normalize(model.projectors[name](h).float(), dim=-1) for name, h in encoded.items()}
        terms = {
            f"contrast_{first}_{second}": nt_xent(z[first], z[second], temperature=self.temperature)
            for first, second in combinations(model.names, 2)
        }
        for name, mapper in model.embedding_mappers.items() if self.mapper_weight else ():
            terms[f"mapped_{name}"] = self.mapper_weight * (mapper(z[TIME]) - z[name]).abs().mean()
        return torch.stack(list(terms.values())).sum(), terms

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"temperature={self.temperature:g}, mapper_weight={self.mapper_weight:g}"


def mapping_loss(mappers: nn.ModuleDict, batch: Sequence[Float[Tensor, "b d"]]) -> dict[str, Float[Tensor, ""]]:
    """Second stage: mean absolute error with which each map guesses its view's vector from that of the series.

    Maps have no parameters in common, so that one optimizer is the same as one for each.

    Parameters
    ----------
    mappers
        Of `FrameNetwork.features`.
    batch
        Vectors of the series and of each view, as `FrameNetwork.encode` gives.

    Returns
    -------
    The errors by the name of the view.

    Examples
    --------
    >>> import torch
    >>> from subspan.represent import mapping_loss
    >>> maps = torch.nn.ModuleDict({"fourier": torch.nn.Identity()})
    >>> mapping_loss(maps, (torch.zeros(2, 3), torch.ones(2, 3)))
    {'fourier': tensor(1.)}
    """
    own, *others = batch
    return {name: (mapper(own) - h).abs().mean() for (name, mapper), h in zip(mappers.items(), others, strict=True)}


class ViewGeometry(NamedTuple):
    """How the vectors of two views of the same n samples lie; all angles in radians.

    Attributes
    ----------
    angles
        (n,) between a sample's two vectors; near a right angle where the spaces know nothing of each other.
    differences
        (n (n - 1) / 2,) angle between two samples in one space, less that in the other; all 0 where one space is the
        other, turned.
    principal
        Principal angles (k,) between the spaces as functions on the samples, smallest first: arc cosines of canonical
        correlations, of coordinates with most variance, a tenth as many as there are samples.
    """

    angles: Float[Tensor, " n"]
    differences: Float[Tensor, " p"]
    principal: Float[Tensor, " k"]


def view_geometry(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> ViewGeometry:
    """Compare two views' vectors of the same samples.

    Parameters
    ----------
    x, y
        (n, d) each, row i of one with row i of the other.

    Returns
    -------
    ViewGeometry

    Raises
    ------
    ValueError
        For other shapes, or fewer than three samples.

    References
    ----------
    Demirel & Holz (2025), arXiv 2510.22655, section on geometry; principal angles are ours.

    Examples
    --------
    >>> import torch
    >>> from subspan.represent import view_geometry
    >>> x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    >>> found = view_geometry(x, x.flip(1))  # the same space, turned
    >>> round(float(found.differences.abs().max()), 3)
    0.0
    """
    if x.ndim != 2 or x.shape != y.shape or len(x) < 3:
        raise ValueError(f"x, y: expected vectors of the same three samples or more, got {x.shape} and {y.shape}")
    x, y = x.double(), y.double()
    u, v = F.normalize(x, dim=1), F.normalize(y, dim=1)
    first, second = torch.triu_indices(len(x), len(x), 1)
    between = [(w @ w.mT)[first, second].clamp(-1, 1).acos() for w in (u, v)]
    own, other = (_functions(w) for w in (x, y))
    return ViewGeometry((u * v).sum(1).clamp(-1, 1).acos(), between[0] - between[1], own.angles(other))


def _functions(x: Float[Tensor, "n d"]) -> Subspace:
    """The space of the coordinates with most variance, as functions on the samples: a tenth as many as samples."""
    found = Subspace.fit(x, rank=0.99)
    return Subspace.span(found.truncate(min(found.dim, max(1, len(x) // 10))).coordinates(x))
