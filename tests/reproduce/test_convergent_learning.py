"""The parts of the protocol of convergent learning, in small."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from subspan.geometry import AffineMap
from subspan.models import permute_units
from subspan.probe import ConvergentLearning, layer_moments
from subspan.reproduce import convergent_learning
from subspan.reproduce.materials import pixels, small_network


def pictures(n: int = 120) -> tuple[torch.Tensor, np.ndarray]:
    """Bright squares in one of two corners."""
    generator = np.random.default_rng(0)
    labels = generator.integers(2, size=n)
    images = generator.integers(0, 60, size=(n, 28, 28))
    for image, label in zip(images, labels):
        image[20 * label : 20 * label + 8, 4:12] += 180
    return pixels(images.astype(np.uint8)), labels


def test_a_reordered_network_is_found_and_stitched():
    network = small_network(1, 2, 0).eval()
    images, _ = pictures(40)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    other = permute_units(network, "conv1", "conv2", order)
    moments = layer_moments([network, other], ["relu1"], [images])[0, 1][0]
    with torch.no_grad():
        truth = network(images).argmax(1).numpy()
    model = ConvergentLearning.from_moments(moments, sign="signed")
    assert torch.equal(model.matching_.partner[model.matching_.partner >= 0], order[model.matching_.partner >= 0])
    units = model.alignment("matching").to(torch.float32)
    joined = convergent_learning.stitched_accuracy(network, other, "relu1", units, images, truth)
    assert joined == 1
    blank = AffineMap(torch.zeros(32, 32), torch.zeros(32))
    with torch.no_grad():
        constant = network[2:](torch.zeros(1, 32, 28, 28)).argmax(1).item()
    kept = convergent_learning.stitched_accuracy(network, other, "relu1", blank, images, truth)
    assert kept == pytest.approx(float((truth == constant).mean()))
