"""What a user measures anyway: powers of a few wide beams, as coarse, noisy and bounded as a phone reports them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from subspan.base import as_tensor
from subspan.geometry import Subspace, dft_dictionary


def probing_beams(grid: Sequence[int], n_beams: int | None = None) -> Complex[Tensor, "s m"]:
    """Wide beams that a station sends in turn: DFT beams in azimuth, from one row of the panel.

    Parameters
    ----------
    grid
        Columns and rows of the panel.
    n_beams
        s, at most the columns; None: as many. Fewer use as many columns, so that they are wider.

    Returns
    -------
    (s, N) orthonormal rows.

    Raises
    ------
    ValueError
        For a number outside [1, columns].

    Examples
    --------
    >>> from subspan.wireless import probing_beams
    >>> probing_beams((8, 4)).shape
    torch.Size([8, 32])
    """
    columns, rows = grid
    n_beams = columns if n_beams is None else n_beams
    if not 1 <= n_beams <= columns:
        raise ValueError(f"n_beams: must lie in [1, {columns}], got {n_beams}")
    across = torch.nn.functional.pad(dft_dictionary(n_beams, dtype=torch.complex64)[0], (0, columns - n_beams))
    down = torch.zeros(1, rows, dtype=across.dtype)
    down[0, 0] = 1
    return torch.kron(across, down)


def rsrp(
    channels: Complex[Tensor, "n p m f"],
    beams: Complex[Tensor, "s m"],
    *,
    gains: Float[Tensor, " n"] | None = None,
    noise_db: float = 0.0,
    step_db: tuple[float, float] | None = (1.0, 2.0),
    floor_db: float = 30.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "n s"]:
    """Received powers of beams in dB, as a phone reports them.

    Parameters
    ----------
    channels
        (n, p, N, f).
    beams
        (s, N) rows.
    gains
        (n,) dB that channels were divided by, put back; None: the level is that of the channels as they are.
    noise_db
        Standard deviation of the error of each measurement.
    step_db
        Of the strongest, and of the others' distance to it; None: not rounded. NR has 1 and 2.
    floor_db
        Below the strongest nothing is told apart; also where no power arrives at all.
    generator
        Of the noise.

    Returns
    -------
    (n, s) dB, the largest of a row its level.

    Raises
    ------
    ValueError
        For NaN, channels of no power in any beam, and numbers below 0.

    References
    ----------
    3GPP TS 38.133, 10.1.6 (reports of 4 bits in steps of 2 dB below the strongest).

    Examples
    --------
    >>> import torch
    >>> from subspan.wireless import rsrp
    >>> both = torch.tensor([[[[1.0], [1.0]]]]) + 0j  # one user, two positions in phase
    >>> rsrp(both, torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5 + 0j)
    tensor([[  3., -27.]])
    """
    for name, value in {"noise_db": noise_db, "floor_db": floor_db, "step_db": min(step_db or (0,))}.items():
        if not value >= 0:
            raise ValueError(f"{name}: must be 0 or more, got {value}")
    response = torch.einsum("sm,npmf->npsf", beams.conj().to(channels.dtype), channels)
    power = response.abs().square().sum((1, 3))
    if not bool(torch.isfinite(power).all()) or not bool((power.amax(1) > 0).all()):
        raise ValueError("channels: a user has NaN, or no power in any beam; leave it out")
    decibels = 10 * power.log10()
    if noise_db:
        noise = torch.randn(decibels.shape, generator=generator, dtype=decibels.dtype)
        decibels = decibels + noise_db * noise.to(decibels.device)
    if gains is not None:
        decibels = decibels + gains.unsqueeze(1).to(decibels)
    return reported(decibels, step_db=step_db, floor_db=floor_db)


def reported(
    powers: Float[Tensor, "n s"], *, step_db: tuple[float, float] | None = (1.0, 2.0), floor_db: float = 30.0
) -> Float[Tensor, "n s"]:
    """Powers in dB as rounded and bounded by a report; reporting twice changes nothing.

    Parameters
    ----------
    powers
        (n, s) dB; -inf is no power.
    step_db, floor_db
        As in `rsrp`.

    Returns
    -------
    (n, s) dB.

    Examples
    --------
    >>> import torch
    >>> from subspan.wireless import reported
    >>> reported(torch.tensor([[-70.4, -73.6, -torch.inf]]))
    tensor([[ -70.,  -74., -100.]])
    """
    level = powers.amax(1, keepdim=True)
    below = (level - powers).clamp(max=floor_db)
    if step_db is not None:
        level = (level / step_db[0]).round() * step_db[0]
        below = (below / step_db[1]).round() * step_db[1]
    return level - below


def fingerprint_keys(powers: Any, *, level_weight: float = 0.25, floor_db: float = 30.0) -> Float[Tensor, "n q"]:
    """Keys whose distances compare users: powers below the strongest, and the level, in dB.

    Parameters
    ----------
    powers
        (n, s) dB; -inf is no power.
    level_weight
        dB of distance for a dB of difference in level.
    floor_db
        Below the strongest, at most.

    Returns
    -------
    (n, s + 1): what each beam lacks to the strongest, at least -floor_db, and the weighted level.

    Raises
    ------
    ValueError
        For NaN and infinity, rows without any power, and other than a matrix.

    Examples
    --------
    >>> import torch
    >>> from subspan.wireless import fingerprint_keys
    >>> fingerprint_keys(torch.tensor([[-80.0, -92.0, -torch.inf]]))
    tensor([[  0., -12., -30., -20.]])
    """
    rows = as_tensor(powers, "powers", ndim=2)
    if rows.is_complex():
        raise TypeError("powers: expected real numbers in dB, got complex ones; see `rsrp`")
    level = rows.amax(1, keepdim=True)
    if bool(rows.isnan().any()) or not bool(level.isfinite().all()):
        raise ValueError("powers: a row has NaN, +inf, or no power in any beam; leave it out")
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return torch.cat([(wide - level).clamp(min=-floor_db), level_weight * level], 1)


def mirrored(
    powers: Float[Tensor, "n s"], subspaces: Subspace, grid: Sequence[int]
) -> tuple[Float[Tensor, "n s"], Subspace]:
    """Users and labels of the site as a mirror shows it, left and right exchanged: a second site for a pretraining.

    Parameters
    ----------
    powers
        (n, s) of `probing_beams`, s the columns of the panel.
    subspaces
        Their labels, a batch of n.
    grid
        Columns and rows.

    Returns
    -------
    Powers and labels.

    Raises
    ------
    ValueError
        For another number of powers than columns.

    Examples
    --------
    >>> import torch
    >>> from subspan.datasets import street_canyon
    >>> from subspan.wireless import channel_subspaces, mirrored, probing_beams, rsrp
    >>> channels = street_canyon(users=4).channels
    >>> powers, labels = rsrp(channels, probing_beams((8, 4))), channel_subspaces(channels)
    >>> other = mirrored(*mirrored(powers, labels, (8, 4)), (8, 4))
    >>> torch.equal(other[0], powers), torch.equal(other[1].basis, labels.basis)
    (True, True)
    """
    columns, rows = grid
    if powers.shape[1] != columns:
        raise ValueError(f"powers: expected one for each of {columns} columns, got {powers.shape[1]}")
    # Beam b of the mirror is beam -b: a column more is a column less.
    beams = (-torch.arange(columns)) % columns
    places = torch.arange(columns * rows).reshape(columns, rows).flip(0).flatten()
    turned = Subspace(subspaces.basis[..., places, :], variances=subspaces.variances, spectrum=subspaces.spectrum)
    return powers[:, beams], turned
