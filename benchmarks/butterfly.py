"""Butterfly multiply beside the dense one and the fast Fourier transform over N, forward and backward; recovery times.

All rows are measured side by side in one run. Run: python benchmarks/butterfly.py [--largest 4096] [--json FILE]
[--official FOLDER], where the authors' torch_butterfly (github.com/HazyResearch/butterfly) lies, built in its place by
`FORCE_CPU=1 python setup.py build_ext --inplace`: its compiled multiply and its form in torch are measured beside ours.
"""

import sys
from collections.abc import Callable

import torch

from record import Record, parser, timed
from subspan.nn import butterfly_factorize, butterfly_multiply

BATCH = 64


def dense_multiply(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x @ weight.mT


def both(multiply, parameter: torch.Tensor, x: torch.Tensor) -> None:
    product = multiply(parameter.requires_grad_(), x)
    real = torch.view_as_real(product) if product.is_complex() else product
    torch.autograd.grad(real.square().sum(), parameter)


Multiply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def official(folder: str) -> dict[str, Multiply]:
    """The authors' multiply, compiled and in torch, of one matrix with strides increasing."""
    sys.path.insert(0, folder)
    from torch_butterfly import multiply as theirs  # pyright: ignore[reportMissingImports]

    # Theirs are (stack, block, level, pair, 2, 2) and (row, stack, column), the pairs in the same order; with strides
    # decreasing theirs begin with the last level.
    def of(multiply: Callable[..., torch.Tensor]) -> Multiply:
        return lambda twiddle, x: multiply(twiddle[None, None], x[:, None], True)[:, 0]

    return {"compiled": of(theirs.butterfly_multiply), "in torch": of(theirs.butterfly_multiply_torch)}


def beside(record: Record, theirs: dict[str, Multiply], largest: int) -> None:
    rows, difference, n = [], 0.0, 128
    while n <= largest:
        levels = n.bit_length() - 1
        row: list[float] = [n]
        for dtype in (torch.float32, torch.complex64):
            x, twiddle = torch.randn(BATCH, n, dtype=dtype), torch.randn(levels, n // 2, 2, 2, dtype=dtype) / 2**0.5
            for name, multiply in theirs.items():
                if name == "in torch" and dtype == torch.complex64:
                    continue
                pair = (multiply, butterfly_multiply)
                with torch.no_grad():
                    expected = multiply(twiddle, x)
                    error = float((butterfly_multiply(twiddle, x) - expected).abs().max() / expected.abs().max())
                    difference = max(difference, error)
                    forward = [timed(lambda f=f, t=twiddle, x=x: f(t, x), repeats=7).processor for f in pair]
                learnt = twiddle.clone()
                whole = [timed(lambda f=f, t=learnt, x=x: both(f, t, x), repeats=7).processor for f in pair]
                row += [forward[0] / forward[1], whole[0] / whole[1]]
        rows.append(row)
        n *= 2
    record.table(
        "The authors' multiply over ours, processor time",
        ["N", "compiled, forward", "forward and backward", "in torch, forward", "forward and backward",
         "compiled, complex, forward", "forward and backward"],
        rows,
    )  # fmt: skip
    record.target("largest difference from the authors' multiply over the largest entry", difference, most=1e-5)
    record.target("authors' compiled multiply over ours at the largest N, forward and backward", rows[-1][2], least=1)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--largest", type=int, default=4096)
    arguments.add_argument("--official", metavar="FOLDER")
    options = arguments.parse_args()
    record = Record("butterfly", f"{BATCH} rows, float32 and complex64")
    rows, n = [], 128
    while n <= options.largest:
        levels = n.bit_length() - 1
        x, weight = torch.randn(BATCH, n), torch.randn(n, n) / n**0.5
        twiddle = torch.randn(levels, n // 2, 2, 2)
        z, complex_twiddle = x.to(torch.complex64), torch.randn(levels, n // 2, 2, 2, dtype=torch.complex64)
        with torch.no_grad():
            dense = timed(lambda x=x, w=weight: x @ w.mT).processor
            ours = timed(lambda x=x, t=twiddle: butterfly_multiply(t, x)).processor
            ours_complex = timed(lambda z=z, t=complex_twiddle: butterfly_multiply(t, z)).processor
            fourier = timed(lambda z=z: torch.fft.fft(z)).processor

        dense_step = timed(lambda w=weight, x=x: both(dense_multiply, w, x)).processor
        our_step = timed(lambda t=twiddle, x=x: both(butterfly_multiply, t, x)).processor
        rows.append([n, 1e3 * dense, dense / ours, dense_step / our_step, ours_complex / fourier, n / (2 * levels)])
        n *= 2
    record.table(
        "Multiply",
        ["N", "dense, ms", "dense / butterfly", "the same, forward and backward", "complex butterfly / FFT",
         "dense / butterfly, multiply-adds"],
        rows,
    )  # fmt: skip
    crossover = next((row[0] for row in rows if row[2] > 1), None)
    record.note(f"The butterfly is faster than the dense multiply from N = {crossover} on." if crossover else
                "The butterfly is slower than the dense multiply at every N.")  # fmt: skip
    record.target("dense over butterfly at the largest N", rows[-1][2], least=1)
    if options.official:
        beside(record, official(options.official), options.largest)
    n = 1024
    matrix = torch.fft.fft(torch.eye(n, dtype=torch.complex128))
    seconds = timed(lambda: butterfly_factorize(matrix), repeats=1).processor
    record.target(f"processor seconds to peel the DFT of length {n}", seconds, most=5)
    record.note(
        f"Multiply-adds a row at N = {n}: {2 * n * 10:,} level by level, {2 * n * 32:,} in blocks, which pass over the "
        f"rows twice in place of ten times, and {n * n:,} dense."
    )
    record.save(options.json)


if __name__ == "__main__":
    main()
