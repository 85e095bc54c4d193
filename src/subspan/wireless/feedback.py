"""What ways of feedback cost: reference ports, bits of a report, work at the phone; and what is left of the rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Scheme = Literal["type-I", "type-II", "port selection", "predicted"]


@dataclass(frozen=True)
class FeedbackCost:
    """Cost of one report of rank 1.

    Parameters
    ----------
    ports
        Reference ports that are sent for it.
    bits
        Of the report.
    operations
        Complex multiply-adds of the search for beams at the phone.
    """

    ports: int
    bits: int
    operations: int


def feedback_cost(
    scheme: Scheme,
    *,
    grid: tuple[int, int] = (8, 4),
    oversampling: tuple[int, int] = (4, 4),
    n_beams: int = 4,
    subbands: int = 8,
    phases: int = 8,
) -> FeedbackCost:
    """Ports, bits and operations of a way of feedback, for two polarisations.

    Parameters
    ----------
    scheme
        "type-I": one beam of the oversampled dictionary and a phase between polarisations a subband. "type-II": a
        group, L of its beams, wideband amplitudes of 3 bits and phases a subband. "port selection": the same for L of
        N ports of fixed beams. "predicted": the station knows the beams, amplitudes and phases are reported alone.
    grid, oversampling
        Of the panel, N positions, and its dictionary.
    n_beams
        L.
    subbands, phases
        Subbands, and phases that are told apart.

    Returns
    -------
    FeedbackCost

    Raises
    ------
    ValueError
        For an unknown scheme, or L above N.

    References
    ----------
    3GPP TS 38.214, 5.2.2.2; bits of the indices as in the standard, amplitudes relative to the strongest coefficient.

    Examples
    --------
    >>> from subspan.wireless import feedback_cost
    >>> feedback_cost("type-II").bits, feedback_cost("predicted").bits
    (212, 192)
    """
    places, groups = grid[0] * grid[1], oversampling[0] * oversampling[1]
    if not 1 <= n_beams <= places:
        raise ValueError(f"n_beams: must lie in [1, {places}], got {n_beams}")
    search = 2 * subbands * places * places
    if scheme == "type-I":
        return FeedbackCost(2 * places, _bits(places * groups) + 2 * subbands, groups * search)
    others = 2 * n_beams - 1
    coefficients = _bits(2 * n_beams) + 3 * others + subbands * others * _bits(phases)
    choice = _bits(math.comb(places, n_beams))
    if scheme == "type-II":
        return FeedbackCost(2 * places, _bits(groups) + choice + coefficients, groups * search)
    if scheme == "port selection":
        return FeedbackCost(2 * places, choice + coefficients, 2 * subbands * places)
    if scheme == "predicted":
        return FeedbackCost(2 * n_beams, coefficients, 0)
    raise ValueError(f"scheme: expected 'type-I', 'type-II', 'port selection' or 'predicted', got {scheme!r}")


def _bits(choices: int) -> int:
    return (choices - 1).bit_length()


def spectral_efficiency(
    capture: Float[Tensor, "*n"],
    cost: FeedbackCost,
    *,
    snr_db: float = 10.0,
    positions: int = 32,
    symbols: int = 1000,
    symbols_per_port: float = 1.0,
) -> Float[Tensor, "*n"]:
    """Bits a second and hertz that are left after reference ports, with beams that capture a share of the channel.

    Parameters
    ----------
    capture
        Shares of the energy in [0, 1].
    cost
        Of the way of feedback.
    snr_db
        Of one antenna.
    positions
        N, the gain of a panel that captures all.
    symbols
        Symbols in which the channel stays the same.
    symbols_per_port
        Of those that each port takes.

    Returns
    -------
    (1 - ports / symbols) log2(1 + N SNR capture), of the shape of `capture`.

    Raises
    ------
    ValueError
        Where the ports take all symbols.

    Examples
    --------
    >>> import torch
    >>> from subspan.wireless import feedback_cost, spectral_efficiency
    >>> share = torch.tensor(0.9)
    >>> few, many = (spectral_efficiency(share, feedback_cost(name)) for name in ("predicted", "type-II"))
    >>> bool(few > many)
    True
    """
    taken = cost.ports * symbols_per_port / symbols
    if not taken < 1:
        raise ValueError(f"symbols: {symbols} are all taken by {cost.ports} ports")
    return (1 - taken) * torch.log2(1 + positions * 10 ** (snr_db / 10) * capture)
