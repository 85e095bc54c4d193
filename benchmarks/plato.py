"""Local CKA and CCA at 30 000 anchors: closed forms beside kernel matrices and scikit-learn's CCA.

Run: python benchmarks/plato.py. Times are of one process; numbers marked "extrapolated" were not measured: the kernel
form is timed at the sizes shown and continued with n².
"""

import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.cross_decomposition import CCA

from record import Record, parser, peak
from subspan.align import SubspaceAligner
from subspan.measures import local_kernel_cka
from subspan.statistics import JointMoments

P, Q, SHARED = 512, 384, 20


def once(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


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
    arguments = parser(__doc__)
    arguments.add_argument("--anchors", type=int, default=30_000)
    arguments.add_argument("--queries", type=int, default=500)
    options = arguments.parse_args()
    warnings.simplefilter("ignore")
    n, m = options.anchors, options.queries
    record = Record("plato", f"{n} anchors of {P} and {Q} columns, {m} x {m} queries")
    x, y = spaces(n + m)
    anchors, queries = (x[:n], y[:n]), (x[n:], y[n:])
    before = peak()

    def stream() -> SubspaceAligner:
        model = SubspaceAligner(50, "local_cka", shrinkage=0.0)
        for start in range(0, n, 5000):
            model.partial_fit(*(rows[start : start + 5000] for rows in anchors))
        return model

    fitting, model = once(stream)
    solving, correlations = once(lambda: model.canonical_correlations_)
    scoring, scores = once(lambda: model.similarity(*queries))
    full = SubspaceAligner(subspace=None, method="local_cka")
    full_time, _ = once(lambda: full.fit(*anchors).similarity(*queries))
    rows = [
        ["moments in one pass", fitting],
        ["CCA, its held-out check included", solving],
        [f"local CKA of all {m * m} pairs, k = 50", scoring],
        ["full spaces, fit and local CKA", full_time],
    ]
    record.table("Closed forms", ["", "seconds"], rows)
    record.note(
        f"Memory added: {peak() - before:.0f} MiB; one kernel of {n} anchors would take {n * n * 8 / 2**20:.0f} MiB."
    )
    top = float(((scores >= scores.diagonal().unsqueeze(1)).sum(1) <= 5).double().mean())
    record.note(f"Top-5 of the planted pairs {top:.3f}, first correlation {correlations[0]:.3f}.")

    side_x, side_y = model.coordinates_
    sizes, seconds, rows = (250, 500, 1000, 2000), [], []
    for size in sizes:
        a, b = side_x.map(anchors[0][:size].double()), side_y.map(anchors[1][:size].double())
        u, v = side_x.map(queries[0][:4].double()), side_y.map(queries[1][:4].double())
        spent, naive = once(lambda a=a, b=b, u=u, v=v: local_kernel_cka(a, b, u, v, kernel="linear"))
        ours = JointMoments(50, 50).update(a, b).local_cka(u, v)
        seconds.append(spent)
        rows.append([size, spent, float((ours - naive).abs().max())])
    columns = ["anchors", "seconds", "largest difference from the closed form"]
    record.table("Kernel matrices for each query, 4 x 4 queries of the same coordinates", columns, rows)
    # Kernels are made once a query and side here; the published program makes them for each of the m² pairs. Time grows
    # at least with their n² numbers.
    per_query = seconds[-1] / 8 * (n / sizes[-1]) ** 2
    record.note(
        f"Extrapolated with n², not measured, to {n} anchors and {m} + {m} queries: {per_query * 2 * m / 3600:.1f} h, "
        f"{per_query * 2 * m / scoring:.0f} x the closed form, {n * n * 8 / 2**20:.0f} MiB a kernel."
    )

    a, b = (rows[:2000, :columns].double() for rows, columns in zip(anchors, (30, 24)))
    a, b = a + 2 * b @ torch.randn(24, 30, dtype=torch.float64), b
    ours, small = once(lambda: SubspaceAligner(5, shrinkage=0.0).fit(a, b))
    theirs, peer = once(lambda: CCA(5).fit(a.numpy(), b.numpy()))
    # At its own settings its iteration stops short of the third digit.
    longer, settled = once(lambda: CCA(5, tol=1e-14, max_iter=100_000).fit(a.numpy(), b.numpy()))
    gaps = []
    for model in (peer, settled):
        found = [np.corrcoef(u, v)[0, 1] for u, v in zip(*(part.T for part in model.transform(a.numpy(), b.numpy())))]
        gaps.append(float(np.abs(small.canonical_correlations_ - found).max()))
    rows = [
        ["subspan", ours, 1.0, 0.0],
        ["scikit-learn, its own settings", theirs, theirs / ours, gaps[0]],
        ["scikit-learn, tolerance 1e-14", longer, longer / ours, gaps[1]],
    ]
    names = ["", "seconds", "x ours", "largest difference of a correlation"]
    record.table("CCA of 2000 rows, 30 and 24 columns, 5 pairs", names, rows)
    record.target("local CKA of all query pairs and CCA, seconds", solving + scoring, most=10)
    record.target("largest difference of the correlations from scikit-learn's, settled", gaps[1], most=1e-3)
    record.save(options.json)


if __name__ == "__main__":
    main()
