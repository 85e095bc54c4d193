"""Classes or numbers read linearly from rows that were not learnt from, of many layers and targets at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

SHRINKAGES = (0.03, 0.1, 0.3, 0.7)
"""Weights of the columns' own variances in the covariance, of which the best over all layers is taken."""
# Layers in which weights are compared, and numbers of states that are solved together: more leave the fast memory.
_ASKED, _NUMBERS_AT_ONCE = 5, 1 << 20


@dataclass(frozen=True)
class Target:
    """What is read of each row: one of some classes, or a number; see `target_of`.

    Parameters
    ----------
    values
        (n,): places among the names, or numbers.
    names
        Of the classes; none for numbers.
    """

    values: Tensor
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.values)

    @property
    def rank(self) -> int:
        """The most dimensions in which a linear reading of it can lie."""
        return max(1, len(self.names) - 1)

    def rows(self, chosen: Tensor) -> Target:
        """Of some rows alone."""
        return Target(self.values[chosen], self.names)

    def columns(self) -> Float[Tensor, "n m"]:
        """What filters are learnt for: a column a class, rare ones as heavy as common ones; or the number."""
        if not self.names:
            return self.values.unsqueeze(1)
        each = torch.nn.functional.one_hot(self.values, len(self.names)).double()
        return each / each.mean(0).clamp_min(1e-12).sqrt()

    def base(self, learnt: Target) -> Float[Tensor, " t"]:
        """Of each row what a loss is compared with: 1, or the squared distance to the mean of what was learnt from."""
        if self.names:
            return torch.ones(len(self), dtype=torch.float64)
        return (self.values - learnt.values.mean()).square()

    def constant_losses(self, learnt: Target) -> Float[Tensor, " t"]:
        """What the commonest class, or the mean, of what was learnt from would lose."""
        if not self.names:
            return self.base(learnt)
        return (self.values != torch.bincount(learnt.values, minlength=len(self.names)).argmax()).double()


class Folds(NamedTuple):
    """Which part of the rows each is held out in, and how many parts there are."""

    part: Int[Tensor, " n"]
    count: int

    def split(self, number: int) -> tuple[Tensor, Tensor]:
        """Rows to learn from, and those held out."""
        held = self.part == number
        return (~held).nonzero().flatten(), held.nonzero().flatten()


def target_of(values: Any, *, numeric: bool = False) -> Target:
    """Labels, or numbers, as what a probe reads.

    Parameters
    ----------
    values
        (n,).
    numeric
        They are numbers.

    Returns
    -------
    Target

    Raises
    ------
    ValueError
        For one class, numbers that are all the same, NaN and infinity.

    Examples
    --------
    >>> from subspan.probe import target_of
    >>> found = target_of(["b", "a", "b"])
    >>> found.names, found.values.tolist(), found.rank
    (('a', 'b'), [1, 0, 1], 1)
    """
    if numeric:
        numbers = torch.as_tensor(np.asarray(values, dtype=np.float64))
        if numbers.ndim != 1 or not bool(numbers.isfinite().all()):
            raise ValueError("values: one finite number a row is needed")
        if bool((numbers == numbers[0]).all()):
            raise ValueError(f"values: all are {float(numbers[0]):g}; there is nothing to read")
        return Target(numbers)
    names, codes = np.unique(np.asarray(values).astype(str), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"labels: all are {str(names[0])!r}; there is nothing to tell apart")
    return Target(torch.as_tensor(codes), tuple(map(str, names)))


def folds_of(target: Target, count: int, random: np.random.RandomState) -> Folds:
    """Random parts with the classes, or small and large numbers, in like shares."""
    # In the order of the target (ties in random order) neighbours go to different parts.
    ties = random.permutation(len(target))
    order = ties[np.argsort(target.values.numpy()[ties], kind="stable")]
    part = np.empty(len(target), dtype=np.int64)
    for start in range(0, len(order), count):
        block = order[start : start + count]
        part[block] = random.permutation(count)[: len(block)]
    return Folds(torch.as_tensor(part), count)


def shuffled(target: Target, random: np.random.RandomState) -> Target:
    """The same values at other rows."""
    return Target(target.values[torch.as_tensor(random.permutation(len(target)))], target.names)


class HeldOut(NamedTuple):
    """Losses of rows by readings that did not learn from them; see `read_held_out`.

    Attributes
    ----------
    losses
        (targets, layers, n).
    bases
        (targets, n) what they are compared with: a score is 1 - mean loss / mean base.
    constant
        (targets, n) losses without looking at the rows.
    shrinkage
        That was taken.
    """

    losses: Float[Tensor, "s l n"]
    bases: Float[Tensor, "s n"]
    constant: Float[Tensor, "s n"]
    shrinkage: float

    def scores(self, target: int = 0) -> Float[Tensor, " l"]:
        """Of each layer: share right, or R²."""
        return 1 - self.losses[target].mean(1) / self.bases[target].mean()


def read_held_out(
    states: Float[Tensor, "l n d"],
    targets: Sequence[Target],
    folds: Folds,
    *,
    shrinkages: Sequence[float] = SHRINKAGES,
    layers_at_once: int | None = None,
) -> HeldOut:
    """Read each target from each layer: in every fold, filters are learnt from the others and read the rows held out.

    A filter solves ((1 - s) C + s diag C) u = cov(x, y), with the one of `shrinkages` that reads the first target best;
    classes are told by a linear discriminant in the coordinates that the filters give. Covariances are shared by all
    targets, layers are solved together.
    """
    layers, n, d = states.shape
    at_once = layers_at_once or max(1, _NUMBERS_AT_ONCE // (n * min(n, d)))
    if len(shrinkages) > 1:
        # Which one is best hardly depends on the layer, and a few of them say it.
        some = sorted({round(place * (layers - 1) / (_ASKED - 1)) for place in range(_ASKED)})
        tried = [
            float(read_held_out(states[some], targets[:1], folds, shrinkages=[weight]).losses.mean())
            for weight in shrinkages
        ]
        shrinkages = [shrinkages[int(np.argmin(tried))]]
    weight = shrinkages[0]
    losses = torch.zeros(len(targets), layers, n, dtype=torch.float64)
    for start in range(0, layers, at_once):
        chunk = slice(start, start + at_once)
        z = standardised(states[chunk])
        total = z.mT @ z
        for number in range(folds.count):
            learnt, held = folds.split(number)
            filters = _filters(z, total, learnt, held, [target.rows(learnt) for target in targets], weight)
            for row, (target, u) in enumerate(zip(targets, filters)):
                read = (z @ u).double()
                losses[row, chunk, held] = reading_losses(
                    target.rows(learnt), target.rows(held), read[:, learnt], read[:, held]
                )
    bases, constant = torch.zeros(2, len(targets), n, dtype=torch.float64)
    for number in range(folds.count):
        learnt, held = folds.split(number)
        for row, target in enumerate(targets):
            bases[row, held] = target.rows(held).base(target.rows(learnt))
            constant[row, held] = target.rows(held).constant_losses(target.rows(learnt))
    return HeldOut(losses, bases, constant, weight)


def read_by_rank(
    states: Float[Tensor, "n d"], target: Target, folds: Folds, ranks: Sequence[int], shrinkage: float
) -> Float[Tensor, "r n"]:
    """Losses of held-out rows when the first so many filters alone are read."""
    z = standardised(states.unsqueeze(0))
    total = z.mT @ z
    losses = torch.zeros(len(ranks), len(target), dtype=torch.float64)
    for number in range(folds.count):
        learnt, held = folds.split(number)
        own = target.rows(learnt)
        read = (z @ _filters(z, total, learnt, held, [own], shrinkage)[0]).double()
        for row, rank in enumerate(ranks):
            losses[row, held] = reading_losses(
                own, target.rows(held), read[:, learnt, :rank], read[:, held, :rank]
            ).squeeze(0)
    return losses


def filters_and_patterns(
    states: Float[Tensor, "n d"], target: Target, shrinkage: float
) -> tuple[Float[Tensor, "d r"], Float[Tensor, "d r"]]:
    """What reads a target in states as they are, and how states differ with it; most telling filters first."""
    x = states.double()
    centred = x - x.mean(0)
    scale = _scale(centred)
    z = (centred / scale).unsqueeze(0)
    y = target.columns()
    y = y - y.mean(0)
    rows, back = z, None
    if x.shape[1] > len(x):
        rows, back = _in_row_space(z)
    gram = rows.mT @ rows / len(x)
    filters = _solved(gram, rows.mT @ y / len(x), shrinkage, [y.shape[1]], [target.rank])[0][0]
    if back is not None:
        filters = back[0] @ filters
    left, _, _ = torch.linalg.svd(centred.mT @ y / len(x), full_matrices=False)
    return filters / scale.unsqueeze(1), left[:, : target.rank]


def standardised(states: Float[Tensor, "l n d"]) -> Float[Tensor, "l n r"]:
    """Columns of mean 0 and variance 1 in single precision; where there are fewer rows, in coordinates of their span.

    The solutions of ridge regressions lie in that span, so nothing that is read changes.
    """
    centred = states.double() - states.double().mean(1, keepdim=True)
    z = (centred / _scale(centred)).float()
    return z if z.shape[2] <= z.shape[1] else _in_row_space(z)[0]


def reading_losses(
    learnt: Target, held: Target, seen: Float[Tensor, "l n k"], unseen: Float[Tensor, "l t k"]
) -> Float[Tensor, "l t"]:
    """Of each row held out, by layer, whether its class is told wrongly, or the squared error of its number."""
    n, k = seen.shape[1:]
    eye = torch.eye(k, dtype=seen.dtype)
    if not learnt.names:
        mean, middle = seen.mean(1, keepdim=True), learnt.values.mean()
        moved = seen - mean
        gram = moved.mT @ moved / n
        weights = torch.linalg.solve(_regular(gram, eye), moved.mT @ (learnt.values - middle).unsqueeze(1) / n)
        return ((unseen - mean) @ weights).squeeze(2).add(middle).sub(held.values).square()
    each = torch.nn.functional.one_hot(learnt.values, len(learnt.names)).to(seen)
    counts = each.sum(0)
    means = (each.mT @ seen) / counts.clamp_min(1).unsqueeze(1)
    inside = seen - means[:, learnt.values]
    within = inside.mT @ inside / max(1, n - len(learnt.names))
    directions = torch.linalg.solve(_regular(within, eye), means.mT)
    offsets = counts.log() - (means.mT * directions).sum(1) / 2
    return ((unseen @ directions + offsets.unsqueeze(1)).argmax(2) != held.values).double()


def _regular(gram: Float[Tensor, "l k k"], eye: Float[Tensor, "k k"]) -> Float[Tensor, "l k k"]:
    """Made invertible by a millionth of its mean."""
    size = gram.diagonal(dim1=1, dim2=2).mean(1)
    return gram + (1e-6 * size + 1e-12).view(-1, 1, 1) * eye


def _scale(centred: Float[Tensor, "*l n d"]) -> Tensor:
    size = centred.square().mean(-2, keepdim=centred.ndim == 3).sqrt()
    return torch.where(size > 0, size, 1)


def _in_row_space(z: Float[Tensor, "l n d"]) -> tuple[Float[Tensor, "l n n"], Float[Tensor, "l d n"]]:
    """Rows in orthonormal coordinates of their span, and its basis."""
    u, s, vh = torch.linalg.svd(z, full_matrices=False)
    return u * s.unsqueeze(1), vh.mT


def _filters(
    z: Float[Tensor, "l n d"],
    total: Float[Tensor, "l d d"],
    learnt: Tensor,
    held: Tensor,
    targets: Sequence[Target],
    shrinkage: float,
) -> list[Tensor]:
    """By target the filters (l, d, r) learnt from some rows; `total` is the Gram matrix of all."""
    count = len(learnt)
    left_out, seen = z[:, held], z[:, learnt]
    mean = seen.mean(1)
    # The held-out rows are fewer, so their Gram matrix is what is computed anew.
    gram = (total - left_out.mT @ left_out) / count - mean.unsqueeze(2) * mean.unsqueeze(1)
    columns = [target.columns() for target in targets]
    y = torch.cat([each - each.mean(0) for each in columns], 1).to(z)
    widths, ranks = [each.shape[1] for each in columns], [target.rank for target in targets]
    return _solved(gram, seen.mT @ y / count, shrinkage, widths, ranks)


def _solved(
    gram: Float[Tensor, "l d d"],
    cross: Float[Tensor, "l d m"],
    shrinkage: float,
    widths: Sequence[int],
    ranks: Sequence[int],
) -> list[Tensor]:
    """Filters of each target, in the order of how much of it they tell."""
    eye = torch.eye(gram.shape[1], dtype=gram.dtype)
    solved = torch.cholesky_solve(cross, torch.linalg.cholesky((1 - shrinkage) * gram + shrinkage * eye))
    found = []
    for u, own, rank in zip(solved.split(list(widths), 2), cross.split(list(widths), 2), ranks):
        explained = own.mT @ u
        turn = torch.linalg.eigh((explained + explained.mT) / 2)[1].flip(-1)
        found.append(u @ turn[:, :, :rank])
    return found
