"""Unlearning by a low-rank update: ReGLU and its rivals through one trainer (extra: train)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Subset

from subspan.base import Progress, save_arrays, saved_object, silent
from subspan.base.modules import evaluation
from subspan.base.parameters import Bounds, Count, NonNegative, Positive, Share, Whole, check_parameters
from subspan.geometry import Subspace
from subspan.geometry.rank import Rank
from subspan.models import LowRankEdit, SiteMoments, add_low_rank, collect_moments, linear_names
from subspan.models.capture import device_of
from subspan.models.layers import layer_names, linear_weight
from subspan.nn import InverseHingeLoss, npo_loss, simnpo_loss
from subspan.nn.training import quiet_trainer

from .low_rank_starts import answer_logits, importance_factors, squared_gradients, zero_factors
from .reglu import (
    LayerPlan,
    SubspaceOrthogonalityLoss,
    collect_output_moments,
    net_leakage,
    random_subspaces,
    reglu_plan,
)
from .unlearning_data import Example, PairedExamples, checked_examples, padded_batch

_SAVES = 20
_TERMS = ("forget", "retain", "orthogonality")
_TRAINED = {"*:down": Float[Tensor, "_ _"], "*:up": Float[Tensor, "_ _"], "optimizer:*": Float[Tensor, "..."]}


class Answers(NamedTuple):
    """What a forget loss is given of a batch of texts.

    Attributes
    ----------
    logits
        (n, v) of the tokens that count, of all texts.
    labels
        (n,) their right ids.
    owner
        (n,) which text each is of, from 0 to b - 1.
    reference
        (b,) log-likelihoods of the answers under the model before training.
    """

    logits: Float[Tensor, "n v"]
    labels: Tensor
    owner: Tensor
    reference: Float[Tensor, " b"]

    def log_likelihood(self, *, per_token: bool = False) -> Float[Tensor, " b"]:
        """Of each answer, the sum over its tokens or their mean."""
        likelihood = -F.cross_entropy(self.logits, self.labels, reduction="none")
        total = torch.zeros_like(self.reference).index_add(0, self.owner, likelihood)
        return total / self.owner.bincount(minlength=len(total)).clamp_min(1) if per_token else total


class UnlearningStep(NamedTuple):
    """Means of one optimizer step.

    Attributes
    ----------
    step
        From 1.
    forget, retain, orthogonality
        Terms of the loss, with their weights.
    """

    step: int
    forget: float
    retain: float
    orthogonality: float


FORGET_LOSSES: dict[str, Callable[[Answers], Tensor]] = {
    "ihl": lambda answers: InverseHingeLoss()(answers.logits, answers.labels),
    "gd": lambda answers: -F.cross_entropy(answers.logits, answers.labels),
    "npo": lambda answers: npo_loss(answers.log_likelihood(), answers.reference),
    "simnpo": lambda answers: simnpo_loss(answers.log_likelihood(per_token=True)),
}


@dataclass(eq=False, repr=False)
class Unlearner:
    """Train a low-rank update of a language model so that it forgets some answers and keeps others.

    The loss of a step is that on forget answers + `retain_weight` times the cross-entropy of as many retain answers
    + `orthogonality` times the sum over layers of |B'P|². Only the update is trained; the model's own weights are never
    touched, whatever the start, so that `edit_.export(folder)` is an ordinary LoRA of the model that everybody has.

    Parameters
    ----------
    start
        "rila": ReGLU's, the subspace of contrast of the outputs, with the function unchanged. "fila": by squared
        gradients. "lora": A random, B zero. "null-space": the same, A kept outside of the retain texts' inputs (NSRU).
    forget_loss
        "ihl" (inverse hinge), "gd" (minus cross-entropy: gradient difference), "npo", "simnpo", or a function of
        `Answers` that gives a scalar.
    rank
        r, at most each layer's width.
    alpha
        The update is scaled by alpha / r; None: 2 r.
    dropout
        On the inputs of the updates while training.
    layers
        As in `layer_names`; None: all linear layers inside the model's blocks.
    beta, retain_rank, retain_cap, center
        As of `reglu_plan`.
    pool, include_padding
        As of `collect_output_moments`.
    samples
        Texts of each set, the first ones, that the plan is made from.
    orthogonality
        λ; 0 leaves the penalty out.
    basis
        P of the penalty: "retain", or "random" ones of the same sizes, the control.
    penalised
        "up": B, as published, or "net": the whole change of the weight.
    null_energy
        "null-space": share of the energy of retain inputs that the update must not act on.
    retain_weight
        γ.
    epochs
        Times over the forget answers.
    max_steps
        Optimizer steps at most.
    batch_size, accumulate
        Pairs of a pass, and passes of a step.
    learning_rate, weight_decay, clip
        Of AdamW, and the largest norm of the gradient.
    warmup
        Share of the steps in which the rate rises; then it falls to 0 in a line.
    pad_token_id
        What fills short texts.
    random_state
        Seed of draws and orders.

    Attributes
    ----------
    plan_ : dict
        Name → `LayerPlan`.
    edit_ : LowRankEdit
        The layers; `export(folder)`, `merge()`, `undo()`.
    model_ : Module
        The model that was given, with the update.
    history_ : list of UnlearningStep
    leakage_ : Leakage
        Of the net change into the subspaces P of what is to be retained.

    Raises
    ------
    ValueError
        Where a set is empty or has a text without an answer, a layer is no linear one or quantised, a rank is above a
        layer's width, or the loss is not finite; the model is then as it was.

    References
    ----------
    ReGLU (arXiv 2604.17396); FILA and the inverse hinge (arXiv 2408.06621); NPO (arXiv 2404.05868); SimNPO
    (arXiv 2410.07163); NSRU (arXiv 2606.10989), of which this is the confinement, without its safe targets.

    Examples
    --------
    ``Unlearner(rank=16).fit(model, answer_examples(tokenizer, forget), answer_examples(tokenizer, retain))``.

    >>> import torch
    >>> from subspan.edit import Unlearner
    >>> class Toy(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.blocks = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(8, 8)) for _ in range(2)])
    ...         self.embed, self.head = torch.nn.Embedding(9, 8), torch.nn.Linear(8, 9)
    ...     def forward(self, input_ids, attention_mask):
    ...         return self.head(self.blocks[1](self.blocks[0](self.embed(input_ids))))
    >>> texts = [{"input_ids": [i, i + 1, i + 2], "labels": [-100, i + 1, i + 2]} for i in range(6)]
    >>> fitted = Unlearner(rank=2, retain_rank=1, epochs=2).fit(Toy(), texts[:2], texts[2:])
    >>> len(fitted.history_), list(fitted.edit_.layers)
    (1, ['blocks.0.0', 'blocks.1.0'])
    """

    # `fit` checks the values: run-time type checkers leave the constructor alone.
    __no_type_check__ = True

    start: Literal["rila", "fila", "lora", "null-space"] = "rila"
    forget_loss: Literal["ihl", "gd", "npo", "simnpo"] | Callable[[Answers], Tensor] = "ihl"
    rank: Count = 32
    alpha: Positive | None = None
    dropout: Annotated[float, Bounds(least=0, below=1)] = 0.0
    layers: Any = None
    beta: Share = 0.7
    retain_rank: Rank = 0.99
    retain_cap: Annotated[float, Bounds(above=0, most=1)] | None = 0.1
    center: bool = False
    pool: Literal["sum", "mean", "rows"] = "sum"
    include_padding: bool = False
    samples: Annotated[int, Bounds(least=2)] = 256
    orthogonality: NonNegative = 0.5
    basis: Literal["retain", "random"] = "retain"
    penalised: Literal["up", "net"] = "up"
    null_energy: Annotated[float, Bounds(above=0, most=1)] = 0.99
    retain_weight: NonNegative = 1.0
    epochs: Count = 5
    max_steps: Count | None = None
    batch_size: Count = 4
    accumulate: Count = 8
    learning_rate: Positive = 1e-4
    weight_decay: NonNegative = 0.01
    clip: Positive = 1.0
    warmup: Share = 0.2
    pad_token_id: Whole = 0
    random_state: int = 0
    plan_: dict[str, LayerPlan] = field(default_factory=dict, init=False)
    history_: list[UnlearningStep] = field(default_factory=list, init=False)

    # ------------------------------------------------------------------ the two public steps

    def plan(
        self,
        model: nn.Module,
        forget: Sequence[Example],
        retain: Sequence[Example],
        *,
        keep: str | os.PathLike[str] | None = None,
        progress: Progress = silent,
    ) -> dict[str, LayerPlan]:
        """The plan that `fit` would make, to be looked at, or to be handed to several fits.

        keep: folder in which the moments are kept, so that a killed run need not collect them again.
        """
        check_parameters(self)
        sets = {"forget": checked_examples(forget, "forget"), "retain": checked_examples(retain, "retain")}
        names = self.checked_layers(model)
        longest = max(len(e["input_ids"]) for each in sets.values() for e in each) if self.include_padding else 0
        moments = {}
        for number, (name, examples) in enumerate(sets.items()):
            progress(f"outputs on {name}", number / 2)
            file = None if keep is None else Path(keep) / f"{name}.safetensors"
            if file is not None and file.is_file():
                moments[name] = SiteMoments.load(file)
                continue
            moments[name] = collect_output_moments(
                model,
                self._inputs(examples[: self.samples], longest),
                names,
                pool=self.pool,
                include_padding=self.include_padding,
            )
            if file is not None:
                moments[name].save(file)
        return reglu_plan(
            moments["forget"],
            moments["retain"],
            rank=self.rank,
            beta=self.beta,
            retain_rank=self.retain_rank,
            retain_cap=self.retain_cap,
            center=self.center,
        )

    def fit(
        self,
        model: nn.Module,
        forget: Sequence[Example],
        retain: Sequence[Example],
        *,
        plan: Mapping[str, LayerPlan] | None = None,
        keep: str | os.PathLike[str] | None = None,
        after_step: Callable[[nn.Module, int], Any] | None = None,
        progress: Progress = silent,
    ) -> Unlearner:
        """Put the update into the model and train it.

        Parameters
        ----------
        model
            A causal model of transformers, or one that takes input_ids and attention_mask and gives logits (b, t, v);
            changed in place (`edit_.undo()` takes the update out).
        forget, retain
            Examples with `input_ids` (t,) and `labels` (t,), as of `answer_examples`.
        plan
            From `plan`; None: made here.
        keep
            Folder in which moments and training are kept, so that a killed run with the same settings goes on.
        after_step
            `after_step(model, step)` after each optimizer step; the training ends where it returns True.
        progress
            Is told each step.
        """
        check_parameters(self)
        wanted, kept = checked_examples(forget, "forget"), checked_examples(retain, "retain")
        held = {tuple(example["input_ids"]) for example in kept}
        if twice := sum(tuple(example["input_ids"]) in held for example in wanted):
            warnings.warn(f"{twice} of {len(wanted)} forget examples are retain examples too", stacklevel=2)
        made = plan or self.plan(model, wanted, kept, keep=keep, progress=lambda m, part: progress(m, 0.1 * part))
        self.plan_ = dict(made)
        self._confined: dict[str, Subspace] = {}
        self.edit_: LowRankEdit = self._started(model, wanted, kept)
        try:
            self._train(model, wanted, kept, keep, after_step, lambda m, part: progress(m, 0.1 + 0.9 * part))
        except BaseException:
            self.edit_.undo()
            raise
        self.model_ = model
        self.leakage_ = net_leakage(self.edit_.layers, {name: layer.retain for name, layer in self.plan_.items()})
        return self

    def checked_layers(self, model: nn.Module) -> list[str]:
        """Names of the layers that get an update. Raises ValueError for one that cannot have it."""
        check_parameters(self)
        names = linear_names(model) if self.layers is None else layer_names(model, self.layers)
        for name in names:
            weight, _ = linear_weight(model.get_submodule(name))
            if self.rank > min(weight.shape):
                raise ValueError(f"rank: {self.rank} is above the width of {name}, {tuple(weight.shape)}")
        return names

    def steps(self, count: int) -> int:
        """Optimizer steps with so many forget examples."""
        total = -(-self.epochs * count // (self.batch_size * self.accumulate))
        return total if self.max_steps is None else min(total, self.max_steps)

    def settings(self) -> dict[str, Any]:
        """Parameters by name."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.init}

    # ------------------------------------------------------------------ the start

    def _inputs(self, examples: Sequence[Example], length: int = 0) -> Any:
        """Batches for a pass without a loss."""
        for batch in self._batches(examples, length):
            yield {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

    def _batches(self, examples: Sequence[Example], length: int = 0) -> Any:
        for at in range(0, len(examples), self.batch_size):
            part = examples[at : at + self.batch_size]
            yield padded_batch(part, pad_token_id=self.pad_token_id, length=length)

    def _started(self, model: nn.Module, forget: list[Example], retain: list[Example]) -> LowRankEdit:
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        names = list(self.plan_)
        weights = {name: linear_weight(model.get_submodule(name))[0] for name in names}
        sites: dict[str, Any]
        if self.start == "rila":
            sites = {name: layer.forget for name, layer in self.plan_.items()}
        elif self.start == "fila":
            wanted, kept = (
                squared_gradients(model, self._batches(each[: self.samples]), names) for each in (forget, retain)
            )
            sites = {
                name: importance_factors(weight, wanted[name], kept[name], self.rank, scale=alpha / self.rank)
                for name, weight in weights.items()
            }
        else:
            if self.start == "null-space":
                seen = collect_moments(model, self._inputs(retain[: self.samples]), names)
                self._confined = {name: seen[name].subspace(self.null_energy, center=False) for name in names}
            generator = torch.Generator().manual_seed(self.random_state)
            sites = {}
            for name, weight in weights.items():
                try:
                    sites[name] = zero_factors(weight, self.rank, outside=self._confined.get(name), generator=generator)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}; lower rank or null_energy") from None
        return add_low_rank(model, sites, alpha=alpha, dropout=self.dropout)

    # ------------------------------------------------------------------ training

    def _train(
        self,
        model: nn.Module,
        forget: list[Example],
        retain: list[Example],
        keep: str | os.PathLike[str] | None,
        after_step: Callable[[nn.Module, int], Any] | None,
        progress: Progress,
    ) -> None:
        from subspan.nn.objective import Objective

        pairs = PairedExamples(
            [{**e, "reference": r} for e, r in zip(forget, self._references(model, forget))],
            retain,
            epochs=self.epochs,
            random_state=self.random_state,
        )
        per_step = self.batch_size * self.accumulate
        total = self.steps(len(forget))
        file = None if keep is None else Path(keep) / "training.safetensors"
        done, state = self._resumed(file)
        if done >= total:
            return
        made: list[Any] = []

        def optimizer(groups: Any, **options: Any) -> torch.optim.Optimizer:
            made.append(torch.optim.AdamW(groups, **options))
            if state:
                made[0].load_state_dict({**made[0].state_dict(), "state": state})
            return made[0]

        def rate(step: int) -> float:
            at, rise = step + done, self.warmup * total
            return (at + 1) / (rise + 1) if at < rise else max(0.0, (total - at) / max(1.0, total - rise))

        def stepped(_: nn.Module, taken: int) -> bool:
            step = done + taken
            self._confine()
            terms = torch.tensor(self._terms).mean(0).tolist()
            self.history_.append(UnlearningStep(step, *terms))
            self._terms.clear()
            progress(f"step {step} of {total}", step / total)
            if file is not None and (step % max(1, total // _SAVES) == 0 or step == total):
                self._save(file, made[0])
            with torch.no_grad():
                return after_step is not None and bool(after_step(model, step))

        self._terms: list[list[float]] = []
        left = Subset(pairs, range(done * per_step, min(len(pairs), total * per_step)))
        objective = Objective(
            model,
            self._loss(),
            optimizer=optimizer,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            schedule=lambda optimizer, _: LambdaLR(optimizer, rate),
            after_step=stepped,
        )
        device = device_of(model) or torch.device("cpu")
        cpu = device.type == "cpu"
        for layer in self.edit_.layers.values():
            layer.dropout.train()
        with quiet_trainer(
            max_epochs=1,
            accelerator="cpu" if cpu else "auto",
            devices=1 if cpu or device.index is None else [device.index],
            accumulate_grad_batches=self.accumulate,
            gradient_clip_val=self.clip,
        ) as trainer:
            trainer.fit(objective, DataLoader(left, self.batch_size, collate_fn=self._collated))
        model.to(device).eval()

    def _references(self, model: nn.Module, forget: list[Example]) -> list[float]:
        """Log-likelihoods of the answers now: no layer has changed yet. Only where the loss asks for them."""
        if self.forget_loss in ("ihl", "gd", "simnpo"):
            return [0.0] * len(forget)
        found: list[float] = []
        with torch.no_grad(), evaluation(model):
            for batch in self._batches(forget):
                empty = torch.zeros(len(batch["input_ids"]))
                logits, labels, owner = answer_logits(model, batch)
                answers = Answers(logits, labels, owner, empty.to(logits.device))
                found += answers.log_likelihood().tolist()
        return found

    def _collated(self, pairs: Sequence[tuple[Example, Example]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        wanted, kept = (padded_batch(part, pad_token_id=self.pad_token_id) for part in zip(*pairs))
        return {**wanted, "reference": torch.tensor([pair[0]["reference"] for pair in pairs])}, kept

    def _loss(self) -> Callable[[nn.Module, Any], dict[str, Tensor]]:
        forgetting: Any = FORGET_LOSSES.get(self.forget_loss) if isinstance(self.forget_loss, str) else None
        forgetting = forgetting or self.forget_loss
        spaces = {name: layer.retain for name, layer in self.plan_.items()}
        if self.basis == "random":
            spaces = random_subspaces(spaces, random_state=self.random_state)
        penalty = SubspaceOrthogonalityLoss(spaces, of=self.penalised)

        def loss(model: nn.Module, batch: Any) -> dict[str, Tensor]:
            wanted, kept = batch
            logits, labels, owner = answer_logits(model, wanted)
            terms = {"forget": forgetting(Answers(logits, labels, owner, wanted["reference"].to(logits.device)))}
            rows, right, _ = answer_logits(model, kept)
            terms["retain"] = self.retain_weight * F.cross_entropy(rows, right)
            if self.orthogonality:
                terms["orthogonality"] = self.orthogonality * penalty(self.edit_.layers)
            self._terms.append([float(terms[name].detach()) if name in terms else 0.0 for name in _TERMS])
            return terms

        return loss

    @torch.no_grad()
    def _confine(self) -> None:
        """Rows of A outside of what they must not act on: the optimizer's steps lead out of there."""
        for name, space in self._confined.items():
            down = self.edit_.layers[name].down
            down.copy_(space.to(down).residual(down))

    # ------------------------------------------------------------------ what a killed run has done

    def _save(self, file: Path, optimizer: torch.optim.Optimizer) -> None:
        arrays = {
            f"{name}:{part}": getattr(layer, part).detach()
            for name, layer in self.edit_.layers.items()
            for part in ("down", "up")
        }
        for place, kept in optimizer.state_dict()["state"].items():
            arrays |= {f"optimizer:{place}:{part}": value for part, value in kept.items()}
        save_arrays(file, "unlearning", arrays, history=[list(step) for step in self.history_])

    def _resumed(self, file: Path | None) -> tuple[int, dict[int, dict[str, Tensor]]]:
        """Steps that were taken, and the optimizer's state; what was trained is put into the layers."""
        self.history_ = []
        if file is None or not file.is_file():
            return 0, {}
        state: dict[int, dict[str, Tensor]] = {}
        with saved_object(file, "unlearning", _TRAINED, {"history": list[list[float]]}) as (arrays, facts):
            for key, value in arrays.items():
                name, _, part = key.rpartition(":")
                if name.startswith("optimizer:"):
                    state.setdefault(int(name.split(":")[1]), {})[part] = value
                elif name not in self.edit_.layers:
                    raise ValueError(f"{key} belongs to no layer")
                else:
                    getattr(self.edit_.layers[name], part).data.copy_(value)
            self.history_ = [UnlearningStep(int(step), *terms) for step, *terms in facts["history"]]
        return len(self.history_), state
