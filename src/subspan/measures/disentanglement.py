"""Whether the coordinates of a representation and the factors behind the data match one to one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from sklearn.ensemble import RandomForestRegressor
from sklearn.utils import check_random_state

from subspan.base import check_matrix
from subspan.geometry import Blocks

from .probes import ProbeScore, probe_score

Data = tuple[Any, Mapping[str, Any]]
"""Latents (n, d) and, by name, the value of each factor in each row (n,), as whole numbers."""


class DCI(NamedTuple):
    """Disentanglement, completeness and informativeness; see `dci_score`.

    Attributes
    ----------
    disentanglement, completeness, informativeness
        In [0, 1].
    importance
        (d, k) of each latent for each factor.
    """

    disentanglement: float
    completeness: float
    informativeness: float
    importance: Float[np.ndarray, "d k"]


def _checked(data: Data, name: str, *, least: int = 2) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    rows = check_matrix(data[0], name).double().cpu().numpy()
    factors = {key: np.asarray(value.cpu() if hasattr(value, "cpu") else value) for key, value in data[1].items()}
    for key, values in factors.items():
        if values.shape != (len(rows),) or values.dtype.kind not in "iub":
            raise ValueError(f"{name}: factor {key!r} must be {len(rows)} whole numbers, got {values.dtype}")
    if len(factors) < least:
        raise ValueError(f"{name}: expected at least {least} factors, got {len(factors)}")
    return rows, factors


def dci_score(fit: Data, test: Data, *, n_estimators: int = 20, max_depth: int = 20, random_state: Any = 0) -> DCI:
    """Disentanglement, completeness and informativeness by random forests that predict each factor from all latents.

    With R the importances (latents, factors): disentanglement is 1 - H(factor | latent) / log(factors), completeness
    1 - H(latent | factor) / log(latents), each weighted by importance; informativeness is the mean R^2 on `test`, not
    below 0. A latent block of more than one dimension for a factor is not complete by construction.

    Parameters
    ----------
    fit, test
        Latents (n, d) with d >= 2, and the factors by name, (n,) whole numbers each; at least 2 factors.
    n_estimators, max_depth
        Trees of each forest, and their depth at most.
    random_state
        Seed of the forests; None: another each time.

    Returns
    -------
    DCI.

    Raises
    ------
    ValueError
        For factors that are no whole numbers, a `test` that does not fit, or latents that tell nothing of any factor.

    References
    ----------
    Eastwood & Williams (2018), A framework for the quantitative evaluation of disentangled representations.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.measures import dci_score
    >>> codes = np.random.default_rng(0).integers(4, size=(200, 2))
    >>> data = (codes.astype(float), {"shape": codes[:, 0], "colour": codes[:, 1]})  # one latent a factor
    >>> found = dci_score(data, data, n_estimators=5)
    >>> found.disentanglement > 0.9, found.importance.argmax(0).tolist()
    (True, [0, 1])
    """
    (rows, factors), (held_rows, held) = _checked(fit, "fit"), _checked(test, "test")
    if set(factors) != set(held) or rows.shape[1] != held_rows.shape[1] or rows.shape[1] < 2:
        raise ValueError(f"test: must have the factors and the {rows.shape[1]} >= 2 latents of fit")
    mean, scale = rows.mean(0), rows.std(0)
    scale[scale == 0] = 1
    importance, informed = np.zeros((rows.shape[1], len(factors))), []
    for k, (name, values) in enumerate(factors.items()):
        forest = RandomForestRegressor(n_estimators, max_depth=max_depth, random_state=random_state)
        forest.fit((rows - mean) / scale, values)
        importance[:, k] = forest.feature_importances_
        informed.append(max(0.0, forest.score((held_rows - mean) / scale, held[name])))
    total = importance.sum()
    if not total > 0:
        raise ValueError("fit: no latent tells anything of any factor, so the scores are not defined")
    by_latent, by_factor = importance.sum(1), importance.sum(0)
    disentangled = 1 - _entropies(importance) / np.log(len(factors))
    complete = 1 - _entropies(importance.T) / np.log(rows.shape[1])
    return DCI(
        float(disentangled @ by_latent / total),
        float(complete @ by_factor / total),
        float(np.mean(informed)),
        importance,
    )


def _entropies(weights: Float[np.ndarray, "n k"]) -> Float[np.ndarray, " n"]:
    share = weights / np.maximum(weights.sum(1, keepdims=True), np.finfo(float).tiny)
    return -(share * np.log(np.where(share > 0, share, 1))).sum(1)


def factor_vae_score(
    fit: Data,
    test: Data,
    *,
    chosen: Sequence[str] | None = None,
    n_votes: int = 2000,
    batch_size: int = 64,
    random_state: Any = 0,
) -> float:
    """Share of votes in which the latent that varies least tells which factor was held fixed; 1 is disentangled.

    A vote takes `batch_size` rows that share a value of one factor and finds the latent of least variance relative to
    its own over all rows. Each latent stands for the factor it voted for most on `fit`; the score is taken on `test`.
    Latents that do not vary have no vote.

    Parameters
    ----------
    fit, test
        Latents (n, d), and the factors by name, (n,) whole numbers each; at least 2 factors.
    chosen
        Factors that are told apart; all others count as one, as where a representation keeps them together. Default:
        every factor.
    n_votes
        Votes on each of the two; the authors take 10 000.
    batch_size
        Rows of a vote.
    random_state
        Seed of the votes; None: another each time.

    Returns
    -------
    Score in [0, 1].

    Raises
    ------
    ValueError
        For factors that are no whole numbers or that no two rows share a value of, chosen ones that there are not, a
        `test` that does not fit, or latents that do not vary.

    References
    ----------
    Kim & Mnih (2018), arXiv 1802.05983. Chosen factors as in XFactors, arXiv 2601.21688.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.measures import factor_vae_score
    >>> codes = np.random.default_rng(0).integers(4, size=(200, 2))
    >>> data = (codes.astype(float), {"shape": codes[:, 0], "colour": codes[:, 1]})  # one latent a factor
    >>> factor_vae_score(data, data, n_votes=100)
    1.0
    """
    random = check_random_state(random_state)
    (rows, factors), (held_rows, held) = _checked(fit, "fit"), _checked(test, "test")
    if list(factors) != list(held) or rows.shape[1] != held_rows.shape[1]:
        raise ValueError(f"test: must have the factors and the {rows.shape[1]} latents of fit, in their order")
    if missing := set(chosen or ()) - set(factors):
        raise ValueError(f"chosen: there are no factors {sorted(missing)}; there are {list(factors)}")
    apart = list(factors) if chosen is None else list(chosen)
    # The number of a factor among those told apart; one more for all others.
    kinds = [apart.index(name) if name in apart else len(apart) for name in factors]
    spread = rows.var(0)
    alive = spread > 1e-12 * max(spread.max(), np.finfo(float).tiny)
    if not alive.any():
        raise ValueError("fit: no latent varies")
    table = np.zeros((rows.shape[1], len(apart) + 1))
    for latent, factor in _votes(rows, factors, spread, alive, n_votes, batch_size, random):
        table[latent, kinds[factor]] += 1
    stands_for = table.argmax(1)
    votes = _votes(held_rows, held, spread, alive, n_votes, batch_size, random)
    return float(np.mean([stands_for[latent] == kinds[factor] for latent, factor in votes]))


def _members(name: str, values: np.ndarray) -> list[np.ndarray]:
    """Rows of each value that more than one row has."""
    groups = [np.flatnonzero(values == value) for value in np.unique(values)]
    shared = [rows for rows in groups if len(rows) > 1]
    if not shared:
        raise ValueError(f"factors: no two rows share a value of {name!r}")
    return shared


def _votes(
    rows: np.ndarray,
    factors: Mapping[str, np.ndarray],
    spread: np.ndarray,
    alive: np.ndarray,
    n_votes: int,
    batch_size: int,
    random: np.random.RandomState,
) -> list[tuple[int, int]]:
    members = [_members(name, values) for name, values in factors.items()]
    found = []
    for _ in range(n_votes):
        factor = random.randint(len(members))
        same = members[factor][random.randint(len(members[factor]))]
        ratio = rows[same[random.randint(len(same), size=batch_size)]].var(0) / np.where(alive, spread, 1)
        found.append((int(np.where(alive, ratio, np.inf).argmin()), int(factor)))
    return found


def block_leakage(
    fit: Data, test: Data, blocks: Blocks, *, kind: str = "logistic", **options: Any
) -> dict[str, dict[str, ProbeScore]]:
    """What each block of a representation, and its length alone, tell of each factor: probes scored on rows held out.

    A loss on directions leaves the length of a block free, so that other factors may hide there. The length is read by
    its 10 nearest neighbours, whatever the kind.

    Parameters
    ----------
    fit, test
        Latents (n, d), and the factors by name, (n,) whole numbers each.
    blocks
        The named blocks of the d coordinates.
    kind, options
        Of the probe of a whole block, see `make_probe`.

    Returns
    -------
    `ProbeScore` by the name of a block, or that name between bars for its length, then by that of the factor.

    Raises
    ------
    ValueError
        For factors that are no whole numbers or do not vary, and a `test` or blocks that do not fit.

    References
    ----------
    XFactors, arXiv 2601.21688, whose contrast sees directions; the measure is ours.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.geometry import Blocks
    >>> from subspan.measures import block_leakage
    >>> rows = np.random.default_rng(0).standard_normal((400, 4))
    >>> far = {"far": (np.hypot(rows[:, 2], rows[:, 3]) > 1).astype(int)}
    >>> found = block_leakage((rows, far), (rows, far), Blocks({"rest": 2, "hue": 2}))
    >>> found["|hue|"]["far"].score > 0.9, found["hue"]["far"].score < 0.75
    (True, True)
    """
    (rows, factors), (held_rows, held) = _checked(fit, "fit", least=1), _checked(test, "test", least=1)
    if set(factors) != set(held):
        raise ValueError(f"test: must have the factors of fit, {', '.join(map(repr, factors))}")
    found: dict[str, dict[str, ProbeScore]] = {}
    for name, size in blocks.sizes.items():
        if not size:
            continue
        part, held_part = (blocks.coordinates(x, name) for x in (rows, held_rows))
        length, held_length = (np.linalg.norm(x, axis=1, keepdims=True) for x in (part, held_part))
        near: dict[str, Any] = {"kind": "knn", "metric": "euclidean"}
        found[name], found[f"|{name}|"] = {}, {}
        for factor, values in factors.items():
            found[name][factor] = probe_score(part, values, kind=kind, test=(held_part, held[factor]), **options)
            found[f"|{name}|"][factor] = probe_score(length, values, test=(held_length, held[factor]), **near)
    return found
