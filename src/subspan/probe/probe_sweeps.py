"""How much of a syntax tree is read by rank, beside controls, and by the subspace of another language or model part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import Tensor

from subspan.base import Progress, silent
from subspan.geometry import Subspace

from .ast_probe import ASTProbe
from .syntax_trees import SyntaxTree, permuted_trees
from .tree_states import TokenStates

Snippets = tuple[TokenStates | Sequence[Tensor], Sequence[SyntaxTree]]
"""States and the trees of the same snippets."""


class RankScore(NamedTuple):
    """Mean F1 of a rank on snippets not learnt from, and of its controls; see `rank_sweep`.

    Attributes
    ----------
    rank
        Dimensions.
    f1
        Of the subspace that was found.
    random
        Of labels read from a random subspace.
    permuted
        Of a probe that learnt from trees whose heights and labels were put in another order.
    """

    rank: int
    f1: float
    random: float
    permuted: float


def rank_sweep(
    probe: ASTProbe,
    training: Snippets,
    validation: Snippets,
    test: Snippets,
    ranks: Iterable[int],
    *,
    progress: Progress = silent,
) -> list[RankScore]:
    """F1 by the number of dimensions, beside a random subspace and beside trees in another order.

    Parameters
    ----------
    probe
        Whose parameters are taken, but for the rank; it need not be fitted, and is left as it is.
    training, validation, test
        States, of one layer or several, of which the best in the validation part counts; and trees.
    ranks
        Dimensions.
    progress
        Is told each rank.

    Returns
    -------
    list of RankScore

    Raises
    ------
    ValueError
        As `ASTProbe.fit`.

    Examples
    --------
    >>> import torch
    >>> from subspan.probe import ASTProbe, code_trees, rank_sweep
    >>> trees = code_trees([f"{a} = {b}({c})" for a in "abcd" for b in "efgh" for c in "ijkl"], parser="ast").trees
    >>> data = [torch.nn.functional.one_hot(torch.arange(6), 8).float() for _ in trees], trees
    >>> probe = ASTProbe(learning_rate=0.02, random_state=0)
    >>> found = rank_sweep(probe, data, data, data, [1, 4])
    >>> [score.f1 for score in found][1], found[1].permuted < 0.9
    (1.0, True)
    """
    wanted, found = list(ranks), []
    width = next(iter(training[0])).shape[-1]
    for place, rank in enumerate(wanted):
        progress(f"rank {rank}", place / len(wanted))
        random = check_random_state(probe.random_state)
        generator = torch.Generator().manual_seed(int(random.randint(2**31)))
        orders = np.random.default_rng(int(random.randint(2**31)))
        own = replace(probe, rank=rank, subspace=None)
        drawn = replace(own, subspace=Subspace.random(width, rank, generator=generator, dtype=torch.float32))
        scores = [each.fit(*training, validation).score(*test) for each in (own, drawn)]
        shuffled = [(states, permuted_trees(trees, orders)) for states, trees in (training, validation)]
        scores.append(replace(own).fit(*shuffled[0], shuffled[1]).score(*test))
        found.append(RankScore(rank, *scores))
    return found


def transfer(probe: ASTProbe, training: Snippets, validation: Snippets | None = None) -> ASTProbe:
    """A probe that reads other trees from the subspace of a fitted one: only its labels are learnt.

    Parameters
    ----------
    probe
        A fitted one; its subspace and parameters are taken.
    training, validation
        States and trees of the other kind, such as another language. Of `TokenStates` of several layers the probe's
        best one is taken.

    Returns
    -------
    ASTProbe, fitted.

    Raises
    ------
    ValueError
        For a probe that is not fitted, and as `ASTProbe.fit`.

    References
    ----------
    Hernández López et al. (ASE 2022), their direct transfer between languages.

    Examples
    --------
    >>> import torch
    >>> from subspan.probe import ASTProbe, code_trees, transfer
    >>> def data(sources):
    ...     trees = code_trees(sources, parser="ast").trees
    ...     return [torch.nn.functional.one_hot(torch.arange(6), 8).float() for _ in trees], trees
    >>> first = data([f"{a} = {b}({c})" for a in "abcd" for b in "efgh" for c in "ijkl"])
    >>> probe = ASTProbe(rank=4, learning_rate=0.02, random_state=0).fit(*first)
    >>> other = transfer(probe, data([f"{a} = {b}[{c}]" for a in "abcd" for b in "efgh" for c in "ijkl"]))
    >>> float(other.subspace_.angles(probe.subspace_).max()) < 1e-3
    True
    """
    if not hasattr(probe, "subspace_"):
        raise ValueError("probe: it has learnt nothing yet; call its fit first")

    def same_layer(part: Snippets) -> Snippets:
        states, trees = part
        if isinstance(states, TokenStates) and len(states.layers) > 1:
            return states.layer(probe.layer_), trees
        return part

    held = None if validation is None else same_layer(validation)
    return replace(probe, subspace=probe.subspace_).fit(*same_layer(training), held)
