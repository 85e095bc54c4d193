"""EigenShield: keep the spiked directions of a representation that perturbations leave alone, drop the rest.

Spikes are the covariance eigenvectors above the Marchenko-Pastur edge; each gets a robustness-based nonconformity score
from clean and perturbed rows; a conformal quantile of the scores decides which stay; the filter is the affine projector
onto those, applied where the encoder ends and with no weight changed. Source: Darabi et al. (2025), arXiv 2502.14976,
who call the kept span the causal subspace. Their abstract gives the steps; the formulas of the score and the affine
form of the filter are this library's own, and the score is pluggable.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from subspan.models import intervene, iterate_representations, layer_names
from subspan.models.capture import Pool, device_of
from subspan.models.layers import Layers
from subspan.models.layout import Layout

from .spikes import UNNAMED, RobustSpikes, SpikeFilter


class EigenShield:
    """Filters at one or more layers of a frozen model, found from calibration data and put in by hooks.

    The filters act inside a with-block: `shield.calibrate(batches, attack)`, then `with shield: model(images)`.

    Parameters
    ----------
    model
        Any torch module; no weight is changed.
    layers
        As in `subspan.models.layer_names`; each gets its own filter.
    item, layout
        Where the states are in a tuple output, and how a map of four axes is laid out ("auto": channels first).
    pool
        What the statistics are made from: "rows" = every selected token or position, or "mean" over them.
    mask
        Which tokens are selected at calibration (see `iterate_representations`); at inference all are filtered.
    **options
        Of `RobustSpikes`.

    References
    ----------
    Darabi et al. (2025), arXiv 2502.14976.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import EigenShield
    >>> model = torch.nn.Sequential(torch.nn.Identity())
    >>> spread = torch.tensor([9.0, 5.0] + [1.0] * 8)  # two directions stand out, of which an attack hits the second
    >>> x = spread * torch.randn(400, 10, generator=torch.Generator().manual_seed(0))
    >>> attack = lambda batch: batch + torch.tensor([0.0, 9.0] + [0.0] * 8)
    >>> shield = EigenShield(model, "0", threshold=1.0).calibrate([x], attack)
    >>> with shield:
    ...     moved = model(attack(x)) - model(x)
    >>> bool(moved.abs().max() < 0.5)
    True
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers,
        *,
        item: int = 0,
        layout: Layout = "auto",
        pool: Pool = "rows",
        mask: str | Callable[[Any], Tensor] | None = "attention_mask",
        **options: Any,
    ) -> None:
        self.model = model
        self.names = layer_names(model, layers)
        self.item = item
        self.layout: Layout = layout
        self.pool: Pool = pool
        self.mask = mask
        self.options = options
        self.spikes: dict[str, RobustSpikes] = {}
        self._installed: contextlib.ExitStack | None = None

    def calibrate(
        self,
        batches: Iterable[Any],
        attack: Callable[[Any], Any] | Mapping[str, Callable[[Any], Any]] | None = None,
        *,
        spectrum: Iterable[Any] = (),
        progress: bool = False,
    ) -> EigenShield:
        """Find the filters from clean batches and what `attack(batch)` makes of them (same samples, same order).

        attack: one function or several by name (their scores are averaged or maximised, see `RobustSpikes`); None where
        the score needs no perturbed rows.
        spectrum: further clean batches; given, they alone estimate the spectrum and `batches` only scores the spikes,
        so that the two do not share rows. A batch is what `iterate_representations` takes. Returns self.
        """
        if self._installed is not None:
            raise RuntimeError("calibrate: the shield is installed; calibrate it outside its with-block")
        attacks = dict(attack) if isinstance(attack, Mapping) else {UNNAMED: attack} if attack is not None else {}
        found = {name: RobustSpikes(**self.options) for name in self.names}
        for estimator in found.values():
            estimator._reset()
        for batch in self._track(spectrum, "spectrum", progress):
            self._take(found, self._states(batch), {})
        for batch in self._track(batches, "calibration", progress):
            clean = self._states(batch)
            self._take(found, clean, {kind: self._states(function(batch)) for kind, function in attacks.items()})
        self.spikes = {name: estimator._solve() for name, estimator in found.items()}
        return self

    def _take(
        self, found: dict[str, RobustSpikes], clean: dict[str, Tensor], perturbed: dict[str, dict[str, Tensor]]
    ) -> None:
        for name, estimator in found.items():
            y = {kind: states[name] for kind, states in perturbed.items()}
            estimator._accumulate(clean[name], y or None, reset=not hasattr(estimator, "n_features_in_"))

    def _states(self, batch: Any) -> dict[str, Tensor]:
        """Rows (n, d) by layer."""
        return next(
            iterate_representations(
                self.model,
                [batch],
                self.names,
                item=self.item,
                pool=self.pool,
                mask=self.mask,
                layout=self.layout,
                dtype=None,
            )
        )

    def _track(self, batches: Iterable[Any], what: str, progress: bool) -> Iterable[Any]:
        console = Console(stderr=True)
        shown = progress and console.is_terminal
        return track(batches, what, console=console, transient=True, disable=not shown)

    def __enter__(self) -> EigenShield:
        if not self.spikes:
            raise RuntimeError("the shield has no filters yet; call calibrate first")
        if self._installed is not None:
            raise RuntimeError("the shield is installed already")
        filters = {name: self.to_module(name).to(device_of(self.model)) for name in self.names}
        with contextlib.ExitStack() as stack:
            stack.enter_context(intervene(self.model, filters, item=self.item, layout=self.layout))
            self._installed = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._installed is not None
        self._installed.close()
        self._installed = None

    def to_module(self, layer: str | None = None, *, dtype: torch.dtype = torch.float32) -> SpikeFilter:
        """An independent copy of one layer's filter, to be placed in a model or exported; buffers in `dtype`."""
        if not self.spikes:
            raise RuntimeError("the shield has no filters yet; call calibrate first")
        if layer is None and len(self.names) > 1:
            raise ValueError(f"layer: one of {', '.join(self.names)} is needed")
        name = self.names[0] if layer is None else layer
        if name not in self.spikes:
            raise ValueError(f"layer: one of {', '.join(self.names)} is needed, got {name!r}")
        found = self.spikes[name].filter_
        return SpikeFilter(
            found.basis.to(dtype),
            found.center.to(dtype),
            removes=found.removes,
            strength=found.strength,
            keep_norm=found.keep_norm,
        )

    def report(self) -> dict[str, dict[str, Any]]:
        """The spectrum report of each layer (see `RobustSpikes.spectrum_report`)."""
        return {name: estimator.spectrum_report() for name, estimator in self.spikes.items()}
