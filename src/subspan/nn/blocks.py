"""Parts that small networks are built of: a perceptron of given sizes, a convolution block, a residual one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

Activation = Literal["relu", "gelu", "silu", "leaky_relu", "elu", "tanh", "identity"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
}
_CONVOLUTIONS: dict[int, tuple[type[Any], type[Any], type[Any]]] = {
    1: (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d),
    2: (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d),
    3: (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d),
}


def _activation(name: str) -> nn.Module:
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation: expected one of {tuple(_ACTIVATIONS)}, got {name!r}")
    return _ACTIVATIONS[name]()


class MLP(nn.Sequential):
    """Linear layers of given sizes with normalisation and activation between them: projectors, heads, small encoders.

    Parameters
    ----------
    sizes
        Of the input, each hidden layer and the output: at least two.
    norm
        Behind each hidden layer: "batch" (over all rows, whatever their axes), "layer", or None.
    activation
        Of the hidden layers.
    dropout
        Behind each activation, in [0, 1).
    last_norm
        "batch" or "layer" behind the last layer, or None.

    Raises
    ------
    ValueError
        For fewer than two sizes, or a name that there is not.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import MLP
    >>> MLP((192, 2048, 192), norm="batch")(torch.randn(4, 3, 192)).shape
    torch.Size([4, 3, 192])
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        norm: Literal["batch", "layer"] | None = None,
        activation: Activation = "gelu",
        dropout: float = 0.0,
        last_norm: Literal["batch", "layer"] | None = None,
    ) -> None:
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"sizes: at least two of at least 1, got {tuple(sizes)}")
        norms = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
        for name, value in (("norm", norm), ("last_norm", last_norm)):
            if value is not None and value not in norms:
                raise ValueError(f"{name}: 'batch', 'layer' or None, got {value!r}")
        parts: list[nn.Module] = []
        for before, after in pairwise(sizes[:-1]):
            parts += [
                nn.Linear(before, after),
                *([] if norm is None else [norms[norm](after)]),
                _activation(activation),
            ]
            parts += [nn.Dropout(dropout)] if dropout else []
        parts += [nn.Linear(sizes[-2], sizes[-1]), *([] if last_norm is None else [norms[last_norm](sizes[-1])])]
        super().__init__(*parts)

    def forward(self, input: Float[Tensor, "*n d"]) -> Float[Tensor, "*n m"]:
        """Outputs (…, sizes[-1]) of rows (…, sizes[0])."""
        rows = super().forward(input.reshape(-1, input.shape[-1]))
        return rows.reshape(*input.shape[:-1], rows.shape[-1])


class ConvBlock(nn.Sequential):
    """Convolution, batch normalisation, activation: (b, c, *n) → (b, o, *ceil(n / stride)), or upwards to n * stride.

    Parameters
    ----------
    in_channels, out_channels
        c and o.
    kernel
        Odd. Upwards it is twice the stride, whatever is given here.
    stride
        Of every axis; at least 2 upwards.
    dims
        Axes of what comes in, beside samples and channels: 1, 2 or 3.
    norm
        Whether there is a batch normalisation; without it the convolution has a bias.
    activation
        "relu", "gelu", "silu", "leaky_relu", "elu", "tanh" or "identity".
    upwards
        A transposed convolution.

    Raises
    ------
    ValueError
        For an even kernel, other dims, or a stride that does not fit.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import ConvBlock
    >>> ConvBlock(3, 8, stride=2)(torch.randn(2, 3, 7, 6)).shape
    torch.Size([2, 8, 4, 3])
    >>> ConvBlock(8, 3, stride=2, upwards=True)(torch.randn(2, 8, 4, 3)).shape
    torch.Size([2, 3, 8, 6])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: int = 3,
        stride: int = 1,
        dims: int = 2,
        norm: bool = True,
        activation: Activation = "relu",
        upwards: bool = False,
    ) -> None:
        convolve = _upwards if upwards else _convolution
        conv = convolve(in_channels, out_channels, kernel, stride, dims, bias=not norm)
        super().__init__(conv, *([_CONVOLUTIONS[dims][2](out_channels)] if norm else []), _activation(activation))


class ResidualConvBlock(nn.Module):
    """Two convolutions beside a shortcut: (b, c, *n) → (b, o, *ceil(n / stride)).

    The shortcut is the identity where nothing changes its shape, else a convolution of one place.

    Parameters
    ----------
    in_channels, out_channels, kernel, dims, norm, activation
        As in `ConvBlock`.
    stride
        Of the first convolution.
    dropout
        Between the two convolutions, in [0, 1).
    preactivation
        Normalisation and activation before each convolution, none behind the sum (He et al., 2016b), and not behind
        each and behind the sum (He et al., 2016a).

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import ResidualConvBlock
    >>> ResidualConvBlock(4, 8, stride=2, dims=1, preactivation=True)(torch.randn(2, 4, 9)).shape
    torch.Size([2, 8, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: int = 3,
        stride: int = 1,
        dims: int = 2,
        norm: bool = True,
        activation: Activation = "relu",
        dropout: float = 0.0,
        preactivation: bool = False,
    ) -> None:
        super().__init__()
        first = _convolution(in_channels, out_channels, kernel, stride, dims, bias=not norm)
        second = _convolution(out_channels, out_channels, kernel, 1, dims, bias=preactivation or not norm)

        def around(channels: int) -> list[nn.Module]:
            return [_CONVOLUTIONS[dims][2](channels)] if norm else []

        between = [*around(out_channels), _activation(activation), *([nn.Dropout(dropout)] if dropout else [])]
        if preactivation:
            parts = [*around(in_channels), _activation(activation), first, *between, second]
        else:
            parts = [first, *between, second, *around(out_channels)]
        self.residual = nn.Sequential(*parts)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else _convolution(in_channels, out_channels, 1, stride, dims, bias=True)
        self.activation = nn.Identity() if preactivation else _activation(activation)

    def forward(self, x: Float[Tensor, "b c *n"]) -> Float[Tensor, "b o *m"]:
        """The block's output."""
        return self.activation(self.shortcut(x) + self.residual(x))


def _convolution(c: int, o: int, kernel: int, stride: int, dims: int, *, bias: bool) -> nn.Module:
    """Zeros around it so that ceil(n / stride) places come out."""
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel: an odd size is needed, got {kernel}")
    return _kind(dims, 0)(c, o, kernel, stride, padding=kernel // 2, bias=bias)


def _upwards(c: int, o: int, kernel: int, stride: int, dims: int, *, bias: bool) -> nn.Module:
    """Every place of the output is reached by two of the input along each axis, which leaves no checkerboard."""
    if stride < 2:
        raise ValueError(f"stride: at least 2 upwards, got {stride}")
    pad, odd = -(-stride // 2), stride % 2
    return _kind(dims, 1)(c, o, 2 * stride, stride, padding=pad, output_padding=odd, bias=bias)


def _kind(dims: int, place: int) -> type[Any]:
    if dims not in _CONVOLUTIONS:
        raise ValueError(f"dims: 1, 2 or 3, got {dims}")
    return _CONVOLUTIONS[dims][place]
