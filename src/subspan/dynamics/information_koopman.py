"""What shapes a latent space in which dynamics are linear: temporal information and spectral entropy (2026)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.base.estimators import at_least_single
from subspan.geometry import effective_rank, von_neumann_entropy
from subspan.nn import MLP, ConvDecoder, ConvEncoder, multi_positive_info_nce

OperatorKind = Literal["pooled", "batch_mean", "learned"]


def _spectrum(z: Float[Tensor, "*n d"], center: bool = True) -> Float[Tensor, " m"]:
    """Eigenvalues of the covariance of all rows, scaled to sum to one, by the smaller of the two Gram matrices."""
    rows = at_least_single(z.reshape(-1, z.shape[-1]))
    if center:
        rows = rows - rows.mean(0)
    gram = rows.mT @ rows if rows.shape[0] >= rows.shape[1] else rows @ rows.mT
    return torch.linalg.eigvalsh(gram / gram.diagonal().sum().clamp_min(torch.finfo(gram.dtype).tiny))


class VonNeumannEntropy(nn.Module):
    """Entropy, in nats, of the spectrum of latent rows' covariance, scaled to sum to one: exp of it lies in [1, d].

    Parameters
    ----------
    center
        Take the mean off first.
    eps
        Added to the scaled eigenvalues, so that the slope in directions without variance is finite.

    Raises
    ------
    ValueError
        For an `eps` that is not positive.

    References
    ----------
    Cheng et al. (2026), arXiv 2510.13025. The paper maximises it; the released code adds it to the loss, and so
    minimises it.

    Examples
    --------
    >>> import torch
    >>> from subspan.dynamics import VonNeumannEntropy
    >>> z = torch.cat([torch.eye(4), -torch.eye(4)])
    >>> round(float(VonNeumannEntropy()(z).exp()), 3), round(float(VonNeumannEntropy()(z[:, :1]).exp()), 3)
    (4.0, 1.0)
    """

    def __init__(self, center: bool = True, eps: float = 1e-8) -> None:
        super().__init__()
        if not 0 < eps < math.inf:
            raise ValueError(f"eps: must be positive and finite, got {eps}")
        self.center, self.eps = center, eps

    def forward(self, z: Float[Tensor, "*n d"]) -> Float[Tensor, ""]:
        """The entropy of all rows together."""
        return von_neumann_entropy((_spectrum(z, self.center) + self.eps).clamp_min(self.eps))

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"center={self.center}, eps={self.eps:g}"


def effective_dimension(z: Float[Tensor, "*n d"]) -> float:
    """How many directions latent rows fill: exp of the von Neumann entropy of their covariance.

    Parameters
    ----------
    z
        Rows (*n, d), at least two.

    Returns
    -------
    float in [1, d].

    Raises
    ------
    ValueError
        For rows that are all the same.

    Examples
    --------
    >>> import torch
    >>> from subspan.dynamics import effective_dimension
    >>> round(effective_dimension(torch.cat([torch.eye(3), -torch.eye(3)])), 3)
    3.0
    """
    return float(effective_rank(_spectrum(z.double())))


class TemporalInfoNCE(nn.Module):
    """Contrast of each latent state with the steps before and behind it: a lower bound of their mutual information.

    Anchors are the steps that have all their neighbours in the sequence.

    Parameters
    ----------
    neighbours
        Positives before and as many behind (the paper's k).
    temperature
        Divides the similarities.
    negatives
        "sequence": the other steps of the same sequence, and the logarithm of the positives' sum, as in the released
        code. "batch": all other states of the batch, and the mean of the positives' logarithms (Algorithm 2).
    metric
        "cosine", or "inner" (Algorithm 2).

    Raises
    ------
    ValueError
        For parameters out of range; in use for sequences of at most 2 neighbours steps, and, with negatives of the
        sequence, for those whose anchors have none.

    References
    ----------
    Cheng et al. (2026), arXiv 2510.13025.

    Examples
    --------
    >>> import torch
    >>> from subspan.dynamics import TemporalInfoNCE
    >>> round(float(TemporalInfoNCE(2)(torch.ones(3, 10, 4))), 4), round(math.log(1 + 5 / 4), 4)
    (0.8109, 0.8109)
    """

    def __init__(
        self,
        neighbours: int = 3,
        temperature: float = 0.1,
        negatives: Literal["sequence", "batch"] = "sequence",
        metric: Literal["cosine", "inner"] = "cosine",
    ) -> None:
        super().__init__()
        if neighbours < 1:
            raise ValueError(f"neighbours: at least 1, got {neighbours}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature: must be positive and finite, got {temperature}")
        if negatives not in ("sequence", "batch"):
            raise ValueError(f"negatives: expected 'sequence' or 'batch', got {negatives!r}")
        if metric not in ("cosine", "inner"):
            raise ValueError(f"metric: expected 'cosine' or 'inner', got {metric!r}")
        self.neighbours, self.temperature, self.negatives, self.metric = neighbours, temperature, negatives, metric

    def forward(self, z: Float[Tensor, "b t d"]) -> Float[Tensor, ""]:
        """The loss of sequences, mean over anchors, in nats."""
        k, (b, t, _) = self.neighbours, z.shape
        if t <= 2 * k + (self.negatives == "sequence"):
            need = f"more than {2 * k + (self.negatives == 'sequence')} are needed"
            raise ValueError(f"z: sequences of {t} steps do not hold anchors with {k} neighbours on each side; {need}")
        z = at_least_single(z)
        if self.metric == "cosine":
            z = F.normalize(z, dim=-1)
        steps = torch.arange(t, device=z.device)
        apart = (steps[k : t - k, None] - steps).abs()
        itself, near = apart == 0, (apart <= k) & (apart > 0)
        anchors = z[:, k : t - k]
        if self.negatives == "sequence":
            logits = (anchors @ z.mT / self.temperature).flatten(0, 1)
            masks = near.repeat(b, 1), itself.repeat(b, 1)
            return multi_positive_info_nce(logits, *masks, combine="log-sum")
        logits = anchors.flatten(0, 1) @ z.flatten(0, 1).mT / self.temperature
        own = torch.eye(b, dtype=torch.bool, device=z.device)
        masks = (torch.einsum("bc,at->bact", own, mask).flatten(2).flatten(0, 1) for mask in (near, itself))
        return multi_positive_info_nce(logits, *masks)

    def extra_repr(self) -> str:
        """Shown by print."""
        return (
            f"neighbours={self.neighbours}, temperature={self.temperature:g}, negatives={self.negatives!r}, "
            f"metric={self.metric!r}"
        )


def gaussian_latent_information(
    operator: Float[Tensor, "d d"],
    covariance: Float[Tensor, "d d"],
    noise: Float[Tensor, "d d"],
    n_steps: int = 1,
) -> Float[Tensor, ""]:
    """Mutual information, in nats, of z_t and z_{t + n} where z' = K z + e is linear and normal: in closed form.

    Parameters
    ----------
    operator
        K (d, d), of columns.
    covariance
        Of z_t (d, d).
    noise
        Covariance (d, d) of e, positive definite.
    n_steps
        n.

    Returns
    -------
    Scalar tensor.

    Raises
    ------
    ValueError
        For fewer than one step, and for noise that is not positive definite.

    References
    ----------
    Cheng et al. (2026), arXiv 2510.13025.

    Examples
    --------
    >>> import torch
    >>> from subspan.dynamics import gaussian_latent_information
    >>> r = torch.tensor([[0.8]]).double()
    >>> found = gaussian_latent_information(r, torch.eye(1).double(), 1 - r**2)
    >>> round(float(found), 4), round(-0.5 * math.log(1 - 0.8**2), 4)
    (0.5108, 0.5108)
    """
    if n_steps < 1:
        raise ValueError(f"n_steps: at least 1, got {n_steps}")
    power, spread = operator, noise
    for _ in range(n_steps - 1):
        spread = operator @ spread @ operator.mT + noise
        power = operator @ power
    factor, failed = torch.linalg.cholesky_ex(spread)
    if int(failed):
        raise ValueError("noise: must be positive definite, for without noise the information is infinite")
    told = torch.linalg.solve_triangular(factor, power, upper=False)
    return torch.linalg.slogdet(torch.eye(len(told)).to(told) + told @ covariance @ told.mT)[1] / 2


def ridge_operator(
    before: Float[Tensor, "*b n d"], after: Float[Tensor, "*b n p"], penalty: float
) -> Float[Tensor, "*b p d"]:
    """K with least |after - before K'|² + penalty |K|², solved in the smaller of n x n and d x d."""
    n, d = before.shape[-2:]
    unit = penalty * torch.eye(min(n, d), dtype=before.dtype, device=before.device)
    if n >= d:
        return torch.linalg.solve(before.mT @ before + unit, before.mT @ after).mT
    return (before.mT @ torch.linalg.solve(before @ before.mT + unit, after)).mT


class LatentSteps(NamedTuple):
    """What a `KoopmanNetwork` makes of windows of T + 1 states.

    Attributes
    ----------
    before, after
        Latents (b, T, d) of steps 0 … T - 1, and of 1 … T.
    told
        What the operator makes of `before`.
    """

    before: Float[Tensor, "b t d"]
    after: Float[Tensor, "b t d"]
    told: Float[Tensor, "b t d"]


class KoopmanNetwork(nn.Module):
    """An encoder, a decoder, and the linear operator between the latents of one step and the next.

    Parameters
    ----------
    state_shape
        (p,) of vectors, or (c, h, w) of fields.
    dim
        Of the latent space.
    n_inputs
        Inputs u that act on each step: z' = K z + B u.
    operator
        Where K comes from in training: "pooled", ridge regression over all pairs of the batch; "batch_mean", the mean
        of those of each window, as in the released code; "learned", a parameter.
    ridge
        Penalty of that regression, beside the sums of squares.
    detach_operator
        Keep gradients from flowing through the regression, as in the released code.
    hidden
        Units of the hidden layers for vectors.
    width
        Channels of the first convolution for fields.
    dropout
        Of the hidden layers for vectors.
    encoder, decoder
        Any modules from states (n, *state_shape) to (n, dim) and back, in place of these.

    Raises
    ------
    ValueError
        For a latent space without a dimension, an operator that there is not, and a ridge that is not positive.

    References
    ----------
    Cheng et al. (2026), arXiv 2510.13025, and the code Wenxuan52/InformationKoopman.

    Examples
    --------
    >>> import torch
    >>> from subspan.dynamics import KoopmanNetwork
    >>> network = KoopmanNetwork((3,), 8)
    >>> [part.shape for part in network(torch.randn(4, 17, 3))]
    [torch.Size([4, 16, 8]), torch.Size([4, 16, 8]), torch.Size([4, 16, 8])]
    """

    def __init__(
        self,
        state_shape: Sequence[int],
        dim: int,
        *,
        n_inputs: int = 0,
        operator: OperatorKind = "pooled",
        ridge: float = 0.1,
        detach_operator: bool = True,
        hidden: Sequence[int] = (96, 96),
        width: int = 16,
        dropout: float = 0.0,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim: at least 1, got {dim}")
        if operator not in ("pooled", "batch_mean", "learned"):
            raise ValueError(f"operator: expected 'pooled', 'batch_mean' or 'learned', got {operator!r}")
        if not 0 < ridge < math.inf:
            raise ValueError(f"ridge: must be positive and finite, got {ridge}")
        shape = tuple(state_shape)
        if len(shape) == 3:
            image: tuple[int, int, int] = (shape[0], shape[1], shape[2])
            encoder = encoder or ConvEncoder(image, dim, width=width, block="plain")
            decoder = decoder or ConvDecoder(
                dim, image, width=width, block="plain", resize=True, unit_range=False
            )  # fmt: skip
        sizes = (math.prod(shape), *hidden, dim)
        self.encoder = encoder or MLP(sizes, activation="relu", dropout=dropout)
        self.decoder = decoder or MLP(sizes[::-1], activation="relu", dropout=dropout)
        self.operator, self.ridge, self.detach_operator, self.n_inputs = operator, ridge, detach_operator, n_inputs
        self.weight = nn.Parameter(torch.eye(dim, dim + n_inputs)) if operator == "learned" else None

    def encode(self, x: Float[Tensor, "n p *s"]) -> Float[Tensor, "n d"]:
        """Latents of states (n, *state)."""
        return self.encoder(x)

    def decode(self, z: Float[Tensor, "n d"]) -> Float[Tensor, "n p *s"]:
        """States of latents."""
        return self.decoder(z)

    def forward(self, x: Float[Tensor, "b t p *s"], inputs: Float[Tensor, "b u m"] | None = None) -> LatentSteps:
        """Latents of windows of T + 1 states, and what the operator makes of the first T; inputs: (b, T, m)."""
        z = self.encode(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        before, after = z[:, :-1], z[:, 1:]
        acting = before if inputs is None else torch.cat([before, inputs], -1)
        return LatentSteps(before, after, acting @ self._operator(acting, after).mT)

    def _operator(self, before: Float[Tensor, "b t p"], after: Float[Tensor, "b t d"]) -> Float[Tensor, "d p"]:
        """[K B] of a batch, in single precision at least."""
        if self.weight is not None:
            return self.weight
        if self.detach_operator:
            before, after = before.detach(), after.detach()
        before, after = at_least_single(before), at_least_single(after)
        if self.operator == "batch_mean":
            return ridge_operator(before, after, self.ridge).mean(0)
        return ridge_operator(before.flatten(0, 1), after.flatten(0, 1), self.ridge)


class InformationKoopmanLoss(nn.Module):
    """Forecasts and reconstructions, plus temporal information and spectral entropy of the latents.

    ``loss(network, (windows,))`` or ``(windows, inputs)`` of a `KoopmanNetwork`, so that ``Objective(network,
    InformationKoopmanLoss(…))`` trains it: the sum over steps of the mean squared errors of g(K z) and, times
    `id_weight`, of g(z); alpha times `TemporalInfoNCE`; minus gamma times `VonNeumannEntropy`; beta times |z' - K z|².

    Parameters
    ----------
    alpha
        Weight of the temporal contrast. 0: none.
    beta
        Weight of the consistency of latents, needed where the operator is learned.
    gamma
        Weight of the entropy. Positive as in the paper, which rewards entropy; the released code has the other sign,
        and minimises it: gamma = -0.1. 0: none.
    id_weight
        Weight of the reconstruction.
    neighbours, temperature, negatives, metric
        Of `TemporalInfoNCE`.

    Raises
    ------
    ValueError
        For weights that are not finite, and alpha, beta or id_weight below 0; in use for a term that is not finite.

    References
    ----------
    Cheng et al. (2026), arXiv 2510.13025, and the code Wenxuan52/InformationKoopman.

    Examples
    --------
    >>> import torch
    >>> from subspan.dynamics import InformationKoopmanLoss, KoopmanNetwork
    >>> total, terms = InformationKoopmanLoss()(KoopmanNetwork((3,), 8), (torch.randn(4, 17, 3),))
    >>> list(terms)
    ['forward', 'identity', 'information', 'entropy']
    """

    def __init__(
        self,
        alpha: float = 2.0,
        beta: float = 0.0,
        gamma: float = 0.1,
        id_weight: float = 0.1,
        *,
        neighbours: int = 3,
        temperature: float = 0.1,
        negatives: Literal["sequence", "batch"] = "sequence",
        metric: Literal["cosine", "inner"] = "cosine",
    ) -> None:
        super().__init__()
        for name, value in {"alpha": alpha, "beta": beta, "id_weight": id_weight, "gamma": gamma}.items():
            if not math.isfinite(value) or (value < 0 and name != "gamma"):
                raise ValueError(f"{name}: must be finite{'' if name == 'gamma' else ' and 0 or more'}, got {value}")
        self.alpha, self.beta, self.gamma, self.id_weight = alpha, beta, gamma, id_weight
        self.information = TemporalInfoNCE(neighbours, temperature, negatives, metric)
        self.entropy = VonNeumannEntropy()

    def forward(
        self, network: KoopmanNetwork, batch: Sequence[Tensor]
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The loss of a batch of windows (b, T + 1, *state), and its terms, weighted."""
        x = batch[0]
        found = network(*batch)
        steps = x.shape[1] - 1

        def error(z: Tensor, states: Tensor) -> Tensor:
            return steps * F.mse_loss(network.decode(z.flatten(0, 1)), states.flatten(0, 1))

        terms = {"forward": error(found.told, x[:, 1:])}
        if self.id_weight:
            terms["identity"] = self.id_weight * error(found.before, x[:, :-1])
        # Before the entropy: no eigenvalues are found of what is not finite.
        _check_terms(terms)
        if self.alpha:
            terms["information"] = self.alpha * self.information(found.before)
        if self.gamma:
            terms["entropy"] = -self.gamma * self.entropy(found.before)
        if self.beta:
            terms["consistency"] = self.beta * (found.after - found.told).square().sum(-1).mean()
        _check_terms(terms)
        return torch.stack(list(terms.values())).sum(), terms

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"alpha={self.alpha:g}, beta={self.beta:g}, gamma={self.gamma:g}, id_weight={self.id_weight:g}"


def _check_terms(terms: Mapping[str, Tensor]) -> None:
    """Refuse terms that are not finite, by name."""
    lost = [name for name, term in terms.items() if not bool(term.detach().isfinite())]
    if lost:
        raise ValueError(f"loss: {', '.join(lost)} not finite; lower learning_rate, or look for NaN in the batch")
