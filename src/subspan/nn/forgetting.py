"""Losses that fall as a language model forgets: of answers' tokens, or of their log-likelihoods."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


class InverseHingeLoss(nn.Module):
    """1 + p(y) - max over other tokens v of p(v): the mean over tokens y that are to become unlikely, in [0, 2].

    Bounded, and its gradient pushes probability to the runner-up alone, where that of gradient ascent grows without
    end and spreads over the whole vocabulary.

    Parameters
    ----------
    ignore_index
        Label of tokens that do not count.

    Raises
    ------
    ValueError
        In the call, where no token counts: the mean of nothing would be NaN.

    References
    ----------
    Cha et al.: Towards Robust and Parameter-Efficient Knowledge Unlearning for LLMs (ICLR 2025), arXiv 2408.06621.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import InverseHingeLoss
    >>> logits = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]).log()
    >>> round(InverseHingeLoss()(logits, torch.tensor([0, -100])).item(), 4)
    1.5
    """

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, logits: Float[Tensor, "*n v"], labels: Int[Tensor, "*n"]) -> Float[Tensor, ""]:
        """Of logits (…, v) and the labels (…) of the same positions."""
        counted = labels != self.ignore_index
        if not bool(counted.any()):
            raise ValueError(f"labels: no token counts, all are {self.ignore_index}")
        chosen, right = logits[counted].float(), labels[counted].unsqueeze(-1)
        likely = chosen.softmax(-1)
        rest = likely.scatter(-1, right, -1.0)
        return (1 + likely.gather(-1, right).squeeze(-1) - rest.amax(-1)).mean()


def npo_loss(
    log_likelihood: Float[Tensor, " b"], reference: Float[Tensor, " b"], *, beta: float = 0.1
) -> Float[Tensor, ""]:
    """Negative preference optimisation: 2 / beta times the mean of log(1 + (p / p_reference)^beta) over answers.

    Parameters
    ----------
    log_likelihood
        (b,) of whole answers, nats.
    reference
        (b,) the same under the model before training.
    beta
        Inverse temperature; towards 0 it is gradient ascent.

    Returns
    -------
    Scalar.

    References
    ----------
    Zhang et al.: Negative Preference Optimization (COLM 2024), arXiv 2404.05868.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import npo_loss
    >>> round(npo_loss(torch.tensor([-4.0]), torch.tensor([-4.0]), beta=1.0).item(), 4)
    1.3863
    """
    return -2 / beta * F.logsigmoid(-beta * (log_likelihood - reference)).mean()


def simnpo_loss(
    mean_log_likelihood: Float[Tensor, " b"], *, beta: float = 2.5, margin: float = 0.0
) -> Float[Tensor, ""]:
    """NPO without a reference: -2 / beta times the mean of log sigmoid(-beta l - margin) over answers.

    Parameters
    ----------
    mean_log_likelihood
        l (b,), per token of each answer, so that long and short ones count alike.
    beta
        Inverse temperature.
    margin
        γ, by which the answer must be unlikely.

    Returns
    -------
    Scalar.

    References
    ----------
    Fan et al.: Simplicity Prevails: Rethinking Negative Preference Optimization (2024), arXiv 2410.07163.

    Examples
    --------
    >>> import torch
    >>> from subspan.nn import simnpo_loss
    >>> simnpo_loss(torch.tensor([-0.1])) > simnpo_loss(torch.tensor([-3.0]))
    tensor(True)
    """
    return -2 / beta * F.logsigmoid(-beta * mean_log_likelihood - margin).mean()
