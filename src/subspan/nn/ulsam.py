"""Ultra-lightweight subspace attention: one spatial map for each group of channels."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.base.modules import evaluation

_GATES = ("default", "identity")


class SubspaceAttention(nn.Module):
    """Feature maps (n, m, h, w) → (1 + A_i) F_i, a spatial attention map A_i for each group of channels.

    A_i = softmax over positions of ReLU(BN(pointwise(max-pool(ReLU(BN(depthwise F_i)))))), the pointwise convolution
    from a group's channels to one. All groups run as one depthwise and one grouped convolution; 5 m + 3 groups numbers
    are learnt. Maps of other channel counts raise ValueError.

    Parameters
    ----------
    channels
        m.
    groups
        Number of groups, which divides m.
    pool
        Side of the max-pool, odd.
    momentum
        Of the batch norms; the published code's 0.9 is another framework's convention and keeps little but the last
        batch.
    residual
        False gives A_i F_i.
    gate
        "identity" starts every map uniform, so that the layer changes a trained network by the factor 1 + 1/(hw) alone.
    allow_1x1
        Take maps of a single position, where softmax is 1 and the layer doubles its input; else they raise ValueError.

    Raises
    ------
    ValueError
        For groups that do not divide the channels, an even pool, or another gate.

    References
    ----------
    Saini et al. (WACV 2020).

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import SubspaceAttention
    >>> layer, maps = SubspaceAttention(8, groups=2, gate="identity"), torch.randn(3, 8, 4, 4)
    >>> torch.allclose(layer(maps), (1 + 1 / 16) * maps, atol=1e-5)
    True
    """

    def __init__(
        self,
        channels: int,
        groups: int = 4,
        *,
        pool: int = 3,
        momentum: float = 0.1,
        residual: bool = True,
        gate: str = "default",
        allow_1x1: bool = False,
    ) -> None:
        super().__init__()
        if channels < 1 or groups < 1 or channels % groups:
            raise ValueError(f"groups: must divide channels, got {groups} groups and {channels} channels")
        if pool < 1 or pool % 2 == 0:
            raise ValueError(f"pool: must be odd, so that maps keep their size, got {pool}")
        if gate not in _GATES:
            raise ValueError(f"gate: expected one of {_GATES}, got {gate!r}")
        self.channels = channels
        self.groups = groups
        self.pool = pool
        self.residual = residual
        self.allow_1x1 = allow_1x1
        self.depthwise = nn.Conv2d(channels, channels, 1, groups=channels)
        self.depthwise_norm = nn.BatchNorm2d(channels, momentum=momentum)
        self.pointwise = nn.Conv2d(channels, groups, 1, groups=groups)
        self.pointwise_norm = nn.BatchNorm2d(groups, momentum=momentum)
        if gate == "identity":
            nn.init.zeros_(self.pointwise_norm.weight)

    def attention(self, x: Float[Tensor, "n m h w"]) -> Float[Tensor, "n g h w"]:
        """The maps, non-negative and of sum 1 over positions, in float32 at least."""
        if x.shape[1] != self.channels:
            raise ValueError(f"x: expected {self.channels} channels, got {x.shape[1]}")
        if x.shape[2] * x.shape[3] == 1 and not self.allow_1x1:
            raise ValueError("x: has a single position, on which attention is 1; pass allow_1x1=True to double the map")
        y = F.relu(self.depthwise_norm(self.depthwise(x.to(self.depthwise.weight.dtype))))
        y = F.max_pool2d(y, self.pool, 1, self.pool // 2)
        y = F.relu(self.pointwise_norm(self.pointwise(y)))
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        return y.flatten(2).softmax(-1).unflatten(2, x.shape[2:])

    def forward(self, x: Float[Tensor, "n m h w"]) -> Float[Tensor, "n m h w"]:
        """The reweighted maps, in the dtype given."""
        a = self.attention(x)
        factor = (1 + a if self.residual else a).to(x.dtype)
        return (x.unflatten(1, (self.groups, -1)) * factor.unsqueeze(2)).flatten(1, 2)

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"channels={self.channels}, groups={self.groups}, pool={self.pool}, residual={self.residual}"


def attention_entropy(maps: Float[Tensor, "n g h w"]) -> Float[Tensor, " g"]:
    """Mean entropy of the maps of each group over that of the uniform map, in [0, 1]; 1 means no attention at all.

    Parameters
    ----------
    maps
        Of sum 1 over positions, (n, g, h, w), as `SubspaceAttention.attention` gives.

    Returns
    -------
    Tensor, (g,)

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import attention_entropy
    >>> uniform, point = torch.full((1, 1, 4, 4), 1 / 16), torch.eye(16)[:1].reshape(1, 1, 4, 4)
    >>> attention_entropy(uniform).item(), attention_entropy(point).item() == 0
    (1.0, True)
    """
    a = maps.flatten(2)
    entropy = -torch.special.xlogy(a, a).sum(-1).mean(0)
    return entropy / torch.tensor(float(a.shape[-1]), dtype=a.dtype, device=a.device).log()


def shape_preserving_blocks(model: nn.Module, x: Any) -> dict[str, tuple[int, ...]]:
    """Names of the submodules of a model whose output has their input's shape (n, c, h, w), with that shape.

    Candidates for a replacement that keeps the network whole: blocks of several convolutions, none inside another one,
    in the order in which they run. The model is run once, in evaluation mode.

    Parameters
    ----------
    model
        Any torch module.
    x
        What it takes, such as images.

    Returns
    -------
    dict of names to shapes.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import shape_preserving_blocks
    >>> def convolution(c):
    ...     return torch.nn.Conv2d(c, 8, 3, padding=1)
    >>> model = torch.nn.Sequential(convolution(3), torch.nn.Sequential(convolution(8), convolution(8)))
    >>> shape_preserving_blocks(model, torch.randn(2, 3, 6, 6))
    {'1': (2, 8, 6, 6)}
    """
    found: dict[str, tuple[int, ...]] = {}
    handles = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            same = inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor)
            if same and output.ndim == 4 and output.shape == inputs[0].shape:
                found[name] = tuple(output.shape)

        return hook

    for name, module in model.named_modules():
        if name and len([part for part in module.modules() if isinstance(part, nn.Conv2d)]) > 1:
            handles.append(module.register_forward_hook(look(name)))
    try:
        with torch.no_grad(), evaluation(model):
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    inside = {name for name in found if any(name.startswith(f"{other}.") for other in found)}
    return {name: shape for name, shape in found.items() if name not in inside}
