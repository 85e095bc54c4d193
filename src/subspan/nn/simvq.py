"""Vector quantisers whose codebook is one learnt linear map of a frozen one, so that no code is left behind."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Inexact, Int
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.solvers import nearest_code
from subspan.statistics import Moments

_ESTIMATORS = ("straight-through", "rotation")


class Quantized(NamedTuple):
    """What a quantiser returns.

    Of padding the values are 0 and the codes -1, and neither the loss nor a gradient knows of it.

    Attributes
    ----------
    values
        The quantised latents, in their shape.
    codes
        Their numbers, without the channel dimension. Of residual and grouped quantisers there is one dimension more at
        the end, a code a quantiser.
    loss
        Scalar.
    """

    values: Float[Tensor, "*m"]
    codes: Int[Tensor, "*n"]
    loss: Float[Tensor, ""]


class SimVQ(nn.Module):
    """Latents (…, d) → the nearest of K codes E = C W' + b, C drawn once and frozen, W learnt.

    In a plain codebook only chosen codes have a gradient and the rest are left behind; here all are moved by one map.
    The loss is mean (sg(z) - e)² + commitment · mean (z - sg(e))². Distances in float32 at least; of equal ones the
    lowest code. Latents of other widths or not finite raise ValueError.

    Parameters
    ----------
    dim
        d.
    num_codes
        K, from 2.
    basis_dim
        Width of C ~ N(0, 1/basis_dim); None: d. A K well above it is what couples the codes, and K < basis_dim warns,
        since nearly orthogonal rows of C are moved one by one again.
    bias
        Lets the codes follow the mean.
    commitment
        Weight of the encoder's part of the loss; >= 0.
    estimator
        The encoder's gradient: "straight-through", or "rotation" (turned and scaled as the latent is onto its code).
    channel_dim
        The axis of the d channels.
    train_basis
        True with a frozen W is plain vector quantisation: the control.
    block
        No matrix larger than so many distances is formed.
    generator
        Of C, and of W and b, which start as in torch's linear layers.

    Raises
    ------
    ValueError
        For values out of range.

    References
    ----------
    Zhu et al. (2024), arXiv 2411.02038; Fifty et al. (2024) for the rotation.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import SimVQ
    >>> quantizer = SimVQ(4, num_codes=16)
    >>> found = quantizer(torch.randn(10, 4))
    >>> found.codes.shape, torch.equal(quantizer.decode(found.codes), found.values)
    (torch.Size([10]), True)
    """

    basis: Tensor

    def __init__(
        self,
        dim: int,
        num_codes: int,
        *,
        basis_dim: int | None = None,
        bias: bool = True,
        commitment: float = 0.25,
        estimator: str = "straight-through",
        channel_dim: int = -1,
        train_basis: bool = False,
        block: int = 1 << 22,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        width = dim if basis_dim is None else basis_dim
        if dim < 1 or width < 1:
            raise ValueError(f"dim, basis_dim: must be at least 1, got {dim} and {width}")
        if num_codes < 2:
            raise ValueError(f"num_codes: must be at least 2, got {num_codes}")
        if not (commitment >= 0 and math.isfinite(commitment)):
            raise ValueError(f"commitment: must not be negative, got {commitment}")
        if estimator not in _ESTIMATORS:
            raise ValueError(f"estimator: expected one of {_ESTIMATORS}, got {estimator!r}")
        if block < 1:
            raise ValueError(f"block: must be at least 1, got {block}")
        if num_codes < width and not train_basis:
            warnings.warn(
                f"num_codes: {num_codes} codes in {width} dimensions are nearly orthogonal, so one map moves them no "
                f"better than a plain codebook; lower basis_dim",
                stacklevel=2,
            )
        self.dim = dim
        self.num_codes = num_codes
        self.commitment = commitment
        self.estimator = estimator
        self.channel_dim = channel_dim
        self.block = block
        basis = torch.randn(num_codes, width, generator=generator) / math.sqrt(width)
        self.transform = nn.Linear(width, dim, bias=bias)
        if generator is not None:
            # As torch draws them.
            for parameter in self.transform.parameters():
                nn.init.uniform_(parameter, -1 / math.sqrt(width), 1 / math.sqrt(width), generator=generator)
        if train_basis:
            self.basis = nn.Parameter(basis)
            self.transform.requires_grad_(False)
        else:
            self.register_buffer("basis", basis)
        self._decoder: tuple[tuple[Any, ...], Tensor] | None = None

    @property
    def codebook(self) -> Float[Tensor, "k d"]:
        """All codes E, in float32 at least."""
        with torch.autocast(self.basis.device.type, enabled=False):
            return self.transform(self.basis)

    @torch.no_grad()
    def init_from(self, moments: Moments) -> None:
        """Start with codes that have the mean and covariance of latents, W = Cov^½ √basis_dim (not in the paper).

        Where basis_dim < d they have the leading part of it. Raises ValueError for other widths, or a missing bias.
        """
        if moments.d != self.dim:
            raise ValueError(f"moments: expected {self.dim} dimensions, got {moments.d}")
        if self.transform.bias is None:
            raise ValueError("bias: is needed for codes that have the latents' mean")
        width = self.basis.shape[1]
        values, vectors = torch.linalg.eigh(moments.covariance())
        kept = min(width, self.dim)
        root = vectors[:, -kept:] * (values[-kept:].clamp_min(0) * width).sqrt()
        self.transform.weight.copy_(F.pad(root, (0, width - kept)))
        self.transform.bias.copy_(moments.mean)

    def forward(self, latents: Inexact[Tensor, "*n"], mask: Bool[Tensor, "*m"] | None = None) -> Quantized:
        """Quantise latents; values have their shape and dtype. mask, without the channels: False for padding."""
        z = _channels_last(latents, self.dim, self.channel_dim, mask)
        rows = z.flatten(0, -2).to(torch.promote_types(z.dtype, torch.float32))
        if mask is not None:
            rows = rows[mask.flatten()]
        codebook = self.codebook.to(rows.dtype)
        codes = nearest_code(rows.detach(), codebook.detach(), block=self.block)
        chosen = codebook[codes]
        loss = F.mse_loss(chosen, rows.detach()) + self.commitment * F.mse_loss(rows, chosen.detach())
        values = _estimate(rows, chosen.detach(), self.estimator)
        if mask is not None:
            kept = mask.flatten()
            values = values.new_zeros(len(kept), self.dim).masked_scatter(kept.unsqueeze(-1), values)
            codes = codes.new_full(kept.shape, -1).masked_scatter(kept, codes)
        values = _channels_back(values.unflatten(0, z.shape[:-1]), self.channel_dim).to(latents.dtype)
        return Quantized(values, codes.unflatten(0, z.shape[:-1]), loss)

    @torch.no_grad()
    def decode(self, codes: Tensor, mask: Bool[Tensor, "*n"] | None = None) -> Float[Tensor, "*m"]:
        """The quantised values of stored codes, those of `forward` to the last bit; of padding (mask False) zeros.

        Raises TypeError for codes that are no integers, ValueError for codes outside [0, K).
        """
        if mask is not None:
            return self.decode(codes.masked_fill(~mask, 0)).masked_fill(~mask.unsqueeze(self.channel_dim), 0)
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise TypeError(f"codes: expected integers, got {codes.dtype}")
        if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < self.num_codes):
            raise ValueError(f"codes: must lie in [0, {self.num_codes}), got {int(codes.min())} to {int(codes.max())}")
        return _channels_back(self._frozen_codebook()[codes], self.channel_dim)

    def _frozen_codebook(self) -> Tensor:
        # All codes at once, as in `forward`: fewer rows may be multiplied in another order and differ in the last bit.
        tensors = [self.basis, *self.transform.parameters()]
        key = tuple((t.data_ptr(), t._version, t.dtype) for t in tensors)
        if self._decoder is None or self._decoder[0] != key:
            self._decoder = (key, self.codebook.detach())
        return self._decoder[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_decoder": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SimVQ:
        # New tensors may lie where those lay that the codes were made of.
        self._decoder = None
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def export(self) -> Float[Tensor, "k d"]:
        """The codebook alone, which is all that decoding needs: the frozen codes and the map can go."""
        return self.codebook.clone()

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"dim={self.dim}, num_codes={self.num_codes}, estimator={self.estimator!r}"


class ResidualSimVQ(nn.Module):
    """Several `SimVQ` in a row, each on what those before left over: depth codes a latent, values their sum.

    The loss is the sum over quantisers.

    Parameters
    ----------
    dim, num_codes
        As in `SimVQ`, for each quantiser.
    depth
        Number of quantisers.
    dropout
        In training keep only a random first part of the quantisers in each batch, so that prefixes of codes are useful.
        The codes of those left out are -1, and their parameters have zero gradients, for which distributed training
        waits.
    **options
        Of `SimVQ`.

    Raises
    ------
    ValueError
        For a depth below 1, and as `SimVQ`.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import ResidualSimVQ
    >>> ResidualSimVQ(4, num_codes=16, depth=3)(torch.randn(10, 4)).codes.shape
    torch.Size([10, 3])
    """

    def __init__(self, dim: int, num_codes: int, depth: int, *, dropout: bool = False, **options: Any) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth: must be at least 1, got {depth}")
        self.dim = dim
        self.channel_dim = options.pop("channel_dim", -1)
        self.estimator = options.get("estimator", "straight-through")
        self.dropout = dropout
        self.quantizers = nn.ModuleList(SimVQ(dim, num_codes, **options) for _ in range(depth))

    def forward(self, latents: Inexact[Tensor, "*n"], mask: Bool[Tensor, "*m"] | None = None) -> Quantized:
        """Quantise latents; codes (…, depth). mask, without the channels: False for padding."""
        z = _channels_last(latents, self.dim, self.channel_dim, mask)
        z = z if mask is None else torch.where(mask.unsqueeze(-1), z, 0)
        rest = z.to(torch.promote_types(z.dtype, torch.float32))
        depth = len(self.quantizers)
        kept = int(torch.randint(1, depth + 1, ())) if self.dropout and self.training else depth
        total, codes, loss = torch.zeros_like(rest), [], rest.new_zeros(())
        for number, quantizer in enumerate(self.quantizers):
            if number >= kept:
                codes.append(torch.full_like(codes[0], -1))
                loss = loss + 0 * torch.stack([each.sum() for each in quantizer.parameters()]).sum()
                continue
            values, found, part = quantizer(rest, mask)
            # Without the estimators of the single quantisers, whose gradients would add up to `depth` times the one.
            rest = rest - values.detach()
            total = total + values.detach()
            codes.append(found)
            loss = loss + part
        estimate = _estimate(z.to(total.dtype), total, self.estimator)
        values = _channels_back(estimate.to(latents.dtype), self.channel_dim)
        return Quantized(values, torch.stack(codes, -1), loss)

    @torch.no_grad()
    def decode(self, codes: Int[Tensor, "*n"]) -> Float[Tensor, "*m"]:
        """The sum of the codes' values; -1 adds nothing, and fewer than `depth` codes are a prefix."""
        if not 1 <= codes.shape[-1] <= len(self.quantizers):
            raise ValueError(f"codes: expected 1 to {len(self.quantizers)} at the end, got {codes.shape[-1]}")
        total: Any = None
        for quantizer, found in zip(self.quantizers, codes.unbind(-1)):
            one: Any = quantizer
            values = one.decode(found.clamp_min(0)).masked_fill((found == -1).unsqueeze(-1), 0)
            total = values if total is None else total + values
        return _channels_back(total, self.channel_dim)


class GroupedSimVQ(nn.Module):
    """Channels cut into equal parts with a `SimVQ` each: K^groups values.

    The loss is the mean over groups.

    Parameters
    ----------
    dim
        Channels, a multiple of `groups`.
    num_codes
        K, of each part.
    groups
        Number of parts.
    **options
        Of `SimVQ`.

    Raises
    ------
    ValueError
        Where groups do not divide dim, and as `SimVQ`.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import GroupedSimVQ
    >>> GroupedSimVQ(4, num_codes=16, groups=2)(torch.randn(10, 4)).codes.shape
    torch.Size([10, 2])
    """

    def __init__(self, dim: int, num_codes: int, groups: int, **options: Any) -> None:
        super().__init__()
        if groups < 1 or dim % groups:
            raise ValueError(f"groups: must divide dim, got {groups} and {dim}")
        self.dim = dim
        self.channel_dim = options.pop("channel_dim", -1)
        self.quantizers = nn.ModuleList(SimVQ(dim // groups, num_codes, **options) for _ in range(groups))

    def forward(self, latents: Inexact[Tensor, "*n"], mask: Bool[Tensor, "*m"] | None = None) -> Quantized:
        """Quantise latents; codes (…, groups). The loss is the mean over groups. mask: as of `SimVQ`."""
        z = _channels_last(latents, self.dim, self.channel_dim, mask)
        parts = [one(part, mask) for one, part in zip(self.quantizers, z.chunk(len(self.quantizers), -1))]
        return Quantized(
            _channels_back(torch.cat([part.values for part in parts], -1), self.channel_dim),
            torch.stack([part.codes for part in parts], -1),
            torch.stack([part.loss for part in parts]).mean(),
        )

    @torch.no_grad()
    def decode(self, codes: Int[Tensor, "*n"], mask: Bool[Tensor, "*k"] | None = None) -> Float[Tensor, "*m"]:
        """The values of stored codes (…, groups); of padding (mask False) zeros."""
        if codes.shape[-1] != len(self.quantizers):
            raise ValueError(f"codes: expected {len(self.quantizers)} at the end, got {codes.shape[-1]}")
        quantizers: Any = self.quantizers
        parts = [one.decode(found, mask) for one, found in zip(quantizers, codes.unbind(-1))]
        return _channels_back(torch.cat(parts, -1), self.channel_dim)


class CodeUsage(NamedTuple):
    """What `code_usage` found.

    Attributes
    ----------
    active
        Share of codes used.
    reachable
        Codes used over those that so many latents can use.
    perplexity
        exp(entropy), in codes.
    """

    active: float
    reachable: float
    perplexity: float


def code_usage(codes: Int[Tensor, "*n"], num_codes: int) -> CodeUsage:
    """How evenly codes are used.

    Parameters
    ----------
    codes
        Integers of any shape; -1 (left out) does not count.
    num_codes
        K.

    Returns
    -------
    CodeUsage

    Raises
    ------
    ValueError
        Where there are no codes.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import code_usage
    >>> active, reachable, perplexity = code_usage(torch.tensor([0, 0, 1, 1, -1]), 8)
    >>> active, reachable, round(perplexity, 3)
    (0.25, 0.5, 2.0)
    """
    used = codes[codes >= 0]
    if not used.numel():
        raise ValueError("codes: there are none")
    counts = torch.bincount(used.flatten(), minlength=num_codes).double()
    share = counts[counts > 0] / counts.sum()
    active = int((counts > 0).sum())
    entropy = -(share * share.log()).sum()
    return CodeUsage(active / num_codes, active / min(num_codes, used.numel()), float(entropy.exp()))


def _channels_last(latents: Tensor, dim: int, channel_dim: int, mask: Tensor | None) -> Tensor:
    if not -latents.ndim <= channel_dim < latents.ndim or latents.ndim < 2:
        raise ValueError(f"latents: expected a dimension {channel_dim} and at least two, got {tuple(latents.shape)}")
    if latents.shape[channel_dim] != dim:
        raise ValueError(f"latents: expected {dim} channels in dimension {channel_dim}, got {tuple(latents.shape)}")
    if not latents.numel():
        raise ValueError(f"latents: there are none in shape {tuple(latents.shape)}")
    z = latents.movedim(channel_dim % latents.ndim, latents.ndim - 1)
    if mask is not None and mask.shape != z.shape[:-1]:
        raise ValueError(f"mask: expected shape {tuple(z.shape[:-1])}, got {tuple(mask.shape)}")
    if not (torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()):
        known = z.detach() if mask is None else z.detach()[mask]
        if not len(known):
            raise ValueError("mask: leaves no latents")
        if not bool(torch.isfinite(known).all()):
            raise ValueError("latents: contain NaN or infinity")
    return z


def _channels_back(values: Tensor, channel_dim: int) -> Tensor:
    # Counted from the front: ONNX has no negative axes here.
    return values.movedim(values.ndim - 1, channel_dim % values.ndim)


def _estimate(rows: Tensor, chosen: Tensor, estimator: str) -> Tensor:
    """The chosen codes to the last bit, with a gradient to the latents."""
    if estimator == "straight-through":
        return chosen + (rows - rows.detach())
    # The rotation that takes the latent's direction to its code's is a product of two reflections.
    tiny = torch.finfo(rows.dtype).tiny
    z, q = rows.detach(), chosen
    z_norm, q_norm = (torch.linalg.vector_norm(part, dim=-1, keepdim=True).clamp_min(tiny) for part in (z, q))
    z_unit, q_unit = z / z_norm, q / q_norm
    middle = z_unit + q_unit
    middle = middle / torch.linalg.vector_norm(middle, dim=-1, keepdim=True).clamp_min(tiny)
    along = lambda unit: (rows * unit).sum(-1, keepdim=True)  # noqa: E731
    # A latent of zero has no direction to be turned from: its gradient is that of the code.
    scale = torch.where(z_norm > tiny, q_norm / z_norm, 1)
    turned = (rows - 2 * middle * along(middle) + 2 * q_unit * along(z_unit)) * scale
    return chosen + (turned - turned.detach())
