"""Fine-tuning that keeps hidden states out of what tells a dominant variety from the others (arXiv 2508.12803)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from subspan.base.parameters import Count, Positive, check_parameters
from subspan.geometry import Subspace
from subspan.models import iterate_representations, layer_names
from subspan.models.capture import split_mask
from subspan.models.checkpointing import is_detached, is_recomputing
from subspan.models.layers import first_tensor
from subspan.nn import ProjectionPenalty

from .variational_probe import VariationalProbe, dominant_subspace
from .variety_report import pooled_rows


@dataclass(frozen=True)
class Refresh:
    """What one estimate of the subspace found.

    Attributes
    ----------
    step
        Optimizer steps taken before it.
    accuracy, chance
        Of the probe on rows that it was not fitted to, and of the commonest label there; with balanced classes means
        over classes.
    accuracy_before
        Of the probe before on the same rows, None for the first: where it is at chance and the new one is not, the
        varieties have moved into other directions.
    bits
        Compression of the labels by the probe: above 1 it says something.
    angle
        Mean principal angle (radians) to the subspace before, None for the first.
    active
        False where the probe was at chance: there is no subspace then, and no penalty.
    """

    step: int
    accuracy: float
    chance: float
    accuracy_before: float | None
    bits: float
    angle: float | None
    active: bool


@dataclass(eq=False, repr=False)
class SubspaceDecoupling:
    """A penalty on the part of a layer's states in the dominant variety's subspace, estimated again as states drift.

    Inside the context the layer's states of each forward pass are seen, and `penalty()` is to be added to the loss:
    weight · mean over tokens of |h U| (over |h|, which does not count for the gradient, where `relative`). Every
    `every` optimizer steps a probe is fitted to states of `batches`, and U becomes what tells the dominant variety from
    the others there. Each probe starts from the one before. Where it is at chance, there is nothing to penalise until
    the next look.

    Parameters
    ----------
    model
        Any torch or transformers model.
    layer
        As in `models.layer_names`; -1 the last block. The name of a model's body, such as "model", is its last
        normalised state.
    batches
        Batches for the probe, looked at in each estimate; a list, or another iterable that can be read again.
    labels
        Of each sample of `batches`, in order, the variety.
    dominant
        One of them.
    weight
        λ.
    every
        Optimizer steps between two estimates.
    kind
        "variety"; or a control: "random", a subspace of the same rank drawn anew; "fixed", the first estimate;
        "shrinkage", all directions, so that states become short.
    probe
        "multiclass": the span of the differences of the dominant class's weights; "ovr": one direction against all
        others together.
    relative
        Penalty relative to the length of the states; the published one is not.
    pool
        How a sample's tokens become rows of the probe: "rows", every token; or "mean".
    settings
        Of `VariationalProbe`; {"class_weight": "balanced"} where varieties have very different numbers of rows.
    random_state
        Seed of the control and of the split.

    Attributes
    ----------
    subspace_ : Subspace or None
        The one of now.
    history_ : list of Refresh

    Raises
    ------
    ValueError
        For labels without the dominant one, or with it alone; for values out of range.

    References
    ----------
    When Alignment Hurts (2025), arXiv 2508.12803. The published method penalises all varieties, as here.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import SubspaceDecoupling
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    >>> x, labels = torch.randn(200, 4), ["new"] * 100 + ["old"] * 100
    >>> x[100:] += 3
    >>> options = {"epochs": 10, "learning_rate": 0.02}
    >>> with SubspaceDecoupling(model, "0", [x], labels, "old", settings=options) as decoupling:
    ...     _ = model(x)
    ...     print(decoupling.subspace_.dim, bool(decoupling.penalty() > 0))
    1 True
    """

    # Values are checked where the context is entered: run-time type checkers leave the constructor alone.
    __no_type_check__ = True

    model: nn.Module
    layer: str | int
    batches: Iterable[Any]
    labels: Any
    dominant: Any
    weight: Positive = 0.01
    every: Count = 500
    kind: Literal["variety", "random", "fixed", "shrinkage"] = "variety"
    probe: Literal["multiclass", "ovr"] = "multiclass"
    relative: bool = True
    pool: Literal["rows", "mean"] = "rows"
    settings: dict[str, Any] = field(default_factory=dict)
    random_state: int = 0

    def __enter__(self) -> SubspaceDecoupling:
        check_parameters(self)
        self._labels = np.asarray(self.labels)
        found = set(self._labels.tolist())
        if self.dominant not in found or len(found) < 2:
            raise ValueError(
                f"labels: {self.dominant!r} and at least one other are needed, got {sorted(map(str, found))}"
            )
        self._penalty = ProjectionPenalty(power=1, relative=self.relative)
        self.history_: list[Refresh] = []
        self.subspace_: Subspace | None = None
        self._probe: VariationalProbe | None = None
        self._states: Tensor | None = None
        self._mask: Tensor | None = None
        self._looking = False
        (name,) = layer_names(self.model, self.layer)
        self._name = name
        self._hooks = [
            self.model.get_submodule(name).register_forward_hook(self._see),
            self.model.register_forward_pre_hook(self._see_mask, with_kwargs=True),
        ]
        try:
            self.refresh(0)
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()

    def penalty(self, counted: Shaped[Tensor, "*n"] | None = None) -> Float[Tensor, ""]:
        """λ times the penalty of the latest forward pass, with its gradient.

        counted: nonzero = this state counts, such as those of the other varieties alone; default: all but padding.
        """
        if self._states is None:
            raise ValueError(
                "penalty: no forward pass was seen; call the model inside the context first, and checkpoint "
                "activations with use_reentrant=False"
            )
        if counted is None and self._mask is not None and self._mask.shape == self._states.shape[:-1]:
            counted = self._mask
        return self.weight * self._penalty(self._states, counted)

    def step(self, step: int) -> None:
        """To be called after each optimizer step with the number taken: estimates again where it is time."""
        if step % self.every == 0 and self.kind != "fixed":
            self.refresh(step)

    def callback(self) -> Any:
        """A callback of transformers' Trainer that calls `step` after each optimizer step."""
        from subspan.base import require

        base = require("transformers", extra="llm").TrainerCallback
        decoupling = self

        class Decouple(base):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                decoupling.step(state.global_step)

        return Decouple()

    def trainer(self, base: type[Any]) -> type[Any]:
        """The class of a trainer with the penalty in its loss and the callback: transformers' Trainer or one like it.

        base: `transformers.Trainer`, `trl.SFTTrainer`, … The penalty counts once an optimizer step, however many
        batches are accumulated for it.
        """
        decoupling = self

        class Decoupled(base):
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **options)
                self.add_callback(decoupling.callback())

            def compute_loss(
                self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
            ) -> Any:
                loss, outputs = super().compute_loss(
                    model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
                )
                if model.training:
                    given = getattr(self, "loss_is_scaled_for_ga", None)
                    by_tokens = self.model_accepts_loss_kwargs and num_items_in_batch is not None
                    scaled = by_tokens or self.compute_loss_func is not None if given is None else given
                    # What the trainer does not divide by the number of batches is divided here.
                    loss = loss + decoupling.penalty() / (self.current_gradient_accumulation_steps if scaled else 1)
                return (loss, outputs) if return_outputs else loss

        return Decoupled

    def added_to(self, loss: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
        """A loss of `nn.Objective` with the penalty; `step` goes into its `after_step`."""

        def total(model: Any, batch: Any) -> Tensor:
            found = loss(model, batch)
            return found + self.penalty()

        return total

    def refresh(self, step: int) -> None:
        """Fit the probe to the states of now, and penalise its subspace from here on."""
        rows, labels = self._rows()
        if self.probe == "ovr":
            labels = labels == self.dominant
        order = np.random.default_rng(self.random_state).permutation(len(rows))
        held, fitted = order[: len(rows) // 4], order[len(rows) // 4 :]
        probe = VariationalProbe(**{"random_state": self.random_state, **self.settings}).fit(
            rows[fitted], labels[fitted], start=self._probe
        )
        accuracy, (chance, error) = probe.score(rows[held], labels[held]), probe.chance(labels[held])
        kept = None if self._probe is None else self._probe.score(rows[held], labels[held])
        active = accuracy > chance + 2 * error
        self._probe = probe
        before, self.subspace_ = self.subspace_, None
        if active:
            self.subspace_ = dominant_subspace(probe, True if self.probe == "ovr" else self.dominant)
            if self.kind == "random":
                generator = torch.Generator().manual_seed(self.random_state + step)
                self.subspace_ = Subspace.random(rows.shape[1], self.subspace_.dim, generator=generator)
            elif self.kind == "shrinkage":
                self.subspace_ = Subspace.span(torch.eye(rows.shape[1]))
        else:
            warnings.warn(
                f"step {step}: the probe is at chance ({accuracy:.2f}, commonest label {chance:.2f}); no penalty now",
                stacklevel=3,
            )
        self._penalty.set_subspace(self.subspace_)
        self._penalty.to(rows.device)
        both = before is not None and self.subspace_ is not None
        angle = float(self.subspace_.angles(before).mean()) if both else None  # pyright: ignore
        self.history_.append(Refresh(step, accuracy, chance, kept, probe.compression_, angle, active))

    # ------------------------------------------------------------------ states

    def _rows(self) -> tuple[Float[Tensor, "n d"], np.ndarray]:
        """States of the probe's batches, a row a token or a sample, and the variety of each."""
        rows, labels, place = [], [], 0
        self._looking = True
        try:
            for batch in self.batches:
                states = next(iter(iterate_representations(self.model, [batch], self._name, pool="none")))
                named = self._labels[place : place + len(states)]
                place += len(states)
                if place > len(self._labels):
                    break
                kept, owners = pooled_rows(states, split_mask(batch, "attention_mask")[1], self.pool)
                rows.append(kept)
                labels.append(named[owners])
        finally:
            self._looking = False
        if place != len(self._labels):
            raise ValueError(f"labels: {len(self._labels)} for other than so many samples; one a sample is needed")
        return torch.cat(rows).float(), np.concatenate(labels)

    def _see(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if not self._looking and not is_recomputing():
            self._states = None if is_detached() else first_tensor(output)

    def _see_mask(self, module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> None:
        if not self._looking:
            self._mask = keywords.get("attention_mask")

    def _leave(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._states = None
