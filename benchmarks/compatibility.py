"""What compatible maps cost: a training step beside a plain linear layer's, and fitting beside closed forms.

Run: python benchmarks/compatibility.py [--quick]. Ratios are of processor times measured side by side in this process.
"""

import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from scipy.linalg import orthogonal_procrustes
from sklearn.linear_model import Ridge
from torch import nn

from record import Record, parser, timed
from subspan.align import BasisTransform, LambdaOrthogonalAdapter, SpaceMap
from subspan.base import normalize_rows
from subspan.nn import LambdaOrthogonality, OrthogonalLinear
from subspan.solvers import nearest

BATCH = 256


def step(layer: nn.Module, x: torch.Tensor, y: torch.Tensor, penalty: nn.Module | None = None) -> Callable[[], None]:
    """One step of Adam on the squared error."""
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)

    def once() -> None:
        optimizer.zero_grad()
        loss = (layer(x) - y).square().mean()
        if penalty is not None:
            loss = loss + penalty(layer.weight)
        loss.backward()
        optimizer.step()

    return once


class Compatible(nn.Module):
    """The compatible part of BT²'s transform of unit rows, with 32 extra dimensions cut from them."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.transform = BasisTransform(d, d, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.transform(x, x[:, :32]).compatible


def steps(record: Record, d: int, repeats: int) -> None:
    x, y = (normalize_rows(torch.randn(BATCH, d, generator=torch.Generator().manual_seed(s))) for s in (0, 1))
    layers = {
        "plain linear layer": step(nn.Linear(d, d), x, y),
        "linear with the λ penalty": step(nn.Linear(d, d), x, y, LambdaOrthogonality()),
        **{
            f"orthogonal, {kind}": step(OrthogonalLinear(d, orthogonal_map=kind), x, y)
            for kind in ("matrix_exp", "cayley", "householder")
        },
        "BT² (two orthogonal maps, matrix_exp)": step(Compatible(d), x, y),
    }
    taken = {name: timed(once, repeats).processor for name, once in layers.items()}
    plain = taken["plain linear layer"]
    rows = [[name, 1e3 * each, each / plain] for name, each in taken.items()]
    record.table(f"One step of training, batch {BATCH}, d = {d}", ["", "processor ms", "x plain"], rows)


def embeddings(n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of unit rows: a decaying spectrum seen by two models, turned, stretched and with noise of their own."""
    generator = np.random.default_rng(0)
    latent = generator.standard_normal((n, d)) * np.arange(1, d + 1) ** -0.5
    rows = []
    for _ in range(2):
        turn = np.linalg.qr(generator.standard_normal((d, d)))[0] * np.exp(0.3 * generator.standard_normal(d))
        rows.append(latent @ turn + 0.05 * generator.standard_normal((n, d)))
    new, old = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rows)
    return new.astype(np.float32), old.astype(np.float32)


def translated(new: np.ndarray, old: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """What translation libraries do: standardise both sides, orthogonal Procrustes by SVD, undo the scaling."""
    (mean_x, std_x), (mean_y, std_y) = ((rows.mean(0), rows.std(0)) for rows in (new, old))
    rotation, _ = orthogonal_procrustes((new - mean_x) / std_x, (old - mean_y) / std_y)
    return lambda rows: (rows - mean_x) / std_x @ rotation * std_y + mean_y


def fits(record: Record, n: int, d: int, epochs: int) -> None:
    new, old = embeddings(n + 2000, d)
    train, test = slice(0, n), slice(n, None)
    options = {"epochs": epochs, "random_state": 0}
    methods: dict[str, Callable[[], Callable[[np.ndarray], np.ndarray]]] = {
        "Procrustes (SpaceMap)": lambda: SpaceMap("procrustes").fit(new[train], old[train]).transform,
        "ridge (SpaceMap)": lambda: SpaceMap("ridge").fit(new[train], old[train]).transform,
        "standardise and Procrustes (SciPy)": lambda: translated(new[train], old[train]),
        "ridge (scikit-learn)": lambda: Ridge(1e-3).fit(new[train], old[train]).predict,
        **{
            f"adapter, {kind}": lambda kind=kind: (
                LambdaOrthogonalAdapter(kind, **options).fit(new[train], old[train]).transform
            )
            for kind in ("strict", "lambda", "affine")
        },
    }
    rows = []
    for name, fit in methods.items():
        start = time.process_time()
        mapping = fit()
        taken = time.process_time() - start
        mapped = torch.as_tensor(np.asarray(mapping(new[test]), np.float32))
        found = nearest(mapped, torch.from_numpy(old[test]), 1, metric="cosine")[1][:, 0]
        rows.append([name, float((found == torch.arange(2000)).float().mean()), taken])
    title = f"Fitting {n} pairs, d = {d} (adapters: {epochs} epochs); recall@1 of the paired old row among 2000"
    record.table(title, ["", "recall@1", "processor seconds"], rows)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--quick", action="store_true", help="small sizes")
    options = arguments.parse_args()
    warnings.simplefilter("ignore")
    quick = options.quick
    record = Record("compatibility", "random rows for the steps, planted pairs for the fits; float32")
    for d in (128,) if quick else (128, 512, 1024):
        steps(record, d, 3)
    fits(record, 2000 if quick else 10_000, 128 if quick else 256, 2 if quick else 10)
    record.save(options.json)


if __name__ == "__main__":
    main()
