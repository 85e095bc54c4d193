"""λ-orthogonality: a penalty that pulls a weight towards the orthogonal matrices and lets go at a chosen distance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .penalties import gram_error

_RELATIVE = 0.375
_SHARPNESS = 100.0


def orthogonality_defect(weight: Float[Tensor, "d_out ..."]) -> Float[Tensor, ""]:
    """Frobenius norm r of W'W - I or WW' - I, whichever Gram matrix is smaller; differentiable, with gradient 0 at 0.

    Parameters
    ----------
    weight
        W (d_out, …), flattened to a matrix, as for convolutions.

    Returns
    -------
    Tensor, scalar, in float32 or wider.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import orthogonality_defect
    >>> orthogonality_defect(torch.tensor([[1.0, 0.0], [0.0, 2.0]])).item()
    3.0
    """
    return torch.linalg.vector_norm(gram_error(weight.flatten(1)))


def defect_limit(weight: Tensor, lam: float | None = None, lam_rel: float | None = None) -> float:
    """λ for a weight: `lam` itself, or `lam_rel` (0.375 where both are None) times the root of the Gram matrix's size.

    With r = λ the squared singular values deviate from 1 by λ / √n in the root mean square.
    """
    if lam is not None:
        return float(lam)
    return (_RELATIVE if lam_rel is None else lam_rel) * math.sqrt(min(weight.flatten(1).shape))


class LambdaOrthogonality(nn.Module):
    """Loss σ(α (r - λ)) r of a weight, r its orthogonality defect: about r above λ, and about nothing below.

    The call takes a weight (d_out, …), flattened to a matrix. Against a task that pulls outwards with slope g, a weight
    comes to rest at about r = λ - log(α λ / g) / α.

    Parameters
    ----------
    lam
        λ, the defect where the pull ends. 0 is soft orthogonality, infinity no constraint.
    lam_rel
        λ / √n in place of `lam`, n the size of the smaller Gram matrix: it means the same for every size. 0.375 where
        both are None.
    alpha
        Sharpness α. None: 100 / λ, with which a weight rests within about a tenth of any λ.

    Raises
    ------
    ValueError
        For negative values, and both `lam` and `lam_rel`.

    References
    ----------
    Ricci et al. (NeurIPS 2025), arXiv 2509.16664.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import LambdaOrthogonality
    >>> penalty = LambdaOrthogonality(lam=1.0)
    >>> penalty(torch.eye(2)).item(), penalty(torch.tensor([[1.0, 0.0], [0.0, 2.0]])).item()
    (0.0, 3.0)
    """

    def __init__(self, lam: float | None = None, *, lam_rel: float | None = None, alpha: float | None = None) -> None:
        super().__init__()
        if lam is not None and lam_rel is not None:
            raise ValueError("lam_rel: give lam or lam_rel, not both")
        for name, value in (("lam", lam), ("lam_rel", lam_rel), ("alpha", alpha)):
            if value is not None and not value >= 0:
                raise ValueError(f"{name}: must be >= 0, got {value}")
        self.lam, self.lam_rel, self.alpha = lam, lam_rel, alpha

    def forward(self, weight: Float[Tensor, "d_out ..."]) -> Float[Tensor, ""]:
        """Penalty of a weight (d_out, …), flattened to a matrix."""
        limit = defect_limit(weight, self.lam, self.lam_rel)
        r = orthogonality_defect(weight)
        if math.isinf(limit):
            return r * 0
        if self.alpha is None and limit == 0:
            return r
        alpha = _SHARPNESS / limit if self.alpha is None else self.alpha
        return torch.sigmoid(alpha * (r - limit)) * r

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"lam={self.lam}, lam_rel={self.lam_rel}, alpha={self.alpha}"


@dataclass(frozen=True)
class RegisteredPenalty:
    """The weights of a model that a penalty is on; calling it gives the sum, to be added to the task's loss."""

    penalty: LambdaOrthogonality
    owners: dict[str, nn.Module]
    name: str

    def __call__(self) -> Float[Tensor, ""]:
        """Sum of the penalties, from the weights as they are now."""
        return torch.stack([self.penalty(getattr(owner, self.name)) for owner in self.owners.values()]).sum()

    @torch.no_grad()
    def defects(self) -> dict[str, float]:
        """Orthogonality defect of each weight, by the name of its module."""
        return {key: float(orthogonality_defect(getattr(owner, self.name))) for key, owner in self.owners.items()}


_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


def register_lambda_orthogonality(
    module: nn.Module,
    name: str = "weight",
    *,
    lam: float | None = None,
    lam_rel: float | None = None,
    alpha: float | None = None,
) -> RegisteredPenalty:
    """λ-orthogonality on the weights of a module's linear and convolutional layers, or on its own parameter.

    Parameters
    ----------
    module
        Looked through for layers; its own matrix `name` counts too.
    name
        Of the parameter in each layer.
    lam, lam_rel, alpha
        As in `LambdaOrthogonality`.

    Returns
    -------
    RegisteredPenalty
        Called, it gives the sum of the penalties: `loss = task_loss + penalty()`. `defects()` are by the name of the
        layer.

    Raises
    ------
    ValueError
        When there is no such weight.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import register_lambda_orthogonality
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> penalty = register_lambda_orthogonality(model, lam=0.1)
    >>> list(penalty.defects()), bool(penalty() > 0)
    (['0', '2'], True)
    """
    own = getattr(module, name, None)
    owners: dict[str, nn.Module]
    owners = {key: part for key, part in module.named_modules() if isinstance(part, _LAYERS) and hasattr(part, name)}
    if isinstance(own, Tensor) and own.ndim >= 2:
        owners.setdefault("", module)
    if not owners:
        raise ValueError(f"module: no linear or convolutional layer with a matrix {name!r} in {type(module).__name__}")
    return RegisteredPenalty(LambdaOrthogonality(lam, lam_rel=lam_rel, alpha=alpha), owners, name)


@torch.no_grad()
def limit_orthogonality_defect(weight: Float[Tensor, "d_out d_in"], limit: float) -> Float[Tensor, "d_out d_in"]:
    """The weight with squared singular values drawn towards 1, s² ← 1 + (s² - 1) min(1, limit / r), so that r <= limit.

    Its singular directions stay.

    Parameters
    ----------
    weight
        (d_out, d_in), with orthogonality defect r.
    limit
        The largest defect that is left; >= 0.

    Returns
    -------
    Tensor (d_out, d_in), a new one.

    Raises
    ------
    ValueError
        For a negative limit.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import limit_orthogonality_defect, orthogonality_defect
    >>> weight = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    >>> round(orthogonality_defect(limit_orthogonality_defect(weight, 4.0)).item(), 3)
    4.0
    """
    if not limit >= 0:
        raise ValueError(f"limit: must be >= 0, got {limit}")
    r = float(orthogonality_defect(weight))
    if r <= limit:
        return weight.clone()
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return u * (1 + (s.square() - 1) * (limit / r)).clamp_min(0).sqrt() @ vh
