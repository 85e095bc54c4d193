"""Linear layers of exactly orthogonal factors and few, equal gains: what a generator reads its latent code through."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.base import check_finite
from subspan.geometry import Subspace
from subspan.geometry.grassmann import orthonormalize, random_basis

from .orthogonal import register_orthonormal

_GAINS = ("mean", "one", "learned")


class HouseholderFrame(nn.Module):
    """A learnable orthonormal frame (d, k), as compact Householder reflections; `subspace()` hands it on.

    Parameters
    ----------
    d, k
        Rows and columns, k <= d.
    start
        A matrix (d, k) of full rank, whose nearest frame it begins at; None: random.
    generator
        Of the random start.

    Raises
    ------
    ValueError
        For k outside [1, d], or a start without full rank.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import HouseholderFrame
    >>> frame = HouseholderFrame(6, 2)()
    >>> torch.allclose(frame.mT @ frame, torch.eye(2), atol=1e-5)
    True
    """

    frame: Tensor

    def __init__(
        self,
        d: int,
        k: int,
        start: Float[Tensor, "d k"] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= k <= d:
            raise ValueError(f"k: must lie in [1, {d}], got {k}")
        first = random_basis(d, k, generator=generator, dtype=torch.float32) if start is None else start.detach()
        self.frame = nn.Parameter(first.clone())
        register_orthonormal(self, "frame")

    def forward(self) -> Float[Tensor, "d k"]:
        """The frame."""
        return self.frame

    def subspace(self) -> Subspace:
        """Its span, with the columns as basis."""
        return Subspace(orthonormalize(self.frame.detach().double()))


class HouseholderProjector(nn.Module):
    """Rows x (…, in) → gain · U V'x + bias with orthonormal U (out, k), V (in, k): k directions of one gain.

    U and V are `HouseholderFrame`s, orthonormal through all training. `from_linear` starts from a trained layer.
    `directions` are V's columns; U V' fixes only their plane, so single ones are a choice of gauge until `canonicalize`
    makes it.

    Parameters
    ----------
    in_features, out_features
        Widths of what comes in and goes out.
    rank
        k, at most the smaller of both.
    gain
        "mean" and "one" are fixed, and 1 here; "learned" is a scalar parameter that starts at 1.
    bias
        Whether there is a bias.
    generator
        Of the random frames.

    Raises
    ------
    ValueError
        For a rank outside [1, min(in, out)], or another gain.

    References
    ----------
    Song et al. (ICCV 2023), arXiv 2307.08012.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import HouseholderProjector
    >>> layer = HouseholderProjector.from_linear(torch.nn.Linear(6, 4), rank=2, gain="one")
    >>> torch.linalg.svdvals(layer.weight.detach()).round(decimals=3)
    tensor([1., 1., 0., 0.])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 10,
        *,
        gain: str = "one",
        bias: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(f"rank: must lie in [1, {min(in_features, out_features)}], got {rank}")
        if gain not in _GAINS:
            raise ValueError(f"gain: expected one of {_GAINS}, got {gain!r}")
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.u = HouseholderFrame(out_features, rank, generator=generator)
        self.v = HouseholderFrame(in_features, rank, generator=generator)
        one = torch.ones(())
        if gain == "learned":
            self.gain = nn.Parameter(one)
        else:
            self.register_buffer("gain", one)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    gain: Tensor

    @classmethod
    def from_linear(cls, linear: nn.Module, rank: int = 10, *, gain: str = "mean") -> HouseholderProjector:
        """The layer with the leading k singular vectors of a trained one, and its bias.

        gain: "mean" of the k singular values ("learned" starts there), or "one". Where the weight has a rank below k
        the missing directions are filled with others, with a warning. Raises ValueError for one that is not finite.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected a torch.nn.Linear, got {type(linear).__name__}")
        weight = check_finite(linear.weight.detach(), "linear.weight").double()
        layer = cls(linear.in_features, linear.out_features, rank, gain=gain, bias=linear.bias is not None)
        # Of a layer of half precision one in float32: its frames are to stay orthonormal.
        layer = layer.to(linear.weight.device, torch.promote_types(linear.weight.dtype, torch.float32))
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        tolerance = torch.finfo(linear.weight.dtype).eps * max(weight.shape)
        known = int((s[:rank] > tolerance * s[0]).sum())
        if known < rank:
            warnings.warn(f"rank: the weight has {known} directions, {rank - known} are filled up", stacklevel=2)
        # Left and right vectors of zero singular values are orthonormal too: they are the filling.
        with torch.no_grad():
            layer.u.frame = u[:, :rank].to(layer.gain.dtype)
            layer.v.frame = vh[:rank].mT.to(layer.gain.dtype)
            if gain != "one":
                layer.gain.fill_(float(s[:rank].mean()))
            if linear.bias is not None and layer.bias is not None:
                layer.bias.copy_(linear.bias)
        return layer

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        """The projected rows, O(k (in + out)) each."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x: expected {self.in_features} columns, got {x.shape[-1]}")
        inner = F.linear(x, self.v().mT.to(x.dtype)) * self.gain.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(inner.dtype)
        return F.linear(inner, self.u().to(inner.dtype), bias)

    @property
    def weight(self) -> Float[Tensor, "o i"]:
        """The matrix gain · U V'."""
        return self.gain * self.u() @ self.v().mT

    @property
    def directions(self) -> Float[Tensor, "i k"]:
        """Columns of V: what an edit adds to this layer's latent."""
        return self.v.frame.detach()

    def input_subspace(self) -> Subspace:
        """The plane of V: what the layer reads."""
        return self.v.subspace()

    def output_subspace(self) -> Subspace:
        """The plane of U: where it writes."""
        return self.u.subspace()

    @torch.no_grad()
    def canonicalize(self, effect: Callable[[Tensor], Tensor], latents: Float[Tensor, "n i"]) -> Float[Tensor, " k"]:
        """Turn U and V together to axes ordered by effect; the layer's map stays. Returns mean squared effects.

        effect: latents (n, in) → outputs (n, …), an image or features of it. The axes are the eigenvectors of the mean
        of (J V)'(J V), J the Jacobian of `effect`, each with its largest entry positive: no gauge is left.
        """
        gram = jacobian_gram(effect, latents, self.v.frame)
        values, turn = torch.linalg.eigh(gram)
        values, turn = values.flip(0), turn.flip(1)
        v = self.v.frame.double() @ turn
        largest = v.abs().argmax(0)
        turn = turn * torch.where(v.gather(0, largest.unsqueeze(0)) < 0, -1.0, 1.0)
        for part in (self.u, self.v):
            part.frame = (part.frame.double() @ turn).to(part.frame.dtype)
        return values.to(self.gain.dtype)

    def multiply_adds(self, x: Tensor) -> int:
        """Multiply-adds for rows x, the frames being known."""
        return x.numel() // x.shape[-1] * self.rank * (self.in_features + self.out_features)

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def jacobian_gram(
    effect: Callable[[Tensor], Tensor], latents: Float[Tensor, "n i"], directions: Float[Tensor, "i k"]
) -> Float[Tensor, "k k"]:
    """Mean over latents of (J V)'(J V), J the Jacobian of `effect` there: one forward derivative a direction."""
    with torch.enable_grad():
        columns = [
            torch.func.jvp(effect, (latents,), (direction.expand_as(latents).contiguous(),))[1].detach().flatten(1)
            for direction in directions.mT.to(latents.dtype)
        ]
    stacked = torch.stack(columns, -1).double()
    return (stacked.mT @ stacked).mean(0)
