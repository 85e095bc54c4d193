"""Butterfly multiply beside the dense one and the fast Fourier transform over N, forward and backward; recovery times.

All rows are measured side by side in one run. Run: python benchmarks/butterfly.py [--largest 4096] [--json FILE]
"""

import torch

from record import Record, parser, timed
from subspan.nn import butterfly_factorize, butterfly_multiply

BATCH = 64


def dense_multiply(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x @ weight.mT


def both(multiply, parameter: torch.Tensor, x: torch.Tensor) -> None:
    multiply(parameter.requires_grad_(), x).square().sum().backward()


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--largest", type=int, default=4096)
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
    n = 1024
    matrix = torch.fft.fft(torch.eye(n, dtype=torch.complex128))
    seconds = timed(lambda: butterfly_factorize(matrix), repeats=1).processor
    record.target(f"processor seconds to peel the DFT of length {n}", seconds, most=5)
    record.note(f"Floor: {2 * n * 10:,} multiply-adds a row at N = {n} against {n * n:,}; each level moves all.")
    record.save(options.json)


if __name__ == "__main__":
    main()
