"""A linear probe that says how many bits the labels cost: Bayesian compression with a gate for each dimension."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.base.arrays import as_tensor, check_matrix
from subspan.base.parameters import Count, Positive, Share, check_parameters
from subspan.geometry import Subspace
from subspan.nn.training import finite_loss

_K1, _K2, _K3 = 0.63576, 1.87320, 1.48695
_SAMPLES = 8


class VariationalLinear(nn.Module):
    """x → W (z ⊙ x) + b, all of z, W and b normal variables: gates z (d,) are shared by the outputs.

    Drawn in training, by local reparametrisation; the means in evaluation.

    Parameters
    ----------
    in_features, out_features
        d and the number of classes.
    clip_variance
        Variances of the weights are at most that.
    generator
        Of the start; the draws are torch's own.

    References
    ----------
    Louizos, Ullrich & Welling (2017), Bayesian compression; Voita & Titov (2020), arXiv 2003.12298.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import VariationalLinear
    >>> layer = VariationalLinear(4, 3).eval()
    >>> layer(torch.ones(2, 4)).shape, bool(layer.kl() > 0)
    (torch.Size([2, 3]), True)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        clip_variance: float = 0.04,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()

        def normal(*shape: int, mean: float = 0.0, deviation: float = 1e-2) -> nn.Parameter:
            return nn.Parameter(mean + deviation * torch.randn(*shape, generator=generator))

        self.largest = math.log(clip_variance)
        self.gate_mean = normal(in_features, mean=1.0)
        self.gate_log_variance = normal(in_features, mean=-9.0)
        self.weight_mean = normal(out_features, in_features, deviation=in_features**-0.5)
        self.weight_log_variance = normal(out_features, in_features, mean=-9.0)
        self.bias_mean = nn.Parameter(torch.zeros(out_features))
        self.bias_log_variance = normal(out_features, mean=-9.0)

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        """Logits."""
        if not self.training:
            return F.linear(x * self.gate_mean, self.weight_mean, self.bias_mean)
        gated = x * (self.gate_mean + (self.gate_log_variance / 2).exp() * torch.randn_like(x))
        mean = F.linear(gated, self.weight_mean, self.bias_mean)
        variance = F.linear(gated.square(), self._variance(self.weight_log_variance), self.bias_log_variance.exp())
        return mean + variance.sqrt() * torch.randn_like(mean)

    def log_alpha(self) -> Float[Tensor, " d"]:
        """Log of the noise of each gate against its size: large where the dimension is not used."""
        return self.gate_log_variance - (self.gate_mean.square() + 1e-8).log()

    def kl(self) -> Float[Tensor, ""]:
        """Divergence (nats) of the variables from their priors: log-uniform for gates, standard normal for the rest."""
        log_alpha = self.log_alpha()
        gates = _K1 * torch.sigmoid(_K2 + _K3 * log_alpha) - 0.5 * F.softplus(-log_alpha) - _K1
        weights = _normal_kl(self.weight_mean, self.weight_log_variance.clamp(max=self.largest))
        return weights + _normal_kl(self.bias_mean, self.bias_log_variance) - gates.sum()

    def _variance(self, log_variance: Tensor) -> Tensor:
        return log_variance.clamp(max=self.largest).exp()


def _normal_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    return 0.5 * (log_variance.exp() + mean.square() - 1 - log_variance).sum()


@dataclass(eq=False, repr=False)
class VariationalProbe:
    """What states say of labels linearly, and what that costs in bits: easier labels have the shorter code.

    The code is the divergence of the probe from its prior and the labels' cost under it, in bits; labels alone cost
    N log2 V. The prior of the weights has a size, so states of other units would cost other bits: rows are divided by
    their root mean square. The rate is halved after an epoch without a gain on held-out rows, and two
    such in a row end the training.

    Parameters
    ----------
    epochs
        At most so many.
    learning_rate
        Of Adam.
    batch_size
        Rows.
    held_out
        Share of the rows that is not trained on; 0 trains for all epochs.
    clip_variance
        See `VariationalLinear`.
    scale
        Divide all rows by one number, their root mean square; the published probe does not.
    class_weight
        "balanced": in the fit and in `score` every class counts alike, however many rows it has. The code is of all
        labels in either case, and longer then.
    random_state
        Seed.

    Attributes
    ----------
    classes_ : (V,)
    code_length_ : float
        Bits of the labels of all rows.
    compression_ : float
        N log2 V over that: above 1 the probe says something.
    kl_ : float
        Part of the code that is the probe, in bits.
    coef_ : (V, d)
        Mean weights times mean gates, of scaled rows.
    scale_ : float
        What rows are divided by.
    gates_ : (d,)
        Log alpha: large where a dimension is not used.
    subspace_ : Subspace
        Of the rows of coef_.

    Raises
    ------
    ValueError
        For one class alone, NaN, or values out of range.

    References
    ----------
    Voita & Titov (2020), arXiv 2003.12298; Müller-Eberstein et al. (2023), arXiv 2310.16484.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.edit import VariationalProbe
    >>> rng = np.random.default_rng(0)
    >>> y = np.arange(400) % 2
    >>> x = rng.normal(size=(400, 5)) + 4 * np.eye(5)[0] * y[:, None]
    >>> probe = VariationalProbe(epochs=20, learning_rate=0.02, random_state=0).fit(x, y)
    >>> probe.compression_ > 1.5, probe.score(x, y) > 0.95, int(np.abs(probe.coef_).sum(0).argmax())
    (True, True, 0)
    """

    # `fit` checks the values: run-time type checkers leave the constructor alone.
    __no_type_check__ = True

    epochs: Count = 30
    learning_rate: Positive = 1e-3
    batch_size: Count = 64
    held_out: Share = 0.1
    clip_variance: Positive = 0.04
    scale: bool = True
    class_weight: Literal["balanced"] | None = None
    random_state: int = 0

    def fit(self, X: Any, y: Any, *, start: VariationalProbe | None = None) -> VariationalProbe:
        """Fit to rows X (n, d) and their labels y (n,), from where another probe of the same classes has come to."""
        check_parameters(self)
        rows = check_matrix(as_tensor(X, "X").detach().float(), "X", min_rows=2)
        labels = np.asarray(y.cpu() if isinstance(y, Tensor) else y)
        if labels.shape != (len(rows),):
            raise ValueError(f"y: expected {len(rows)} labels, got shape {labels.shape}")
        self.classes_, codes = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y: at least two classes are needed, got {self.classes_.tolist()}")
        target = torch.from_numpy(codes).to(rows.device)
        size = float(rows.square().mean().sqrt())
        self.scale_ = size if self.scale and size > 0 else 1.0
        rows = rows / self.scale_
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.random_state)
            self.layer_ = VariationalLinear(rows.shape[1], len(self.classes_), clip_variance=self.clip_variance)
            if start is not None:
                self._continue(start)
            self._train(self.layer_.to(rows.device), rows, target)
            self._measure(rows, target)
        self.coef_ = (self.layer_.weight_mean * self.layer_.gate_mean).detach().cpu().numpy()
        self.gates_ = self.layer_.log_alpha().detach().cpu().numpy()
        return self

    @property
    def subspace_(self) -> Subspace:
        """Of the rows of coef_, at most the numerical rank of it."""
        return Subspace.span(torch.from_numpy(self.coef_.T))

    def decision_function(self, X: Any) -> Float[Tensor, "n v"]:
        """Logits by the mean weights."""
        rows = check_matrix(as_tensor(X, "X").detach().float(), "X", columns=self.coef_.shape[1], min_rows=1)
        with torch.no_grad():
            return self.layer_.eval()(rows.to(self.layer_.gate_mean.device) / self.scale_).cpu()

    def predict_proba(self, X: Any) -> Float[np.ndarray, "n v"]:
        """Chances of the classes."""
        return self.decision_function(X).softmax(-1).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest class of each row."""
        return self.classes_[self.decision_function(X).argmax(-1).numpy()]

    def score(self, X: Any, y: Any) -> float:
        """Share of rows that get their label; with balanced classes the mean of the shares of each class."""
        labels = np.asarray(y)
        right = self.predict(X) == labels
        if self.class_weight is None:
            return float(right.mean())
        return float(np.mean([right[labels == each].mean() for each in np.unique(labels)]))

    def chance(self, y: Any) -> tuple[float, float]:
        """`score` on labels y of always giving one answer, the best one, and the standard error of such a score."""
        counts = np.unique(np.asarray(y), return_counts=True)[1]
        if self.class_weight is None:
            share = float(counts.max() / counts.sum())
            return share, float((share * (1 - share) / counts.sum()) ** 0.5)
        share = 1 / len(counts)
        return share, float((share * (1 - share) * (1 / counts).sum()) ** 0.5 / len(counts))

    @torch.no_grad()
    def _continue(self, start: VariationalProbe) -> None:
        """Take over another probe's variables."""
        if start.coef_.shape[1] != self.layer_.gate_mean.numel() or start.classes_.tolist() != self.classes_.tolist():
            raise ValueError(
                f"start: a probe of {self.classes_.tolist()} on {self.layer_.gate_mean.numel()} dimensions is needed, "
                f"got one of {start.classes_.tolist()} on {start.coef_.shape[1]}"
            )
        self.layer_.load_state_dict(start.layer_.state_dict())

    @torch.enable_grad()
    def _train(self, layer: VariationalLinear, rows: Tensor, target: Int[Tensor, " n"]) -> None:
        """A loop of its own: a step is far cheaper here than what a Trainer adds to each."""
        order, held = torch.randperm(len(rows)).to(rows.device), round(self.held_out * len(rows))
        kept, trained = order[:held], order[held:]
        optimizer = torch.optim.Adam(layer.parameters(), self.learning_rate)
        counts = torch.bincount(target, minlength=len(self.classes_))
        # As many rows in all as there are, so that the divergence weighs what it did.
        weight = None if self.class_weight is None else len(target) / (len(counts) * counts)
        best, bad, step = math.inf, 0, 0
        for _ in range(self.epochs):
            layer.train()
            for batch in trained[torch.randperm(len(trained)).to(rows.device)].split(self.batch_size):
                loss = F.cross_entropy(layer(rows[batch]), target[batch], weight, reduction="sum")
                loss = finite_loss(loss + layer.kl() * (len(batch) / len(trained)), step)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
            if not held:
                continue
            with torch.no_grad():
                found = float(F.cross_entropy(layer.eval()(rows[kept]), target[kept], weight))
            best, bad = min(best, found), 0 if found < best else bad + 1
            if bad > 1:
                return
            for group in optimizer.param_groups if bad else ():
                group["lr"] /= 2

    @torch.no_grad()
    def _measure(self, rows: Tensor, target: Int[Tensor, " n"]) -> None:
        """The bound on the code: expected cost of the labels under drawn probes, and the divergence."""
        layer = self.layer_.train()
        costs = [float(F.cross_entropy(layer(rows), target, reduction="sum")) for _ in range(_SAMPLES)]
        self.kl_ = float(layer.kl()) / math.log(2)
        self.code_length_ = self.kl_ + sum(costs) / len(costs) / math.log(2)
        self.compression_ = len(rows) * math.log2(len(self.classes_)) / self.code_length_


def dominant_subspace(probe: VariationalProbe, dominant: Any, energy: float = 0.95) -> Subspace:
    """What tells one class from all others: the span of the differences of its weights from theirs.

    Parameters
    ----------
    probe
        Fitted; with two classes the span is one direction.
    dominant
        One of its classes.
    energy
        Share of the differences' energy that is kept, in (0, 1].

    Returns
    -------
    Subspace of dimension at most V - 1.

    Raises
    ------
    ValueError
        Where the probe has no such class.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.edit import VariationalProbe, dominant_subspace
    >>> x, y = np.eye(6).repeat(10, 0), np.arange(6).repeat(10)
    >>> dominant_subspace(VariationalProbe(epochs=2).fit(x, y), 0, energy=1.0).dim
    5
    """
    place = np.flatnonzero(probe.classes_ == dominant)
    if not len(place):
        raise ValueError(f"dominant: {dominant!r} is none of the classes {probe.classes_.tolist()[:10]}")
    weights = torch.from_numpy(probe.coef_)
    differences = weights[int(place[0])] - torch.cat([weights[: int(place[0])], weights[int(place[0]) + 1 :]])
    if len(differences) == 1:
        return Subspace.span(differences.mT)
    return Subspace.from_factor(differences, count=float(len(differences)), rank=energy)
