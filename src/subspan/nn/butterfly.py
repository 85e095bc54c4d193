"""Butterfly factorisations: linear maps of N log N numbers, learnt, built for known transforms, or found by algebra."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Inexact, Int
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.base import check_finite

from .butterfly_factors import bit_reversal, butterfly_factorize, check_size, fixed_permutation, peel
from .butterfly_products import butterfly_multiply

_INITS = ("ortho", "randn", "identity")
_CONSTRAINTS = (None, "orthogonal", "unitary")
_FAR = 0.5


class Butterfly(nn.Module):
    """Linear layer of butterfly factors: y = W x + bias with W = B_b P ⋯ B_1 P, padded to N = 2^m and cut to size.

    More outputs than N are stacked. Twiddles should have no weight decay. Float16 is computed in float32.

    Parameters
    ----------
    in_features, out_features
        Widths of x and y.
    bias
        Whether there is a bias.
    complex
        Complex twiddles; the output is then complex.
    real_part
        Keep only the real part of a complex output.
    blocks
        Number b of factors. One with bit reversal is the family BP (DFT, Hadamard), two are BPBP (convolutions).
    increasing
        Whether the strides of the levels grow: one for all blocks or one each. False then True is the pattern B B'.
    permutation
        Fixed P before each factor: "identity", "bit-reversal" or an index of length N.
    tied
        One 2 x 2 for all groups of a level: 4(N - 1) numbers a factor in place of 2 N log₂ N.
    init
        "ortho" (random 2 x 2 rotations and reflections), "randn" (E[B'B] = I) or "identity".
    constraint
        "orthogonal" (an angle a pair, real) or "unitary" (four, complex), both exact; None: free twiddles.
    generator
        Of the random start.

    Raises
    ------
    ValueError
        For a size below 1, an unknown name, or options that do not fit together.

    References
    ----------
    Dao et al. (ICML 2019), arXiv 1903.05895.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import Butterfly
    >>> layer = Butterfly(8, 8, bias=False, constraint="orthogonal")
    >>> matrix = layer.to_dense()
    >>> torch.allclose(matrix @ matrix.mT, torch.eye(8), atol=1e-5)
    True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        complex: bool = False,
        real_part: bool = False,
        blocks: int = 1,
        increasing: bool | Sequence[bool] = True,
        permutation: str | Int[Tensor, " n"] = "identity",
        tied: bool = False,
        init: str = "ortho",
        constraint: str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if min(in_features, out_features, blocks) < 1:
            raise ValueError(
                f"in_features, out_features, blocks: at least 1, got {in_features}, {out_features} and {blocks}"
            )
        if init not in _INITS:
            raise ValueError(f"init: expected one of {_INITS}, got {init!r}")
        if constraint not in _CONSTRAINTS:
            raise ValueError(f"constraint: expected one of {_CONSTRAINTS}, got {constraint!r}")
        if constraint is not None and complex != (constraint == "unitary"):
            raise ValueError(f"constraint: {constraint!r} needs complex={constraint == 'unitary'}")
        if real_part and not complex:
            raise ValueError("real_part: a real layer has no other part")
        self.in_features = in_features
        self.out_features = out_features
        self.levels = max(1, math.ceil(math.log2(in_features)))
        self.n = 1 << self.levels
        self.stacks = -(-out_features // self.n)
        self.blocks = blocks
        directions = [increasing] * blocks if isinstance(increasing, bool) else list(increasing)
        if len(directions) != blocks:
            raise ValueError(f"increasing: one for all blocks or {blocks}, got {len(directions)}")
        self.increasing = directions
        self.complex = complex
        self.real_part = real_part
        self.tied = tied
        self.constraint = constraint
        identity = isinstance(permutation, str) and permutation == "identity"
        self.register_buffer("permutation", None if identity else fixed_permutation(permutation, self.n))
        count = self.n - 1 if tied else self.levels * self.n // 2
        start = _start(init, (self.stacks, blocks, count), complex, constraint, generator)
        self.factors = nn.Parameter(start)
        dtype = torch.complex64 if complex and not real_part else torch.float32
        limit = 1 / math.sqrt(in_features)
        start = torch.empty(out_features).uniform_(-limit, limit, generator=generator) if bias else None
        self.bias = None if start is None else nn.Parameter(start.to(dtype))

    permutation: Tensor | None

    @property
    def twiddle(self) -> Inexact[Tensor, "s b levels half 2 2"]:
        """The 2 x 2 matrices of all stacks, blocks, levels and pairs."""
        factors = self.factors
        if self.constraint == "orthogonal":
            c, s = factors.cos(), factors.sin()
            t = torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], -2)
        elif self.constraint == "unitary":
            t = _unitary(factors)
        elif self.complex:
            t = torch.view_as_complex(factors)
        else:
            t = factors
        if not self.tied:
            return t.unflatten(2, (self.levels, self.n // 2))
        parts = t.split([1 << level for level in range(self.levels)], 2)
        return torch.stack([part.repeat(1, 1, self.n // (2 * part.shape[2]), 1, 1) for part in parts], 2)

    def forward(self, x: Inexact[Tensor, "*n i"]) -> Inexact[Tensor, "*n o"]:
        """The transformed rows (…, out_features)."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x: expected {self.in_features} columns, got {x.shape[-1]}")
        if x.is_complex() and not self.complex:
            raise ValueError("x: is complex, the layer is real; make it with complex=True")
        dtype = x.dtype
        with torch.autocast(x.device.type, enabled=False):
            y = self._transform(x.to(torch.promote_types(dtype, torch.float32)))
            y = y if self.bias is None else y + self.bias
        return y if y.is_complex() else y.to(dtype)

    def _transform(self, x: Tensor) -> Tensor:
        twiddle = self.twiddle
        if x.shape[-1] < self.n:
            x = F.pad(x, (0, self.n - x.shape[-1]))
        y = x.unsqueeze(-2)
        for block, increasing in enumerate(self.increasing):
            y = y if self.permutation is None else y[..., self.permutation]
            y = butterfly_multiply(twiddle[:, block], y, increasing=increasing)
        y = y.flatten(-2)[..., : self.out_features]
        return y.real if self.real_part else y

    @torch.no_grad()
    def to_dense(self) -> Inexact[Tensor, "o i"]:
        """The matrix W, without the bias."""
        eye = torch.eye(self.in_features, dtype=self.factors.dtype, device=self.factors.device)
        return self._transform(eye).mT

    @torch.no_grad()
    def inverse(self, y: Inexact[Tensor, "*n o"]) -> Inexact[Tensor, "*n i"]:
        """The x with W x + bias = y, level by level in O(N log N).

        Raises ValueError where sizes differ, the layer keeps only a real part, or a 2 x 2 is singular (naming it).
        """
        if not (self.in_features == self.out_features == self.n) or self.real_part:
            raise ValueError(f"layer: only a square one of size {self.n} with its whole output has an inverse")
        x = y if self.bias is None else y - self.bias
        twiddle = self.twiddle[0]
        determinant = torch.linalg.det(twiddle).abs()
        scale = torch.linalg.matrix_norm(twiddle).square()
        singular = determinant <= torch.finfo(determinant.dtype).eps * scale
        if bool(singular.any()):
            block, level, pair = (int(part) for part in singular.nonzero()[0])
            raise ValueError(f"twiddle: that of block {block}, level {level}, pair {pair} is singular")
        inverted = torch.linalg.inv(twiddle)
        for factor, increasing in zip(inverted.flip(0), reversed(self.increasing)):
            x = butterfly_multiply(factor, x, increasing=not increasing)
            x = x if self.permutation is None else x[..., self.permutation.argsort()]
        return x

    @classmethod
    def from_matrix(
        cls,
        matrix: Inexact[Tensor, "o i"],
        bias: Inexact[Tensor, " o"] | None = None,
        *,
        permutation: str | Int[Tensor, " n"] = "identity",
    ) -> Butterfly:
        """The layer that a matrix is projected to by `butterfly_factorize`: exact for a matrix B P, else as near as
        peeling comes; warns above half the matrix's norm, which is what most dense matrices lose.
        """
        out, width = matrix.shape
        layer = cls(
            width, out, bias=bias is not None, complex=matrix.is_complex(), permutation=permutation, init="identity"
        ).to(matrix.device)
        padded = torch.zeros(layer.stacks * layer.n, layer.n, dtype=matrix.dtype, device=matrix.device)
        padded[:out, :width] = check_finite(matrix.detach(), "matrix")
        if layer.permutation is not None:
            padded = padded[:, layer.permutation]
        twiddle = torch.stack([peel(part) for part in padded.split(layer.n)])
        with torch.no_grad():
            layer.factors.copy_(_as_factors(twiddle.flatten(1, 2).unsqueeze(1)))
            if bias is not None and layer.bias is not None:
                layer.bias.copy_(bias)
            error = torch.linalg.norm(layer.to_dense() - matrix.to(layer.to_dense().dtype)) / torch.linalg.norm(matrix)
        if not float(error) <= _FAR:
            warnings.warn(f"matrix: the butterfly is {float(error):.2f} of its norm away from it", stacklevel=2)
        return layer

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Butterfly:
        """The butterfly nearest to a linear layer that peeling finds; see `from_matrix`."""
        return cls.from_matrix(linear.weight, linear.bias)

    def multiply_adds(self, x: Tensor) -> int:
        """Multiply-adds for rows x: 2 N log₂ N a factor, four times that where complex."""
        rows = x.numel() // x.shape[-1]
        return rows * self.stacks * self.blocks * self.levels * 2 * self.n * (4 if self.complex else 1)

    def extra_repr(self) -> str:
        """Shown by print."""
        padded = "" if self.n == self.in_features else f", padded to {self.n}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, blocks={self.blocks}, "
            f"complex={self.complex}, tied={self.tied}, constraint={self.constraint}{padded}"
        )


def _as_factors(twiddle: Tensor) -> Tensor:
    return torch.view_as_real(twiddle.resolve_conj()) if twiddle.is_complex() else twiddle


def _built(twiddle: Tensor, **options: Any) -> Butterfly:
    """A layer without bias of given twiddles (blocks, levels, N/2, 2, 2)."""
    blocks, levels = twiddle.shape[:2]
    layer = Butterfly(
        1 << levels, 1 << levels, bias=False, complex=twiddle.is_complex(), blocks=blocks, init="identity", **options
    )
    wide = twiddle.to(torch.complex64 if twiddle.is_complex() else torch.float32)
    layer.factors.data = _as_factors(wide.flatten(1, 2).unsqueeze(0)).contiguous()
    return layer


def _fft_twiddle(n: int, sign: int = -1) -> Tensor:
    levels = []
    for level in range(check_size(n)):
        stride = 1 << level
        angle = sign * math.pi * torch.arange(stride, dtype=torch.float64) / stride
        omega = torch.polar(torch.ones_like(angle), angle)
        one = torch.ones_like(omega)
        two = torch.stack([torch.stack([one, omega], -1), torch.stack([one, -omega], -1)], -2)
        levels.append(two.repeat(n // (2 * stride), 1, 1))
    return torch.stack(levels)


def _scale_output(twiddle: Tensor, diagonal: Tensor) -> Tensor:
    """Twiddles of diag · B, B of increasing stride: the last level's pairs are (i, i + N/2)."""
    last = twiddle[-1] * diagonal.unflatten(0, (2, -1)).mT.unsqueeze(-1)
    return torch.cat([twiddle[:-1], last.unsqueeze(0)])


def fft(n: int) -> Butterfly:
    """The discrete Fourier transform of length n = 2^m as a layer (complex, not normalised: that of torch.fft.fft)."""
    return _built(_fft_twiddle(n).unsqueeze(0), permutation="bit-reversal")


def ifft(n: int) -> Butterfly:
    """The inverse of `fft`."""
    twiddle = _fft_twiddle(n, 1)
    return _built(_scale_output(twiddle, torch.full((n,), 1 / n)).unsqueeze(0), permutation="bit-reversal")


def hadamard(n: int) -> Butterfly:
    """The Walsh-Hadamard transform in Sylvester's order, entries ±1 (real)."""
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    return _built(two.expand(1, check_size(n), n // 2, 2, 2))


def dct_permutation(n: int) -> Int[Tensor, " n"]:
    """(0, 2, 4, …, 5, 3, 1) followed by bit reversal: with it the DCT-II is the real part of one butterfly."""
    order = torch.cat([torch.arange(0, n, 2), torch.arange(1, n, 2).flip(0)])
    return order[bit_reversal(n)]


def dct(n: int) -> Butterfly:
    """The DCT-II of scipy.fft.dct (not normalised): a complex butterfly of which the real part is taken."""
    angle = -math.pi * torch.arange(n, dtype=torch.float64) / (2 * n)
    twiddle = _scale_output(_fft_twiddle(n), torch.polar(torch.full_like(angle, 2), angle))
    return _built(twiddle.unsqueeze(0), permutation=dct_permutation(n), real_part=True)


def circulant(column: Inexact[Tensor, " n"]) -> Butterfly:
    """Circular convolution with `column`, n = 2^m: iFFT · diag · FFT as two factors (BPBP); real for a real column."""
    n = len(column)
    spectrum = torch.fft.fft(check_finite(column, "column").to(torch.complex128))
    forth = _fft_twiddle(n)
    back = _scale_output(_fft_twiddle(n, 1), torch.full((n,), 1 / n))
    twiddle = torch.stack([_scale_output(forth, spectrum), back])
    return _built(twiddle, permutation="bit-reversal", real_part=not column.is_complex())


@torch.no_grad()
def recover_dct(matrix: Float[Tensor, "n n"]) -> tuple[Butterfly, float]:
    """A real matrix as the real part of one complex butterfly, by peeling; the layer and its relative error.

    cos and sin of the DCT's angles stand in rows k and n - k, so T[k] - i T[n - k] is a complex matrix with real part
    T; for the DCT-II it is a butterfly. Others are recovered as far as that holds. Raises as
    `butterfly_factorize`.
    """
    n = matrix.shape[0]
    partner = torch.cat([torch.zeros_like(matrix[:1]), matrix[1:].flip(0)])
    found = butterfly_factorize(torch.complex(matrix.double(), -partner.double()), dct_permutation(n))
    layer = _built(found.twiddle.unsqueeze(0), permutation=found.permutation, real_part=True)
    return layer, float(torch.linalg.norm(found.to_dense().real - matrix) / torch.linalg.norm(matrix))


@torch.no_grad()
def recover_convolution(matrix: Inexact[Tensor, "n n"]) -> tuple[Butterfly, float]:
    """A matrix as (B P)(F), F the Fourier transform and B found by peeling; the layer and its relative error.

    Exact for circulants, where T F⁻¹ = F⁻¹ diag: the one factor of the family BPBP that is not known. Raises as
    `butterfly_factorize`.
    """
    n = matrix.shape[0]
    wide = matrix.to(torch.complex128)
    # T F⁻¹, row by row: F⁻¹ is symmetric.
    found = butterfly_factorize(torch.fft.ifft(wide, dim=1), "bit-reversal")
    twiddle = torch.stack([_fft_twiddle(n).to(matrix.device), found.twiddle])
    real = not matrix.is_complex()
    layer = _built(twiddle, permutation="bit-reversal", real_part=real)
    whole = torch.fft.fft(found.to_dense(), dim=1)
    product = whole.real if real else whole
    return layer, float(torch.linalg.norm(product - matrix) / torch.linalg.norm(matrix))


def _unitary(angles: Float[Tensor, "*b 4"]) -> Tensor:
    """2 x 2 unitary matrices of angles φ, α, ψ, χ."""
    phi, alpha, psi, chi = angles.unbind(-1)
    c, s = phi.cos(), phi.sin()
    first = torch.stack([torch.polar(c, alpha + psi), torch.polar(s, alpha + chi)], -1)
    second = torch.stack([torch.polar(-s, alpha - chi), torch.polar(c, alpha - psi)], -1)
    return torch.stack([first, second], -2)


def _start(
    init: str,
    shape: tuple[int, ...],
    complex_: bool,
    constraint: str | None,
    generator: torch.Generator | None,
) -> Tensor:
    if constraint == "orthogonal":
        return torch.zeros(shape) if init == "identity" else 2 * math.pi * torch.rand(shape, generator=generator)
    if constraint == "unitary" or (init == "ortho" and complex_):
        angles = 2 * math.pi * torch.rand(*shape, 4, generator=generator)
        # Haar on U(2): the share of |first entry|² is uniform.
        angles[..., 0] = torch.rand(shape, generator=generator).sqrt().asin()
        if constraint == "unitary":
            return torch.zeros_like(angles) if init == "identity" else angles
        return torch.view_as_real(_unitary(angles))
    if init == "randn":
        if complex_:
            return torch.randn(*shape, 2, 2, 2, generator=generator) * math.sqrt(0.25)
        return torch.randn(*shape, 2, 2, generator=generator) * math.sqrt(0.5)
    two = torch.eye(2).expand(*shape, 2, 2).clone()
    if init == "ortho":
        angle = 2 * math.pi * torch.rand(shape, generator=generator)
        sign = torch.where(torch.rand(shape, generator=generator) < 0.5, -1.0, 1.0)
        c, s = angle.cos(), angle.sin()
        two = torch.stack([torch.stack([c, -s], -1), torch.stack([s * sign, c * sign], -1)], -2)
    return torch.view_as_real(two.to(torch.complex64)) if complex_ else two
