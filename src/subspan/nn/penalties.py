"""Penalties on what lies in a subspace: of hidden states, of weights, and of a basis that should be orthonormal."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from subspan.geometry import Subspace


def gram_error(matrix: Float[Tensor, "*b d k"]) -> Float[Tensor, "*b m m"]:
    """Distance of columns (of rows, where there are fewer) from an orthonormal set: Q'Q - I, in float32 or wider.

    Parameters
    ----------
    matrix
        Matrices (…, d, k).

    Returns
    -------
    Tensor (…, m, m) with m = min(d, k).
    """
    with torch.autocast(matrix.device.type, enabled=False):
        q = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        gram = q.mT @ q if q.shape[-2] >= q.shape[-1] else q @ q.mT
        return gram - torch.eye(gram.shape[-1], dtype=q.dtype, device=q.device)


def orthonormality_penalty(matrix: Float[Tensor, "*b d k"]) -> Float[Tensor, "*b"]:
    """|Q'Q - I|² (Frobenius) of each matrix: the soft constraint of a basis that is trained.

    Parameters
    ----------
    matrix
        Matrices (…, d, k); of wide ones the rows are meant.

    Returns
    -------
    Tensor (…), 0 where the columns are orthonormal.

    Notes
    -----
    The probe of Hernández López et al. (ASE 2022) weighs it by 5; `orthogonality_defect` is its root, and
    `register_orthonormal` keeps a matrix orthonormal without a penalty.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import orthonormality_penalty
    >>> orthonormality_penalty(2 * torch.eye(3)[:, :2]).item()
    18.0
    """
    return gram_error(matrix).square().sum((-2, -1))


def weight_projection_penalty(weight: Float[Tensor, "d r"], subspace: Subspace) -> Float[Tensor, ""]:
    """|B'P|² (Frobenius): how far the columns of a weight reach into a subspace of its outputs.

    Parameters
    ----------
    weight
        B (d, r), such as the output side of a low-rank update.
    subspace
        Orthonormal basis P (d, k); its centre does not count.

    Returns
    -------
    Scalar. For orthonormal B it is the sum of the squared cosines of the principal angles.

    References
    ----------
    ReGLU (arXiv 2604.17396), where P are the main directions of what is to be retained.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import Subspace
    >>> from subspan.nn import weight_projection_penalty
    >>> axes = Subspace.span(torch.eye(4)[:, :2])
    >>> weight_projection_penalty(torch.ones(4, 3), axes).item()
    6.0
    """
    return projection_penalty(weight.mT, subspace, reduction="sum")


def projection_penalty(
    states: Float[Tensor, "*n d"],
    subspace: Subspace,
    mask: Shaped[Tensor, "*n"] | None = None,
    *,
    power: Literal[1, 2] = 2,
    relative: bool = False,
    reduction: Literal["mean", "sum"] = "mean",
) -> Float[Tensor, ""]:
    """|hP|² (or |hP|) over hidden states h: what of them lies in a subspace.

    Parameters
    ----------
    states
        Hidden states (…, d).
    subspace
        One subspace of dimension d; its basis P is a constant, its centre does not count.
    mask
        (…): nonzero = counts. Others may hold anything, NaN too. Default: all count.
    power
        2, or 1 for the length itself, whose pull does not fade near the subspace's complement.
    relative
        Divide by the same of the whole states, as a constant: shrinking all states then gains nothing.
    reduction
        "mean" over the states that count, or "sum".

    Returns
    -------
    Scalar, in float32 or wider; 0 where no state counts.

    Raises
    ------
    ValueError
        Where `subspace` is a batch or has another dimension, or the mask another shape.

    References
    ----------
    Decoupling (arXiv 2508.12803): power 1 with weight 0.01, P estimated anew as the states drift.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import Subspace
    >>> from subspan.nn import projection_penalty
    >>> axis = Subspace.span(torch.tensor([[1.0], [0.0]]))
    >>> projection_penalty(torch.tensor([[3.0, 4.0], [1.0, 9.0]]), axis).item()
    5.0
    """
    if power not in (1, 2):
        raise ValueError(f"power: 1 or 2, got {power!r}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: 'mean' or 'sum', got {reduction!r}")
    if subspace.batch_shape:
        raise ValueError(f"subspace: one is needed, got a batch {subspace.batch_shape}")
    total, count = _projected(states, subspace.basis.detach(), mask, power, relative)
    return total if reduction == "sum" else total / max(count, 1)


def _projected(states: Tensor, basis: Tensor, mask: Tensor | None, power: int, relative: bool) -> tuple[Tensor, int]:
    """(sum over the states that count, their number)."""
    if basis.shape[0] != states.shape[-1]:
        raise ValueError(f"states: expected {basis.shape[0]} columns, got {states.shape[-1]}")
    if mask is not None and mask.shape != states.shape[:-1]:
        raise ValueError(f"mask: shape {tuple(states.shape[:-1])} is needed, got {tuple(mask.shape)}")
    rows = states.reshape(-1, states.shape[-1]) if mask is None else states[mask.to(states.device) != 0]

    def size(vectors: Tensor) -> Tensor:
        # The norm has the gradient 0 at 0, where the root of a sum of squares has NaN.
        lengths = torch.linalg.vector_norm(vectors, dim=-1)
        return (lengths if power == 1 else vectors.square().sum(-1)).sum()

    with torch.autocast(states.device.type, enabled=False):
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        total = size(wide @ basis.to(wide))
        if relative and len(rows):
            total = total / (size(wide.detach()) / len(rows)).clamp_min(torch.finfo(wide.dtype).tiny)
        return total, len(rows)


def cross_correlation(a: Float[Tensor, "n p"], b: Float[Tensor, "n q"]) -> Float[Tensor, "p q"]:
    """Correlations over rows of each column of one matrix with each of another; 0 for columns that do not vary.

    Parameters
    ----------
    a, b
        Paired rows (n, p) and (n, q), n >= 2.

    Returns
    -------
    Tensor (p, q), in [-1, 1], in float32 or wider. Its Frobenius norm is a penalty that keeps two parts of a
    representation from telling the same, linearly.

    Raises
    ------
    ValueError
        For another number of rows in each, or fewer than two.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import cross_correlation
    >>> rows = torch.tensor([[1.0, 2.0], [2.0, 2.0], [3.0, 2.0]])
    >>> cross_correlation(rows, -rows[:, :1]).round(decimals=3)
    tensor([[-1.],
            [ 0.]])
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"a, b: at least 2 paired rows are needed, got {len(a)} and {len(b)}")
    with torch.autocast(a.device.type, enabled=False):
        left, right = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (a, b))
        left, right = (x - x.mean(0) for x in (left, right))
        smallest = torch.finfo(left.dtype).eps
        left, right = (x / torch.linalg.vector_norm(x, dim=0).clamp_min(smallest) for x in (left, right))
        return left.mT @ right


class ProjectionPenalty(nn.Module):
    """`projection_penalty` on a subspace that is saved with the module and may be set anew while training goes on.

    Parameters
    ----------
    subspace
        One subspace, or None for none yet: then the penalty is 0.
    power, relative
        As in `projection_penalty`.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import Subspace
    >>> from subspan.nn import ProjectionPenalty
    >>> penalty = ProjectionPenalty(Subspace.span(torch.eye(3)[:, :1]), power=1)
    >>> penalty(torch.tensor([[[-2.0, 5.0, 0.0]]])).item()
    2.0
    """

    basis: Tensor | None

    def __init__(self, subspace: Subspace | None = None, *, power: Literal[1, 2] = 2, relative: bool = False) -> None:
        super().__init__()
        self.power: Literal[1, 2] = power
        self.relative = relative
        self.register_buffer("basis", None)
        self.set_subspace(subspace)

    def set_subspace(self, subspace: Subspace | None) -> None:
        """Penalise another subspace from now on (None: none); it may have another rank."""
        device = None if self.basis is None else self.basis.device
        self.basis = None if subspace is None else subspace.basis.detach().clone().to(device=device)

    def forward(self, states: Float[Tensor, "*n d"], mask: Shaped[Tensor, "*n"] | None = None) -> Float[Tensor, ""]:
        """The penalty of states (…, d), of those that `mask` (…) selects."""
        if self.basis is None:
            return states.new_zeros((), dtype=torch.promote_types(states.dtype, torch.float32))
        total, count = _projected(states, self.basis, mask, self.power, self.relative)
        return total / max(count, 1)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # What was set while training went on may have another rank than what this module was made with.
        found = state_dict.get(f"{prefix}basis")
        if found is not None and (self.basis is None or self.basis.shape != found.shape):
            self.basis = torch.empty_like(found, device=None if self.basis is None else self.basis.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Shown by print."""
        shape = None if self.basis is None else tuple(self.basis.shape)
        return f"basis={shape}, power={self.power}, relative={self.relative}"
