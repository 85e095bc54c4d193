"""Orthonormal matrices as parameters: one family of maps for `torch.nn.utils.parametrize`, and a layer made of them."""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from subspan.base import as_tensor, check_finite
from subspan.geometry.grassmann import polar, random_basis

_START_TOLERANCE = 1e-3


class OrthonormalMap(nn.Module):
    """Parameter → orthonormal columns (d, k), or rows where d < k; what the maps below have in common.

    Assigning a matrix starts there: at the nearest orthonormal one (Procrustes), of either determinant. Computed in
    float32 at least and outside of autocast. Raises ValueError for a start that is not finite or has not full rank.
    """

    def forward(self, x: Float[Tensor, "e f"]) -> Float[Tensor, "d k"]:
        """The orthonormal matrix of a parameter."""
        with torch.autocast(x.device.type, enabled=False):
            q = self._map(x.to(torch.promote_types(x.dtype, torch.float32)))
            # One Newton-Schulz step towards the polar factor takes away the rounding that the map has gathered.
            gram = q.mT @ q if q.shape[0] >= q.shape[1] else q @ q.mT
            half = 1.5 * torch.eye(gram.shape[0], dtype=q.dtype, device=q.device) - 0.5 * gram
            return (q @ half if q.shape[0] >= q.shape[1] else half @ q).to(x.dtype)

    @torch.no_grad()
    def right_inverse(self, matrix: Float[Tensor, "d k"]) -> Float[Tensor, "e f"]:
        """The parameter of the orthonormal matrix that is nearest to `matrix`."""
        wide = matrix.double()
        tall = wide.shape[0] >= wide.shape[1]
        if not matrix.is_meta:
            spectrum = torch.linalg.svdvals(check_finite(wide, "matrix"))
            if not float(spectrum[-1]) > 1e-10 * float(spectrum[0]):
                raise ValueError("matrix: has not full rank, so no orthonormal matrix is nearest to it")
        start = polar(wide) if tall else polar(wide.mT).mT
        return self._start(start).to(matrix.dtype)

    def _map(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _start(self, q: Tensor) -> Tensor:
        raise NotImplementedError

    def _keep(self, name: str, value: Tensor) -> None:
        """Store what belongs to the start beside the parameter, in a buffer, so that it is saved with it."""
        setattr(self, name, value.to(getattr(self, name)))


class HouseholderMap(OrthonormalMap):
    """Products of k reflections in compact WY form: the first k columns of (I - V T V') diag(sign).

    T⁻¹ = striu(V'V) + diag(V'V)/2 (Joffrin & Puglisi), so the map is one k x k triangular solve: O(d k²), any d and k.
    A zero vector reflects nothing. Parameter: the vectors V (d, k).
    """

    sign: Tensor

    def __init__(self, d: int, k: int) -> None:
        super().__init__()
        self.wide = d < k
        self.register_buffer("sign", torch.ones(min(d, k)))

    def _map(self, x: Tensor) -> Tensor:
        v = x.mT if self.wide else x
        # Looked for on the processor alone: elsewhere it would wait for the device.
        if not torch.compiler.is_compiling() and v.device.type == "cpu" and bool((v == 0).all(0).any()):
            warnings.warn("a Householder vector is zero and reflects nothing", stacklevel=2)
        q = householder_columns(v) * self.sign.to(v.dtype)
        return q.mT if self.wide else q

    def _start(self, q: Tensor) -> Tensor:
        v, sign = householder_vectors(q.mT if self.wide else q)
        self._keep("sign", sign)
        return v.mT if self.wide else v


class _SkewMap(OrthonormalMap):
    """Maps of skew matrices A about a stored start B (d, d): the first k columns of B f(A), with f(0) = I.

    A = [X, 0] - [X, 0]', so columns beyond the first k are turned only as far as these need. Parameter: X (d, k).
    """

    base: Tensor

    def __init__(self, d: int, k: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.wide = d < k
        self.register_buffer("base", torch.eye(max(d, k), dtype=dtype))

    def _of_skew(self, a: Tensor) -> Tensor:
        raise NotImplementedError

    def _map(self, x: Tensor) -> Tensor:
        x = x.mT if self.wide else x
        d, k = x.shape
        a = F.pad(x.tril(-1), (0, d - k))
        q = self.base.to(x.dtype) @ self._of_skew(a - a.mT)[:, :k]
        return q.mT if self.wide else q

    def _start(self, q: Tensor) -> Tensor:
        tall = q.mT if self.wide else q
        d, k = tall.shape
        if k < d:
            rest = torch.linalg.svd(tall, full_matrices=True)[0][:, k:]
            self._keep("base", torch.cat([tall, rest], 1))
        else:
            self._keep("base", tall)
        return torch.zeros_like(q)


class MatrixExpMap(_SkewMap):
    """f = exp: every rotation of the start is reached; O(d³)."""

    def _of_skew(self, a: Tensor) -> Tensor:
        return torch.linalg.matrix_exp(a)


class CayleyMap(_SkewMap):
    """f(A) = (I - A/2)⁻¹ (I + A/2): every rotation of the start but those with an eigenvalue -1; O(d³), one solve."""

    def _of_skew(self, a: Tensor) -> Tensor:
        one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        return torch.linalg.solve(one - a / 2, one + a / 2)


class PolarMap(OrthonormalMap):
    """The polar factor of the parameter itself, which is the matrix (d, k): one thin SVD; fails where it loses rank."""

    def __init__(self, d: int, k: int) -> None:
        super().__init__()
        self.wide = d < k

    def _map(self, x: Tensor) -> Tensor:
        return polar(x.mT).mT if self.wide else polar(x)

    def _start(self, q: Tensor) -> Tensor:
        return q


class GivensMap(OrthonormalMap):
    """About a stored start B (d, d), a butterfly of plane rotations: ⌈log₂ d⌉ levels of pairs (i, i + 2^level), any d.

    ½ d log₂ d angles where the dense maps have ½ d (d - 1) numbers: not all rotations are reached. Square only.
    Parameter: angles (levels, ⌊d/2⌋), in radians.
    """

    base: Tensor

    def __init__(self, d: int, k: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if d != k:
            raise ValueError(f"orthogonal_map: the butterfly of Givens rotations is square, got a {d} x {k} matrix")
        self.register_buffer("base", torch.eye(d, dtype=dtype))

    def _map(self, x: Tensor) -> Tensor:
        first, second = (index.to(x.device) for index in givens_pairs(len(self.base)))
        return givens_rotate(self.base.to(x.dtype), x, first, second)

    def _start(self, q: Tensor) -> Tensor:
        self._keep("base", q)
        return q.new_zeros(givens_pairs(len(q))[0].shape)


_MAPS: dict[str, type[OrthonormalMap]] = {
    "matrix_exp": MatrixExpMap,
    "cayley": CayleyMap,
    "householder": HouseholderMap,
    "givens": GivensMap,
    "polar": PolarMap,
}


def register_orthonormal(module: nn.Module, name: str = "weight", orthogonal_map: str = "householder") -> nn.Module:
    """Keep a matrix of a module orthonormal from now on: its columns, or its rows where it is wide.

    The start is the orthonormal matrix nearest to what the parameter holds, and `module.name = matrix` starts anew from
    another.

    Parameters
    ----------
    module
        What holds the matrix; changed in place.
    name
        Of the parameter, (d, k).
    orthogonal_map
        "householder" (O(d k²), any size), "matrix_exp", "cayley", "polar" or "givens" (square; fewest numbers).

    Returns
    -------
    The module.

    Raises
    ------
    ValueError
        For what is not a matrix of full rank, and another map.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import register_orthonormal
    >>> layer = register_orthonormal(torch.nn.Linear(4, 2))
    >>> torch.allclose(layer.weight @ layer.weight.mT, torch.eye(2), atol=1e-5)
    True
    """
    if orthogonal_map not in _MAPS:
        raise ValueError(f"orthogonal_map: expected one of {tuple(_MAPS)}, got {orthogonal_map!r}")
    tensor = getattr(module, name, None)
    if not isinstance(tensor, nn.Parameter) or tensor.ndim != 2:
        raise ValueError(f"name: {name!r} is no parameter with two dimensions of {type(module).__name__}")
    options: dict[str, Any] = {"dtype": tensor.dtype} if orthogonal_map in ("matrix_exp", "cayley", "givens") else {}
    made = _MAPS[orthogonal_map](*tensor.shape, **options).to(tensor.device)
    # The shape of the butterfly's parameter differs from the matrix's, which torch allows where it need not look.
    parametrize.register_parametrization(module, name, made, unsafe=True)
    return module


class OrthogonalLinear(nn.Module):
    """Rows x (…, d) → Q x with Q orthogonal (d, d), learnt without leaving the orthogonal group.

    Training stays on the side of the group, rotations or reflections, that it starts on; `determinant` says which.

    Parameters
    ----------
    d
        Width of the rows.
    init
        "identity", "random" (Haar) or an orthogonal matrix, such as the solution of Procrustes' problem.
    orthogonal_map
        As in `register_orthonormal`; "matrix_exp" and "cayley" cost O(d³) a step, Cayley the less.
    generator
        Of the random start.
    dtype
        That Q is computed in; it is used in the type of x.

    Raises
    ------
    ValueError
        For a start that is not orthogonal, and another map.

    References
    ----------
    Lezcano-Casado & Martínez-Rubio (2019).

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import OrthogonalLinear
    >>> layer, x = OrthogonalLinear(4, init="random"), torch.randn(5, 4)
    >>> torch.allclose(layer(x).norm(dim=1), x.norm(dim=1), atol=1e-5)
    True
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
        start = _start(d, init, generator)
        self.d = d
        self.orthogonal_map = orthogonal_map
        self.weight = nn.Parameter(start.to(dtype))
        register_orthonormal(self, "weight", orthogonal_map)
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


def householder_factors(v: Float[Tensor, "*b d m"]) -> tuple[Float[Tensor, "*b d m"], Float[Tensor, "*b m m"]]:
    """Unit vectors V and the triangular T⁻¹ of H_1 ⋯ H_m = I - V T V', H_i = I - 2 v_i v_i'/|v_i|².

    A zero vector counts as no reflection.
    """
    norm = torch.linalg.vector_norm(v, dim=-2, keepdim=True)
    unit = v / torch.where(norm > 0, norm, 1)
    gram = unit.mT @ unit
    half = torch.diag_embed(torch.full_like(gram.diagonal(dim1=-2, dim2=-1), 0.5))
    return unit, gram.triu(1) + half


def householder_apply(v: Float[Tensor, "*b d m"], x: Float[Tensor, "*b d n"]) -> Float[Tensor, "*b d n"]:
    """H_1 ⋯ H_m x without the product: O(d m (n + m))."""
    unit, inverse = householder_factors(v)
    return x - unit @ torch.linalg.solve_triangular(inverse, unit.mT @ x, upper=True)


def householder_columns(v: Float[Tensor, "*b d m"]) -> Float[Tensor, "*b d m"]:
    """The first m columns of H_1 ⋯ H_m, in compact WY form."""
    d, m = v.shape[-2:]
    unit, inverse = householder_factors(v)
    turned = unit @ torch.linalg.solve_triangular(inverse, unit[..., :m, :].mT, upper=True)
    return torch.eye(d, m, dtype=v.dtype, device=v.device) - turned


def householder_vectors(q: Float[Tensor, "*b d k"]) -> tuple[Float[Tensor, "*b d k"], Float[Tensor, "*b k"]]:
    """Vectors and signs with `householder_columns(v) * sign = q`, for orthonormal columns q.

    Every vector is a genuine reflection: LAPACK leaves one out where a column is settled already, which would fix the
    determinant and stop that vector's gradient.
    """
    rest = q.clone()
    k = q.shape[-1]
    v, sign = torch.zeros_like(q), torch.ones_like(q[..., 0, :])
    for column in range(k):
        x = rest[..., column:, column]
        sign[..., column] = torch.where(x[..., 0] > 0, -1.0, 1.0)
        vector = x.clone()
        vector[..., 0] -= sign[..., column] * torch.linalg.vector_norm(x, dim=-1)
        vector = vector / torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
        v[..., column:, column] = vector
        block = rest[..., column:, :]
        rest[..., column:, :] = block - 2 * vector.unsqueeze(-1) * (vector.unsqueeze(-2) @ block)
    return v, sign


def givens_pairs(d: int) -> tuple[Int[Tensor, "levels half"], Int[Tensor, "levels half"]]:
    """Partners (i, i + 2^level) of a butterfly on d coordinates, ⌊d/2⌋ a level.

    Where d is no power of two, those left without a partner are paired among themselves, in order.
    """
    levels = _partners(d)
    first, second = (torch.tensor([level[side] for level in levels], dtype=torch.long, device="cpu") for side in (0, 1))
    return first.view(len(levels), d // 2), second.view(len(levels), d // 2)


@functools.lru_cache(maxsize=8)
def _partners(d: int) -> list[tuple[list[int], list[int]]]:
    """First and second partners, level by level."""
    found = []
    for level in range(math.ceil(math.log2(d))):
        stride = 1 << level
        lower = [index for index in range(d - stride) if (index // stride) % 2 == 0]
        upper = [index + stride for index in lower]
        alone = sorted(set(range(d)).difference(lower, upper))
        half = len(alone) // 2
        found.append((lower + alone[:half], upper + alone[half : 2 * half]))
    return found


def givens_rotate(
    x: Float[Tensor, "d n"],
    angles: Float[Tensor, "levels half"],
    first: Int[Tensor, "levels half"],
    second: Int[Tensor, "levels half"],
) -> Float[Tensor, "d n"]:
    """Turn the rows of x by a butterfly of plane rotations, level by level: 3 d n multiplications a level at most."""
    for angle, i, j in zip(angles, first, second):
        cosine, sine = angle.cos().unsqueeze(-1), angle.sin().unsqueeze(-1)
        a, b = x[i], x[j]
        x = x.index_copy(0, i, cosine * a - sine * b).index_copy(0, j, sine * a + cosine * b)
    return x
