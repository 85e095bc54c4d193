"""Is a subspace of weights that is said to carry a behaviour specific to it? An audit with controls and an interval."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from torch import Tensor, nn

from subspan.base import Progress, silent
from subspan.base.parameters import Bounds, Count, Positive, check_parameters
from subspan.geometry import FractionOfDim
from subspan.models import StateDelta, SubspaceMap

from .audit_evidence import Arm, AuditReport, Evidence, Reading, Selectivity, Verdict
from .update_geometry import ALL, ProjectedUpdate, projected_update, weight_subspaces

Source = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]
Share = Annotated[float, Bounds(above=0, most=1)]


@dataclass(eq=False, repr=False)
class SubspaceAudit:
    """Does the subspace of an update carry one behaviour rather than others, and more so than controls do?

    The update from the aligned model to each tuned one is projected on the main directions of the update from the base
    to the aligned one ("same"), or freed of them ("orth"), and every behaviour that the tuning has moved is read again:
    the subspace carries a share of its change. Selectivity is the share of one behaviour, less the mean share of the
    others, less the same difference of a control. It is judged beside two of them:

    - "random": random subspaces of the same dimensions;
    - "scaled": the whole update times the share of its energy that the subspace keeps (the mean over the tuned models):
      no other direction, and the same component along the update. One behaviour may need less of an update than
      another; this is what size alone does.

    "randomk" (directions of the reference whatever their size) says whether the main ones matter. It is reported and
    not judged by: of a reference of low rank it is the same subspace.

    The verdict is "specific" where, for some behaviour and fraction, selectivity is `margin` or more and its interval
    above 0 beside every control; "not specific" where everywhere the interval of one is below `margin`; else, and
    where fewer than two behaviours were moved at all, "no evidence".

    Parameters
    ----------
    metrics
        Behaviour → ``fn(model)``, at least two; each returns one number a prompt (n,), always of the same prompts, or a
        single number, of which only the random draws give an interval.
    fractions
        Shares of the directions of each tensor, in (0, 1]; never more directions than the reference's rank.
    controls
        Of "random", "scaled" (one of these at least) and "randomk".
    modes
        Of "same", "orth" and "opp"; the share that is carried is the mean over them.
    n_random
        Draws of each random control.
    margin
        Selectivity from which a subspace counts as specific.
    level
        Of all intervals together: each one leaves out its share of the rest.
    resamples
        Bootstrap draws, of prompts and of random subspaces.
    random_state
        Seed.

    References
    ----------
    Ponkshe et al. (2025), Safety Subspaces are Not Distinct: A Fine-Tuning Case Study, arXiv 2505.14185.

    Examples
    --------
    One behaviour was changed inside of what the reference spans, the other outside:

    >>> import torch
    >>> from subspan.probe import SubspaceAudit
    >>> _, eye, prompts = torch.manual_seed(0), torch.eye(16), torch.rand(30, 16)
    >>> model = torch.nn.Linear(16, 16, bias=False)
    >>> aligned = model.weight.detach().clone()
    >>> base = {"weight": aligned - eye[:, :4] @ torch.randn(4, 16)}
    >>> tuned = {"weight": aligned + (eye[:, [0]] + eye[:, [9]]) @ torch.ones(1, 16)}
    >>> metrics = {"safe": lambda m: m(prompts)[:, 0].detach(), "useful": lambda m: m(prompts)[:, 9].detach()}
    >>> report = SubspaceAudit(metrics, fractions=[0.25]).run(base, model, {"both": tuned})
    >>> report.verdict, round(report.curves()["safe"]["topk"][0.25], 3)
    ('specific', 1.0)
    """

    # `run` checks the values: run-time type checkers leave the constructor alone.
    __no_type_check__ = True

    metrics: Mapping[str, Callable[[nn.Module], Any]]
    fractions: Sequence[Share] = (0.01, 0.25, 0.5, 0.75, 0.99)
    controls: Sequence[Literal["randomk", "random", "scaled"]] = ("randomk", "random", "scaled")
    modes: Sequence[Literal["same", "orth", "opp"]] = ("same", "orth")
    n_random: Count = 3
    margin: Positive = 0.2
    level: Annotated[float, Bounds(above=0, below=1)] = 0.95
    resamples: Count = 4000
    random_state: int = 0

    def run(
        self,
        base: Source,
        aligned: nn.Module,
        tuned: Mapping[str, Source],
        *,
        strict: bool = True,
        progress: Progress = silent,
    ) -> AuditReport:
        """Audit the subspace of the update from `base` to `aligned`.

        Parameters
        ----------
        base
            Module, mapping of tensors or path; read tensor by tensor.
        aligned
            The model that behaviours are read from. Updates are put into it and taken out again: its weights are the
            same to the bit afterwards, also where a metric fails.
        tuned
            Name → model tuned on from the aligned one: module, mapping or path.
        strict
            False leaves out tensors that are not in all, or have other shapes.
        progress
            Is told what is read, and the share that is done.

        Raises
        ------
        ValueError
            For parameters out of range, checkpoints that do not fit, an update that is zero, and scores that are not
            finite or change their number.
        """
        self._check(tuned)
        reference = _changed(StateDelta.between(base, aligned, strict=strict))
        if not len(reference):
            raise ValueError("aligned: is the base itself, so that the update between them spans nothing")
        deltas = {name: _changed(StateDelta.between(aligned, each, strict=strict)) for name, each in tuned.items()}
        if same := [name for name, delta in deltas.items() if not len(delta)]:
            raise ValueError(f"tuned: {', '.join(map(repr, same))} is the aligned model itself")
        comparisons = len(self.fractions) * (1 if len(self.metrics) == 2 else len(self.metrics))
        evidence = Evidence(
            self.metrics,
            aligned,
            n_random=self.n_random,
            resamples=self.resamples,
            random_state=self.random_state,
            tail=(1 - self.level) / comparisons / 2,
        )
        for name, delta in deltas.items():
            progress(f"{name}, the whole update", 0.0)
            with delta.applied(aligned) as model:
                evidence.read_whole(model, name)
        found: list[Selectivity] = []
        readings: list[Reading] = []
        if len(evidence.moved) > 1:
            readings += self._readings(aligned, reference, deltas, evidence, progress)
            for fraction in self.fractions:
                found += evidence.selectivities(fraction, self.controls)
        verdict, reason = self._judge(evidence.moved, found)
        return AuditReport(verdict, reason, tuple(evidence.changes), tuple(readings), tuple(found))

    def _check(self, tuned: Mapping[str, Source]) -> None:
        check_parameters(self)
        for name in ("fractions", "controls", "modes"):
            values = list(getattr(self, name))
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}: at least one is needed, and each once, got {values}")
        if len(self.metrics) < 2:
            raise ValueError(f"metrics: two behaviours or more can be told apart, got {len(self.metrics)}")
        if not set(self.controls) & {"random", "scaled"}:
            raise ValueError(f"controls: 'random' or 'scaled' is needed to judge by, got {list(self.controls)}")
        if not tuned:
            raise ValueError("tuned: at least one model is needed")

    def _readings(
        self,
        aligned: nn.Module,
        reference: StateDelta,
        deltas: Mapping[str, StateDelta],
        evidence: Evidence,
        progress: Progress,
    ) -> Iterator[Reading]:
        """Every projection of every update, put into the model and read."""
        progress("decomposing the reference", 0.0)
        whole = weight_subspaces(reference, ALL)
        draws: dict[Any, int] = {
            kind: self.n_random if kind.startswith("random") else 1 for kind in ("topk", *self.controls)
        }
        total, done = len(self.fractions) * sum(draws.values()), 0
        for fraction in self.fractions:
            energies: dict[Any, list[float]] = {mode: [] for mode in self.modes}
            for kind, draw in ((kind, draw) for kind, count in draws.items() for draw in range(count)):
                progress(f"{kind}, {fraction:g} of the directions", done / total)
                done += 1
                spaces = weight_subspaces(
                    whole,
                    FractionOfDim(fraction),
                    kind="topk" if kind == "scaled" else kind,
                    random_state=self.random_state + draw,
                )
                size = sum(space.dim for space in spaces.values())
                pairs: Any = ((item, mode) for item in deltas.items() for mode in self.modes)
                for (name, delta), mode in pairs:
                    own = SubspaceMap({each: space for each, space in spaces.items() if each in delta})
                    part = projected_update(reference, delta, own, mode)
                    if kind == "topk":
                        energies[mode].append(part.energy_kept)
                    if kind == "scaled":
                        part = _scaled(part, delta, float(np.mean(energies[mode])), -1 if mode == "opp" else 1)
                    arm = Arm(fraction, kind, draw, mode)
                    facts = (size, part.energy_kept, part.cosine, part.cosine_to_reference)
                    with part.update.applied(aligned) as model:
                        for behaviour, score, carried in evidence.read(model, name, arm):
                            yield Reading(name, behaviour, *arm, *facts, score, carried)

    def _judge(self, moved: Sequence[str], found: Sequence[Selectivity]) -> tuple[Verdict, str]:
        if len(moved) < 2:
            said = f"only {moved[0]!r} is" if moved else "no behaviour is"
            return "no evidence", f"{said} moved by the tuning, and two must be to tell one from another"
        cases: dict[tuple[str, float], list[Selectivity]] = {}
        for each in found:
            if each.control != "randomk":
                cases.setdefault((each.behaviour, each.fraction), []).append(each)
        # The control that leaves the least is the one that counts.
        least = {case: min(rows, key=lambda row: row.estimate) for case, rows in cases.items()}
        specific = [
            least[case]
            for case, rows in cases.items()
            if least[case].estimate >= self.margin and all(row.low > 0 for row in rows)
        ]
        best = max(specific or least.values(), key=lambda row: row.estimate)
        words = (
            f"{best.estimate:.2f} ({best.low:.2f} to {best.high:.2f}) more of {best.behaviour!r} than of the rest, at "
            f"{best.fraction:g} of the directions and beside the control {best.control!r}"
        )
        if specific:
            return "specific", f"the subspace carries {words}"
        if all(any(row.high < self.margin for row in rows) for rows in cases.values()):
            return "not specific", f"at most the subspace carries {words}; {self.margin:g} is excluded everywhere"
        return "no evidence", f"at most the subspace carries {words}; {self.margin:g} is not excluded everywhere"


def _changed(delta: StateDelta) -> StateDelta:
    """Without the tensors that stay as they are: they need not be read again for every projection."""
    return delta.only(name for name in delta if bool(delta[name].any()))


def _scaled(part: ProjectedUpdate, delta: StateDelta, share: float, sign: int) -> ProjectedUpdate:
    """The whole update times a share: its component along itself is that of a projection that keeps so much energy."""
    kept = share**2
    return ProjectedUpdate(
        delta * (sign * share), kept, float(sign), part.cosine_to_reference, dict.fromkeys(delta, kept)
    )
