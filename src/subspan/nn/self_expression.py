"""Losses on a matrix of self-expression coefficients C (n, n), row i expressing item i by the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class SelfExpression(nn.Module):
    """Sum over layers of |Z - CZ|_F^2, one C for all layers: one kernel self-expression of K = sum Z Z'.

    The call takes C (n, n) and the layers (n, …), each of which is flattened to rows. `parts` are the losses of each.

    Parameters
    ----------
    per_layer_scale
        Divide each layer by |Z|_F^2, without which the largest decides, and an encoder gains by shrinking. A layer of
        zeros adds nothing.
    zero_diag
        Take the diagonal of C as zero, without which C = I is the minimiser.

    References
    ----------
    Sindičić & Kopriva (2025), arXiv 2504.18179, whose code has neither.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import SelfExpression
    >>> z = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    >>> SelfExpression()(torch.tensor([[0.0, 0.5], [2.0, 0.0]]), [z]).item()
    0.0
    """

    def __init__(self, per_layer_scale: bool = True, zero_diag: bool = True) -> None:
        super().__init__()
        self.per_layer_scale, self.zero_diag = per_layer_scale, zero_diag

    def coefficients(self, c: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
        """C as the loss takes it."""
        return c - torch.diag_embed(c.diagonal()) if self.zero_diag else c

    def parts(self, c: Float[Tensor, "n n"], layers: Sequence[Tensor]) -> list[Tensor]:
        """The loss of each layer (n, …); with per_layer_scale the squared relative error |Z - CZ|^2 / |Z|^2."""
        c = self.coefficients(c)
        found = []
        for layer in layers:
            z = layer.flatten(1)
            if len(z) != len(c):
                raise ValueError(f"layers: expected {len(c)} items, as many as C has rows, got {len(z)}")
            error = (z - c @ z).square().sum()
            if self.per_layer_scale:
                error = error / z.square().sum().clamp_min(torch.finfo(z.dtype).tiny)
            found.append(error)
        return found

    def forward(self, c: Float[Tensor, "n n"], layers: Sequence[Tensor]) -> Float[Tensor, ""]:
        """The loss of layers (n, …), each of which is flattened to rows."""
        if not layers:
            raise ValueError("layers: at least one is needed")
        return torch.stack(self.parts(c, layers)).sum()


class SubspaceStructured(nn.Module):
    """tr(Q' L Q): the affinity (|C| + |C|')^power that lies between clusters, L its Laplacian.

    The call takes C (n, n) and labels (n,); the diagonal of C does not enter. Entries within clusters have no gradient,
    so the loss hardens a partition rather than changes it.

    Parameters
    ----------
    power
        In (0, 1].
    epsilon
        Entries are raised as (x + epsilon)^power: x^(1/2) has an infinite slope at 0, which gives NaN.

    Raises
    ------
    ValueError
        For values out of range.

    References
    ----------
    Sindičić & Kopriva (2025), arXiv 2504.18179.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import SubspaceStructured
    >>> c = torch.eye(4)[[1, 0, 3, 2]]  # 0 and 1 express each other, as do 2 and 3
    >>> loss = SubspaceStructured()
    >>> bool(loss(c, torch.tensor([0, 0, 1, 1])) < loss(c, torch.tensor([0, 1, 0, 1])))
    True
    """

    def __init__(self, power: float = 0.5, epsilon: float = 1e-8) -> None:
        super().__init__()
        if not 0 < power <= 1 or not epsilon > 0:
            raise ValueError(f"power, epsilon: must lie in (0, 1] and be > 0, got {power} and {epsilon}")
        self.power, self.epsilon = power, epsilon

    def forward(self, c: Float[Tensor, "n n"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """The loss; the diagonal of C does not enter."""
        affinity = (c.abs() + c.abs().mT + self.epsilon).pow(self.power)
        return affinity.masked_fill(labels.unsqueeze(1) == labels, 0).sum()
