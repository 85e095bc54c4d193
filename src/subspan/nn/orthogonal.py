"""Square linear layers that stay orthogonal in training, from any orthogonal start."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from ..geometry.arrays import as_tensor, check_finite
from ..geometry.grassmann import polar, random_basis

_START_TOLERANCE = 1e-3
_MAPS = ("matrix_exp", "cayley", "householder")


class OrthogonalLinear(nn.Module):
    """Rows x (…, d) → Q x with Q orthogonal (d, d), learnt without leaving the orthogonal group.

    init: "identity", "random" (Haar) or an orthogonal matrix, such as the solution of Procrustes' problem. Training
    stays on the side of the group, rotations or reflections, that it starts on; `determinant` says which.
    orthogonal_map: "matrix_exp" or "cayley" (of a skew matrix, about the start; O(d³) a step, Cayley the cheaper from
    about 1024) or "householder" (products of reflections). Q is computed in `dtype` and used in the type of x.
    Raises ValueError for a start that is not orthogonal. Source: Lezcano-Casado & Martínez-Rubio (2019).
    """

    weight: Tensor

    def __init__(
        self,
        d: int,
        *,
        init: str | Float[Tensor, "e f"] = "identity",
        orthogonal_map: str = "matrix_exp",
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if d < 1:
            raise ValueError(f"d: must be at least 1, got {d}")
        if orthogonal_map not in _MAPS:
            raise ValueError(f"orthogonal_map: expected one of {_MAPS}, got {orthogonal_map!r}")
        start = _start(d, init, generator)
        self.d = d
        self.orthogonal_map = orthogonal_map
        self.weight = nn.Parameter(start.to(dtype))
        # About a stored start the skew forms reach both determinants; products of reflections are found by QR.
        parametrizations.orthogonal(self, "weight", orthogonal_map, use_trivialization=orthogonal_map != "householder")
        self.weight = start.to(dtype)

    @property
    def determinant(self) -> int:
        """+1 for rotations, -1 for reflections."""
        return 1 if float(torch.linalg.det(self.weight.detach().double())) > 0 else -1

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Rotate rows x (…, d)."""
        return F.linear(x, self.weight.to(x.dtype))

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"d={self.d}, orthogonal_map={self.orthogonal_map}"


def _start(d: int, init: str | Tensor, generator: torch.Generator | None) -> Tensor:
    if isinstance(init, str):
        if init == "identity":
            return torch.eye(d, dtype=torch.float64)
        if init == "random":
            return random_basis(d, d, generator=generator)
        raise ValueError(f"init: expected 'identity', 'random' or an orthogonal matrix, got {init!r}")
    matrix = check_finite(as_tensor(init, "init", ndim=2), "init").double()
    if matrix.shape != (d, d):
        raise ValueError(f"init: expected shape {(d, d)}, got {tuple(matrix.shape)}")
    nearest = polar(matrix)
    if float((nearest - matrix).abs().max()) > _START_TOLERANCE:
        raise ValueError("init: the matrix is not orthogonal; pass its polar factor (geometry.grassmann.polar)")
    return nearest
