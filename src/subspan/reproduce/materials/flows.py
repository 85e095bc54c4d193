"""Dynamics made here: the Lorenz attractor, and the wake of a cylinder by a lattice Boltzmann method."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Float32

from subspan.base import Progress, silent
from subspan.datasets.cache import entry_folder, whole_folder

_DIRECTIONS = np.array([[0, 0], [1, 0], [0, 1], [-1, 0], [0, -1], [1, 1], [-1, 1], [-1, -1], [1, -1]])
_WEIGHTS = np.array([4 / 9, *[1 / 9] * 4, *[1 / 36] * 4], dtype=np.float32)
_OPPOSITE = np.array([0, 3, 4, 1, 2, 7, 8, 5, 6])


def lorenz(count: int, steps: int, *, dt: float = 0.02, seed: int = 0) -> Float[np.ndarray, "m n 3"]:
    """Trajectories (count, steps, 3) on the Lorenz attractor, by Runge-Kutta of fourth order.

    Source: Lorenz (1963), with sigma = 10, rho = 28, beta = 8/3; starts are drawn, and run until they are on it.
    """
    state = np.random.default_rng(seed).normal(size=(count, 3)) * [8, 8, 8] + [0, 0, 25]

    def slope(x: np.ndarray) -> np.ndarray:
        a, b, c = x.T
        return np.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c], axis=1)

    kept = []
    for step in range(int(20 / dt) + steps):
        if step >= int(20 / dt):
            kept.append(state)
        state = _runge_kutta(slope, state, dt)
    return np.stack(kept, axis=1)


def _runge_kutta(slope: Callable[[np.ndarray], np.ndarray], x: np.ndarray, dt: float) -> np.ndarray:
    first = slope(x)
    second = slope(x + dt / 2 * first)
    third = slope(x + dt / 2 * second)
    return x + dt / 6 * (first + 2 * second + 2 * third + slope(x + dt * third))


def vortex_street(
    frames: int,
    *,
    reynolds: float = 120.0,
    speed: float = 0.1,
    diameter: int = 10,
    every: int = 25,
    warm_up: int = 7500,
    progress: Progress = silent,
) -> Float32[np.ndarray, "n 2 64 64"]:
    """Velocities (frames, 2, 64, 64) in the wake of a cylinder, one picture each `every` steps of the lattice.

    A channel of 160 x 80 cells, full bounce-back on the cylinder, equilibrium at the inlet, open at the outlet,
    periodic across; 64 x 64 cells behind the cylinder are kept, in units of the inflow. Cached.

    Source: the lattice Bhatnagar-Gross-Krook model D2Q9, Qian, d'Humières & Lallemand (1992).
    """
    key = f"{frames} {reynolds:g} {speed:g} {diameter} {every} {warm_up}"
    folder = entry_folder("vortex-street", key)
    if not (folder / "flow.npy").exists():
        with whole_folder(folder) as unfinished:
            if unfinished is not None:
                flow = _wake(frames, reynolds, speed, diameter, every, warm_up, progress)
                np.save(unfinished / "flow.npy", flow)
    return np.load(folder / "flow.npy", allow_pickle=False)


def _wake(
    frames: int, reynolds: float, speed: float, diameter: int, every: int, warm_up: int, progress: Progress
) -> Float32[np.ndarray, "n 2 64 64"]:
    length, height = 160, 80
    rate = np.float32(1 / (3 * speed * diameter / reynolds + 0.5))
    x, y = np.meshgrid(np.arange(length), np.arange(height), indexing="ij")
    solid = (x - length / 4) ** 2 + (y - height / 2 + 0.5) ** 2 < diameter**2 / 4
    # A small slant of the inflow, which fades, ends the symmetry.
    inflow = np.zeros((2, height), np.float32)
    inflow[0] = speed
    inflow[1] = 1e-2 * speed * np.sin(2 * np.pi * np.arange(height) / height)
    velocity = np.repeat(inflow[:, None], length, axis=1)
    f = _equilibrium(np.ones((length, height), np.float32), velocity)
    kept = []
    for step in range(warm_up + frames * every):
        if step % 500 == 0:
            progress("cylinder wake", step / (warm_up + frames * every))
        f[[3, 6, 7], -1] = f[[3, 6, 7], -2]
        density = f.sum(axis=0)
        velocity = np.tensordot(_DIRECTIONS.T.astype(np.float32), f, axes=1) / density
        velocity[:, 0] = inflow
        density[0] = 1.0
        balance = _equilibrium(density, velocity)
        f[:, 0] = balance[:, 0]
        after = f + rate * (balance - f)
        after[:, solid] = f[_OPPOSITE][:, solid]
        for i, (across, up) in enumerate(_DIRECTIONS):
            f[i] = np.roll(after[i], (across, up), axis=(0, 1))
        if step == warm_up // 4:
            inflow[1] = 0
        if step >= warm_up and (step - warm_up) % every == 0:
            kept.append(velocity[:, 48:112, 8:72].swapaxes(1, 2) / speed)
    return np.stack(kept).astype(np.float32)


def _equilibrium(density: np.ndarray, velocity: np.ndarray) -> np.ndarray:
    along = np.tensordot(_DIRECTIONS.astype(np.float32), velocity, axes=1)
    return density * _WEIGHTS[:, None, None] * (1 + 3 * along + 4.5 * along**2 - 1.5 * (velocity**2).sum(axis=0))
