"""Sub-JEPA: samples are to look normal in some frozen subspaces, not in the whole space."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from subspan.geometry import Subspace
from subspan.geometry.grassmann import random_basis
from subspan.nn.penalties import gram_error

from .sliced_gaussian import SlicedGaussianLoss

Projection = Literal["orthonormal", "gaussian", "trainable"]


class SubspaceGaussianRegularizer(SlicedGaussianLoss):
    """Mean Epps-Pulley statistic inside some random subspaces that are drawn once and kept.

    As `SlicedGaussianLoss`, but only the parts z W of samples in K subspaces of few dimensions are to be standard
    normal. That is K k (k + 1) / 2 conditions on a covariance with d (d + 1) / 2 entries: the samples may keep to k
    dimensions and yet cannot collapse. Inside each subspace the directions are drawn anew at every call.

    Parameters
    ----------
    knots, num_proj
        Knots of the statistic, and directions a subspace and call; None: 2048 divided by the subspaces, at least 16.
        The published code has 1024 a subspace; the mean is the same and the time is not.
    dim
        Width d of the samples; None: that of the first ones.
    subspace_dim
        Dimensions k of each subspace; the effective rank of samples can fall as low as that.
    n_subspaces
        K; None: d // k, so that they span nearly all.
    projection
        "orthonormal" columns; "gaussian" ones, of length √d in the mean; "trainable" ones that start orthonormal, to
        which `orthogonality_loss` is added.
    t_max, chunk_size, generator, reduce_ranks
        As in `SlicedGaussianLoss`; the generator also draws the subspaces.

    Attributes
    ----------
    basis : Tensor (K, d, k)
        Saved with the module.
    subspaces : Subspace
        A batched one.

    Raises
    ------
    ValueError
        For sizes that do not fit, and samples of another width.

    References
    ----------
    Zhao et al. (2026), Sub-JEPA, arXiv 2605.09241.

    Examples
    --------
    >>> import torch
    >>> from subspan.dynamics import SubspaceGaussianRegularizer
    >>> loss = SubspaceGaussianRegularizer(dim=24, subspace_dim=6, generator=torch.Generator().manual_seed(0))
    >>> loss.subspaces.basis.shape
    torch.Size([4, 24, 6])
    >>> bool(loss(torch.zeros(64, 24)) > 20)
    True
    """

    basis: Tensor

    def __init__(
        self,
        knots: int = 17,
        num_proj: int | None = None,
        *,
        dim: int | None = None,
        subspace_dim: int = 6,
        n_subspaces: int | None = None,
        projection: Projection = "orthonormal",
        t_max: float = 3.0,
        chunk_size: int = 256,
        generator: torch.Generator | None = None,
        reduce_ranks: bool = True,
    ) -> None:
        super().__init__(
            knots, 1 if num_proj is None else num_proj, t_max=t_max, chunk_size=chunk_size, generator=generator,
            reduce_ranks=reduce_ranks,
        )  # fmt: skip
        if projection not in ("orthonormal", "gaussian", "trainable"):
            raise ValueError(f"projection: expected 'orthonormal', 'gaussian' or 'trainable', got {projection!r}")
        for name, size in (("subspace_dim", subspace_dim), ("n_subspaces", n_subspaces), ("dim", dim)):
            if size is not None and size < 1:
                raise ValueError(f"{name}: at least 1, got {size}")
        self.subspace_dim, self.n_subspaces, self.projection = subspace_dim, n_subspaces, projection
        self._directions = num_proj
        if projection == "trainable" and dim is None:
            raise ValueError("dim: trainable subspaces are parameters, which need it before the first samples")
        self.register_buffer("basis", None)
        if dim is not None:
            self._draw(dim, torch.empty(0))

    def extra_repr(self) -> str:
        """Its settings, and its sizes once they are known."""
        sizes = "no samples yet" if self.basis is None else f"subspaces={tuple(self.basis.shape)}"
        return f"{sizes}, projection={self.projection!r}, {super().extra_repr()}"

    def _draw(self, dim: int, like: Tensor) -> None:
        """Draw the subspaces, the same ones in all processes."""
        if self.subspace_dim > dim:
            raise ValueError(f"subspace_dim: {self.subspace_dim} is above the width of the samples, {dim}")
        count = max(1, dim // self.subspace_dim) if self.n_subspaces is None else self.n_subspaces
        if count * self.subspace_dim < dim and self.n_subspaces is not None:
            warnings.warn(
                f"n_subspaces: {count} of {self.subspace_dim} dimensions leave {dim - count * self.subspace_dim} of "
                f"{dim} without any condition; samples may collapse or grow there",
                stacklevel=3,
            )
        shape = (count, dim, self.subspace_dim)
        if self.projection == "gaussian":
            device = None if self.generator is None else self.generator.device
            basis = torch.randn(*shape, generator=self.generator, device=device)
        else:
            basis = random_basis(dim, self.subspace_dim, batch=(count,), generator=self.generator, dtype=torch.float32)
        basis = basis.to(like.device)
        if self.group is not None:
            dist.broadcast(basis, src=0)
        del self.basis
        if self.projection == "trainable":
            self.basis = nn.Parameter(basis)
        else:
            self.register_buffer("basis", basis)
        self.num_proj = max(16, 2048 // count) if self._directions is None else self._directions

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        # Subspaces that were not drawn yet are those that were saved.
        if self.basis is None and (saved := state_dict.get(f"{prefix}basis")) is not None:
            self._draw(saved.shape[-2], torch.empty(0))
            self.register_buffer("basis", torch.empty_like(saved))
        super()._load_from_state_dict(state_dict, prefix, *others)

    @property
    def subspaces(self) -> Subspace:
        """The subspaces, as one batch."""
        if self.basis is None:
            raise ValueError("subspaces: they are drawn at the first samples; give dim")
        return Subspace.span(self.basis.detach())

    def project(self, z: Float[Tensor, "*b n d"]) -> Float[Tensor, "K *b n k"]:
        """Samples inside each subspace."""
        if self.basis is None:
            self._draw(z.shape[-1], z)
        if z.shape[-1] != self.basis.shape[-2]:
            raise ValueError(f"z: expected a width of {self.basis.shape[-2]}, got {z.shape[-1]}")
        with torch.autocast(z.device.type, enabled=False):
            wide = z.to(torch.promote_types(z.dtype, torch.float32))
            return torch.einsum("...d,sdk->s...k", wide, self.basis.to(wide))

    def forward(self, z: Float[Tensor, "*b n d"]) -> Float[Tensor, ""]:
        """Mean statistic over subspaces, directions and leading dimensions."""
        inside = self.project(z)
        between = (1,) * (inside.ndim - 3)
        drawn = self.directions(1, *between, self.subspace_dim, self.num_proj, like=inside)
        return self.statistic(inside, drawn).mean()

    def orthogonality_loss(self) -> Float[Tensor, ""]:
        """Mean distance (Frobenius) of the columns of each basis from an orthonormal set; for trainable ones."""
        return torch.linalg.matrix_norm(gram_error(self.basis)).mean()
