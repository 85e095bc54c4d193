"""What nested and fixed classifiers cost beside plain ones: simplex logits, MRL-E heads, funnel search.

Run: python benchmarks/nested.py. Ratios are of processor times measured side by side in this process.
"""

import torch

from record import Record, parser, timed
from subspan.nn import MatryoshkaLinear, simplex_logits, simplex_vertices
from subspan.represent import MatryoshkaIndex

BATCH = 128


def simplex(record: Record) -> None:
    rows = []
    for count in (1000, 10_000):
        z = torch.randn(BATCH, count - 1)
        weight = simplex_vertices(count, dtype=torch.float32)
        error = float((simplex_logits(z) - z @ weight.mT).abs().max())
        ours = timed(lambda z=z: simplex_logits(z), 5).processor
        dense = timed(lambda z=z, w=weight: z @ w.mT).processor
        rows.append([count, 1e3 * ours, 1e3 * dense, dense / ours, weight.numel() * 4 / 2**20, error])
        del weight
    columns = [
        "classes",
        "ms, no weight",
        "ms, dense",
        "times as fast",
        "dense weight, MiB",
        "largest difference",
    ]
    record.table(f"Simplex logits of {BATCH} rows", columns, rows)
    record.target("simplex logits over the dense product, 10,000 classes", rows[-1][3], least=10)


def heads(record: Record) -> None:
    dims, classes = (8, 16, 32, 64, 128, 256, 512, 1024, 2048), 1000
    x = torch.randn(BATCH, dims[-1])
    shared, separate = MatryoshkaLinear(dims, classes, efficient=True), MatryoshkaLinear(dims, classes)
    plain = torch.nn.Linear(dims[-1], classes)
    with torch.no_grad():
        ours = timed(lambda: shared(x), 5).processor
        sliced = timed(lambda: [shared.logits(x, m) for m in dims], 5).processor
        ways = {
            "one weight, running sums": (ours, dims[-1]),
            "one weight, a product a prefix": (sliced, sum(dims)),
            "separate heads": (timed(lambda: separate(x), 5).processor, sum(dims)),
            "the largest head alone": (timed(lambda: plain(x), 5).processor, dims[-1]),
        }
    rows = [[name, 1e3 * taken, taken / ours, cost] for name, (taken, cost) in ways.items()]
    columns = ["", "processor ms", "x running sums", "multiply-adds a class"]
    record.table(f"Logits of {len(dims)} nested sizes, {classes} classes, {BATCH} rows", columns, rows)


def funnel(record: Record) -> None:
    n, d, queries = 50_000, 512, 64
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, d + 1) ** -0.5
    base = torch.randn(n, d, generator=generator) * scale
    q = base[:queries] + 0.3 * torch.randn(queries, d, generator=generator) * scale
    exact = MatryoshkaIndex(schedule=[(d, 10)]).fit(base)
    truth = exact.kneighbors(q, 10)[1]
    whole = timed(lambda: exact.kneighbors(q, 10)).processor
    rows = [["exact", 1e3 * whole, 1.0, 1.0, 1.0]]
    for name, schedule in (
        ("16 → 512, list 200", [(16, 200), (d, 10)]),
        ("funnel from 16", [(16, 200), (32, 100), (64, 50), (128, 25), (d, 10)]),
        ("funnel from 32", [(32, 400), (64, 200), (128, 100), (256, 50), (d, 10)]),
    ):
        index = MatryoshkaIndex(schedule=schedule).fit(base)
        found = index.kneighbors(q, 10)[1]
        recall = float((found.unsqueeze(1) == truth.unsqueeze(2)).any(-1).double().mean())
        ours = timed(lambda index=index: index.kneighbors(q, 10)).processor
        rows.append([name, 1e3 * ours, whole / ours, index.exact_cost_ / index.cost_per_query_, recall])
    columns = ["", "processor ms", "times as fast", "times fewer multiply-adds", "recall@10"]
    record.table(f"Search of {queries} queries in {n} rows of {d} columns, planted decay", columns, rows)


def main() -> None:
    options = parser(__doc__).parse_args()
    record = Record("nested", "random weights and rows; float32")
    simplex(record)
    heads(record)
    funnel(record)
    record.save(options.json)


if __name__ == "__main__":
    main()
