"""BT²: a new embedding whose leading part answers for the old one, by two basis changes (Zhou et al., ICCV 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.base import check_matrix
from subspan.geometry import AffineMap, Blocks, Subspace
from subspan.geometry.grassmann import polar
from subspan.nn import OrthogonalLinear, cosine_matching_loss, influence_loss


class BT2Output(NamedTuple):
    """full (…, d_new + k) = [compatible; residual]; compatible (…, d_old) is searched in the old gallery."""

    full: Float[Tensor, "*n d_full"]
    compatible: Float[Tensor, "*n d_old"]
    residual: Float[Tensor, "*n d_residual"]


class BasisTransform(nn.Module):
    """Unit vectors f (…, d_new) and e (…, k) → [R₂ m₁; m₂] with m = [e; R₁ C f] cut after d_old, R₁ and R₂ orthogonal.

    Every output has length √(1 + C²); inner products of outputs are ⟨e, e'⟩ + C² ⟨f, f'⟩ whatever R₁ and R₂ are, so the
    full vector is as good as f, while the compatible part sees f through a (d_old - k)-dimensional subspace, which is
    learnt. Both maps and their application stay in float32 (or wider) whatever the type of f and e, autocast included.

    Parameters
    ----------
    d_new, d_old
        Dimensions of the new and the old embedding.
    k
        Dimensions that are added.
    scale
        C > 0.
    orthogonal_map, init, generator
        See `OrthogonalLinear`.

    Raises
    ------
    ValueError
        Unless 0 <= k <= d_old <= d_new + k and scale > 0.

    References
    ----------
    Zhou et al. (2023), arXiv 2211.03989.

    Examples
    --------
    >>> import torch
    >>> from subspan.align import BasisTransform
    >>> f, e = (torch.nn.functional.normalize(torch.randn(5, d), dim=1) for d in (8, 2))
    >>> found = BasisTransform(8, 6, k=2, scale=2.0)(f, e)
    >>> torch.allclose(found.full @ found.full.mT, e @ e.mT + 4 * f @ f.mT, atol=1e-5)
    True
    >>> tuple(found.compatible.shape), tuple(found.residual.shape)
    ((5, 6), (5, 4))
    """

    def __init__(
        self,
        d_new: int,
        d_old: int,
        k: int = 32,
        scale: float = 2.0,
        *,
        orthogonal_map: str = "matrix_exp",
        init: str = "random",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if d_new < 1 or d_old < 1:
            raise ValueError(f"d_new, d_old: must be at least 1, got {d_new}, {d_old}")
        if not 0 <= k <= d_old:
            raise ValueError(f"k: must lie in [0, d_old = {d_old}], got {k}")
        if d_old > d_new + k:
            raise ValueError(f"d_old: at most d_new + k = {d_new + k}, got {d_old}; raise k or d_new")
        if not scale > 0:
            raise ValueError(f"scale: must be positive, got {scale}")
        self.d_new, self.d_old, self.k, self.scale = d_new, d_old, k, float(scale)
        options: dict[str, Any] = {"init": init, "orthogonal_map": orthogonal_map, "generator": generator}
        self.new_basis = OrthogonalLinear(d_new, **options)
        self.old_basis = OrthogonalLinear(d_old, **options)

    def forward(self, f: Float[Tensor, "*n d_new"], e: Float[Tensor, "*n k"]) -> BT2Output:
        """Change the bases of unit vectors f (…, d_new) and e (…, k; width 0 for k = 0)."""
        if f.shape[-1] != self.d_new or e.shape[-1] != self.k:
            raise ValueError(f"f, e: expected widths {self.d_new} and {self.k}, got {f.shape[-1]} and {e.shape[-1]}")
        with torch.autocast(f.device.type, enabled=False):
            wide = torch.promote_types(f.dtype, torch.float32)
            mixed = torch.cat([e.to(wide), self.new_basis(self.scale * f.to(wide))], -1)
            compatible, residual = self.old_basis(mixed[..., : self.d_old]), mixed[..., self.d_old :]
        return BT2Output(torch.cat([compatible, residual], -1), compatible, residual)

    def recover(self, full: Float[Tensor, "*n d_full"]) -> tuple[Float[Tensor, "*n d_new"], Float[Tensor, "*n k"]]:
        """The f and e behind outputs (…, d_new + k), exactly."""
        r1, r2 = (basis.weight.to(full) for basis in (self.new_basis, self.old_basis))
        mixed = torch.cat([full[..., : self.d_old] @ r2, full[..., self.d_old :]], -1)
        return mixed[..., self.k :] @ r1 / self.scale, mixed[..., : self.k]

    @property
    def blocks(self) -> Blocks:
        """The new space: "visible" is what the compatible part sees, d_old - k dimensions; "residual" the rest."""
        seen = self.d_old - self.k
        axes = polar(self.new_basis.weight.detach().double().mT)
        return Blocks({"visible": seen, "residual": self.d_new - seen}, rotation=axes)

    @property
    def visible_subspace(self) -> Subspace:
        """The d_old - k dimensions of the new space that the compatible part sees. Raises ValueError at k = d_old."""
        return cast(Subspace, self.blocks.subspace("visible"))

    @property
    def residual_subspace(self) -> Subspace:
        """The rest of the new space, which the old one cannot hold. Raises ValueError where nothing is left."""
        return cast(Subspace, self.blocks.subspace("residual"))

    @property
    def affine_map(self) -> AffineMap:
        """The linear map [e; f] → full as a matrix (d_new + k, k + d_new)."""
        identity = torch.eye(self.k + self.d_new, device=self.new_basis.weight.device)
        with torch.no_grad():
            return AffineMap(self(identity[:, self.k :], identity[:, : self.k]).full.mT.contiguous())

    @torch.no_grad()
    def warm_start(
        self, f: Float[Tensor, "n d_new"], e: Float[Tensor, "n k"], old: Float[Tensor, "n d_old"]
    ) -> BasisTransform:
        """Set R₁ and R₂ from rows f, e and the old features (n, d_old) that they are to answer for; returns self.

        The leading d_old - k pairs of singular directions of old'f become the visible subspace, and Procrustes'
        rotation brings e to the old directions that are left. Closed form; both determinants are within reach.
        """
        rows = check_matrix(old, "old", columns=self.d_old).double()
        seen = self.d_old - self.k
        u, _, vh = torch.linalg.svd(rows.mT @ f.double())
        left = u[:, seen:]
        r2 = torch.cat([left @ polar(left.mT @ (rows.mT @ e.double())), u[:, :seen]], 1) if self.k else u
        self.old_basis.weight = r2.to(self.old_basis.weight)
        self.new_basis.weight = vh.to(self.new_basis.weight)
        return self

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"d_new={self.d_new}, d_old={self.d_old}, k={self.k}, scale={self.scale:g}"


class BT2Features(NamedTuple):
    """logits (n, classes); new f (n, d_new) and extra e (n, k), unit; full (n, d_new + k); compatible (n, d_old)."""

    logits: Float[Tensor, "n c"]
    new: Float[Tensor, "n d_new"]
    extra: Float[Tensor, "n k"]
    full: Float[Tensor, "n d_full"]
    compatible: Float[Tensor, "n d_old"]


class BT2Head(nn.Module):
    """Pooled features g of any backbone → class logits, f, e and the vectors of `BasisTransform`.

    f is the first d_new numbers of g, scaled to one; e the first k of a learnt linear map of relu(g) to d_old numbers,
    scaled to one before they are cut and again after. Zero vectors stay zero.

    Parameters
    ----------
    in_features
        Width of g; where it is not d_new + d_old a linear layer brings g to that width first.
    d_new, d_old, k, scale
        See `BasisTransform`.
    num_classes
        Of the logits.
    **options
        Of `BasisTransform`.

    Raises
    ------
    ValueError
        For sizes that do not fit.

    References
    ----------
    Zhou et al. (2023), arXiv 2211.03989.

    Examples
    --------
    >>> import torch
    >>> from subspan.align import BT2Head
    >>> out = BT2Head(16, 8, 6, k=2, num_classes=3)(torch.randn(5, 16))
    >>> tuple(out.logits.shape), tuple(out.full.shape), tuple(out.compatible.shape)
    ((5, 3), (5, 10), (5, 6))
    """

    def __init__(
        self,
        in_features: int,
        d_new: int,
        d_old: int,
        k: int = 32,
        *,
        num_classes: int,
        scale: float = 2.0,
        **options: Any,
    ) -> None:
        super().__init__()
        if in_features < 1 or num_classes < 2:
            raise ValueError(f"in_features, num_classes: need at least 1 and 2, got {in_features}, {num_classes}")
        self.transform = BasisTransform(d_new, d_old, k, scale, **options)
        width = d_new + d_old
        self.neck = nn.Identity() if in_features == width else nn.Linear(in_features, width)
        self.classifier = nn.Linear(d_new, num_classes, bias=False)
        self.old_branch = nn.Linear(width, d_old) if k else None

    def forward(self, features: Float[Tensor, "n p"]) -> BT2Features:
        """Everything that the loss and a search need, from pooled features (n, in_features)."""
        g = self.neck(features)
        f = _unit(g[:, : self.transform.d_new])
        if self.old_branch is None:
            e = f[:, :0]
        else:
            e = _unit(_unit(self.old_branch(g.relu()))[:, : self.transform.k])
        out = self.transform(f, e)
        return BT2Features(self.classifier(f), f, e, out.full, out.compatible)


class BT2Loss(nn.Module):
    """CE(logits) + λ₁ (1 - cos(f, new)) + λ₂ CE(Q b, y) + λ₃ (1 - cos(b, old)), b the compatible part at unit length.

    Parameters
    ----------
    class_means
        Q (classes, d_old), see `old_class_means`.
    lambdas
        (λ₁, λ₂, λ₃), at least 0.
    temperature
        Of the second cross entropy; 1 as published.
    label_smoothing
        Of the first cross entropy.

    Raises
    ------
    ValueError
        For other lambdas.

    References
    ----------
    Zhou et al. (2023), arXiv 2211.03989.

    Examples
    --------
    >>> import torch
    >>> from subspan.align import BT2Head, BT2Loss
    >>> unit = lambda d: torch.nn.functional.normalize(torch.randn(5, d), dim=1)
    >>> out = BT2Head(16, 8, 6, k=2, num_classes=3)(torch.randn(5, 16))
    >>> total, terms = BT2Loss(torch.randn(3, 6))(out, torch.tensor([0, 1, 2, 0, 1]), unit(6), unit(8))
    >>> len(terms), bool(total > 0)
    (4, True)
    """

    class_means: Tensor

    def __init__(
        self,
        class_means: Float[Tensor, "c d_old"],
        lambdas: Sequence[float] = (1.0, 10.0, 5.0),
        *,
        temperature: float = 1.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if len(lambdas) != 3 or not all(value >= 0 for value in lambdas):
            raise ValueError(f"lambdas: expected three numbers >= 0, got {tuple(lambdas)}")
        self.register_buffer("class_means", check_matrix(class_means, "class_means").float())
        self.lambdas = tuple(float(value) for value in lambdas)
        self.temperature = temperature
        self.label_smoothing = label_smoothing

    def forward(
        self,
        out: BT2Features,
        labels: Int[Tensor, " n"],
        old: Float[Tensor, "n d_old"],
        new: Float[Tensor, "n d_new"],
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The total, and its terms before weighting, given unit features of the two teachers."""
        compatible = _unit(out.compatible)
        terms = {
            "classification": F.cross_entropy(out.logits, labels, label_smoothing=self.label_smoothing),
            "new_matching": 1 + cosine_matching_loss(out.new, new),
            "influence": influence_loss(compatible, self.class_means, labels, temperature=self.temperature),
            "old_matching": 1 + cosine_matching_loss(compatible, old),
        }
        weights = (1.0, *self.lambdas)
        return torch.stack([weight * term.float() for weight, term in zip(weights, terms.values())]).sum(), terms


def _unit(rows: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    # The square of a half-precision number overflows long before the number does.
    return F.normalize(rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows, dim=-1)
