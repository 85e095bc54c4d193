"""A subspace taken out of states, or set to a place in it: affine maps, for `intervene` and for rows alike."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from subspan.base import as_tensor
from subspan.geometry import AffineMap, Subspace


def erase_subspace(subspace: Subspace) -> AffineMap:
    """The map after which all rows have the coordinates of the subspace's centre, and are else as they were.

    Parameters
    ----------
    subspace
        Of states of one layer; without a centre the coordinates become 0.

    Returns
    -------
    AffineMap x → x - B B'(x - c). Its `map` is what `intervene` takes.

    Raises
    ------
    ValueError
        For a batch of subspaces.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import erase_subspace
    >>> from subspan.geometry import Subspace
    >>> axis = Subspace(torch.tensor([[1.0], [0.0]]), center=torch.tensor([2.0, 5.0]))
    >>> erase_subspace(axis).map(torch.tensor([[7.0, 8.0]]))
    tensor([[2., 8.]])
    """
    return steer_subspace(subspace, torch.zeros(subspace.dim).to(subspace.basis))


def steer_subspace(subspace: Subspace, coordinates: Any, *, add: bool = False, strength: float = 1.0) -> AffineMap:
    """The map that sets the coordinates in a subspace, or adds to them, and leaves all else as it was.

    Parameters
    ----------
    subspace
        Of states of one layer.
    coordinates
        (k,) from its centre, such as the mean of `subspace.coordinates` over states that have a property.
    add
        Add them to each state's own instead of putting them in their place.
    strength
        They are multiplied by it first.

    Returns
    -------
    AffineMap of d dimensions.

    Raises
    ------
    ValueError
        For a batch of subspaces, and another number of coordinates.

    Examples
    --------
    >>> import torch
    >>> from subspan.edit import steer_subspace
    >>> from subspan.geometry import Subspace
    >>> axis = Subspace(torch.tensor([[1.0], [0.0]]))
    >>> x = torch.tensor([[7.0, 8.0]])
    >>> steer_subspace(axis, [3.0]).map(x).tolist(), steer_subspace(axis, [3.0], add=True).map(x).tolist()
    ([[3.0, 8.0]], [[10.0, 8.0]])
    """
    if subspace.batch_shape:
        raise ValueError(f"subspace: one is needed, got a batch of {subspace.batch_shape}")
    basis = subspace.basis
    wanted: Float[Tensor, " k"] = as_tensor(coordinates, "coordinates").to(basis)
    if wanted.shape != (subspace.dim,):
        raise ValueError(f"coordinates: {subspace.dim} are needed, got shape {tuple(wanted.shape)}")
    eye = torch.eye(subspace.ambient_dim, dtype=basis.dtype, device=basis.device)
    shift = basis @ (strength * wanted)
    if add:
        return AffineMap(eye, shift)
    inside = basis @ basis.mT
    if subspace.center is not None:
        shift = shift + inside @ subspace.center.to(basis)
    return AffineMap(eye - inside, shift)
