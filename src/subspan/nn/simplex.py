"""A classifier that never changes: the vertices of a regular simplex, and the losses that keep models on it.

Source: Biondi et al., Stationary Representations (CVPR 2024, arXiv 2405.02581).
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.base import as_tensor
from subspan.geometry import Subspace
from subspan.geometry.grassmann import orthonormalize
from subspan.measures import template_gallery


def _check_vertices(count: int, name: str) -> int:
    if isinstance(count, bool) or count < 2:
        raise ValueError(f"{name}: a simplex needs at least 2 vertices, got {count}")
    return count


def _constants(count: int) -> tuple[float, float, float]:
    """(v, c, ν): the last point is v·1, the centroid c·1, and ν the distance of every vertex from it."""
    v = (1 - math.sqrt(count)) / (count - 1)
    return v, (1 + v) / count, math.sqrt((count - 1) / count)


def simplex_vertices(
    count: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
) -> Float[Tensor, "k e"]:
    """The vertices of the regular simplex about the origin: unit rows, cosines -1 / (count - 1).

    The orientation is part of the interface between models: the unit vectors and one more point, less their centroid.

    Parameters
    ----------
    count
        Number of vertices, from 2.
    dtype, device
        Of the result.

    Returns
    -------
    Tensor, (count, count - 1)

    Raises
    ------
    ValueError
        For fewer than 2.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import simplex_vertices
    >>> vertices = simplex_vertices(3, dtype=torch.float32)
    >>> (vertices @ vertices.mT).round(decimals=3)
    tensor([[ 1.0000, -0.5000, -0.5000],
            [-0.5000,  1.0000, -0.5000],
            [-0.5000, -0.5000,  1.0000]])
    """
    v, c, radius = _constants(_check_vertices(count, "count"))
    points = torch.eye(count, count - 1, dtype=torch.float64, device=device)
    points[-1] = v
    return ((points - c) / radius).to(dtype)


def simplex_logits(z: Float[Tensor, "*n e"]) -> Float[Tensor, "*n k"]:
    """Inner products of rows with all vertices of a simplex in O(k) a row, without the matrix of vertices.

    Parameters
    ----------
    z
        Rows (…, k - 1).

    Returns
    -------
    Tensor (…, k); float32 for half precision, as the products contain a sum over all coordinates.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import simplex_logits, simplex_vertices
    >>> vertices = simplex_vertices(5)
    >>> torch.allclose(simplex_logits(vertices), vertices @ vertices.mT)
    True
    """
    count = _check_vertices(z.shape[-1] + 1, "z: columns + 1")
    v, c, radius = _constants(count)
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    total = wide.sum(-1, keepdim=True)
    return torch.cat([wide - c * total, (v - c) * total], -1) / radius


def active_subspace(count: int, vertices: Any, *, dtype: torch.dtype = torch.float64) -> Subspace:
    """The span of chosen vertices of a simplex, as a linear subspace of R^(count - 1).

    L distinct vertices span L dimensions, all of them count - 1. Its `residual_energy` of features is their energy
    outside.

    Parameters
    ----------
    count
        Vertices of the simplex.
    vertices
        Numbers of the chosen ones; one may stand there more than once.
    dtype
        Of the basis.

    Returns
    -------
    Subspace

    Raises
    ------
    ValueError
        Where none is chosen, or a number is no vertex.

    Examples
    --------
    >>> from subspan.nn import active_subspace
    >>> active_subspace(5, [0, 3]).basis.shape
    torch.Size([4, 2])
    """
    index = _check_index(as_tensor(vertices, "vertices", ndim=1, floating=False), count, "vertices").unique()
    if not len(index):
        raise ValueError("vertices: at least one is needed")
    chosen = simplex_vertices(count, dtype=torch.float64)[index[: count - 1]]
    return Subspace(orthonormalize(chosen.mT).to(dtype))


def _check_index(index: Tensor, count: int, name: str) -> Tensor:
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, got {index.dtype}")
    if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < count):
        raise ValueError(f"{name}: must lie in [0, {count - 1}], got {int(index.min())} to {int(index.max())}")
    return index.long()


class SimplexClassifier(nn.Module):
    """Backbone features (…, in_features) → logits (…, preallocated) over the fixed vertices of a simplex.

    There is no weight of classes: nothing to train or store. Classes that come later find their vertex waiting.

    Parameters
    ----------
    num_classes
        Classes in use; their labels are 0 … num_classes - 1.
    in_features
        Where it differs from K - 1, a bias-free linear map comes first. None: K - 1.
    preallocated
        Vertices in all, K; embeddings have K - 1 coordinates.
    index
        Labels count from the "front" of the table (models trained elsewhere) or from the "back" (one's own tasks), so
        that both share the table until it is full.
    normalize
        Logits of unit embeddings; by default embeddings go in as they are.
    scale
        Factor of the logits.

    Raises
    ------
    ValueError
        For more classes than vertices, and values out of range.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import SimplexClassifier
    >>> head = SimplexClassifier(3, preallocated=8, index="back")
    >>> vertices = head.class_index(torch.arange(3))
    >>> vertices, head(head.weight[vertices]).argmax(1)
    (tensor([7, 6, 5]), tensor([7, 6, 5]))
    """

    def __init__(
        self,
        num_classes: int,
        in_features: int | None = None,
        *,
        preallocated: int = 1024,
        index: str = "front",
        normalize: bool = False,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if index not in ("front", "back"):
            raise ValueError(f"index: expected 'front' or 'back', got {index!r}")
        if not scale > 0:
            raise ValueError(f"scale: must be positive, got {scale}")
        self.preallocated = _check_vertices(preallocated, "preallocated")
        self.index = index
        self.normalize = normalize
        self.scale = scale
        self.num_classes = 0
        self.extend(num_classes)
        self.in_features = preallocated - 1 if in_features is None else in_features
        if self.in_features < 1:
            raise ValueError(f"in_features: must be at least 1, got {in_features}")
        same = self.in_features == preallocated - 1
        self.projection = nn.Identity() if same else nn.Linear(self.in_features, preallocated - 1, bias=False)

    def extend(self, num_classes: int) -> None:
        """Use that many classes from now on; nothing moves."""
        if num_classes < max(1, self.num_classes):
            raise ValueError(f"num_classes: must be at least {max(1, self.num_classes)}, got {num_classes}")
        if num_classes > self.preallocated:
            raise ValueError(
                f"num_classes: {num_classes} classes, but only {self.preallocated} vertices are preallocated; "
                f"classes {self.preallocated} to {num_classes - 1} have none"
            )
        self.num_classes = num_classes

    @property
    def weight(self) -> Float[Tensor, "k e"]:
        """The vertices as a matrix, made anew; `forward` does without it."""
        return simplex_vertices(self.preallocated, dtype=torch.float32)

    def class_index(self, labels: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
        """The vertex number of each label. Raises ValueError for labels outside [0, num_classes)."""
        chosen = _check_index(labels, self.num_classes, "labels")
        return chosen if self.index == "front" else self.preallocated - 1 - chosen

    @torch.no_grad()
    def warm_start(self, features: Float[Tensor, "n f"], labels: Int[Tensor, " n"]) -> None:
        """Turn the projection so that the class means of unit features come nearest to their vertices (Procrustes)."""
        if not isinstance(self.projection, nn.Linear):
            raise ValueError(
                f"in_features: {self.in_features} features are embeddings already; nothing is to be turned"
            )
        means, classes = template_gallery(features, self.class_index(labels))
        cross = simplex_vertices(self.preallocated)[torch.as_tensor(classes)].mT @ means.double().cpu()
        u, _, vh = torch.linalg.svd(cross, full_matrices=False)
        self.projection.weight.copy_(u @ vh)

    def embed(self, features: Float[Tensor, "*n f"]) -> Float[Tensor, "*n e"]:
        """Embeddings (…, K - 1), not normalised. Raises ValueError for features of another width."""
        if features.shape[-1] != self.in_features:
            raise ValueError(
                f"features: expected {self.in_features} columns, got {features.shape[-1]}; pass in_features="
                f"{features.shape[-1]} so that a linear map makes them {self.preallocated - 1} wide"
            )
        return self.projection(features)

    def logits(self, embeddings: Float[Tensor, "*n e"]) -> Float[Tensor, "*n k"]:
        """Inner products of embeddings with all vertices (float32 for half precision)."""
        if self.normalize:
            embeddings = F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=-1)
        return self.scale * simplex_logits(embeddings)

    def forward(self, features: Float[Tensor, "*n f"]) -> Float[Tensor, "*n k"]:
        """Logits over all vertices; compare with `class_index(labels)`."""
        return self.logits(self.embed(features))

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"num_classes={self.num_classes}, preallocated={self.preallocated}, index={self.index}"


class HOCLoss(nn.Module):
    """Higher-order compatibility: features of the new model contrasted with the same items' features of the old one.

    mean_i [ -mu⟨o_i, n_i⟩ + log Σ_j exp(s_ij) ] on unit features, s_ij = mu⟨o_i, n_j⟩ for labels that differ. The call
    takes new and old features (n, d) and labels (n,); NaN raises ValueError. No gradient reaches the old features.
    Computed in float32 at least; a zero vector has no direction and counts as zero. Warns where a batch holds one class
    only.

    Parameters
    ----------
    mu
        Inverse temperature; > 0.
    same_class
        Pairs of one label, the positive among them, count as s_ij = 0 each ("constant", the authors' program) or not at
        all ("exclude").

    Raises
    ------
    ValueError
        For values out of range.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import HOCLoss
    >>> loss, x, labels = HOCLoss(), torch.eye(3), torch.arange(3)
    >>> bool(loss(x, x, labels) < loss(x.roll(1, 0), x, labels))
    True
    """

    def __init__(self, mu: float = 10.0, *, same_class: str = "constant") -> None:
        super().__init__()
        if not mu > 0:
            raise ValueError(f"mu: must be positive, got {mu}")
        if same_class not in ("constant", "exclude"):
            raise ValueError(f"same_class: expected 'constant' or 'exclude', got {same_class!r}")
        self.mu = mu
        self.same_class = same_class

    def forward(
        self, new: Float[Tensor, "n d"], old: Float[Tensor, "n d"], labels: Int[Tensor, " n"]
    ) -> Float[Tensor, ""]:
        """The loss of features (n, d) of the two models on the same items with their labels."""
        if new.shape != old.shape:
            raise ValueError(f"old: expected shape {tuple(new.shape)}, got {tuple(old.shape)}")
        dtype = torch.promote_types(new.dtype, torch.float32)
        n, o = F.normalize(new.to(dtype), dim=-1), F.normalize(old.detach().to(dtype), dim=-1)
        similarity = self.mu * o @ n.mT
        if bool(similarity.detach().isnan().any()):
            raise ValueError("new, old: the features contain NaN or infinity")
        same = labels.unsqueeze(1) == labels
        positive = similarity.diagonal()
        if bool(same.all()):
            warnings.warn("labels: the batch holds one class only, so the loss has no negatives", stacklevel=2)
            if self.same_class == "exclude":
                return -positive.mean()
        if self.same_class == "exclude":
            kept = similarity.masked_fill(same, -torch.inf)
            return (kept.logsumexp(1) - positive).mean()
        return (similarity.masked_fill(same, 0).logsumexp(1) - positive).mean()

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"mu={self.mu}, same_class={self.same_class}"


class CompatibleCE(nn.Module):
    """lam · cross entropy on the fixed vertices + (1 - lam) · `HOCLoss`; cross entropy alone where no old features are.

    The call takes logits (n, k), vertex numbers (n,), and new and old features (n, d) or None.

    Parameters
    ----------
    lam
        In [0, 1], 0.1 as in the authors' program.
    hoc
        The second loss; None: `HOCLoss()`.

    Raises
    ------
    ValueError
        For `lam` outside [0, 1].

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import CompatibleCE
    >>> loss, x, labels = CompatibleCE(), torch.eye(3), torch.arange(3)
    >>> round(loss(20 * x, labels).item(), 3), round(loss(20 * x, labels, x, x).item(), 2)
    (0.0, -8.01)
    """

    def __init__(self, lam: float = 0.1, *, hoc: HOCLoss | None = None) -> None:
        super().__init__()
        if not 0 <= lam <= 1:
            raise ValueError(f"lam: must lie in [0, 1], got {lam}")
        self.lam = lam
        self.hoc = HOCLoss() if hoc is None else hoc

    def forward(
        self,
        logits: Float[Tensor, "n k"],
        vertices: Int[Tensor, " n"],
        new: Float[Tensor, "n d"] | None = None,
        old: Float[Tensor, "n d"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of logits against vertex numbers, and of new against old features."""
        entropy = F.cross_entropy(logits, vertices)
        if self.lam == 1 or new is None or old is None:
            return entropy
        return self.lam * entropy + (1 - self.lam) * self.hoc(new, old, vertices)

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"lam={self.lam}"
