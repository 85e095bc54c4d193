"""Draw docs/images/butterfly.png: the factors that peeling finds in the matrix of the Fourier transform."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from drawing import panels, save

from subspan.nn import butterfly_factorize, butterfly_multiply
from subspan.reproduce.butterfly import transforms

N = 32


def show(axes: Any, matrix: torch.Tensor, title: str) -> None:
    """The real part, black below zero, white above and grey at it."""
    values = matrix.real.numpy()
    most = np.abs(values).max()
    axes.imshow(values, cmap="gray", vmin=-most, vmax=most)
    axes.set_title(title, fontsize=10)


def main() -> None:
    """Write the picture beside this file."""
    target = transforms(N, 0)["DFT"]
    found = butterfly_factorize(target)
    eye = torch.eye(N, dtype=target.dtype)
    factors = []
    for level in range(len(found.twiddle)):
        # All other levels are the identity, so that one factor is left.
        alone = torch.eye(2, dtype=target.dtype).expand(*found.twiddle.shape).clone()
        alone[level] = found.twiddle[level]
        factors.append(butterfly_multiply(alone, eye).mT)
    permutation = eye[:, found.permutation].mT
    product = permutation
    for factor in factors:
        product = factor @ product
    error = (product - target).abs()

    figure, axes = panels(6.3, 3, 3)
    parts = [*((factor, f"$B_{level + 1}$") for level, factor in enumerate(factors)), (permutation, "$P$")]
    for each, (matrix, title) in zip(axes.flat, [*reversed(parts[:-1]), parts[-1]]):
        show(each, matrix, title)
    show(axes[2, 0], product, "product")
    show(axes[2, 1], target, "Fourier transform")
    image = axes[2, 2].imshow(error / 1e-16, cmap="viridis", vmin=0)
    axes[2, 2].set_title("difference, $10^{-16}$", fontsize=10)
    figure.colorbar(image, ax=axes[2, 2], shrink=0.7)
    for each in axes.flat:
        each.set(xticks=[], yticks=[])
        each.spines[:].set_visible(True)
    save(figure, Path(__file__))
    print(f"relative error {found.relative_error:.1e}, largest difference {float(error.max()):.1e}")


if __name__ == "__main__":
    main()
