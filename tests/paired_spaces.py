"""Two spaces of paired rows that share some dimensions, with the truth about them."""

from __future__ import annotations

import torch

P, Q, SHARED = 48, 36, 10


def planted(n: int, seed: int = 0, *, private: float = 4.0, noise: float = 0.2, p: int = P, q: int = Q):
    """Two spaces that share SHARED dimensions under stronger private ones; (x, y, shared rows of x)."""
    g = torch.Generator().manual_seed(7)
    turns = [torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=g)).Q for d in (p, q)]
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(n, SHARED, dtype=torch.float64, generator=g)
    sides = []
    for d, turn in zip((p, q), turns):
        seen = common + noise * torch.randn(n, SHARED, dtype=torch.float64, generator=g)
        rest = private * torch.randn(n, d - SHARED, dtype=torch.float64, generator=g)
        sides.append(torch.cat([seen, rest], 1) @ turn.mT + 5)
    return sides[0], sides[1], turns[0][:, :SHARED]
