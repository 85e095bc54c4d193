"""Fast transforms found in their matrices by algebra and by learning; butterfly layers trained on grey pictures."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import scipy.fft
import scipy.linalg
import torch
from jaxtyping import Float, Inexact
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.nn import Butterfly, butterfly_factorize
from subspan.nn.butterfly import recover_convolution, recover_dct

from .materials import labelled_images, parameter_count
from .protocol import Check, Outcome, Progress, Table
from .training import cosine, train
from .trials import Trials, spread

SIZES = (8, 64, 512, 1024)
LEARNED = (8, 16)
RESTARTS, LEARNING_STEPS, LEARNING_RATE = 20, 1000, 0.02
MACHINE_PRECISION = 1e-4
"""Root of the mean squared error of an entry at which the paper calls a transform recovered."""

PIXELS, BATCH, EPOCHS, RATE = 1024, 128, 2, 1e-3


def transforms(n: int, seed: int) -> dict[str, Inexact[Tensor, "n n"]]:
    """Matrices of orthonormal columns where the transform has them, in float64."""
    eye = np.eye(n)
    generator = np.random.default_rng(seed)
    matrices = {
        "DFT": np.fft.fft(eye, norm="ortho"),
        "Hartley (real part of (1 + i) DFT)": (1 + 1j) * np.fft.fft(eye, norm="ortho"),
        "Hadamard": scipy.linalg.hadamard(n) / math.sqrt(n),
        "DCT": scipy.fft.dct(eye, axis=0, norm="ortho"),
        "convolution": scipy.linalg.circulant(generator.standard_normal(n) / math.sqrt(n)),
        "Gaussian": generator.standard_normal((n, n)) / math.sqrt(n),
    }
    return {name: torch.from_numpy(np.ascontiguousarray(matrix)) for name, matrix in matrices.items()}


def peel(name: str, matrix: Inexact[Tensor, "n n"]) -> float:
    """Relative error of the recovery that suits a transform."""
    if name == "DCT":
        return recover_dct(matrix.real)[1]
    if name == "convolution":
        return recover_convolution(matrix)[1]
    return butterfly_factorize(matrix, "identity" if name == "Hadamard" else "bit-reversal").relative_error


def low_rank_error(matrix: Inexact[Tensor, "n n"]) -> float:
    """Relative error of the best matrix of the rank that 2 N log₂ N numbers allow, log₂ N."""
    s = torch.linalg.svdvals(matrix).square()
    return float((s[int(math.log2(len(matrix))) :].sum() / s.sum()).sqrt())


def learn(matrix: Inexact[Tensor, "n n"], permutation: str, steps: int, seed: int) -> Float[Tensor, " r"]:
    """Entrywise root mean squared errors of many starts, all trained at once by Adam on the mean squared error.

    Each start is one stack of the layer, so their gradients do not meet.
    """
    n, eye = len(matrix), torch.eye(len(matrix))
    target = matrix.to(torch.complex64).mT.repeat(1, RESTARTS)
    options: Any = {"permutation": permutation, "generator": torch.Generator().manual_seed(seed)}
    layer = Butterfly(n, n * RESTARTS, bias=False, complex=True, tied=True, **options)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) - target).abs().square().sum().div(n * n)

    train(layer, loss, [eye] * steps, learning_rate=LEARNING_RATE, schedule=cosine)
    with torch.no_grad():
        return (layer(eye) - target).abs().square().unflatten(1, (RESTARTS, n)).mean((0, 2)).sqrt()


class Circulant(nn.Module):
    """Circular convolution with a learnt column, by the fast Fourier transform."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.column = nn.Parameter(torch.randn(n) / math.sqrt(n))
        self.bias = nn.Parameter(torch.zeros(n))

    def forward(self, x: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """The convolved rows."""
        n = x.shape[-1]
        return torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(self.column), n) + self.bias


def layers(n: int) -> dict[str, Callable[[], nn.Module]]:
    """The hidden layer of every arm; the low-rank one has the parameters of the complex butterfly or a few more."""
    real = partial(Butterfly, n, n, blocks=2, permutation="bit-reversal", tied=True)
    both = partial(real, complex=True, real_part=True)
    rank = math.ceil((parameter_count(both()) - n) / (2 * n))
    return {
        "dense": lambda: nn.Linear(n, n),
        "butterfly, complex BPBP": both,
        "butterfly, real BPBP": real,
        "low rank": lambda: nn.Sequential(nn.Linear(n, rank, bias=False), nn.Linear(rank, n)),
        "circulant": lambda: Circulant(n),
    }


def grey_images() -> tuple[str, dict[str, Float[Tensor, "n p"]], dict[str, Tensor]]:
    """Standardised grey pictures of 32 × 32 pixels with labels: CIFAR-10, or scikit-learn's digits enlarged."""
    data = labelled_images("cifar10")
    x = {part: torch.from_numpy(np.asarray(rows)).float() for part, rows in data.split(data.images).items()}
    if data.name == "digits":
        x = {part: rows.repeat_interleave(4, 1).repeat_interleave(4, 2).flatten(1) for part, rows in x.items()}
    else:
        x = {part: rows.mean(-1).flatten(1) for part, rows in x.items()}
    mean, deviation = x["train"].mean(), x["train"].std()
    y = data.split(torch.from_numpy(np.asarray(data.labels, np.int64)))
    name = "digits, enlarged" if data.name == "digits" else "CIFAR-10, grey"
    return name, {part: (rows - mean) / deviation for part, rows in x.items()}, y


def accuracy(make: Callable[[], nn.Module], x: Any, y: Any, epochs: int, seed: int) -> float:
    """Test accuracy, percent, after training; batches are the same for every arm of a seed."""
    torch.manual_seed(seed)
    network = nn.Sequential(make(), nn.ReLU(), nn.Linear(PIXELS, 10))
    generator = torch.Generator().manual_seed(seed)
    order = [rows for _ in range(epochs) for rows in torch.randperm(len(y["train"]), generator=generator).split(BATCH)]
    train(
        network,
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        order,
        collate=lambda rows: (x["train"][rows], y["train"][rows]),
        learning_rate=RATE,
    )
    with torch.no_grad():
        return 100 * float((network(x["test"]).argmax(1) == y["test"]).double().mean())


def in_closed_form(sizes: tuple[int, ...], seed: int) -> list[list[Any]]:
    """Transform, N, relative error of its recovery, that of the best low rank, and seconds of the processor."""
    rows = []
    for n in sizes:
        for name, matrix in transforms(n, seed).items():
            started = time.process_time()
            error = peel(name, matrix)
            rows.append([name, n, error, low_rank_error(matrix), round(time.process_time() - started, 3)])
    return rows


def by_gradients(sizes: tuple[int, ...], steps: int, seed: int) -> list[list[Any]]:
    """Transform, N, best and median error of the starts, and how many of them reach the precision of the machine."""
    rows = []
    for n in sizes:
        for name, permutation in (("DFT", "bit-reversal"), ("Hadamard", "identity")):
            errors = learn(transforms(n, seed)[name], permutation, steps, seed)
            reached = int((errors < MACHINE_PRECISION).sum())
            rows.append([name, n, float(errors.min()), float(errors.median()), reached])
    return rows


def protocol(*, quick: bool, seed: int, progress: Progress) -> Outcome:
    """Recovery by peeling and by gradients, then one hidden layer of five kinds."""
    steps, epochs, seeds = (300, 1, 1) if quick else (LEARNING_STEPS, EPOCHS, 3)
    progress("peeling", 0.0)
    recovered = in_closed_form(SIZES[:3] if quick else SIZES, seed)
    progress("learning", 0.1)
    learned = by_gradients(LEARNED[:1] if quick else LEARNED, steps, seed)
    source, x, y = grey_images()
    if quick:
        x, y = ({part: rows[:1000] for part, rows in parts.items()} for parts in (x, y))
    arms = layers(PIXELS)
    trials = Trials(
        arms,
        range(seed, seed + seeds),
        lambda arm, number: accuracy(arms[arm], x, y, epochs, number),
        progress=progress,
        span=(0.2, 1),
    )
    sizes = {name: parameter_count(make()) for name, make in arms.items()}
    ours = "butterfly, complex BPBP"
    exact = max(row[2] for row in recovered if row[0] != "Gaussian")
    best = [row[2] for row in learned if row[0] == "DFT"][-1]
    return Outcome(
        claim="Fast algorithms are learnt from a transform's matrix as butterfly factors to machine precision up to "
        "N = 1024; as a hidden layer on grey CIFAR-10 complex BPBP reaches 49.93 where a dense layer reaches 46.03, "
        "with 39.4 times fewer parameters.",
        data=f"matrices of transforms; {source}: {len(x['train'])} training and {len(x['test'])} test pictures",
        model=f"one hidden layer of {PIXELS}, {epochs} epochs of Adam, rate {RATE}",
        metric="largest relative error of the transforms that are recovered in closed form",
        ours=exact,
        baselines={"best low rank of equal size": min(row[3] for row in recovered if row[0] != "convolution")},
        main=Check.below(
            "DFT, Hartley, Hadamard, DCT and convolution are found",
            "largest relative error of the transforms that are recovered in closed form", exact, 1e-10, quick=True),
        checks=[
            Check.below("the DFT is learnt too", f"best root mean squared error of {RESTARTS} starts at the largest N "
                        "learnt", best, MACHINE_PRECISION, quick=True),
            Check.at_least("BPBP over dense", "points, mean of seeds", trials.gap(ours, "dense"), 1),
            Check.at_least("BPBP over low rank", "points, mean of seeds", trials.gap(ours, "low rank"), 8),
            Check.at_least("and is smaller", "parameters of dense over those of BPBP", sizes["dense"] / sizes[ours], 35,
                           quick=True),
        ],
        tables=[
            Table("closed form", ["transform", "N", "relative error", "low rank of equal size", "seconds"], recovered),
            Table(
                f"by gradients, {RESTARTS} starts, {steps} steps",
                ["transform", "N", "best RMSE", "median RMSE", "starts below 1e-4"],
                learned,
            ),
            trials.table("one hidden layer", "layer", {"parameters of the layer": sizes, **spread(mean="accuracy")}),
        ],
        notes=[
            "Seconds are of the processor.",
            "Permutations are given, not learnt: bit reversal for the DFT, the cosine transform's own for the DCT. For "
            "the convolution one of the two factors is the known Fourier transform.",
            "The paper tunes rates for every layer and trains to the end; here all arms have one rate and few epochs.",
        ],
    )  # fmt: skip
