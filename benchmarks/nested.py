"""What nested and fixed classifiers cost beside plain ones: simplex logits, MRL-E heads, funnel search.

Run: python benchmarks/nested.py. Ratios are of times measured side by side in this process.
"""

import os
import platform
import time
from collections.abc import Callable

import torch

from subspan.nn import MatryoshkaLinear, simplex_logits, simplex_vertices
from subspan.represent import MatryoshkaIndex

BATCH = 128


def seconds(function: Callable[[], object], repeats: int = 5) -> float:
    """Best of several runs after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def simplex() -> None:
    for count in (1000, 10_000):
        z = torch.randn(BATCH, count - 1)
        weight = simplex_vertices(count, dtype=torch.float32)
        error = float((simplex_logits(z) - z @ weight.mT).abs().max())
        ours, dense = seconds(lambda z=z: simplex_logits(z)), seconds(lambda z=z, w=weight: z @ w.mT, 3)
        print(
            f"simplex, K = {count:>6}: {ours * 1e3:8.3f} ms, dense {dense * 1e3:8.2f} ms ({dense / ours:.0f} x); "
            f"weight 0 MB, dense {weight.numel() * 4 / 2**20:.0f} MB; largest difference {error:.1e}"
        )
        del weight


def heads() -> None:
    dims, classes = (8, 16, 32, 64, 128, 256, 512, 1024, 2048), 1000
    x = torch.randn(BATCH, dims[-1])
    shared, separate = MatryoshkaLinear(dims, classes, efficient=True), MatryoshkaLinear(dims, classes)
    plain = torch.nn.Linear(dims[-1], classes)
    with torch.no_grad():
        sliced = seconds(lambda: [shared.logits(x, m) for m in dims])
        ours, apart, one = (seconds(lambda layer=layer: layer(x)) for layer in (shared, separate, plain))
    print(
        f"heads for {len(dims)} sizes: running sums {ours * 1e3:.2f} ms, slices of the weight {sliced * 1e3:.2f} ms "
        f"({sliced / ours:.2f} x), separate heads {apart * 1e3:.2f} ms ({apart / ours:.2f} x), the largest head alone "
        f"{one * 1e3:.2f} ms; multiply-adds {dims[-1]} against {sum(dims)} a class"
    )


def funnel() -> None:
    n, d, queries = 50_000, 512, 64
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, d + 1) ** -0.5
    base = torch.randn(n, d, generator=generator) * scale
    q = base[:queries] + 0.3 * torch.randn(queries, d, generator=generator) * scale
    exact = MatryoshkaIndex(schedule=[(d, 10)]).fit(base)
    for name, schedule in (
        ("16 → 512, list 200", [(16, 200), (d, 10)]),
        ("funnel from 16", [(16, 200), (32, 100), (64, 50), (128, 25), (d, 10)]),
        ("funnel from 32", [(32, 400), (64, 200), (128, 100), (256, 50), (d, 10)]),
    ):
        index = MatryoshkaIndex(schedule=schedule).fit(base)
        truth, found = (part.kneighbors(q, 10)[1] for part in (exact, index))
        recall = float((found.unsqueeze(1) == truth.unsqueeze(2)).any(-1).double().mean())
        ours, whole = (
            seconds(lambda index=index: index.kneighbors(q, 10), 3),
            seconds(lambda: exact.kneighbors(q, 10), 3),
        )
        print(
            f"{name}: {ours * 1e3:.0f} ms, exact {whole * 1e3:.0f} ms ({whole / ours:.1f} x); multiply-adds "
            f"{index.exact_cost_ / index.cost_per_query_:.1f} x fewer; recall@10 {recall:.3f}"
        )


def main() -> None:
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores, torch on {torch.get_num_threads()} threads")
    simplex()
    heads()
    funnel()


if __name__ == "__main__":
    main()
