"""`UpgradeMap`: one encoder's embeddings in the space of another, chosen by held-out retrieval."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any, Literal, TypedDict, get_args

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from subspan.base import check_matrix, like, normalize_rows, save_arrays, saved_object
from subspan.base.estimators import PairedEstimator
from subspan.base.parameters import Bounds, Count, NonNegative, Whole
from subspan.base.saved import Schema, optional
from subspan.geometry import AffineMap
from subspan.geometry.affine import check_map_memory
from subspan.statistics import JointMoments

from .adapter import SAVED_ARRAYS as ADAPTER_ARRAYS
from .adapter import EmbeddingAdapter
from .confidence import SAVED_ARRAYS as CONFIDENCE_ARRAYS
from .confidence import RetrievalConfidence
from .held_out import CLOSED_FORMS, CrossValidation, FoldedPairs, HeldOut, closed_forms, complexity, grid
from .unpaired import UnpairedReport, align_unpaired

Method = Literal["none", "translation", "procrustes", "scaled", "low-rank", "cca", "ridge", "mlp"]
_METHODS = get_args(Method)
_FEW_ANCHORS = ("none", "translation", "procrustes", "scaled", "ridge")
_MLP_PAIRS = 1000


@dataclass(eq=False, repr=False)
class UpgradeMap(ClassNamePrefixFeaturesOutMixin, TransformerMixin, PairedEstimator):
    """Map from one encoder's embeddings, rows X (n, d_x), to another's, the rows Y (n, d_y) that they are paired with.

    For an index whose encoder is replaced: X from the new encoder, Y from the old one, both of the same items; mapped
    queries then search the old index. Rows may be arrays, memory maps, or streams as for `SpaceMap`, read once in O(d²)
    memory. Fewer pairs than dimensions: a warning, and only a shift, rotations of their span and shrunken ridge are
    tried.

    Parameters
    ----------
    method
        "none" (identity; padded or cut for unequal widths), "translation" (the same and a shift of the mean),
        "procrustes" (Schönemann, 1966), "scaled", "low-rank" (the rotation plus a reduced-rank ridge regression of what
        it leaves), "cca" (through k canonical pairs), "ridge", "mlp" (a small residual network on top of the best of
        these; extra: train), or "auto", the simplest whose held-out recall is within one standard error of the best.
    candidates
        The methods that "auto" tries; None for all.
    alpha, rank, k
        Fixed hyper-parameters; those left None are chosen in inner splits.
    metric
        Of the search: "cosine", "euclidean" or "inner".
    target
        What recall counts: "neighbours" (share of the true item's `n_neighbors` nearest in the old space that the
        mapped query finds too) or "pair" (whether the paired item is found among them).
    n_neighbors
        See `target`.
    normalize
        Rows to unit length before and after the map.
    folds
        Of the cross-validation.
    max_queries, max_gallery
        Rows that it scores and keeps; the network is trained on those that are kept.
    random_state
        Seed of the splits and draws.

    Attributes
    ----------
    method_, parameters_
        What was chosen.
    adapter_, map_
        An `EmbeddingAdapter`, and its linear part, an `AffineMap`.
    scores_
        One dict a candidate: method, parameters, recall, low, high, standard_error, complexity, queries, note.
    recall_, n_pairs_
        Held-out recall of the chosen method, and the number of pairs.
    unpaired_
        An `UnpairedReport` after `fit_unpaired`.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.align import UpgradeMap
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(60, 4))
    >>> y = x @ np.linalg.qr(rng.normal(size=(4, 4)))[0]  # the old encoder's space is the new one's, rotated
    >>> model = UpgradeMap(candidates=["none", "procrustes"], folds=3).fit(x, y)
    >>> model.method_, round(model.recall_, 3)
    ('procrustes', 1.0)
    """

    method: Literal["auto"] | Method = "auto"
    _: KW_ONLY
    candidates: Sequence[Method] | None = None
    alpha: NonNegative | None = None
    rank: Count | None = None
    k: Count | None = None
    metric: Literal["cosine", "euclidean", "inner"] = "cosine"
    target: Literal["neighbours", "pair"] = "neighbours"
    n_neighbors: Count = 10
    normalize: bool = False
    folds: Annotated[int, Bounds(least=3)] = 5
    max_queries: Annotated[int, Bounds(least=10)] = 2000
    max_gallery: Annotated[int, Bounds(least=20)] = 5000
    random_state: Whole = 0

    # ------------------------------------------------------------------ fitting

    def fit(self, X: Any, Y: Any) -> UpgradeMap:
        """Fit to paired rows. Raises ValueError for NaN, unequal numbers of rows, fewer than 2, or constant rows."""
        self._check_parameters()
        self._forget()
        generator = torch.Generator().manual_seed(int(self.random_state))
        pairs: FoldedPairs | None = None
        for x, y in self._pairs(X, Y, reset=True):
            if self.normalize and x.shape[1] < 2:
                raise ValueError("X: 1 feature(s) leave only two unit vectors; normalize=True needs at least 2")
            x, y = (normalize_rows(x), normalize_rows(y)) if self.normalize else (x, y)
            if pairs is None:
                check_map_memory(x.shape[1], y.shape[1])
                pairs = FoldedPairs(
                    x.shape[1], y.shape[1], folds=self.folds, keep=self.max_gallery, generator=generator
                )
            elif (x.shape[1], y.shape[1]) != (pairs.folds[0].d_x, pairs.folds[0].d_y):
                raise ValueError(
                    f"X, Y: a batch of {x.shape[1]} and {y.shape[1]} columns follows batches of "
                    f"{pairs.folds[0].d_x} and {pairs.folds[0].d_y}"
                )
            pairs.update(x, y)
        if pairs is None or pairs.count < 2:
            raise ValueError("X, Y: need at least 2 pairs (n_samples = 2)")
        self.n_pairs_ = pairs.count
        self._n_features_out = pairs.folds[0].d_y
        self._choose(pairs)
        return self

    def fit_unpaired(self, X: Any, Y: Any, *, check: tuple[Any, Any] | None = None) -> UpgradeMap:
        """Fit to rows X (n, d_x) and Y (m, d_y) of which no pairs are known, from the two distributions alone.

        It needs two or three thousand rows of the same kind of items, and spaces that are nearly rotations of each
        other: one encoder rotated, or two of one family. Of encoders that are built differently expect it to fail,
        which it says: `unpaired_.succeeded`, and a warning. check: a few known pairs (x, y), used for nothing but to
        measure. At most 4000 rows of each are looked at. Raises ValueError for streams, NaN, or fewer than 20 rows.
        """
        self._check_parameters()
        self._forget()
        x, y = check_matrix(X, "X", min_rows=20), check_matrix(Y, "Y", min_rows=20)
        x, y = (normalize_rows(x), normalize_rows(y)) if self.normalize else (x, y)
        self.n_features_in_, self._n_features_out = x.shape[1], y.shape[1]
        known = None if check is None else (check_matrix(check[0], "check"), check_matrix(check[1], "check"))
        affine, inverse, self.unpaired_ = align_unpaired(
            x, y, k=self.n_neighbors, metric=self.metric, check=known, random_state=int(self.random_state)
        )
        self.method_, self.parameters_, self.n_pairs_ = "unpaired", {}, 0
        self.scores_ = []
        self.recall_ = float("nan") if self.unpaired_.recall is None else self.unpaired_.recall
        self._set(affine, None)
        self._inverse = inverse
        if not self.unpaired_.succeeded:
            warnings.warn(f"fit_unpaired: failed; {self.unpaired_.reason}; do not use this map", stacklevel=2)
        return self

    def _forget(self) -> None:
        for name in ("moments_", "_inverse", "_confidence", "unpaired_", "n_features_in_"):
            self.__dict__.pop(name, None)

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if self.candidates is not None and not self.candidates:
            raise ValueError(f"candidates: some of {_METHODS}, got {self.candidates!r}")

    def _choose(self, pairs: FoldedPairs) -> None:
        total = pairs.without()
        if not float(total.x.total_variance) > 0 or not float(total.y.total_variance) > 0:
            raise ValueError("X, Y: one of them is constant; there is nothing to map")
        self.moments_ = total
        fixed = {"alpha": self.alpha, "rank": self.rank, "k": self.k}
        few = pairs.count < max(total.d_x, total.d_y)
        if few:
            warnings.warn(
                f"X, Y: {pairs.count} pairs are fewer than the {max(total.d_x, total.d_y)} dimensions; rotations are "
                f"fitted on their span alone, and of the regressions only ridge is tried",
                stacklevel=3,
            )
        wanted = tuple(self.candidates or _METHODS) if self.method == "auto" else ("none", self.method)
        candidates = [m for m in CLOSED_FORMS if m in wanted and (m in _FEW_ANCHORS or not few or m == self.method)]
        notes: dict[str, str] = {}
        if "mlp" in wanted:
            reason = self._why_no_mlp(pairs)
            if reason and self.method == "mlp":
                raise ValueError(f"method: {reason}")
            if reason:
                notes["mlp"] = reason
            else:
                candidates = (list(CLOSED_FORMS) if self.method == "mlp" else candidates) + ["mlp"]
        if pairs.count < 2 * self.folds:
            self._without_validation(total, fixed)
            return
        validation = CrossValidation(
            pairs,
            total,
            k=self.n_neighbors,
            metric=self.metric,
            target=self.target,
            max_queries=self.max_queries,
            normalize=self.normalize,
        )
        results: dict[str, HeldOut] = {}
        for method in candidates:
            if method != "mlp":
                results[method] = validation.run(method, grid(method, validation.train(0)[0], fixed))
        if "mlp" in candidates:
            results["mlp"] = self._mlp_held_out(validation, results)
        self._choose_from(results, notes, validation)

    def _choose_from(self, results: dict[str, HeldOut], notes: dict[str, str], validation: CrossValidation) -> None:
        total = self.moments_
        weight = {name: complexity(name, r.parameters, total.d_x, total.d_y) for name, r in results.items()}
        best = max(results.values(), key=lambda result: result.mean)
        good = [name for name, r in results.items() if r.mean >= best.mean - best.standard_error]
        self.method_ = min(good, key=lambda name: weight[name]) if self.method == "auto" else self.method
        chosen = results[self.method_]
        self.parameters_, self.recall_ = dict(chosen.parameters), chosen.mean
        self.scores_ = [_row(result, weight[name]) for name, result in results.items()]
        for name, note in notes.items():
            skipped: Any = {**dict.fromkeys(_Score.__annotations__), "method": name, "parameters": {}}
            skipped["note"] = f"skipped: {note}"
            self.scores_.append(skipped)
        hidden = None
        if self.method_ == "mlp":
            base = results[chosen.parameters["base"]]
            affine = self._closed_form(total, base.method, base.parameters)
            hidden = self._train_mlp(affine, validation.x, validation.y)
        else:
            affine = self._closed_form(total, self.method_, self.parameters_)
        self._set(affine, hidden)
        self._confidence = RetrievalConfidence.calibrated(validation, chosen)

    def _closed_form(self, moments: JointMoments, method: str, parameters: Mapping[str, Any]) -> AffineMap:
        return next(iter(closed_forms(method, moments, [parameters])))

    def _without_validation(self, total: JointMoments, fixed: dict[str, Any]) -> None:
        """Too few pairs to hold any out: Procrustes on their span where the choice is ours."""
        warnings.warn(
            f"X, Y: {int(total.count)} pairs are too few to hold any out ({2 * self.folds} are needed for "
            f"{self.folds} folds); nothing is known about the recall, and there is no confidence",
            stacklevel=4,
        )
        self.method_ = "procrustes" if self.method == "auto" else self.method
        self.parameters_ = grid(self.method_, total, fixed)[0]
        self.scores_, self.recall_ = [], float("nan")
        self._set(self._closed_form(total, self.method_, self.parameters_), None)

    def _set(self, affine: AffineMap, hidden: Any) -> None:
        self.map_ = affine
        self.adapter_ = EmbeddingAdapter(
            affine.matrix,
            affine.bias,
            hidden=hidden,
            normalize_input=bool(self.normalize),
            normalize_output=bool(self.normalize),
        )

    # ------------------------------------------------------------------ the network

    def _why_no_mlp(self, pairs: FoldedPairs) -> str:
        if importlib.util.find_spec("lightning") is None:
            return "the MLP needs Lightning (pip install 'subspan[train]')"
        if pairs.count < _MLP_PAIRS:
            return f"{pairs.count} pairs are too few for an MLP, which is tried from {_MLP_PAIRS} on"
        return ""

    def _train_mlp(self, affine: AffineMap, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from .residual_mlp import train_residual

        return train_residual(
            affine, x, y, k=self.n_neighbors, metric=self.metric, target=self.target, seed=int(self.random_state)
        )

    def _mlp_held_out(self, validation: CrossValidation, results: dict[str, HeldOut]) -> HeldOut:
        """Held-out recall of the network, trained anew for each fold on the closed form that did best over all."""
        base = max((r for r in results.values()), key=lambda result: result.mean)
        recall, mapped = torch.zeros_like(base.recall), torch.zeros_like(base.mapped)
        hidden: Any = ()
        for fold in range(len(validation.pairs.folds)):
            affine = validation.full_map(base.method, fold, base.parameters)
            kept = validation.fold != fold
            hidden = self._train_mlp(affine, validation.x[kept], validation.y[kept])
            adapter = EmbeddingAdapter(affine.matrix, affine.bias, hidden=hidden)
            rows, place = validation.apply(adapter, fold)
            recall[place], mapped[place] = validation.recall(rows, place), rows
        weight = complexity(base.method, base.parameters, self.moments_.d_x, self.moments_.d_y)
        parameters = {"base": base.method, "hidden": len(hidden[0]), "base_complexity": weight}
        return HeldOut("mlp", parameters, recall, mapped)

    # ------------------------------------------------------------------ use

    def transform(self, X: Any) -> Any:
        """Rows X (n, d_x) in the space of Y (n, d_y); numpy or torch as given."""
        check_is_fitted(self, "adapter_")
        rows = self._rows(X)
        with torch.no_grad():
            return like(self.adapter_(rows), X)

    def inverse_transform(self, X: Any) -> Any:
        """Rows X (n, d_y) of the target space in the source space.

        The inverse of an isometry (or of the identity); for the other methods the same method fitted from Y to X, whose
        error is smaller than that of a matrix inverse.
        """
        check_is_fitted(self, "adapter_")
        rows = check_matrix(X, "X", columns=self._n_features_out)
        rows = normalize_rows(rows) if self.normalize else rows
        mapped = self.inverse_map_.to(rows.device).map(rows)
        return like(normalize_rows(mapped) if self.normalize else mapped, X)

    @property
    def inverse_map_(self) -> AffineMap:
        """The linear map from the target space back."""
        check_is_fitted(self, "adapter_")
        if not hasattr(self, "_inverse"):
            if self.method_ in ("none", "translation", "procrustes", "scaled"):
                self._inverse = self.map_.inverse()
            else:
                method, parameters = self.method_, self.parameters_
                if method == "mlp":
                    method, parameters = "ridge", {"alpha": 0.01}
                self._inverse = self._closed_form(self.moments_.swapped(), method, parameters)
        return self._inverse

    def confidence(self, X: Any) -> Any:
        """Expected recall in [0, 1] of each mapped row (n,), as held-out queries like it had it.

        It rises where the nearest anchors (at most 2000 are kept) stand out from the others and both spaces name the
        same ones, and falls with the part of a row outside the anchors' principal subspace and its distance inside.
        Raises ValueError where no pairs were held out.
        """
        check_is_fitted(self, "adapter_")
        if not hasattr(self, "_confidence"):
            raise ValueError("X: no pairs were held out in fitting, so there is no confidence")
        rows = self._rows(X)
        unit = normalize_rows(rows) if self.normalize else rows
        with torch.no_grad():
            return like(self._confidence(unit, self.adapter_(rows)), X)

    def to_module(self) -> nn.Module:
        """The map as a torch module."""
        check_is_fitted(self, "adapter_")
        return self.adapter_

    def to_faiss(self) -> list[Any]:
        """The map as faiss VectorTransforms, in the order in which they apply (extra: index)."""
        check_is_fitted(self, "adapter_")
        return self.adapter_.to_faiss()

    def to_onnx(self, path: str | os.PathLike[str]) -> None:
        """Write the map as an ONNX graph "embeddings" → "mapped" (extra: onnx)."""
        check_is_fitted(self, "adapter_")
        self.adapter_.to_onnx(path)

    # ------------------------------------------------------------------ files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write map, inverse, confidence and scores to a safetensors file, whole or not at all."""
        check_is_fitted(self, "adapter_")
        arrays = {f"adapter.{name}": value for name, value in self.adapter_.state_dict().items()}
        inverse = self.inverse_map_
        arrays["inverse.matrix"] = inverse.matrix
        if inverse.bias is not None:
            arrays["inverse.bias"] = inverse.bias
        if hasattr(self, "_confidence"):
            arrays |= {f"confidence.{name}": value for name, value in self._confidence.arrays().items()}
        save_arrays(
            path,
            "upgrade-map",
            arrays,
            parameters=self.get_params(),
            method=self.method_,
            chosen=self.parameters_,
            scores=self.scores_,
            recall=self.recall_ if np.isfinite(self.recall_) else None,
            pairs=self.n_pairs_,
            unpaired=self.unpaired_.facts() if hasattr(self, "unpaired_") else None,
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> UpgradeMap:
        """Read a file written by `save`. Raises ValueError when it is not one."""
        with saved_object(path, "upgrade-map", _SAVED_ARRAYS, _SAVED_FACTS) as (arrays, facts):

            def part(prefix: str) -> dict[str, Tensor]:
                return {n.removeprefix(prefix): v for n, v in arrays.items() if n.startswith(prefix)}

            parameters = facts["parameters"]
            if parameters["candidates"] is not None:
                parameters["candidates"] = tuple(parameters["candidates"])
            model = cls(**parameters)
            model._check_parameters()
            normal = bool(model.normalize)
            model.adapter_ = EmbeddingAdapter.from_arrays(
                part("adapter."), {"normalize_input": normal, "normalize_output": normal}
            )
            model.map_ = AffineMap(model.adapter_.weight, model.adapter_.bias)
            model._inverse = AffineMap(arrays["inverse.matrix"], arrays.get("inverse.bias"))
            if facts["method"] not in (*_METHODS, "unpaired") or facts["pairs"] < 0:
                raise ValueError(f"a map by {facts['method']!r} of {facts['pairs']} pairs")
            model.method_, model.parameters_ = facts["method"], facts["chosen"]
            model.scores_, model.n_pairs_ = facts["scores"], facts["pairs"]
            model.recall_ = float("nan") if facts["recall"] is None else facts["recall"]
            model._n_features_out, model.n_features_in_ = model.adapter_.weight.shape
            if confidence := part("confidence."):
                model._confidence = RetrievalConfidence.from_arrays(confidence)
            if facts["unpaired"] is not None:
                model.unpaired_ = UnpairedReport(**facts["unpaired"])
            return model


class _Score(TypedDict):
    method: str
    parameters: dict[str, float | int | str]
    recall: float | None
    low: float | None
    high: float | None
    standard_error: float | None
    complexity: int | None
    queries: int | None
    note: str


_SAVED_ARRAYS: Schema = {
    **{f"adapter.{name}": kind for name, kind in ADAPTER_ARRAYS.items()},
    "inverse.matrix": Float[Tensor, "d_in d_out"],
    "inverse.bias": optional(Float[Tensor, " d_in"]),
    **{f"confidence.{name}": kind for name, kind in CONFIDENCE_ARRAYS.items()},
}
_SAVED_FACTS: Schema = {
    "parameters": {
        "method": str,
        "candidates": list[str] | None,
        "alpha": float | None,
        "rank": int | None,
        "k": int | None,
        "metric": str,
        "target": str,
        "n_neighbors": int,
        "normalize": bool,
        "folds": int,
        "max_queries": int,
        "max_gallery": int,
        "random_state": int,
    },
    "method": str,
    "chosen": {
        "alpha": float | None,
        **dict.fromkeys(("rank", "k", "hidden", "base_complexity"), int | None),
        "base": str | None,
    },
    "scores": list[_Score],
    "recall": float | None,
    "pairs": int,
    "unpaired": UnpairedReport | None,
}


def _row(result: HeldOut, weight: int) -> _Score:
    error = result.standard_error
    reach = 1.96 * error if np.isfinite(error) else 0.0
    return {
        "method": result.method,
        "parameters": dict(result.parameters),
        "recall": result.mean,
        "low": max(0.0, result.mean - reach),
        "high": min(1.0, result.mean + reach),
        "standard_error": error if np.isfinite(error) else None,
        "complexity": weight,
        "queries": len(result.recall),
        "note": "",
    }
