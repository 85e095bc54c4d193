"""Fitting a map between embedding spaces and applying it, beside scikit-learn, SciPy and (where installed) latentis.

Run: python benchmarks/upgrade.py. Ratios are of times measured side by side in this process; recall@10 is that of rows
which fitted nothing, in the index of all old rows.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from scipy.linalg import orthogonal_procrustes
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from record import Record, parser, timed
from subspan.align import UpgradeMap
from subspan.align.upgrade.held_out import Retrieval

ROWS, FIT, D = 6000, 4000, 256
QUERIES = 200_000


def spaces() -> tuple[np.ndarray, np.ndarray]:
    """Unit rows with a decaying spectrum, and a rotated, unevenly stretched, noisy view of them; float32."""
    generator = np.random.default_rng(0)
    latent = generator.standard_normal((ROWS, D)) * np.arange(1, D + 1) ** -0.7
    rotation = np.linalg.qr(generator.standard_normal((D, D)))[0]
    old = latent * np.exp(0.3 * generator.standard_normal(D)) @ rotation + 0.02 * generator.standard_normal((ROWS, D))
    return tuple((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32) for rows in (latent, old))


def scipy_procrustes(x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Centring, scaling to unit variance, rotation: what latentis calls an orthogonal translator."""
    a, b = StandardScaler().fit(x), StandardScaler().fit(y)
    rotation, _ = orthogonal_procrustes(a.transform(x), b.transform(y))
    return lambda rows: b.inverse_transform(a.transform(rows) @ rotation)


def regression(model: object) -> Callable[..., Callable[[np.ndarray], np.ndarray]]:
    """A scikit-learn pipeline: centring, scaling, regression."""
    return lambda x, y: make_pipeline(StandardScaler(), model).fit(x, y).predict


def ours(method: str) -> Callable[..., Callable[[np.ndarray], np.ndarray]]:
    """One fixed method, or the choice among the closed forms; both with cross-validation and confidence."""
    candidates = ("none", "procrustes", "scaled", "low-rank", "cca", "ridge")
    options = {"candidates": candidates} if method == "auto" else {}
    return lambda x, y: UpgradeMap(method, **options).fit(x, y).transform


def latentis() -> dict[str, Callable[..., Callable[[np.ndarray], np.ndarray]]]:
    """latentis' own translators, where it is installed."""
    try:
        from latentis.transform.translate.functional import lstsq_align_state, svd_align_state
    except ImportError:
        return {}

    def through(state: Callable[..., dict]) -> Callable[..., Callable[[np.ndarray], np.ndarray]]:
        def fit(x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
            matrix = state(torch.from_numpy(x), torch.from_numpy(y))["matrix"]
            return lambda rows: (torch.from_numpy(rows) @ matrix).numpy()

        return fit

    return {"latentis, orthogonal": through(svd_align_state), "latentis, least squares": through(lstsq_align_state)}


def main() -> None:
    options = parser(__doc__).parse_args()
    setting = f"{FIT} pairs of {D} dimensions; recall@10 of {ROWS - FIT} queries among {ROWS}"
    record = Record("upgrade", setting)
    new, old = spaces()
    retrieval = Retrieval(torch.from_numpy(old), 10, "cosine", "neighbours")
    own = torch.arange(FIT, ROWS)
    truth = retrieval.neighbours(torch.from_numpy(old[FIT:]), own)
    fits = {
        "UpgradeMap, auto": ours("auto"),
        "UpgradeMap, procrustes": ours("procrustes"),
        "UpgradeMap, ridge": ours("ridge"),
        "scale, scipy Procrustes": scipy_procrustes,
        "scale, least squares": regression(LinearRegression()),
        "scale, Ridge(alpha=1)": regression(Ridge(1.0)),
        **latentis(),
    }
    rows = []
    for name, fit in fits.items():
        started = time.process_time()
        mapped = fit(new[:FIT], old[:FIT])
        took = time.process_time() - started
        recall = retrieval.recall(torch.from_numpy(np.asarray(mapped(new[FIT:]), dtype=np.float32)), own, truth)
        rows.append([name, float(recall.mean()), took])
    record.table("Fitting a map", ["", "recall@10", "processor seconds"], rows)
    queries = np.random.default_rng(1).standard_normal((QUERIES, D), dtype=np.float32)
    model = UpgradeMap("ridge", alpha=0.01).fit(new[:FIT], old[:FIT])
    matrix = model.map_.matrix.float().mT.contiguous().numpy()
    product = timed(lambda: queries @ matrix).processor
    rows, weight = torch.from_numpy(queries), torch.from_numpy(matrix)
    product_of_torch = timed(lambda: rows @ weight).processor
    mapped = timed(lambda: model.transform(queries)).processor
    module = timed(lambda: model.to_module()(rows)).processor
    ways = {
        "the plain product, NumPy": product,
        "the plain product, torch": product_of_torch,
        "transform": mapped,
        "as a module": module,
    }
    columns = ["", "processor seconds", "speed over NumPy's product", "speed over torch's product"]
    record.table(
        f"Mapping {QUERIES} rows", columns, [[name, t, product / t, product_of_torch / t] for name, t in ways.items()]
    )
    record.target("speed of transform over that of NumPy's product", product / mapped, least=0.8)
    record.target(
        "speed of transform over that of torch's product, which it is made of", product_of_torch / mapped, least=0.8
    )
    record.save(options.json)


if __name__ == "__main__":
    main()
