"""A forward and backward pass of Hydra's gated cosines: two matrix products beside gated keys written out.

Memory is the rise of the peak, the smaller one first. Run: python benchmarks/hydra.py [--batch 1024] [--json FILE]
"""

import torch
from torch.nn import functional as F

from record import Record, parser, peak, timed
from subspan.nn import gated_cosine


def written_out(z: torch.Tensor, k: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Keys gated once a query, (n, m, d), as in the authors' code before their own kernel."""
    queries = F.normalize(z * g, dim=-1)
    keys = F.normalize(torch.einsum("nk,bk->bnk", k, g), dim=-1)
    return torch.einsum("bj,bnj->bn", queries, keys)


FORMS = {"two products": gated_cosine, "keys written out": written_out}


def step(form: str, inputs: list[torch.Tensor]) -> torch.Tensor:
    for each in inputs:
        each.grad = None
    found = FORMS[form](*inputs)
    found.logsumexp(-1).sum().backward()
    return found.detach()


def drawn(batch: int, dim: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    z, k, g = torch.randn(batch, dim), torch.randn(batch, dim), torch.rand(batch, dim)
    return [each.requires_grad_() for each in (z, k, g)]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--batch", type=int, default=1024)
    arguments.add_argument("--dim", type=int, default=256)
    arguments.add_argument("--repeats", type=int, default=1)
    options = arguments.parse_args()
    record = Record("hydra", f"{options.batch} queries and keys of {options.dim} dimensions, float32")
    inputs = drawn(options.batch, options.dim)
    for form in FORMS:
        step(form, [each[:8].detach().requires_grad_() for each in inputs])
    results, rows, before = {}, [], peak()
    for form in FORMS:
        results[form] = step(form, inputs)
        memory = peak() - before
        spent = timed(lambda form=form: step(form, inputs), repeats=options.repeats, warm=False)
        rows.append([form, 1e3 * spent.processor, memory])
    record.table("A forward and backward pass", ["form", "ms", "MB"], rows)
    ours, theirs = rows
    apart = float((results["two products"] - results["keys written out"]).abs().max())
    record.target("times as fast", theirs[1] / ours[1], least=5)
    record.target("times less memory", theirs[2] / max(ours[2], 1.0), least=20)
    record.target("largest difference of a cosine", apart, most=1e-5)
    record.note("Milliseconds of the processor.")
    record.save(options.json)


if __name__ == "__main__":
    main()
