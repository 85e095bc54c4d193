"""What tests of subspace clusterers share: planted unions of subspaces."""

import numpy as np


def union_of_subspaces(*, affine=False, noise=0.0, n=40, k=3, dim=4, d=30, seed=0):
    """(rows (k n, d), labels (k n,), bases): n rows in each of k random subspaces, in random order."""
    random = np.random.default_rng(seed)
    bases = [np.linalg.qr(random.normal(size=(d, dim)))[0] for _ in range(k)]
    rows = [random.normal(size=(n, dim)) @ basis.T + (3 * random.normal(size=d) if affine else 0) for basis in bases]
    order = random.permutation(k * n)
    x = np.vstack(rows) + noise * random.normal(size=(k * n, d))
    return x[order], np.repeat(np.arange(k), n)[order], bases
