"""λ-orthogonality: maps between frozen embedding models that stay as near to a rotation as one asks.

The objective is Ricci et al.'s (NeurIPS 2025, arXiv 2509.16664).
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.base import check_matrix, like, normalize_rows, save_arrays, saved_object
from subspan.base.estimators import PairedEstimator, at_least_single
from subspan.base.parameters import Bounds, Count, NonNegative, Positive, Seed
from subspan.base.saved import Schema, set_state
from subspan.geometry import AffineMap, Subspace, procrustes
from subspan.measures import retrieval_scores
from subspan.nn import LambdaOrthogonality, OrthogonalLinear, info_nce, limit_orthogonality_defect, orthogonality_defect
from subspan.nn.blocks import MLP
from subspan.nn.lambda_orthogonality import defect_limit
from subspan.nn.training import batch_rows, finite_loss

_COMPARED_ROWS = 1000
_KIND = "lambda-orthogonal-adapter"
# JSON has no infinity.
_UNBOUNDED = "inf"
_OPTIONS: Schema = {
    "backward": str,
    "forward": str,
    "lam": float | Literal["inf"] | None,
    "lam_rel": float | Literal["inf"] | None,
    "alpha": float | None,
    "penalty": float,
    "weights": list[float],
    "temperature": float,
    "symmetric": bool,
    "normalize": bool,
    "start": str,
    "determinant": int | None,
    "safeguard": bool,
    "learning_rate": float,
    "weight_decay": float,
    "batch_size": int | None,
    "epochs": int,
    "random_state": None,
}


@dataclass(eq=False, repr=False)
class LambdaOrthogonalAdapter(ClassNamePrefixFeaturesOutMixin, TransformerMixin, PairedEstimator):
    """New embeddings X (n, d_new) and old ones Y (n, d_old) of the same items → one space for old, F(old) and B(new).

    B: R^d_new → R^d_new brings new embeddings to old coordinates, F: R^d_old → R^d_new lifts old ones to B(new); both
    are trained together by Adam on
    w₁ |F(y) - B(x)|² + w₂ |B(x) - y|² + w₃ [contrast(F(y), B(x)) + contrast(F(y), y)] + penalty · L_λ(B),
    squares averaged over coordinates. Vectors of unequal width are compared on their first min(d_old, d_new) numbers.
    Embeddings are best searched by cosine.

    Parameters
    ----------
    backward
        "lambda", affine and drawn to within λ of the orthogonal matrices (adapts to the pairs, keeps what the new model
        knows elsewhere); "strict", a rotation or reflection: the new model's own retrieval is untouched; "affine",
        unconstrained; "none", new embeddings stay as they are and only F is trained (forward-compatible training).
    forward
        "affine" or "mlp" (d → 2d → 2 d_new → d_new, batch normalisation).
    lam, lam_rel
        λ; where lam is None, lam_rel · √d_new.
    alpha
        Sharpness of the gate; None: 100 / λ.
    penalty
        Weight of L_λ.
    weights
        (w₁, w₂, w₃).
    temperature, symmetric
        Of the contrast, whose positives are rows of one label, or the row itself without labels.
    normalize
        Rows are scaled to unit length first (a single column has no direction and stays).
    start
        B begins as "procrustes" or "identity".
    determinant
        +1 or -1 fixes the side that a Procrustes start may take; None for either.
    safeguard
        After each epoch of "lambda" the defect is cut back to λ.
    learning_rate, weight_decay
        Of Adam.
    batch_size
        None for 512, fewer where that leaves few steps.
    epochs
        Passes over the pairs.
    random_state
        Seed of the training.

    Attributes
    ----------
    backward_, forward_
        Torch modules on prepared rows.
    map_
        B as an `AffineMap`.
    lam_, orthogonality_defect_, singular_values_
        λ, how far B is from the orthogonal matrices, and its singular values.
    history_
        The terms of each epoch.

    References
    ----------
    Ricci et al. (2025), arXiv 2509.16664.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.align import LambdaOrthogonalAdapter
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(100, 6))
    >>> y = x @ np.linalg.qr(rng.normal(size=(6, 6)))[0]  # the old embeddings, rotated
    >>> model = LambdaOrthogonalAdapter(backward="strict", epochs=2, random_state=0).fit(x, y)
    >>> unit = y / np.linalg.norm(y, axis=1, keepdims=True)
    >>> bool((model.transform(x) * unit).sum(1).min() > 0.99), model.orthogonality_defect_ < 1e-3
    (True, True)
    """

    backward: Literal["strict", "lambda", "affine", "none"] = "lambda"
    forward: Literal["affine", "mlp"] = "affine"
    lam: NonNegative | None = None
    lam_rel: NonNegative | None = 0.375
    alpha: NonNegative | None = None
    penalty: NonNegative = 1.0
    weights: Sequence[NonNegative] = (1.0, 1.0, 1.0)
    temperature: Positive = 0.1
    symmetric: bool = False
    normalize: bool = True
    start: Literal["procrustes", "identity"] = "procrustes"
    determinant: Literal[1, -1] | None = None
    safeguard: bool = False
    learning_rate: Positive = 1e-3
    weight_decay: NonNegative = 0.0
    batch_size: Annotated[int, Bounds(least=2)] | None = None
    epochs: Count = 30
    random_state: Seed = None

    def fit(self, X: Any, Y: Any, labels: Any = None) -> LambdaOrthogonalAdapter:
        """Train B and F on new rows X and old rows Y of the same items; labels (n,), any hashable ids, are optional.

        Raises ValueError for NaN, unequal numbers of rows, fewer than 2, or embeddings that are all equal.
        """
        self._check_parameters()
        new, old = self._training_rows(X, Y)
        groups = _groups(labels, len(new), new.device)
        self._warn(new, old, groups)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        d_new, d_old = new.shape[1], old.shape[1]
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            backward = self._backward(new, old).to(new.device)
            forward = _forward(self.forward, d_old, d_new).to(new.device)
            self._train(backward, forward, new, old, groups)
        self._n_features_out, self.n_features_old_ = d_new, d_old
        self._keep(_linear(backward, d_new), forward)
        if self.backward == "lambda" and self.penalty and self.orthogonality_defect_ > 1.1 * self.lam_:
            warnings.warn(
                f"the orthogonality defect ended at {self.orthogonality_defect_:.3g}, above lam = {self.lam_:.3g}: the "
                "penalty was jumped or outweighed; lower learning_rate, raise penalty, or set safeguard=True",
                stacklevel=2,
            )
        return self

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if len(self.weights) != 3:
            raise ValueError(f"weights: expected three numbers >= 0, got {self.weights!r}")

    def _training_rows(self, X: Any, Y: Any) -> tuple[Float[Tensor, "n d_new"], Float[Tensor, "n d_old"]]:
        x, y = (torch.cat(parts) for parts in zip(*self._pairs(X, Y, reset=True)))
        if len(x) < 2:
            raise ValueError(f"X, Y: need at least 2 pairs (n_samples = {len(x)})")
        prepared = []
        for name, rows in (("X", x), ("Y", y)):
            rows = self._prepared(rows).float()
            if float((rows - rows[0]).abs().max()) <= 1e-6 * float(rows.abs().max()):
                raise ValueError(
                    f"{name}: all rows are equal{' at unit length' if self.normalize else ''} (n_features = "
                    f"{rows.shape[1]}); there is nothing to map"
                )
            prepared.append(rows)
        return prepared[0], prepared[1]

    def _prepared(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        return normalize_rows(rows) if self.normalize and rows.shape[1] > 1 else rows

    def _warn(self, new: Tensor, old: Tensor, groups: Tensor | None) -> None:
        if self.backward in ("lambda", "affine") and len(new) < new.shape[1]:
            warnings.warn(
                f"X: {len(new)} pairs leave an affine map of {new.shape[1]} dimensions undetermined; "
                "backward='strict' needs fewer, or give more pairs",
                stacklevel=3,
            )
        if groups is None:
            return
        part = slice(0, _COMPARED_ROWS)
        numbers = groups[part].cpu().numpy()
        if len(np.unique(numbers)) == len(numbers):
            return
        found = [retrieval_scores(rows[part], rows[part], numbers, numbers, exclude_self=True) for rows in (new, old)]
        first, second = (scores.cmc() for scores in found)
        # Two standard errors of the difference of two shares, as if they were independent.
        margin = 2 * ((first * (1 - first) + second * (1 - second)) / len(found[0].queries)) ** 0.5
        if first < second - margin:
            warnings.warn(
                f"the new model retrieves worse than the old one (top-1 {first:.3f} against {second:.3f} among "
                f"{len(numbers)} training rows): compatibility with it gains nothing",
                stacklevel=3,
            )

    def _backward(self, new: Float[Tensor, "n d_new"], old: Float[Tensor, "n d_old"]) -> nn.Module:
        d = new.shape[1]
        if self.backward == "none":
            return nn.Identity()
        start = torch.eye(d, dtype=torch.float64)
        if self.start == "procrustes":
            # Beyond the compared coordinates the target is zero: any completion to an orthogonal matrix is optimal.
            target = F.pad(old, (0, max(0, d - old.shape[1])))[:, :d]
            cross = new.double().mT @ target.double() / len(new)
            start = procrustes(cross, determinant=self.determinant).matrix.cpu()
        if self.backward == "strict":
            return OrthogonalLinear(d, init=start)
        layer = nn.Linear(d, d)
        with torch.no_grad():
            layer.weight.copy_(start)
            nn.init.zeros_(layer.bias)
        return layer

    def _train(
        self,
        backward: nn.Module,
        forward: nn.Module,
        new: Float[Tensor, "n d_new"],
        old: Float[Tensor, "n d_old"],
        groups: Int[Tensor, " n"] | None,
    ) -> None:
        self.lam_ = defect_limit(torch.empty(new.shape[1], new.shape[1], device="meta"), self.lam, self.lam_rel)
        learnt = [*backward.parameters(), *forward.parameters()]
        optimizer = torch.optim.Adam(learnt, lr=self.learning_rate, weight_decay=self.weight_decay)
        size, step = batch_rows(len(new), self.batch_size, 512), 0
        self.history_: list[dict[str, float]] = []
        for _ in range(self.epochs):
            totals: dict[str, float] = {}
            for part in torch.randperm(len(new)).to(new.device).split(size):
                # Neither a contrast nor batch normalisation can do with a single row.
                if len(part) < 2:
                    continue
                terms = self._terms(backward, forward, new[part], old[part], None if groups is None else groups[part])
                optimizer.zero_grad()
                finite_loss(torch.stack([weight * term for weight, term in terms.values()]).sum(), step).backward()
                optimizer.step()
                step += 1
                for name, (_, term) in terms.items():
                    totals[name] = totals.get(name, 0.0) + float(term.detach()) * len(part) / len(new)
            if self.safeguard and self.backward == "lambda":
                layer: Any = backward
                layer.weight.data.copy_(limit_orthogonality_defect(layer.weight, self.lam_))
            self.history_.append(totals)

    def _terms(
        self,
        backward: nn.Module,
        forward: nn.Module,
        new: Float[Tensor, "b d_new"],
        old: Float[Tensor, "b d_old"],
        groups: Int[Tensor, " b"] | None,
    ) -> dict[str, tuple[float, Tensor]]:
        """Weight and value of each term of the objective that counts."""
        mapped, lifted = backward(new), forward(old)
        shared = min(new.shape[1], old.shape[1])
        w_forward, w_backward, w_contrast = self.weights
        terms: dict[str, tuple[float, Tensor]] = {"forward": (w_forward, F.mse_loss(lifted, mapped))}
        if self.backward != "none":
            terms["backward"] = (w_backward, F.mse_loss(mapped[:, :shared], old[:, :shared]))
        if w_contrast:
            positives: Bool[Tensor, "b b"] | None = None if groups is None else groups[:, None] == groups
            contrast = sum(
                info_nce(a, c, positives, temperature=self.temperature, symmetric=self.symmetric)
                for a, c in ((lifted, mapped), (lifted[:, :shared], old[:, :shared]))
            )
            terms["contrast"] = (w_contrast, torch.as_tensor(contrast))
        if self.backward == "lambda" and self.penalty:
            layer: Any = backward
            terms["penalty"] = (self.penalty, self._regularizer(layer.weight))
        return terms

    def _regularizer(self, weight: Float[Tensor, "d_new d_new"]) -> Float[Tensor, ""]:
        return LambdaOrthogonality(self.lam_, alpha=self.alpha)(weight)

    def _keep(self, backward: nn.Linear, forward: nn.Module) -> None:
        self.backward_ = backward.requires_grad_(False).eval()
        self.forward_ = forward.requires_grad_(False).eval()
        self.map_ = AffineMap(backward.weight.detach(), None if backward.bias is None else backward.bias.detach())
        self.orthogonality_defect_ = float(orthogonality_defect(self.map_.matrix.double()))
        self.singular_values_ = torch.linalg.svdvals(self.map_.matrix.double()).cpu().numpy()

    def transform(self, X: Any) -> Any:
        """B of new embeddings (n, d_new), in old coordinates; numpy or torch as given."""
        check_is_fitted(self, "map_")
        x = self._rows(X)
        mapped = self.map_.to(x.device).map(self._prepared(at_least_single(x)))
        return like(mapped.to(x.dtype) if isinstance(X, Tensor) else mapped, X)

    @torch.no_grad()
    def transform_old(self, Y: Any) -> Any:
        """F of old embeddings (n, d_old) → (n, d_new), beside B(new); numpy or torch as given."""
        check_is_fitted(self, "map_")
        y = check_matrix(Y, "Y", columns=self.n_features_old_)
        rows = self._prepared(at_least_single(y))
        if isinstance(self.forward_, nn.Linear):
            mapped = F.linear(rows, self.forward_.weight.to(rows), self.forward_.bias.to(rows))
        else:
            mapped = self.forward_.to(rows.device)(rows.float()).to(rows)
        return like(mapped.to(y.dtype) if isinstance(Y, Tensor) else mapped, Y)

    def departure(self, tolerance: float = 0.1) -> Subspace:
        """Span of the directions in which B departs from a rotation: right singular vectors with |s² - 1| > tolerance.

        Strongest first; `variances` holds |s² - 1|. Raises ValueError when B is a rotation within the tolerance.
        """
        check_is_fitted(self, "map_")
        _, s, vh = torch.linalg.svd(self.map_.matrix.double())
        deviation = (s.square() - 1).abs()
        order = deviation.argsort(descending=True)
        order = order[deviation[order] > tolerance]
        if not len(order):
            raise ValueError(f"tolerance: no direction departs from a rotation by more than {tolerance}")
        return Subspace(vh[order].mT.contiguous(), variances=deviation[order])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted maps to a safetensors file, whole or not at all."""
        check_is_fitted(self, "map_")
        arrays = {f"backward.{name}": value for name, value in self.backward_.state_dict().items()}
        arrays |= {f"forward.{name}": value for name, value in self.forward_.state_dict().items()}
        options = self.get_params() | {"weights": [float(value) for value in self.weights], "random_state": None}
        options |= {name: _UNBOUNDED for name in ("lam", "lam_rel") if options[name] == math.inf}
        lam = _UNBOUNDED if self.lam_ == math.inf else self.lam_
        save_arrays(path, _KIND, arrays, options=options, d=[self.n_features_in_, self.n_features_old_], lam=lam)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LambdaOrthogonalAdapter:
        """Read a file written by `save`. Raises ValueError when it is not one."""
        schema = {"backward.*": Float[Tensor, "..."], "forward.*": Shaped[Tensor, "..."]}
        kept = {"options": _OPTIONS, "d": list[int], "lam": float | Literal["inf"]}
        with saved_object(path, _KIND, schema, kept) as (arrays, facts):
            options = facts["options"]
            options |= {name: math.inf for name in ("lam", "lam_rel") if options[name] == _UNBOUNDED}
            model = cls(**options)
            model._check_parameters()
            d_new, d_old = facts["d"]
            first = arrays["forward.0.weight" if model.forward == "mlp" else "forward.weight"]
            if arrays["backward.weight"].shape != (d_new, d_new) or first.shape[1] != d_old:
                raise ValueError(f"maps that are not of {d_new} and {d_old} dimensions")
            backward, forward = (
                nn.Linear(d_new, d_new, bias="backward.bias" in arrays),
                _forward(model.forward, d_old, d_new),
            )
            for part, prefix in ((backward, "backward."), (forward, "forward.")):
                set_state(part, {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)})
            model._n_features_out = model.n_features_in_ = d_new
            model.n_features_old_, model.lam_, model.history_ = d_old, float(facts["lam"]), []
            model._keep(backward, forward)
            return model


def _forward(kind: str, d_old: int, d_new: int) -> nn.Module:
    """F before training: the identity on shared coordinates, or the network of forward-compatible training."""
    if kind == "mlp":
        return MLP((d_old, 2 * d_old, 2 * d_new, d_new), norm="batch", activation="relu")
    layer = nn.Linear(d_old, d_new)
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _linear(backward: nn.Module, d: int) -> nn.Linear:
    """B as a plain linear layer, without the parametrisation that it was trained through."""
    if isinstance(backward, nn.Linear):
        return backward
    matrix = backward.weight.detach() if isinstance(backward, OrthogonalLinear) else torch.eye(d)
    return AffineMap(matrix).to_module()


def _groups(labels: Any, count: int, device: torch.device) -> Int[Tensor, " n"] | None:
    if labels is None:
        return None
    names = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if names.shape != (count,):
        raise ValueError(f"labels: expected {count} labels, one a pair, got shape {names.shape}")
    return torch.from_numpy(np.unique(names, return_inverse=True)[1].astype(np.int64)).to(device)
