"""Concrete subspace learning: fine-tuned models merged inside one learnt mask of parameters (arXiv 2312.06173)."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from subspan.base.parameters import Count, NonNegative, Positive, Whole, check_parameters
from subspan.geometry import CoordinateSubspace
from subspan.models import StateDelta
from subspan.nn import ConcreteGate

from .merged_module import MergedModule

_LEAST_MEAN = 1e-3
_COLLAPSED = 0.5


class ConcreteMasks(nn.Module):
    """One number in (0, 1) for each parameter of named tensors, drawn anew in every forward pass while training.

    All logits are one flat parameter, so that a draw is one call. Masks are divided by their mean, tensor by tensor:
    an update keeps its size whatever the share of it that stays.

    Parameters
    ----------
    shapes
        Name → shape of the tensor.
    temperature
        Of the relaxed Bernoulli variables, > 0: towards 0 they become 0 or 1.
    init_logit
        Where all logits start; 0 is a chance of one half.
    random_state
        Seed of the draws; None takes torch's own.

    Examples
    --------
    >>> from subspan.weights import ConcreteMasks
    >>> masks = ConcreteMasks({"w": (2, 3)}).eval()
    >>> masks()["w"].mean()
    tensor(1., grad_fn=<MeanBackward0>)
    """

    def __init__(
        self,
        shapes: Mapping[str, Any],
        temperature: float = 0.5,
        init_logit: float = 0.0,
        random_state: int | None = None,
    ) -> None:
        super().__init__()
        self.shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
        self.sizes = [math.prod(shape) for shape in self.shapes.values()]
        self.logits = nn.Parameter(torch.full((sum(self.sizes),), float(init_logit)))
        self.gate = ConcreteGate(temperature)
        self.generator = None if random_state is None else torch.Generator().manual_seed(random_state)

    def forward(self, discrete: bool = False) -> dict[str, Tensor]:
        """Name → mask of mean 1: drawn while training, expected in evaluation; or drawn as 0 and 1."""
        if discrete:
            drawn = torch.rand(self.logits.shape, generator=self.generator).to(self.logits)
            flat = (drawn < self.logits.sigmoid()).to(self.logits)
        else:
            flat = self.gate(self.logits, self.generator)
        return {name: part / part.mean().clamp(min=_LEAST_MEAN) for name, part in self._parts(flat)}

    def open_share(self) -> dict[str, float]:
        """Share of each tensor's parameters that are open with a chance above one half."""
        return {name: float((part > 0).float().mean()) for name, part in self._parts(self.logits)}

    def subspace(self, name: str) -> CoordinateSubspace:
        """The parameters of a tensor, flattened, that are open with a chance above one half."""
        return CoordinateSubspace.of((dict(self._parts(self.logits))[name].flatten() > 0).cpu())

    def _parts(self, flat: Float[Tensor, " n"]) -> Iterator[tuple[str, Tensor]]:
        for (name, shape), part in zip(self.shapes.items(), flat.split(self.sizes)):
            yield name, part.view(shape)

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"{len(self.sizes)} tensors, {sum(self.sizes):,} numbers"


@dataclass(eq=False, repr=False)
class ConcreteMerging:
    """Merge experts of one base on unlabelled data: coefficients and a shared mask that make the predictions certain.

    The loss is the entropy of each task's predictions, summed over the tasks. With "fixed" coefficients the mask alone
    is learnt. Else each step takes one step of the coefficients from their start under the mask of the step, then one
    of the mask (first order); at the end the mask is kept and the coefficients are learnt by themselves. Without a mask
    this is AdaMerging. Entropy is also least where all inputs get one answer: `fit` warns where the predictions of a
    task grow uniform, `diversity_weight` works against it, and `holdout` stops in time.

    Parameters
    ----------
    base_merge
        Coefficients: "task_arithmetic" (fixed), "task_wise", or "layer_wise" (one a task and tensor).
    learn_mask
        False is task-wise or layer-wise AdaMerging.
    scaling
        The coefficients, or where they start.
    temperature, init_logit
        Of the masks, see `ConcreteMasks`.
    mask_lr, inner_lr, tta_lr
        Adam's rates for the mask, for the one step of the coefficients, and for the coefficients at the end.
    steps, tta_steps
        Steps of the mask, and of the coefficients at the end.
    clamp
        Cut coefficients to [0, 1].
    eval_mask
        Of the merged model: "expected" (no draw: two runs agree), a "sample", or a "discrete" one of 0 and 1.
    exclude
        Regular expression of tensors that stay the base's.
    buffers
        Running statistics: the "base"'s, or the "mean" of the experts'.
    diversity_weight
        Of the entropy of the mean prediction, which is made large; 0 as published.
    check_every
        Steps between two looks at `holdout`.
    random_state
        Seed of the draws.

    Attributes
    ----------
    merged_model_ : nn.Module
        An ordinary model with the merged weights.
    mask_ : ConcreteMasks or None
    coefficients_ : dict
        Task → tensor of one coefficient, or one for each merged tensor.
    history_ : list of dict
        A step each: mean entropy ("loss"), and for each task the entropy of its mean prediction.

    Raises
    ------
    ValueError
        For experts that do not fit the base, a task without a loader, or logits that are not (n, c).

    References
    ----------
    Tang et al. (2023), arXiv 2312.06173; Yang et al. (2024), AdaMerging, arXiv 2310.02575.

    Examples
    --------
    >>> import copy, torch
    >>> from subspan.weights import ConcreteMerging
    >>> _ = torch.manual_seed(0)
    >>> base = torch.nn.Linear(8, 2)
    >>> experts = {task: copy.deepcopy(base) for task in "ab"}
    >>> for expert in experts.values():
    ...     _ = torch.nn.init.normal_(expert.weight)
    >>> loaders = {task: [torch.randn(16, 8)] for task in "ab"}
    >>> merging = ConcreteMerging(steps=20, random_state=0).fit(base, experts, loaders)
    >>> merging.history_[-1]["loss"] < merging.history_[0]["loss"] * 1.2, type(merging.merged_model_).__name__
    (True, 'Linear')
    """

    # `fit` checks the values: run-time type checkers leave the constructor alone.
    __no_type_check__ = True

    base_merge: Literal["task_arithmetic", "task_wise", "layer_wise"] = "task_arithmetic"
    learn_mask: bool = True
    scaling: float = 0.3
    temperature: Positive = 0.5
    init_logit: float = 0.0
    mask_lr: Positive = 1e-3
    inner_lr: Positive = 1.0
    tta_lr: Positive = 1e-3
    steps: Whole = 2000
    tta_steps: Whole = 1000
    clamp: bool = True
    eval_mask: Literal["expected", "sample", "discrete"] = "expected"
    exclude: str | None = None
    buffers: Literal["base", "mean"] = "base"
    diversity_weight: NonNegative = 0.0
    check_every: Count = 50
    random_state: int | None = None

    def fit(
        self,
        base: nn.Module,
        experts: Mapping[str, nn.Module | StateDelta | Mapping[str, Tensor] | str | os.PathLike[str]],
        loaders: Mapping[str, Iterable[Any]],
        *,
        heads: Mapping[str, Callable[[Any], Tensor]] | None = None,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        holdout: Mapping[str, Iterable[Any]] | None = None,
        trainer: Mapping[str, Any] | None = None,
    ) -> ConcreteMerging:
        """Learn the mask and the coefficients.

        Parameters
        ----------
        base
            Never written to; its device and type are used.
        experts
            Task → model tuned from the base, its weights or their path, or the update itself.
        loaders
            Task → batches without labels, gone through again and again.
        heads
            Task → frozen head, from what `forward_fn` gives to logits (n, c); by default that is the logits.
        forward_fn
            ``forward_fn(model, batch)``; by default ``model(batch)``.
        holdout
            Task → other batches without labels: the mask with the least entropy on them is kept.
        trainer
            Options of Lightning's Trainer, such as ``{"enable_progress_bar": True}``.
        """
        check_parameters(self)
        if missing := [task for task in experts if task not in loaders]:
            raise ValueError(f"loaders: none for {', '.join(missing)}")
        deltas = {
            task: expert if isinstance(expert, StateDelta) else StateDelta.between(base, expert)
            for task, expert in experts.items()
        }
        kinds: dict[str, Any] = {"task_arithmetic": "fixed", "task_wise": "task", "layer_wise": "tensor"}
        self._merged = MergedModule(
            base,
            deltas,
            coefficients=kinds[self.base_merge],
            scaling=self.scaling,
            clamp=self.clamp,
            forward_fn=forward_fn,
            exclude=self.exclude,
            buffers=self.buffers,
        )
        self._heads, self.history_ = dict(heads or {}), []
        self.mask_ = None
        if self.learn_mask:
            self.mask_ = ConcreteMasks(self._merged.shapes, self.temperature, self.init_logit, self.random_state)
            self._learn_mask(self.mask_.to(self._merged.coefficients.device), loaders, holdout, trainer)
        self._draw()
        if self.base_merge != "task_arithmetic":
            self._learn_coefficients(self._masks, loaders, trainer)
        self._warn_of_collapse()
        self.merged_model_ = self._merged.unloaded(self._masks)
        self.coefficients_ = dict(zip(deltas, self._merged.used_coefficients().detach().cpu(), strict=True))
        return self

    def remerged(self) -> ConcreteMerging:
        """Make `merged_model_` again, with the mask that `eval_mask` says now; coefficients stay."""
        self._draw()
        self.merged_model_ = self._merged.unloaded(self._masks)
        return self

    def masked_expert(self, task: str) -> nn.Module:
        """The base with the whole update of one task under the mask: what the mask leaves of an expert."""
        chosen = [float(each == task) for each in self._merged.tasks]
        if not any(chosen):
            raise ValueError(f"task: expected one of {self._merged.tasks}, got {task!r}")
        return self._merged.unloaded(self._masks, self._merged.coefficients.new_tensor(chosen).unsqueeze(1))

    # ------------------------------------------------------------------ learning

    @torch.no_grad()
    def _draw(self) -> None:
        self._masks = None if self.mask_ is None else self._evaluation_masks(self.mask_)

    def _learn_mask(self, masks: ConcreteMasks, loaders: Any, holdout: Any, trainer: Any) -> None:
        merged = self._merged
        inner = torch.optim.Adam([merged.coefficients], lr=self.inner_lr)

        def loss(masks: ConcreteMasks, batch: Any) -> Tensor:
            drawn = masks()
            first, second = batch
            if merged.coefficients.requires_grad:
                merged.reset_coefficients()
                held = {name: mask.detach() for name, mask in drawn.items()}
                inner.zero_grad()
                self._entropy(merged.weights(held), first, kept=False).backward()
                inner.step()
            return self._entropy(merged.weights(drawn), second)

        best: dict[str, Any] = {"entropy": math.inf, "logits": None}

        def look(masks: ConcreteMasks, step: int) -> None:
            if holdout is None or step % self.check_every:
                return
            with torch.no_grad():
                weights = merged.weights(self._evaluation_masks(masks))
                found = [
                    float(self._entropy(weights, dict(zip(holdout, batches)), kept=False))
                    for batches in zip(*holdout.values())
                ]
            if not found:
                raise ValueError("holdout: gives no batch (iterators that were used up? give lists)")
            if (mean := sum(found) / len(found)) < best["entropy"]:
                best.update(entropy=mean, logits=masks.logits.detach().clone())

        self._run(masks, loss, loaders, self.steps, self.mask_lr, trainer, draws=2, after_step=look)
        if best["logits"] is not None:
            masks.logits.data.copy_(best["logits"])

    def _learn_coefficients(self, masks: Mapping[str, Tensor] | None, loaders: Any, trainer: Any) -> None:
        self._merged.reset_coefficients()

        def loss(merged: MergedModule, batch: Any) -> Tensor:
            return self._entropy(merged.weights(masks), batch[0])

        self._run(self._merged, loss, loaders, self.tta_steps, self.tta_lr, trainer, draws=1)

    def _run(
        self, model: nn.Module, loss: Any, loaders: Any, steps: int, rate: float, trainer: Any, draws: int, **more: Any
    ) -> None:
        if not steps:
            return
        from subspan.nn.objective import Objective
        from subspan.nn.training import quiet_trainer

        objective = Objective(model, loss, optimizer="adam", learning_rate=rate, **more)
        batches = _Cycled({task: loaders[task] for task in self._merged.tasks}, steps, draws)
        device = self._merged.coefficients.device
        where = {"accelerator": "cpu"} if device.type == "cpu" else {"accelerator": "auto", "devices": 1}
        with quiet_trainer(**{"max_epochs": 1, **where, **(trainer or {})}) as run:
            run.fit(objective, batches)

    def _entropy(self, weights: Mapping[str, Tensor], batches: Mapping[str, Any], kept: bool = True) -> Tensor:
        """Summed over tasks; those whose logits are not finite are left out of the step, and counted in the history."""
        losses, facts = [], {}
        for task, batch in batches.items():
            given = self._merged(batch, weights)
            logits = self._heads[task](given) if task in self._heads else given
            if not isinstance(logits, Tensor) or logits.ndim != 2:
                found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise ValueError(f"heads: {task!r} must give logits (n, c), got {found}")
            log_chances = logits.log_softmax(-1)
            chances = log_chances.exp()
            mean = chances.mean(0).clamp(min=torch.finfo(chances.dtype).tiny)
            spread = torch.special.entr(mean).sum()
            loss = -(chances * log_chances).sum(-1).mean() - self.diversity_weight * spread
            if bool(loss.isfinite()):
                losses.append(loss)
                facts[task] = float(spread.detach())
        if not losses:
            raise ValueError("loaders: the logits of every task are NaN or infinite")
        total = torch.stack(losses).sum()
        if kept:
            skipped = len(batches) - len(losses)
            self.history_.append({"loss": float(total.detach()) / len(losses), "skipped": skipped, **facts})
        return total

    def _evaluation_masks(self, masks: ConcreteMasks) -> dict[str, Tensor]:
        masks.train(self.eval_mask == "sample")
        found = masks(discrete=self.eval_mask == "discrete")
        masks.train()
        return found

    def _warn_of_collapse(self) -> None:
        """Say which tasks' predictions became alike while their entropy fell."""
        tenth = max(1, len(self.history_) // 10)
        for task in self._merged.tasks:
            spread = [each[task] for each in self.history_ if task in each]
            first, last = spread[:tenth], spread[-tenth:]
            if first and sum(last) / len(last) < _COLLAPSED * sum(first) / len(first):
                warnings.warn(
                    f"{task}: the entropy of the mean prediction fell from {sum(first) / len(first):.2f} to "
                    f"{sum(last) / len(last):.2f}: most inputs get one answer now; try diversity_weight=1, or holdout=",
                    stacklevel=3,
                )


class _Cycled:
    """`count` times: `draws` dicts of task → next batch, each loader started again at its end."""

    def __init__(self, loaders: Mapping[str, Iterable[Any]], count: int, draws: int) -> None:
        self.loaders, self.count, self.draws = loaders, count, draws

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[dict[str, Any], ...]]:
        running = {task: self._endless(task) for task in self.loaders}
        for _ in range(self.count):
            yield tuple({task: next(each) for task, each in running.items()} for _ in range(self.draws))

    def _endless(self, task: str) -> Iterator[Any]:
        while True:
            empty = True
            for batch in self.loaders[task]:
                empty = False
                yield batch
            if empty:
                raise ValueError(f"loaders: {task!r} gives no batch (an iterator that was used up? give a list)")
