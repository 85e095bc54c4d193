"""Worlds moved by actions: their truth beside a simulation, and windows that show where they are."""

import numpy as np
import pytest
import torch

from subspan.measures import affine_recovery
from subspan.reproduce.materials import acted_vectors, acted_windows, acted_worlds


@pytest.mark.parametrize("quadratic", [0.0, 0.5])
def test_the_truth_is_the_mean_outcome_of_an_action(quadratic):
    world = acted_vectors(40_000, 1, 0, quadratic=quadratic)
    near = np.abs(world.a[:, 0] - 0.6) < 0.05
    assert world.effect(np.array([[0.6]]))[0] == pytest.approx(world.y[near].mean(), abs=0.15)
    assert world.effect(np.array([[0.6]]))[0] != pytest.approx(world.effect(np.array([[-0.6]]))[0], abs=0.5)
    moved = world.z - world.z.mean(0)
    bend = np.polyfit(world.a[:, 0], moved[:, 0], 2)[0]
    assert abs(bend) == pytest.approx(2 * quadratic, abs=0.1)


def test_vectors_hold_the_state_and_noise_hides_it():
    plain, noisy = acted_vectors(2000, 2, 1), acted_vectors(2000, 2, 1, noise=1.0)
    np.testing.assert_array_equal(plain.z, noisy.z)
    assert plain.x.shape == (2000, 10)
    assert affine_recovery(plain.z, noisy.x) < affine_recovery(plain.z, plain.x) - 0.1
    still = acted_vectors(2000, 2, 1, strength=0.0)
    assert affine_recovery(still.z, still.a) < 0.01 < 0.5 < affine_recovery(plain.z, plain.a)


def test_windows_follow_the_camera(monkeypatch):
    seen = {}

    def pixels(pictures, encoder, size):
        seen["pictures"] = pictures
        raise ModuleNotFoundError

    monkeypatch.setattr(acted_worlds, "pooled_features", pixels)
    monkeypatch.setattr(acted_worlds, "image_encoder", lambda size: None)
    picture = np.zeros((400, 600, 3), np.uint8)
    picture[200:, :, 0], picture[:, 300:, 1] = 200, 200
    monkeypatch.setattr(acted_worlds, "load", lambda name: {"coffee": picture})
    world = acted_windows(300, 0, size=32, components=6)
    assert world.x.shape == (300, 6)
    shown = torch.from_numpy(seen["pictures"]).double()
    bright = np.stack([shown[..., 1].mean((1, 2)), shown[..., 0].mean((1, 2))], 1)  # rises to the right, and down
    assert np.diag(np.corrcoef(bright.T, world.z.T)[:2, 2:]).min() > 0.99
