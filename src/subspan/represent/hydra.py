"""Contrast of arbitrary pairs of classes, each inside a subspace of its own (Hydra, later SimLAP; Wu et al., 2024)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from subspan.geometry import CoordinateSubspace, SoftSubspace
from subspan.nn import ConcreteGate, StochasticGate, gated_cosine, multi_positive_info_nce

Pairing = Literal["arbitrary", "identical", "distinct"]
_NORMS = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
_BLOCK = 4096


class PairGate(nn.Module):
    """For two classes the coordinates that they share: gates in [0, 1], the same for (a, b) and (b, a).

    In training the gates of kind "gumbel" and "stochastic" are drawn; in evaluation they are what they are.

    Parameters
    ----------
    n_classes
        Classes, numbered from 0.
    dim
        Coordinates that are gated.
    embed_dim, hidden
        Width of the classes' embeddings, and of the network behind them.
    fuse
        "mean": one gate of the mean of both embeddings; "product": the product of a gate of each class.
    kind
        "sigmoid"; "gumbel" and "stochastic", drawn ones (`ConcreteGate`, `StochasticGate`); "open", all ones, without
        parameters.
    norm
        "batch", as published, sees the pairs of the batch; "layer" serves where a batch has few different pairs.

    Raises
    ------
    ValueError
        For sizes below 1 or a name that there is not; in use, for classes outside [0, n_classes), and, where gates are
        read as subspaces or relations, for those that it was not trained on.

    References
    ----------
    Wu et al. (2024), arXiv 2410.18200, and the code erow/hydra. The relations are ours.

    Examples
    --------
    >>> import torch
    >>> from subspan.represent import PairGate
    >>> gate = PairGate(3, 8, embed_dim=4, hidden=16)
    >>> first, second = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])
    >>> gate(first, second).shape
    torch.Size([3, 8])
    >>> gate.eval().subspace(0, 1, top_k=2).dim
    2
    """

    seen: Tensor

    def __init__(
        self,
        n_classes: int,
        dim: int,
        *,
        embed_dim: int = 512,
        hidden: int = 1024,
        fuse: Literal["mean", "product"] = "mean",
        kind: Literal["sigmoid", "open", "gumbel", "stochastic"] = "sigmoid",
        norm: Literal["batch", "layer"] = "batch",
    ) -> None:
        super().__init__()
        for name, size in (("n_classes", n_classes), ("dim", dim), ("embed_dim", embed_dim), ("hidden", hidden)):
            if size < 1:
                raise ValueError(f"{name}: must be at least 1, got {size}")
        kinds: dict[str, Callable[[], nn.Module]] = {
            "sigmoid": nn.Sigmoid,
            "open": nn.Identity,
            "gumbel": ConcreteGate,
            "stochastic": StochasticGate,
        }
        for name, value, known in (("fuse", fuse, ("mean", "product")), ("kind", kind, kinds), ("norm", norm, _NORMS)):
            if value not in known:
                raise ValueError(f"{name}: expected one of {tuple(known)}, got {value!r}")
        self.n_classes, self.dim, self.fuse, self.kind = n_classes, dim, fuse, kind
        self.register_buffer("seen", torch.zeros(n_classes, dtype=torch.bool))
        self.squash = kinds[kind]()
        if kind != "open":
            self.embedding = nn.Embedding(n_classes, embed_dim)
            self.network = nn.Sequential(
                nn.ReLU(),
                _NORMS[norm](embed_dim),
                nn.Linear(embed_dim, hidden),
                nn.ReLU(),
                _NORMS[norm](hidden),
                nn.Linear(hidden, dim),
            )

    def forward(self, first: Int[Tensor, " n"], second: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Gates of pairs of classes."""
        self._check(first, "first")
        self._check(second, "second")
        if self.training:
            self.seen[torch.cat([first, second])] = True
        if self.kind == "open":
            return torch.ones(len(first), self.dim, device=first.device)
        a, b = self.embedding(first), self.embedding(second)
        if self.fuse == "mean":
            return self.squash(self.network((a + b) / 2))
        one, other = self.network(torch.cat([a, b])).chunk(2)
        return self.squash(one) * self.squash(other)

    def _check(self, classes: Tensor, name: str) -> None:
        if classes.is_floating_point() or classes.dtype == torch.bool:
            raise TypeError(f"{name}: expected class numbers, got {classes.dtype}")
        if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < self.n_classes:
            low, high = int(classes.min()), int(classes.max())
            raise ValueError(f"{name}: classes must lie in [0, {self.n_classes - 1}], got {low} … {high}")

    @torch.no_grad()
    def soft_subspace(self, first: Any, second: Any) -> SoftSubspace:
        """Gates of classes (n,), or of two numbers, as a `SoftSubspace`; those of evaluation, whatever the mode."""
        device = self.seen.device
        a, b = (torch.as_tensor(each, device=device).reshape(-1) for each in (first, second))
        for name, each in (("first", a), ("second", b)):
            self._check(each, name)
            if self.kind != "open" and not bool(self.seen[each].all()) and bool(self.seen.any()):
                missing = each[~self.seen[each]].unique().tolist()
                raise ValueError(f"{name}: the gate was not trained on classes {missing}")
        training = self.training
        self.eval()
        try:
            weights = torch.cat([self(*part) for part in zip(a.split(_BLOCK), b.split(_BLOCK))])
        finally:
            self.train(training)
        return SoftSubspace(weights[0] if torch.as_tensor(first).ndim == 0 else weights)

    def subspace(
        self, first: int, second: int, *, threshold: float = 0.5, top_k: int | None = None
    ) -> CoordinateSubspace:
        """The coordinates that two classes share: those with a gate above `threshold`, or the `top_k` most open."""
        found = self.soft_subspace(int(first), int(second)).harden(threshold=threshold, top_k=top_k)
        assert isinstance(found, CoordinateSubspace)
        return found

    def relations(self, metric: Literal["overlap", "open"] = "overlap") -> Float[Tensor, "c c"]:
        """How much every two classes share, (c, c), symmetric.

        "open" is the mean gate of the pair. "overlap" is the share of the pair's gates that lies where both classes'
        own gates are open, sum_k g(a,a) g(b,b) g(a,b) / sum_k g(a,b).
        """
        if metric not in ("overlap", "open"):
            raise ValueError(f"metric: expected 'overlap' or 'open', got {metric!r}")
        classes = torch.arange(self.n_classes, device=self.seen.device)
        own = self.soft_subspace(classes, classes).weights
        found = own.new_zeros(self.n_classes, self.n_classes)
        for a, b in self._pairs():
            gates = self.soft_subspace(a, b).weights
            share = gates.mean(-1)
            if metric == "overlap":
                share = (own[a] * own[b] * gates).sum(-1) / gates.sum(-1).clamp_min(torch.finfo(gates.dtype).tiny)
            found[a, b] = found[b, a] = share
        return found

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every pair a <= b once, in blocks."""
        first, second = torch.triu_indices(self.n_classes, self.n_classes, device=self.seen.device)
        yield from zip(first.split(_BLOCK), second.split(_BLOCK))

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"n_classes={self.n_classes}, dim={self.dim}, fuse={self.fuse!r}, kind={self.kind!r}"


def sign_agreement_gate(
    classifier_weight: Float[Tensor, "c d"], first: Int[Tensor, " n"], second: Int[Tensor, " n"]
) -> Float[Tensor, "n d"]:
    """Gates without training: 1 where the weights of both classes in a linear classifier have the same sign.

    Parameters
    ----------
    classifier_weight
        (c, d), a row a class.
    first, second
        Classes (n,) of each pair.

    Returns
    -------
    Tensor (n, d) of zeros and ones; `SoftSubspace` takes it.

    Raises
    ------
    ValueError
        For classes outside [0, c).

    References
    ----------
    Wu et al. (2024), in the authors' code the fused variant.

    Examples
    --------
    >>> import torch
    >>> from subspan.represent import sign_agreement_gate
    >>> weight = torch.tensor([[1.0, -2.0, 3.0], [2.0, 1.0, 0.5]])
    >>> sign_agreement_gate(weight, torch.tensor([0]), torch.tensor([1]))
    tensor([[1., 0., 1.]])
    """
    for name, classes in (("first", first), ("second", second)):
        if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < len(classifier_weight):
            raise ValueError(f"{name}: classes must lie in [0, {len(classifier_weight) - 1}], got {classes.tolist()}")
    return (classifier_weight[first] * classifier_weight[second] > 0).to(classifier_weight)


def pair_masks(
    first: Int[Tensor, " n"], second: Int[Tensor, " n"], keys: Int[Tensor, " m"], *, same_rows: bool = False
) -> tuple[Bool[Tensor, "n m"], Bool[Tensor, "n m"]]:
    """Positives and exclusions of anchors of class `first` that are paired with class `second`, for any loss of pairs.

    Positives are keys of the second class; keys of the first are neither positive nor negative.

    Parameters
    ----------
    first, second
        Classes (n,) of the anchors and of their partners.
    keys
        Classes (m,) of the keys.
    same_rows
        Whether the anchors are the keys, so that an anchor is not its own positive.

    Returns
    -------
    Positives and exclusions (n, m), as `multi_positive_info_nce` takes them.

    References
    ----------
    Wu et al. (2024). That a row is no positive of itself is ours.

    Examples
    --------
    >>> import torch
    >>> from subspan.represent import pair_masks
    >>> positives, excluded = pair_masks(torch.tensor([0]), torch.tensor([1]), torch.tensor([0, 1, 2]))
    >>> positives.tolist(), excluded.tolist()
    ([[False, True, False]], [[True, False, False]])
    """
    positives = second[:, None] == keys
    if same_rows:
        positives = positives.clone().fill_diagonal_(False)
    own = first[:, None] == keys
    if same_rows:
        own = own | torch.eye(len(first), dtype=torch.bool, device=own.device)
    return positives, own & ~positives


class NearbyPartners(nn.Module):
    """Draws the partner of each anchor in a batch, classes near to its own more often.

    Weights are 1 / (1 + distance)^power; farther than `largest` no partner is drawn.

    Parameters
    ----------
    distances
        (c, c) between classes, such as steps in a tree of words.
    power
        0 draws every sample of the batch alike.
    largest
        The farthest that partners are.

    Raises
    ------
    ValueError
        For distances that are negative, NaN or not square.

    Examples
    --------
    >>> import torch
    >>> from subspan.represent import NearbyPartners
    >>> distances = torch.tensor([[0.0, 1.0, 9.0], [1.0, 0.0, 9.0], [9.0, 9.0, 0.0]])
    >>> NearbyPartners(distances, largest=2)(torch.tensor([2, 0, 2]))[[0, 2]]  # class 2 is near to itself alone
    tensor([2, 2])
    """

    weights: Tensor

    def __init__(self, distances: Float[Tensor, "c c"], *, power: float = 1.0, largest: float = float("inf")) -> None:
        super().__init__()
        if distances.shape != (len(distances), len(distances)) or not bool((distances >= 0).all()):
            raise ValueError(f"distances: expected a square matrix of numbers >= 0, got shape {tuple(distances.shape)}")
        weights = (1 + distances).pow(-power).masked_fill(distances > largest, 0)
        self.register_buffer("weights", weights.fill_diagonal_(1.0))

    def forward(self, labels: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Classes (n,) of partners, drawn from the labels (n,) of the batch."""
        return labels[torch.multinomial(self.weights[labels][:, labels], 1)[:, 0]]


def drawn_partners(labels: Int[Tensor, " n"], pairing: Pairing) -> Int[Tensor, " n"]:
    """Classes of the partners of the samples of a batch: of a permutation, the own ones, or any other in the batch."""
    if pairing == "identical":
        return labels
    if pairing == "arbitrary":
        return labels[torch.randperm(len(labels), device=labels.device)]
    classes, place = labels.unique(return_inverse=True)
    step = torch.randint(1, len(classes), labels.shape, device=labels.device)
    return classes[(place + step) % len(classes)]


class ArbitraryPairLoss(nn.Module):
    """Pulls together the samples of any two classes, inside the subspace that a gate opens for the two.

    ``loss(z1, z2, labels)`` is the loss and what is worth a look, as `Objective` takes it. z2 are other views of the
    samples of z1; None: there is one view, and samples are contrasted with one another.

    Parameters
    ----------
    gate
        Its `dim` is the width of the embeddings.
    temperature
        Divides the cosines.
    pairing
        Whom a sample is paired with: the class of a random other ("arbitrary"), its own ("identical"; with an open gate
        supervised contrast), or any other class of the batch ("distinct").
    pair_sampler
        ``pair_sampler(labels)`` → classes of the partners, in place of `pairing`; such as `NearbyPartners`.
    binary_penalty
        Weight of the mean of g (1 - g), which pushes gates to 0 or 1.
    average
        Over all positive "pairs" as published, or over "anchors", which frequent classes do not rule.
    normalize
        As in `gated_cosine`.

    Raises
    ------
    ValueError
        For a temperature that is not positive, a negative penalty, a name that there is not; in use for other widths,
        other numbers of rows, and a batch of fewer than two classes.

    References
    ----------
    Wu et al. (2024), arXiv 2410.18200: temperature 0.1. The penalty is not in their code.

    Examples
    --------
    >>> import torch
    >>> from subspan.represent import ArbitraryPairLoss, PairGate
    >>> loss = ArbitraryPairLoss(PairGate(3, 8, embed_dim=4, hidden=16))
    >>> z1, z2, labels = torch.randn(6, 8), torch.randn(6, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    >>> value, log = loss(z1, z2, labels)
    >>> bool(value > 0), sorted(log)
    (True, ['gate_entropy', 'negative_cosine', 'open_gates', 'own_cosine', 'partner_cosine'])
    """

    def __init__(
        self,
        gate: PairGate,
        *,
        temperature: float = 0.1,
        pairing: Pairing = "arbitrary",
        pair_sampler: Callable[[Tensor], Tensor] | None = None,
        binary_penalty: float = 0.0,
        average: Literal["pairs", "anchors"] = "pairs",
        normalize: Literal["inside", "before"] = "inside",
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature: must be positive, got {temperature}")
        if not binary_penalty >= 0:
            raise ValueError(f"binary_penalty: must be 0 or more, got {binary_penalty}")
        if pairing not in ("arbitrary", "identical", "distinct"):
            raise ValueError(f"pairing: expected 'arbitrary', 'identical' or 'distinct', got {pairing!r}")
        self.gate, self.temperature = gate, temperature
        self.pairing: Pairing = pairing
        self.pair_sampler, self.binary_penalty = pair_sampler, binary_penalty
        self.average: Any = average
        self.normalize: Any = normalize

    def forward(
        self, z1: Float[Tensor, "n d"], z2: Float[Tensor, "n d"] | None, labels: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The loss, and the gates and cosines that it is made of."""
        if z1.shape[-1] != self.gate.dim:
            raise ValueError(f"z1: the gate is of {self.gate.dim} coordinates, got {z1.shape[-1]}")
        if len(labels) != len(z1) or (z2 is not None and z2.shape != z1.shape):
            raise ValueError(f"labels: expected {len(z1)}, and views of one shape, got {len(labels)}")
        if len(labels.unique()) < 2:
            raise ValueError("labels: a batch needs at least 2 classes; there is nothing to contrast")
        sampler = self.pair_sampler
        partners = drawn_partners(labels, self.pairing) if sampler is None else sampler(labels)
        gates = self.gate(labels, partners)
        positives, excluded = pair_masks(labels, partners, labels, same_rows=z2 is None)
        sides = [(z1, z1)] if z2 is None else [(z1, z2), (z2, z1)]
        cosines = torch.stack([gated_cosine(z, k, gates.to(z), normalize=self.normalize) for z, k in sides])
        loss = torch.stack([self._contrast(each, positives, excluded) for each in cosines]).mean()
        if self.binary_penalty:
            loss = loss + self.binary_penalty * (gates * (1 - gates)).mean()
        own = pair_masks(labels, labels, labels, same_rows=z2 is None)[0]
        parts = {"own": own, "partner": positives, "negative": ~(positives | excluded)}
        return loss, self._log(gates.detach(), cosines.detach().mean(0), parts)

    def _contrast(
        self, cosines: Float[Tensor, "n n"], positives: Bool[Tensor, "n n"], excluded: Bool[Tensor, "n n"]
    ) -> Float[Tensor, ""]:
        # Without a negative there is nothing to tell a positive from: such an anchor counts nothing.
        counts = positives & ~(positives | excluded).all(-1, keepdim=True)
        if not bool(counts.any()):
            return cosines.sum() * 0
        kept = counts.any(-1)
        return multi_positive_info_nce(
            cosines[kept] / self.temperature,
            counts[kept],
            excluded[kept],
            rivals="negatives",
            average=self.average,
        )

    @staticmethod
    def _log(gates: Tensor, cosines: Tensor, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        closed = (1 - gates).clamp(1e-7, 1)
        entropy = -(gates.clamp_min(1e-7).log() * gates + closed.log() * closed)
        found = {f"{name}_cosine": cosines[mask].sum() / mask.sum().clamp_min(1) for name, mask in parts.items()}
        return {"open_gates": gates.mean(), "gate_entropy": entropy.mean(), **found}

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"temperature={self.temperature}, pairing={self.pairing!r}"
