"""Where in a model varieties can be told apart, what that costs in bits, and how far they lie from a dominant one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from subspan.base import Progress
from subspan.models import find_blocks, iterate_representations, layer_names, pool_states
from subspan.models.capture import select_tokens, split_mask

from .variational_probe import VariationalProbe, dominant_subspace


@dataclass(frozen=True)
class VarietyReading:
    """What one layer's states say of one variety against all others.

    Attributes
    ----------
    layer, variety
        Which.
    accuracy, chance
        Of a probe on rows that it was not fitted to, and of the commoner answer there; with
        settings={"class_weight": "balanced"} the mean over both answers, and 0.5.
    compression
        Bits of the labels alone over bits by the probe (`VariationalProbe.compression_`): above that of the control
        the layer says something.
    compression_shuffled
        The same where the labels are put in a random order: the control.
    angle
        Degrees from the probe's direction to that of the dominant variety's probe, 0 to 90; None for the dominant one
        itself, and where there are two varieties, whose probes are one.
    angle_shuffled
        The same of probes of shuffled labels: what directions that mean nothing have.
    """

    layer: str
    variety: Any
    accuracy: float
    chance: float
    compression: float
    compression_shuffled: float
    angle: float | None
    angle_shuffled: float | None


def pooled_rows(
    states: Float[Tensor, "b t d"] | Float[Tensor, "b d"],
    mask: Tensor | None,
    pool: Literal["rows", "mean"],
    drop_tokens: int = 0,
) -> tuple[Float[Tensor, "n d"], np.ndarray]:
    """Rows for a probe, every token or the mean of a sample's, and the sample of each row."""
    if pool == "rows" and states.ndim == 3:
        kept = select_tokens(states, mask, drop_tokens)
        return states[kept], torch.nonzero(kept)[:, 0].cpu().numpy()
    return pool_states(states, mask, pool="mean", drop_tokens=drop_tokens), np.arange(len(states))


def variety_report(
    model: nn.Module,
    batches: Iterable[Any],
    labels: Sequence[Any] | np.ndarray,
    dominant: Any,
    *,
    layers: Any = None,
    pool: Literal["rows", "mean"] = "rows",
    drop_tokens: int = 0,
    settings: Mapping[str, Any] | None = None,
    random_state: int = 0,
    progress: Progress | None = None,
) -> list[VarietyReading]:
    """The diagnosis before a remedy: layer by layer, how easily each variety is told from the others, and its angles.

    Parameters
    ----------
    model
        Any torch or transformers model.
    batches
        Texts of all varieties, read once.
    labels
        Of each sample, in order, the variety.
    dominant
        One of them.
    layers
        As in `models.layer_names`; None: every block.
    pool
        "rows": every token, its sample's label; "mean": a row a sample, of which a probe of many dimensions needs many.
    drop_tokens
        The first so many tokens of each sample are left out: language models have huge states at the first.
    settings
        Of `VariationalProbe`.
    random_state
        Seed of the probes, of what they are tested on and of the shuffled labels.
    progress
        Called with what is done and the share of it.

    Returns
    -------
    list of VarietyReading, layer by layer, the dominant variety first.

    Raises
    ------
    ValueError
        For labels without the dominant one, with it alone, or of another number than the samples.

    References
    ----------
    When Alignment Hurts (2025), arXiv 2508.12803; Müller-Eberstein et al. (2023), arXiv 2310.16484. Control labels
    after Hewitt & Liang (2019), arXiv 1909.03368.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import variety_report
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())
    >>> x, labels = torch.randn(200, 4), ["old"] * 100 + ["new"] * 100
    >>> x[100:, 0] += 4
    >>> settings = {"epochs": 40, "learning_rate": 0.05}
    >>> first, _ = variety_report(model, [x], labels, "old", layers="0", settings=settings)
    >>> first.variety, first.accuracy > 0.8, first.compression > first.compression_shuffled
    ('old', True, True)
    """
    named = np.asarray(labels)
    found = sorted(set(named.tolist()), key=lambda label: (label != dominant, str(label)))
    if dominant not in found or len(found) < 2:
        raise ValueError(f"labels: {dominant!r} and at least one other are needed, got {found}")
    names = layer_names(model, f"{find_blocks(model)}.*" if layers is None else layers)
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    owners: list[np.ndarray] = []
    place = 0
    for batch in batches:
        mask = split_mask(batch, "attention_mask")[1]
        for states in iterate_representations(model, [batch], names, pool="none"):
            for name in names:
                kept, owner = pooled_rows(states[name], mask, pool, drop_tokens)
                rows[name].append(kept.float().cpu())
            owners.append(np.asarray(owner + place))
            place += len(states[names[0]])
    if place != len(named):
        raise ValueError(f"labels: {len(named)} for {place} samples; one a sample is needed")
    given = named[np.concatenate(owners)]
    readings: list[VarietyReading] = []
    for done, name in enumerate(names):
        if progress is not None:
            progress(f"varieties in {name}", done / len(names))
        readings += _layer(name, torch.cat(rows[name]), given, found, dict(settings or {}), random_state)
    return readings


def _layer(
    name: str, rows: Float[Tensor, "n d"], labels: np.ndarray, varieties: list[Any], settings: dict[str, Any], seed: int
) -> list[VarietyReading]:
    """Readings of one layer; varieties: the dominant one first."""
    draws = np.random.default_rng(seed)
    order, shuffled = draws.permutation(len(rows)), draws.permutation(labels)
    held, fitted = order[: len(rows) // 4], order[len(rows) // 4 :]
    several = len(varieties) > 2
    readings: list[VarietyReading] = []
    first: tuple[Any, Any] | None = None
    for place, variety in enumerate(varieties):
        mine, control = labels == variety, shuffled == variety
        probe, random = (
            # Each its own start: two probes that start alike would lie near each other.
            VariationalProbe(**{"random_state": seed + 2 * place + other, **settings}).fit(rows[fitted], which[fitted])
            for other, which in enumerate((mine, control))
        )
        spaces = dominant_subspace(probe, True), dominant_subspace(random, True)
        angles: tuple[float | None, float | None] = (None, None)
        if first is not None and several:
            real, drawn = (float(torch.rad2deg(a.angles(b)).mean()) for a, b in zip(spaces, first))
            angles = real, drawn
        first = spaces if first is None else first
        readings.append(
            VarietyReading(
                name,
                variety,
                probe.score(rows[held], mine[held]),
                probe.chance(mine[held])[0],
                probe.compression_,
                random.compression_,
                *angles,
            )
        )
    return readings
