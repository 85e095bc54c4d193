"""Random draws that depend on what they are for, and not on what was drawn before."""

from __future__ import annotations

import hashlib

import torch


def generator_for(random_state: int, *what: object) -> torch.Generator:
    """A generator of its own for a seed and what is drawn (the name of a tensor): any order gives the same draws."""
    digest = hashlib.sha256("/".join(map(str, (random_state, *what))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
