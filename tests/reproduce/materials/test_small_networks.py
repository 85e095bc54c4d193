"""Small networks that differ in their seed alone, and are kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("lightning", reason="small networks train with Lightning (extra: train)")

from subspan.reproduce.materials import accuracy, pixels, small_network, trained_network


def pictures(n: int = 120) -> tuple[torch.Tensor, np.ndarray]:
    """Bright squares in one of two corners."""
    generator = np.random.default_rng(0)
    labels = generator.integers(2, size=n)
    images = generator.integers(0, 60, size=(n, 28, 28))
    for image, label in zip(images, labels):
        image[20 * label : 20 * label + 8, 4:12] += 180
    return pixels(images.astype(np.uint8)), labels


def test_networks_learn_depend_on_their_seed_and_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBSPAN_CACHE", str(tmp_path))
    images, labels = pictures()
    first = trained_network(images, labels, seed=0, epochs=4)
    assert accuracy(first, images, labels) > 0.9
    again = trained_network(images, labels, seed=0, epochs=4)
    assert torch.equal(first.conv1.weight, again.conv1.weight)
    kept = [path for path in (tmp_path / "small-networks").iterdir() if not path.name.startswith(".")]
    assert len(kept) == 1
    assert not torch.equal(small_network(1, 2, 1).conv1.weight, small_network(1, 2, 0).conv1.weight)
