"""Spatial covariances of channels, and the subspaces that beams of a 3GPP codebook give: type I, type II, ports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Complex, Float, Inexact, Int
from torch import Tensor

from subspan.base import check_finite
from subspan.geometry import Subspace, dft_dictionary
from subspan.solvers import leading_eigenspace


def channel_covariance(channels: Inexact[Tensor, "*b p m f"]) -> Inexact[Tensor, "*b m m"]:
    """Spatial covariance of each channel over polarisations and subbands, of trace 1.

    Parameters
    ----------
    channels
        (*b, p, N, f): polarisations, positions of the panel, subbands.

    Returns
    -------
    (*b, N, N) sum of h h', in single precision at least.

    Raises
    ------
    ValueError
        For NaN, and a channel that is zero: a user that no path reaches.

    Examples
    --------
    >>> import torch
    >>> from subspan.wireless import channel_covariance
    >>> channel_covariance(torch.tensor([[[1.0], [1.0]]])).tolist()  # one polarisation, two positions, one subband
    [[0.5, 0.5], [0.5, 0.5]]
    """
    given = channels.to(torch.promote_types(channels.dtype, torch.float32))
    wide = check_finite(given.flatten(-3), "channels").reshape(given.shape)
    # Scaled first: gains of -150 dB squared are below single precision.
    size = wide.abs().amax((-3, -2, -1), keepdim=True)
    if not bool((size > 0).all()):
        lost = torch.nonzero(size.flatten() == 0)[:, 0].tolist()
        raise ValueError(f"channels: {len(lost)} of {size.numel()} are zero (the first is {lost[0]}); leave them out")
    ports = (wide / size).movedim(-3, -2).flatten(-2)
    found = ports @ ports.mH
    return found / found.diagonal(dim1=-2, dim2=-1).sum(-1).real[..., None, None]


def channel_subspaces(channels: Inexact[Tensor, "*b p m f"], rank: int = 8) -> Subspace:
    """The leading eigenvectors of each channel's spatial covariance: the label of a user.

    Parameters
    ----------
    channels
        (*b, p, N, f).
    rank
        Directions that are kept, in [1, N]. Where a channel has fewer, the rest is any complement, of share 0.

    Returns
    -------
    A batch with variances (shares of the energy) and spectrum.

    Raises
    ------
    ValueError
        As `channel_covariance`, and for a rank out of range.

    Examples
    --------
    >>> from subspan.datasets import street_canyon
    >>> from subspan.wireless import channel_subspaces
    >>> labels = channel_subspaces(street_canyon(users=5, grid=(4, 2)).channels, rank=3)
    >>> labels.dim, labels.ambient_dim, bool((labels.explained_ratio <= 1).all())
    (3, 8, True)
    """
    return leading_eigenspace(channel_covariance(channels), rank, cut="exact")


class BeamChoice(NamedTuple):
    """Beams of one orthogonal group that were chosen for each of a batch.

    Attributes
    ----------
    subspace
        (*b, N, L) the beams as a basis, strongest first, with the share of energy along each as variances.
    group
        (*b,) number of the group.
    beams
        (*b, L) numbers inside it.
    """

    subspace: Subspace
    group: Int[Tensor, "*b"]
    beams: Int[Tensor, "*b l"]


def beam_energies(covariance: Inexact[Tensor, "*b m m"], beams: Complex[Tensor, "*g m"]) -> Float[Tensor, "*c"]:
    """Energy b' R b of each beam.

    Parameters
    ----------
    covariance
        (*b, N, N).
    beams
        (*g, N) as rows, such as `dft_dictionary` makes them.

    Returns
    -------
    (*b, *g).

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import dft_dictionary
    >>> from subspan.wireless import beam_energies
    >>> flat = torch.full((4, 4), 0.25)  # a plane wave from straight ahead
    >>> beam_energies(flat, dft_dictionary(4)[0]).round(decimals=4).abs().tolist()
    [1.0, 0.0, 0.0, 0.0]
    """
    dtype = torch.promote_types(covariance.dtype, beams.dtype if covariance.dtype.itemsize > 8 else torch.complex64)
    rows = beams.to(covariance.device, dtype).flatten(0, -2)
    found = torch.einsum("gm,...mk,gk->...g", rows.conj(), covariance.to(dtype), rows).real
    return found.unflatten(-1, beams.shape[:-1])


def type2_subspace(
    covariance: Inexact[Tensor, "*b m m"],
    grid: Sequence[int],
    *,
    oversampling: int | Sequence[int] = 4,
    n_beams: int = 4,
) -> BeamChoice:
    """The L beams of the orthogonal group that hold the most energy: what a type II report of 3GPP searches for.

    Parameters
    ----------
    covariance
        (*b, N, N) of the true channel, or of a prediction.
    grid
        Columns and rows of the panel, N in all, the last counted fastest.
    oversampling
        Of the DFT beams along each: the number of groups is their product. 1: the one group of plain DFT beams.
    n_beams
        L.

    Returns
    -------
    BeamChoice

    Raises
    ------
    ValueError
        For a grid of other than N positions, and L outside [1, N].

    References
    ----------
    3GPP TS 38.214, 5.2.2.2.3.

    Examples
    --------
    >>> from subspan.datasets import street_canyon
    >>> from subspan.wireless import channel_covariance, type2_subspace
    >>> covariance = channel_covariance(street_canyon(users=3, grid=(4, 2)).channels)
    >>> found = type2_subspace(covariance, (4, 2), n_beams=2)
    >>> tuple(found.subspace.basis.shape), bool((found.subspace.captured_energy(covariance) > 0.5).all())
    ((3, 8, 2), True)
    """
    places = covariance.shape[-1]
    dictionary = _dictionary(covariance, grid, oversampling)
    if not 1 <= n_beams <= places:
        raise ValueError(f"n_beams: must lie in [1, {places}], got {n_beams}")
    strongest = beam_energies(covariance, dictionary).topk(n_beams, dim=-1)
    group = strongest.values.sum(-1).argmax(-1)
    chosen = group[..., None, None].expand(*group.shape, 1, n_beams)
    beams, energies = (x.gather(-2, chosen).squeeze(-2) for x in (strongest.indices, strongest.values))
    basis = dictionary[group.unsqueeze(-1), beams].mT
    return BeamChoice(Subspace(basis, variances=energies), group, beams)


def type1_beam(
    covariance: Inexact[Tensor, "*b m m"], grid: Sequence[int], *, oversampling: int | Sequence[int] = 4
) -> Subspace:
    """The one beam of the oversampled DFT dictionary with the most energy: a type I report.

    Parameters
    ----------
    covariance
        (*b, N, N).
    grid, oversampling
        As in `type2_subspace`.

    Returns
    -------
    A batch of lines (*b, N, 1).

    Examples
    --------
    >>> from subspan.datasets import street_canyon
    >>> from subspan.wireless import channel_covariance, type1_beam
    >>> type1_beam(channel_covariance(street_canyon(users=3, grid=(4, 2)).channels), (4, 2)).dim
    1
    """
    return type2_subspace(covariance, grid, oversampling=oversampling, n_beams=1).subspace


def port_selection(covariance: Inexact[Tensor, "*b m m"], beams: Complex[Tensor, "s m"], n_ports: int = 4) -> Subspace:
    """The L strongest of beams that are sent anyway.

    Parameters
    ----------
    covariance
        (*b, N, N).
    beams
        (s, N) orthonormal rows.
    n_ports
        L, at most s.

    Returns
    -------
    A batch (*b, N, L), strongest first, with the energy along each as variances.

    Raises
    ------
    ValueError
        For L outside [1, s], and beams that are not orthonormal.

    Examples
    --------
    >>> from subspan.datasets import street_canyon
    >>> from subspan.wireless import channel_covariance, port_selection, probing_beams
    >>> covariance = channel_covariance(street_canyon(users=3, grid=(4, 2)).channels)
    >>> port_selection(covariance, probing_beams((4, 2), 4), 2).dim
    2
    """
    if not 1 <= n_ports <= len(beams):
        raise ValueError(f"n_ports: must lie in [1, {len(beams)}], got {n_ports}")
    energies, places = beam_energies(covariance, beams).topk(n_ports, dim=-1)
    return Subspace(beams.to(covariance.device, _complex(covariance))[places].mT, variances=energies)


def _dictionary(covariance: Tensor, grid: Sequence[int], oversampling: int | Sequence[int]) -> Complex[Tensor, "g m m"]:
    found = dft_dictionary(*grid, oversampling=oversampling, dtype=_complex(covariance))
    if found.shape[-1] != covariance.shape[-1]:
        shape = " x ".join(map(str, grid))
        raise ValueError(f"grid: {shape} is {found.shape[-1]} positions, the channels have {covariance.shape[-1]}")
    return found.to(covariance.device)


def _complex(covariance: Tensor) -> torch.dtype:
    return torch.promote_types(covariance.dtype, torch.complex64)
