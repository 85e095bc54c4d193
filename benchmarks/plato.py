"""Local CKA and CCA at 30 000 anchors: closed forms beside kernel matrices and scikit-learn's CCA.

Run: python benchmarks/plato.py. Times are of one process; numbers marked "extrapolated" were not measured: the kernel
form is timed at the sizes shown and continued with n².
"""

import argparse
import os
import platform
import resource
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.cross_decomposition import CCA

from subspan.align import SubspaceAligner
from subspan.statistics import JointMoments, local_kernel_cka

P, Q, SHARED = 512, 384, 20


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def peak() -> float:
    """Largest resident memory so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def spaces(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two spaces with SHARED dimensions in common under stronger private ones, float32."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(n, SHARED, generator=generator)
    sides = []
    for d in (P, Q):
        turn = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
        rows = 2 * torch.randn(n, d, generator=generator)
        rows[:, :SHARED] = common + 0.3 * torch.randn(n, SHARED, generator=generator)
        sides.append(rows @ turn.mT)
    return sides[0], sides[1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--anchors", type=int, default=30_000)
    parser.add_argument("--queries", type=int, default=500)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    n, m = options.anchors, options.queries
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores, torch on {torch.get_num_threads()} threads")
    x, y = spaces(n + m)
    anchors, queries = (x[:n], y[:n]), (x[n:], y[n:])
    before = peak()

    def stream() -> SubspaceAligner:
        model = SubspaceAligner(50, "local_cka", shrinkage=0.0)
        for start in range(0, n, 5000):
            model.partial_fit(*(rows[start : start + 5000] for rows in anchors))
        return model

    fitting, model = timed(stream)
    solving, correlations = timed(lambda: model.canonical_correlations_)
    scoring, scores = timed(lambda: model.similarity(*queries))
    full = SubspaceAligner(subspace=None, method="local_cka")
    full_time, _ = timed(lambda: full.fit(*anchors).similarity(*queries))
    print(f"{n} anchors of {P} and {Q} columns, {m} x {m} queries")
    print(f"  moments in one pass              {fitting:8.2f} s")
    print(f"  CCA, its held-out check included {solving:8.2f} s")
    print(f"  local CKA of all pairs, k = 50   {scoring:8.3f} s   ({m * m} scores)")
    print(f"  full spaces, fit and local CKA   {full_time:8.2f} s")
    print(f"  memory added                     {peak() - before:8.0f} MiB ((p + q)² and copies; one kernel of")
    print(f"                                            {n} anchors would take {n * n * 8 / 2**20:.0f} MiB)")
    top = float(((scores >= scores.diagonal().unsqueeze(1)).sum(1) <= 5).double().mean())
    print(f"  top-5 of the planted pairs {top:.3f}, first correlation {correlations[0]:.3f}")

    print("kernel matrices for each query, one thread, 4 x 4 queries of the same coordinates")
    side_x, side_y = model.coordinates_
    sizes, seconds = (250, 500, 1000, 2000), []
    for size in sizes:
        a, b = side_x.map(anchors[0][:size].double()), side_y.map(anchors[1][:size].double())
        u, v = side_x.map(queries[0][:4].double()), side_y.map(queries[1][:4].double())
        spent, naive = timed(lambda a=a, b=b, u=u, v=v: local_kernel_cka(a, b, u, v, kernel="linear"))
        ours = JointMoments(50, 50).update(a, b).local_cka(u, v)
        seconds.append(spent)
        print(f"  n = {size:5d}   {spent:8.3f} s   largest difference {float((ours - naive).abs().max()):.1e}")
    # Kernels are made once a query and side here; the published program makes them for each of the m² pairs. Time grows
    # at least with their n² numbers.
    per_query = seconds[-1] / 8 * (n / sizes[-1]) ** 2
    print(f"  extrapolated (n²) to {n} anchors and {m} + {m} queries: {per_query * 2 * m / 3600:.1f} h,")
    print(f"  {per_query * 2 * m / scoring:.0f} x the closed form, {n * n * 8 / 2**20:.0f} MiB a kernel")

    print("CCA of 2000 rows, 30 and 24 columns, 5 pairs; scikit-learn with its own settings")
    a, b = (rows[:2000, :columns].double() for rows, columns in zip(anchors, (30, 24)))
    a, b = a + 2 * b @ torch.randn(24, 30, dtype=torch.float64), b
    ours, small = timed(lambda: SubspaceAligner(5, shrinkage=0.0).fit(a, b))
    theirs, peer = timed(lambda: CCA(5).fit(a.numpy(), b.numpy()))
    found = [np.corrcoef(u, v)[0, 1] for u, v in zip(*(part.T for part in peer.transform(a.numpy(), b.numpy())))]
    difference = np.abs(small.canonical_correlations_ - found).max()
    print(f"  subspan {ours:.3f} s, scikit-learn {theirs:.3f} s ({theirs / ours:.1f} x ours)")
    print(f"  largest difference of the correlations {difference:.1e}")


if __name__ == "__main__":
    main()
