"""What a training did to the answers that it was for: the likelihood of right ones and of wrong ones, before and after.

Where wrong answers are pushed down, right ones that look like them go down too, or hardly rise ("lazy likelihood
displacement"); of preference pairs the margin can grow while the preferred answer becomes less likely.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from subspan.measures import paired_bootstrap
from subspan.models import continuation_log_likelihood


@dataclass(frozen=True)
class Displacement:
    """Changes of log-likelihood (nats) from one model to another, an answer an entry.

    Attributes
    ----------
    positives
        (n,) of right or preferred answers.
    negatives
        (n,) of the wrong ones beside them, or None.

    Raises
    ------
    ValueError
        For NaN, and other numbers of the one than of the other.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import Displacement
    >>> found = Displacement(torch.tensor([-0.25, 0.5]), torch.tensor([-1.0, 0.25]))
    >>> found.lazy, found.displaced, found.margins.tolist()
    (0.5, 0.5, [0.75, 0.25])
    """

    positives: Float[Tensor, " n"]
    negatives: Float[Tensor, " n"] | None = None

    def __post_init__(self) -> None:
        for name, value in (("positives", self.positives), ("negatives", self.negatives)):
            if value is not None and (value.shape != self.positives.shape or not bool(value.isfinite().all())):
                raise ValueError(f"{name}: {len(self.positives)} finite changes are needed, got {value}")

    @property
    def lazy(self) -> float:
        """Share of right answers that have not become more likely."""
        return float((self.positives <= 0).float().mean())

    @property
    def margins(self) -> Float[Tensor, " n"]:
        """Changes of the margin between right and wrong. Raises ValueError without wrong answers."""
        if self.negatives is None:
            raise ValueError("negatives: a margin needs wrong answers beside the right ones")
        return self.positives - self.negatives

    @property
    def displaced(self) -> float:
        """Share of pairs whose margin grew while the right answer became less likely."""
        return float(((self.margins > 0) & (self.positives < 0)).float().mean())

    def interval(self, level: float = 0.95) -> tuple[float, float, float]:
        """Mean change of right answers, and its bootstrap interval; at least 2 answers are needed."""
        return paired_bootstrap(self.positives, torch.zeros_like(self.positives), level=level)


def lld(
    before: nn.Module,
    after: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    positives: Sequence[str],
    negatives: Sequence[str] | None = None,
    *,
    per: Literal["token", "text"] = "text",
    batch_size: int = 8,
    add_special_tokens: bool = True,
) -> Displacement:
    """How much likelier right answers (or preferred ones) became by a training, and wrong ones beside them.

    Parameters
    ----------
    before, after
        Causal models of transformers with one tokenizer. Of a model that is trained in place, keep a copy.
    tokenizer
        A fast one.
    prompts, positives
        (n,) texts; a prompt with several answers is repeated.
    negatives
        (n,) wrong or rejected answers to the same prompts: for preference pairs.
    per
        "text": log-likelihoods of whole answers; "token": their means over tokens.
    batch_size
        Texts a pass.
    add_special_tokens
        False for prompts that come from a chat template.

    Returns
    -------
    Displacement

    Raises
    ------
    ValueError
        For unequal numbers, none, and an answer without a token of its own.

    References
    ----------
    Deng et al. (2025), arXiv 2505.18830; of preference pairs Razin et al. (2024), arXiv 2410.08847.

    Examples
    --------
    >>> found = lld(base, tuned, tokenizer, prompts, chosen, rejected)  # doctest: +SKIP
    >>> found.lazy, found.displaced, found.interval()  # doctest: +SKIP
    """
    options: dict[str, Any] = {"per": per, "batch_size": batch_size, "add_special_tokens": add_special_tokens}

    def change(answers: Sequence[str]) -> Float[Tensor, " n"]:
        first, second = (
            continuation_log_likelihood(model, tokenizer, prompts, answers, **options) for model in (before, after)
        )
        return second - first

    return Displacement(change(positives), None if negatives is None else change(negatives))
