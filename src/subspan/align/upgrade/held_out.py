"""Choosing a map between embedding spaces by held-out retrieval, from the moments of folds that are read once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subspan.base import normalize_rows
from subspan.geometry import AffineMap, translation
from subspan.geometry.closed_forms import reduced_rank_factors
from subspan.measures import recall_at_k
from subspan.solvers import nearest
from subspan.statistics import JointMoments, Moments, UniformSample

CLOSED_FORMS = ("none", "translation", "procrustes", "scaled", "low-rank", "cca", "ridge")
"""Methods that need moments alone, simple ones first; "none" is the identity, padded or cut for unequal widths;
"translation" moves its mean to that of y."""

_ALPHAS = (10.0, 1.0, 0.1, 0.01, 0.001)
_RANKS = (8, 32, 128, 512)
_RESIDUAL_ALPHAS = (1.0, 0.1, 0.01)
# Cross-validation works in at most this many leading directions of each space: a closed form costs O(d^3).
_SELECTION_DIMENSIONS = 384
# These send a coordinate to the coordinate of the same number, which leading axes do not have.
_UNCUT = ("none", "translation")


class FoldedPairs:
    """Paired rows dealt to folds at random: moments a fold, and a uniform sample of the rows, from one pass."""

    def __init__(self, d_x: int, d_y: int, *, folds: int, keep: int, generator: torch.Generator) -> None:
        self.folds = [JointMoments(d_x, d_y) for _ in range(folds)]
        self._sample = UniformSample(keep, generator)
        self._generator = generator
        self._dealt = 0

    def update(self, x: Float[Tensor, "n d_x"], y: Float[Tensor, "n d_y"]) -> FoldedPairs:
        """Deal the rows of a batch; returns self."""
        count = len(self.folds)
        order = torch.randperm(len(x), generator=self._generator)
        fold = torch.empty(len(x), dtype=torch.int64)
        fold[order] = (torch.arange(len(x)) + self._dealt) % count
        self._dealt += len(x)
        x, y = x.detach().cpu(), y.detach().cpu()
        for number in range(count):
            chosen = fold == number
            self.folds[number].update(x[chosen], y[chosen])
        self._sample.update(fold, x, y)
        return self

    @cached_property
    def sample(self) -> tuple[Int[Tensor, " m"], Float[Tensor, "m d_x"], Float[Tensor, "m d_y"]]:
        """Fold, x and y of the rows that were kept, in float32."""
        fold, x, y = self._sample.rows()
        return fold, x.float(), y.float()

    @property
    def count(self) -> int:
        """Pairs so far."""
        return self._dealt

    def without(self, *left_out: int) -> JointMoments:
        """Moments of all folds but some."""
        return _without(self.folds, left_out)


def _without(folds: list[JointMoments], left_out: tuple[int, ...]) -> JointMoments:
    kept = [moments for number, moments in enumerate(folds) if number not in left_out]
    return sum(kept[1:], kept[0])


def grid(method: str, moments: JointMoments, fixed: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Hyper-parameters that are tried, the most regular first; what is `fixed` (not None) is not varied."""
    limit = supported_rank(moments)
    alphas = [fixed["alpha"]] if fixed["alpha"] is not None else list(_ALPHAS)
    if method == "ridge":
        return [{"alpha": alpha} for alpha in ([100.0, *alphas] if fixed["alpha"] is None else alphas)]
    if method == "cca":
        ranks = [k for k in (8, 32, 128, 256) if k < limit]
        return [{"k": k} for k in ([fixed["k"]] if fixed["k"] is not None else [*ranks, limit])]
    if method == "low-rank":
        ranks = [fixed["rank"]] if fixed["rank"] is not None else [r for r in _RANKS if r <= limit // 2] or [1]
        alphas = [fixed["alpha"]] if fixed["alpha"] is not None else list(_RESIDUAL_ALPHAS)
        return [{"rank": rank, "alpha": alpha} for alpha in alphas for rank in ranks]
    return [{}]


def supported_rank(moments: JointMoments) -> int:
    """Dimensions about which the pairs can say something."""
    inner = spaces.moments if (spaces := moments.row_spaces()) else moments
    return max(1, min(inner.d_x, inner.d_y, int(moments.count) - 1))


def complexity(method: str, parameters: Mapping[str, Any], d_x: int, d_y: int) -> int:
    """Free parameters of a map, by which the one-standard-error rule calls it simple."""
    low, high = min(d_x, d_y), max(d_x, d_y)
    rotation = low * high - low * (low + 1) // 2 + d_y

    def of_rank(k: int) -> int:
        return k * (d_x + d_y - k)

    if method == "none":
        return 0
    if method == "translation":
        return d_y
    if method in ("procrustes", "scaled"):
        return rotation + (method == "scaled")
    if method == "low-rank":
        return rotation + of_rank(parameters["rank"])
    if method == "cca":
        return of_rank(parameters["k"]) + d_y
    if method == "mlp":
        return parameters["base_complexity"] + parameters["hidden"] * (d_x + d_y + 1) + d_y
    return d_x * d_y + d_y


def closed_forms(
    method: str, moments: JointMoments, parameters: Sequence[Mapping[str, Any]], shared: dict[str, Any] | None = None
) -> Iterator[AffineMap]:
    """The maps of one method for several hyper-parameters, what they have in common computed once.

    `shared`: a dict that carries the rotation from one method to the next for the same moments.
    """
    shared = {} if shared is None else shared
    if method == "none":
        yield AffineMap(torch.eye(moments.d_y, moments.d_x, dtype=torch.float64))
        return
    if method == "translation":
        yield moments.translation()
        return
    if method == "ridge":
        yield from (moments.ridge(options["alpha"]) for options in parameters)
        return
    if method == "cca":
        limit = supported_rank(moments)
        canonical = moments.cca(min(limit, max(options["k"] for options in parameters)))
        for options in parameters:
            yield moments.through_canonical(canonical.truncate(min(options["k"], limit)))
        return
    if spaces := moments.row_spaces():
        # A penalty is relative to the mean over the dimensions, and a rank ends with what the rows span.
        inner = [
            {"rank": min(options["rank"], supported_rank(moments)), "alpha": options["alpha"] * spaces.share}
            if method == "low-rank"
            else options
            for options in parameters
        ]
        yield from (spaces.between(fitted).dense() for fitted in closed_forms(method, spaces.moments, inner))
        return
    if "rotation" not in shared:
        limit = supported_rank(moments)
        shared["rotation"] = moments.procrustes(rank=limit if limit < min(moments.d_x, moments.d_y) else None).matrix
    rotation, cov_xx, cov_xy = shared["rotation"], moments.cov_xx, moments.cov_xy
    through = cov_xx @ rotation.mT
    if method in ("procrustes", "scaled"):
        factor = 1.0
        if method == "scaled":
            factor = float((rotation.mT * cov_xy).sum() / (rotation.mT * through).sum())
        matrix = factor * rotation
        yield AffineMap(matrix, moments.mean_y - matrix @ moments.mean_x)
        return
    factors = {
        alpha: reduced_rank_factors(cov_xx, cov_xy - through, alpha=alpha)
        for alpha in {options["alpha"] for options in parameters}
    }
    for options in parameters:
        matrix = rotation + factors[options["alpha"]](options["rank"])
        yield AffineMap(matrix, moments.mean_y - matrix @ moments.mean_x)


@dataclass(frozen=True)
class Retrieval:
    """Recall of mapped queries in the gallery of all sampled y, the query's own partner left out of the neighbours.

    target "neighbours": share of the k nearest gallery rows of the true y that are among the k nearest of the mapped
    x. target "pair": whether the true y itself is among the k nearest of the mapped x.
    """

    gallery: Float[Tensor, "m d_y"]
    k: int
    metric: str
    target: str

    def neighbours(self, rows: Float[Tensor, "q d_y"], own: Int[Tensor, " q"]) -> Int[Tensor, "q k"]:
        """The k nearest gallery rows that are not `own`."""
        found = nearest(rows, self.gallery, self.k + 1, metric=self.metric)[1]
        # Where the own partner is not among them, the last is one too many.
        wrong = found == own.unsqueeze(1)
        wrong[:, -1] |= ~wrong.any(1)
        return found[~wrong].reshape(len(found), self.k)

    def recall(
        self, mapped: Float[Tensor, "q d_y"], own: Int[Tensor, " q"], truth: Int[Tensor, "q k"] | None
    ) -> Float[Tensor, " q"]:
        """Recall of each mapped query; `truth` from `neighbours` of the true rows (target "neighbours")."""
        if self.target == "pair":
            found = nearest(mapped, self.gallery, self.k, metric=self.metric)[1]
            return (found == own.unsqueeze(1)).any(1).double()
        assert truth is not None
        found = self.neighbours(mapped, own)
        return recall_at_k(found, truth)


@dataclass
class HeldOut:
    """What cross-validation found for one method: hyper-parameters, recall of every held-out query, mapped queries."""

    method: str
    parameters: dict[str, Any]
    recall: Float[Tensor, " q"]
    mapped: Float[Tensor, "q d_y"]

    @property
    def mean(self) -> float:
        """Mean recall over the held-out queries."""
        return float(self.recall.mean())

    @property
    def standard_error(self) -> float:
        """Standard error of the mean over queries."""
        return float(self.recall.std()) / len(self.recall) ** 0.5 if len(self.recall) > 1 else float("inf")


class CrossValidation:
    """Nested cross-validation of the closed forms: the outer fold scores, one inner fold chooses hyper-parameters.

    Inner folds come in pairs (a, b): the moments without both choose for a by the score on b, and for b by that on a,
    so K outer and K / 2 inner sets of closed forms are all. Spaces wider than 384 are rotated to their principal axes
    and cut there while choosing (an unsupervised step on all rows); final maps are never cut.
    """

    def __init__(
        self,
        pairs: FoldedPairs,
        total: JointMoments,
        *,
        k: int,
        metric: str,
        target: str,
        max_queries: int,
        normalize: bool,
    ) -> None:
        self.pairs = pairs
        self.normalize = normalize
        self.x_axes, self.y_axes = (_leading_axes(side) for side in (total.x, total.y))
        self._folds = pairs.folds
        if self.x_axes is not None or self.y_axes is not None:
            sides = [
                torch.eye(d, dtype=torch.float64) if axes is None else axes.mT
                for d, axes in ((total.d_x, self.x_axes), (total.d_y, self.y_axes))
            ]
            self._folds = [fold.map(AffineMap(sides[0]), AffineMap(sides[1])) for fold in pairs.folds]
        self.fold, self.x, self.y = pairs.sample
        m = len(self.fold)
        self.retrieval = Retrieval(self.y, max(1, min(k, (m - 1) // 2)), metric, target)
        self.queries = torch.cat(
            [(self.fold == f).nonzero()[:, 0][: -(-max_queries // len(pairs.folds))] for f in range(len(pairs.folds))]
        )
        self.query_fold = self.fold[self.queries]
        self.truth = self.retrieval.neighbours(self.y[self.queries], self.queries) if target == "neighbours" else None
        self._moments: dict[tuple[int, ...], tuple[JointMoments, dict[str, Any]]] = {}

    def train(self, *left_out: int) -> tuple[JointMoments, dict[str, Any]]:
        """Moments of the other folds, on the leading axes where the spaces are wide, and what closed forms share."""
        if left_out not in self._moments:
            self._moments[left_out] = (_without(self._folds, left_out), {"mean_y": self._means(left_out)[1]})
        return self._moments[left_out]

    def _means(self, left_out: tuple[int, ...]) -> tuple[Float[Tensor, " d_x"], Float[Tensor, " d_y"]]:
        """Mean x and y of the other folds in the whole spaces."""
        kept = [fold for number, fold in enumerate(self.pairs.folds) if number not in left_out]
        mean = torch.stack([fold.count * fold.joint.mean for fold in kept]).sum(0) / sum(fold.count for fold in kept)
        return mean[: kept[0].d_x], mean[kept[0].d_x :]

    def in_full(self, affine: AffineMap, mean_y: Float[Tensor, " d_y"]) -> AffineMap:
        """A map between leading axes as a map between the spaces."""
        matrix = affine.matrix if self.x_axes is None else affine.matrix @ self.x_axes.mT
        bias = affine.bias if affine.bias is not None else matrix.new_zeros(len(matrix))
        if self.y_axes is not None:
            matrix, bias = self.y_axes @ matrix, self.y_axes @ bias
            bias = bias + mean_y - self.y_axes @ (self.y_axes.mT @ mean_y)
        return AffineMap(matrix, bias)

    def through(self, affine: AffineMap, mean_y: Float[Tensor, " d_y"]) -> Callable[[Tensor], Tensor]:
        """The same, applied axes by axes: no matrix of the whole spaces is formed."""

        def mapped(x: Float[Tensor, "q d_x"]) -> Float[Tensor, "q d_y"]:
            y = affine.map(x if self.x_axes is None else x @ self.x_axes.to(x))
            if self.y_axes is None:
                return y
            rest = mean_y - self.y_axes @ (self.y_axes.mT @ mean_y)
            return y @ self.y_axes.mT.to(y) + rest.to(y)

        return mapped

    def maps(
        self, method: str, left_out: tuple[int, ...], parameters: Sequence[Mapping[str, Any]]
    ) -> Iterator[Callable[[Tensor], Tensor]]:
        """Maps of rows x (q, d_x) from the folds that are not left out."""
        if method in _UNCUT:
            yield self._uncut(method, left_out).map
            return
        moments, shared = self.train(*left_out)
        yield from (self.through(a, shared["mean_y"]) for a in closed_forms(method, moments, parameters, shared))

    def _uncut(self, method: str, left_out: tuple[int, ...]) -> AffineMap:
        if method == "translation":
            return translation(*self._means(left_out))
        return AffineMap(torch.eye(self.y.shape[1], self.x.shape[1], dtype=torch.float64))

    def full_map(self, method: str, fold: int, parameters: Mapping[str, Any]) -> AffineMap:
        """One map from all folds but one, between the whole spaces."""
        if method in _UNCUT:
            return self._uncut(method, (fold,))
        moments, shared = self.train(fold)
        return self.in_full(next(iter(closed_forms(method, moments, [parameters], shared))), shared["mean_y"])

    def apply(self, affine: Any, fold: int) -> tuple[Tensor, Tensor]:
        """Mapped queries of a fold, and their places among all queries."""
        place = (self.query_fold == fold).nonzero()[:, 0]
        mapped = affine(self.x[self.queries[place]])
        return (normalize_rows(mapped) if self.normalize else mapped), place

    def recall(self, mapped: Tensor, place: Tensor) -> Float[Tensor, " q"]:
        """Recall of mapped queries at those places."""
        truth = None if self.truth is None else self.truth[place]
        return self.retrieval.recall(mapped, self.queries[place], truth)

    def partner(self, fold: int) -> int:
        """The inner fold of an outer one: folds go in pairs, a last odd one with the first."""
        count = len(self.pairs.folds)
        other = fold ^ 1
        return other if other < count else 0

    def run(self, method: str, parameters: list[dict[str, Any]]) -> HeldOut:
        """Held-out recall of one method whose hyper-parameters are chosen inside, and the choice for all rows."""
        count = len(self.pairs.folds)
        inner = {fold: torch.zeros(len(parameters)) for fold in range(count)}
        if len(parameters) > 1:
            for first, second in sorted({tuple(sorted((f, self.partner(f)))) for f in range(count)}):
                for number, mapped in enumerate(self.maps(method, (first, second), parameters)):
                    # The score on one fold chooses for the other; the odd fold's partner keeps its own choice.
                    for outer, validation in ((first, second), (second, first)):
                        if self.partner(outer) == validation:
                            inner[outer][number] = self.recall(*self.apply(mapped, validation)).mean()
        recall = torch.zeros(len(self.queries), dtype=torch.float64)
        images = torch.zeros(len(self.queries), self.y.shape[1])
        overall = torch.zeros(len(parameters), dtype=torch.float64)
        for fold in range(count):
            chosen = int(inner[fold].argmax())
            for number, mapped in enumerate(self.maps(method, (fold,), parameters)):
                rows, place = self.apply(mapped, fold)
                scores = self.recall(rows, place)
                overall[number] += scores.sum()
                if number == chosen:
                    recall[place], images[place] = scores, rows.float()
        return HeldOut(method, parameters[int(overall.argmax())], recall, images)


def _leading_axes(moments: Moments) -> Float[Tensor, "d p"] | None:
    """Principal axes to choose in, or None where the space is narrow enough."""
    if moments.d <= _SELECTION_DIMENSIONS:
        return None
    if moments.factor is None:
        return torch.linalg.eigh(moments.covariance())[1].flip(-1)[:, :_SELECTION_DIMENSIONS].contiguous()
    axes = torch.linalg.svd(moments.factor, full_matrices=False)[2][:_SELECTION_DIMENSIONS].mT
    # As many as of more rows: penalties are relative to the mean over all of them.
    return torch.nn.functional.pad(axes, (0, _SELECTION_DIMENSIONS - axes.shape[1])).contiguous()
