"""A point in two rooms with a door between them, seen from above: the world that a model is to learn from pixels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

# Lengths in sides of the square; the wall stands in the middle, its door in the middle of it.
SPEED, WALL, DOOR, EDGE = 0.04, 0.03, 0.12, 0.05
BLOCK = 5
"""Steps of the world that one action of the model spans."""
SIZE = 32
REACHED = 0.07


class Episodes(NamedTuple):
    """Places (e, t, 2) at every block's start and the end, and the blocks of actions (e, t, 10), the last one NaN."""

    places: Float[np.ndarray, "e t 2"]
    actions: Float[np.ndarray, "e t a"]

    def images(self) -> Float[Tensor, "e t c h w"]:
        """What is seen."""
        return rendered(self.places)


def moved(places: Float[np.ndarray, "n 2"], actions: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
    """One step: velocities of at most 1, walls that stop what runs into them."""
    length = np.linalg.norm(actions, axis=1, keepdims=True)
    there = np.clip(places + SPEED * actions / np.maximum(length, 1), EDGE, 1 - EDGE)
    through = (np.abs(there[:, 1] - 0.5) < DOOR) & (np.abs(places[:, 1] - 0.5) < DOOR)
    side = np.where(places[:, 0] < 0.5, -1, 1)
    near = 0.5 + side * WALL
    inside = np.abs(places[:, 0] - 0.5) < WALL
    stopped = ~through & ~inside & ((there[:, 0] - near) * side < 0)
    there[stopped, 0] = near[stopped]
    # Between the rooms the door's own walls hold.
    low, high = 0.5 - DOOR, 0.5 + DOOR
    held = (np.abs(there[:, 0] - 0.5) < WALL) & ~stopped
    there[held, 1] = there[held, 1].clip(low, high)
    return there


def towards(places: Float[np.ndarray, "n 2"], goals: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
    """Unit velocities to goals, through the door where they lie in the other room."""
    across = (places[:, 0] - 0.5) * (goals[:, 0] - 0.5) < 0
    # First in front of the door, then through it.
    before = np.stack([0.5 + np.sign(places[:, 0] - 0.5) * 2 * WALL, np.full(len(places), 0.5)], 1)
    ready = np.abs(places[:, 1] - 0.5) < DOOR / 2
    behind = np.stack([0.5 - np.sign(places[:, 0] - 0.5) * 3 * WALL, np.full(len(places), 0.5)], 1)
    wanted = np.where(across[:, None], np.where(ready[:, None], behind, before), goals) - places
    return wanted / np.maximum(np.linalg.norm(wanted, axis=1, keepdims=True), 1e-6)


def rendered(places: Float[np.ndarray, "*n 2"], size: int = SIZE) -> Float[Tensor, "*n c h w"]:
    """Pictures in [0, 1]: the walls in blue, the point a red spot."""
    at = (torch.arange(size) + 0.5) / size
    x, y = at[None, :], at[:, None]
    wall = ((x - 0.5).abs() < WALL) & ((y - 0.5).abs() > DOOR)
    spot = torch.as_tensor(places, dtype=torch.float32)[..., None, None, :]
    square = (x - spot[..., 0]).square() + (y - spot[..., 1]).square()
    red = torch.exp(-square / (2 * 0.035**2))
    blue = wall.float().expand_as(red)
    return torch.stack([red, torch.zeros_like(red), blue], -3)


def episodes(count: int, blocks: int, seed: int, noise: float = 1.3) -> Episodes:
    """Walks to random goals, one after the other, by a guide whose velocities are disturbed by normal noise."""
    draws = np.random.default_rng(seed)
    here, goals = free(count, draws), free(count, draws)
    places, actions = [here], []
    for _ in range(blocks):
        taken = []
        for _ in range(BLOCK):
            arrived = np.linalg.norm(goals - here, axis=1) < REACHED
            goals[arrived] = free(int(arrived.sum()), draws)
            action = towards(here, goals) + noise * draws.normal(size=here.shape)
            action /= np.maximum(np.linalg.norm(action, axis=1, keepdims=True), 1)
            here = moved(here, action)
            taken.append(action)
        places.append(here)
        actions.append(np.concatenate(taken, 1))
    actions.append(np.full_like(actions[0], np.nan))
    return Episodes(np.stack(places, 1), np.stack(actions, 1))


def free(count: int, draws: np.random.Generator) -> Float[np.ndarray, "n 2"]:
    """Random places outside the wall."""
    found = draws.uniform(EDGE, 1 - EDGE, (count, 2))
    side = np.where(found[:, 0] < 0.5, -1, 1)
    within = np.abs(found[:, 0] - 0.5) < 2 * WALL
    found[within, 0] = 0.5 + 2 * WALL * side[within]
    return found
