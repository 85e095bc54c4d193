"""Products of Householder reflections: compact WY form beside torch.linalg.householder_product and one after the other.

Also a training step of each map that keeps a matrix orthonormal. Run: python benchmarks/orthogonal.py [--json FILE]
"""

from functools import partial

import torch
from torch import Tensor, nn

from record import Record, parser, timed
from subspan.nn import register_orthonormal
from subspan.nn.orthogonal import householder_apply, householder_columns

SIZES = (64, 128, 256, 512, 1024)
ROWS = 64


def reflectors(d: int, k: int) -> Tensor:
    """Lower trapezoidal, with a unit diagonal, as LAPACK stores them."""
    return torch.randn(d, k).tril(-1) + torch.eye(d, k)


def by_torch(v: Tensor) -> Tensor:
    return torch.linalg.householder_product(v, 2 / v.square().sum(0))


def formed_by_torch(v: Tensor) -> Tensor:
    """The whole square product: LAPACK takes a missing reflection as a zero factor."""
    d, k = v.shape
    tau = torch.cat([2 / v.square().sum(0), torch.zeros(d - k)])
    return torch.linalg.householder_product(torch.cat([v, torch.eye(d)[:, k:]], 1), tau)


def one_by_one(v: Tensor) -> Tensor:
    return reflected(v, torch.eye(*v.shape))


def reflected(v: Tensor, x: Tensor) -> Tensor:
    for column in reversed(range(v.shape[1])):
        each = v[:, column]
        x = x - torch.outer(2 / each.square().sum() * each, each @ x)
    return x


def step(make, v: Tensor, target: Tensor) -> None:
    (make(v.requires_grad_()) * target).sum().backward()


def trained(layer: nn.Module, x: Tensor) -> None:
    layer(x).square().sum().backward()


def main() -> None:
    options = parser(__doc__).parse_args()
    record = Record("orthogonal", "float32; k = d / 4 columns and k = d")
    torch.manual_seed(0)
    for title, share in (("k = d / 4", 4), ("k = d", 1)):
        rows = []
        for d in SIZES:
            k = d // share
            v, target = reflectors(d, k), torch.randn(d, k)
            ways = {"compact WY": householder_columns, "householder_product": by_torch, "one by one": one_by_one}
            with torch.no_grad():
                found = {name: make(v) for name, make in ways.items()}
                for other in found.values():
                    torch.testing.assert_close(found["compact WY"], other, atol=2e-4, rtol=0)
                plain = {name: 1e3 * timed(partial(make, v)).processor for name, make in ways.items()}
            both = {name: 1e3 * timed(partial(step, make, v, target)).processor for name, make in ways.items()}
            rows.append([d, *plain.values(), *both.values()])
        names = [f"{name}, ms" for name in ("compact WY", "householder_product", "one by one")]
        record.table(f"The first k columns, {title}", ["d", *names, *(f"{name} with backward" for name in names)], rows)
        record.target(f"householder_product over compact WY with backward, d = {SIZES[-1]}, {title}",
                      rows[-1][5] / rows[-1][4], least=1)  # fmt: skip
        record.target(f"one by one over compact WY with backward, d = {SIZES[-1]}, {title}",
                      rows[-1][6] / rows[-1][4], least=1)  # fmt: skip
    rows = []
    for d in SIZES:
        v, x = reflectors(d, d // 4), torch.randn(d, ROWS)
        with torch.no_grad():
            ours = 1e3 * timed(lambda v=v, x=x: householder_apply(v, x)).processor
            formed = 1e3 * timed(lambda v=v, x=x: formed_by_torch(v) @ x).processor
            single = 1e3 * timed(lambda v=v, x=x: reflected(v, x)).processor
        rows.append([d, ours, formed, single])
    record.table(f"The product applied to {ROWS} columns, k = d / 4",
                 ["d", "compact WY, ms", "formed by householder_product, ms", "one by one, ms"], rows)  # fmt: skip
    rows = []
    for d in SIZES[:-1]:
        spent = []
        for name in ("householder", "cayley", "matrix_exp", "givens", "polar"):
            layer = register_orthonormal(nn.Linear(d, d, bias=False), "weight", name)
            spent.append(1e3 * timed(lambda layer=layer: trained(layer, torch.ones(ROWS, layer.in_features))).processor)
        plain = nn.Linear(d, d, bias=False)
        rows.append(
            [d, *spent, 1e3 * timed(lambda layer=plain: trained(layer, torch.ones(ROWS, layer.in_features))).processor]
        )
    names = ["householder", "cayley", "matrix_exp", "givens", "polar", "unconstrained"]
    record.table(
        f"A step of a square layer, forward and backward, {ROWS} rows", ["d", *(f"{name}, ms" for name in names)], rows
    )
    record.note("Floor: the first k of d columns from k reflections take 2 d k² multiply-adds in WY form (Gram matrix "
                "and product) and k³ / 6 for the triangle; one by one as many, in k passes over it all.")  # fmt: skip
    record.save(options.json)


if __name__ == "__main__":
    main()
