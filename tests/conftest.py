"""What every test shares: shape checking, planted subspaces, and the folder of shared data sets."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import shape_checking

# Before anything imports subspan: from here on each call in it is checked against its annotated shapes and dtypes.
shape_checking.install()

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("subspan", deadline=None)
settings.register_profile("subspan-ci", deadline=None, derandomize=True, database=None, print_blob=True)
settings.load_profile("subspan-ci" if os.environ.get("CI") else "subspan")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first: one that starts last leaves the other processes idle."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish() -> None:
    """Leave what is imported by now, millions of objects, out of every further collection of garbage."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


@pytest.fixture(autouse=True)
def seeded_draws() -> None:
    """Start the global generators of every test anew: what it draws is the same alone and in any order of tests."""
    torch.manual_seed(0)


class Planted(NamedTuple):
    """Data with a known subspace: `data (n, d)` and the orthonormal `basis (d, k)` it was drawn from."""

    data: torch.Tensor
    basis: torch.Tensor


@pytest.fixture(scope="session")
def planted() -> Callable[..., Planted]:
    """Draw points of a random k-dimensional subspace, with standard deviations falling from 2 to 1 along its basis."""

    def draw(
        n: int = 500,
        d: int = 20,
        k: int = 3,
        *,
        noise: float = 0.01,
        offset: float | torch.Tensor = 0.0,
        dtype: torch.dtype = torch.float64,
        generator: torch.Generator | None = None,
    ) -> Planted:
        if generator is None:
            generator = torch.Generator().manual_seed(0)
        # Drawn in double precision, so that the same seed plants the same subspace whatever the dtype.
        basis = torch.linalg.qr(torch.randn(d, k, dtype=torch.float64, generator=generator)).Q
        scale = torch.linspace(2.0, 1.0, k, dtype=torch.float64)
        coordinates = torch.randn(n, k, dtype=torch.float64, generator=generator) * scale
        perturbation = noise * torch.randn(n, d, dtype=torch.float64, generator=generator)
        return Planted((coordinates @ basis.T + perturbation + offset).to(dtype), basis.to(dtype))

    return draw


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of shared data sets; the test is skipped where SUBSPAN_DATA names none."""
    value = os.environ.get("SUBSPAN_DATA")
    if not value:
        pytest.skip("SUBSPAN_DATA is not set: the shared data sets are not on this machine")
    folder = Path(value)
    if not folder.is_dir():
        pytest.fail(f"SUBSPAN_DATA is {value!r}, which is not a folder")
    return folder
