"""How the default detector ranks strange rows, beside PyOD's PCA, ECOD and isolation forest with their own defaults.

Run: python benchmarks/detect_tables.py [--json FILE] [--development]. Nobody says which rows are normal: each detector
is fitted to the table that it scores. Two kinds of table. Real: the rows of some classes, and a few of others. Planted:
one row in a hundred is replaced by a strange one. The tables were fixed before the rule of the detector was chosen,
which was done on those of --development alone.
"""

import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version

import numpy as np
from pyod.models.ecod import ECOD
from pyod.models.iforest import IForest
from pyod.models.pca import PCA
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine

from record import Record, parser
from subspan.commands import read_rows
from subspan.datasets import data_folder, load, load_sentence_encoder
from subspan.detect import SubspaceDetector
from subspan.measures import auroc
from subspan.models import SentenceEncoder
from subspan.reproduce.materials.image_features import image_encoder

SEEDS = 3
SHARE_OF_OTHERS = 0.05
PLANTED_SHARE = 0.01

Labelled = tuple[np.ndarray, np.ndarray]


# ---------------------------------------------------------------------- tables


def one_class(x: np.ndarray, y: np.ndarray, inlier: Callable[[np.ndarray], np.ndarray], seed: int) -> Labelled:
    """The rows whose class is normal, and some of the others, to 5 % of the whole (at least five)."""
    rng = np.random.default_rng(seed)
    normal, others = np.flatnonzero(inlier(y)), np.flatnonzero(~inlier(y))
    count = max(5, round(SHARE_OF_OTHERS / (1 - SHARE_OF_OTHERS) * len(normal)))
    chosen = rng.permutation(np.r_[normal, rng.choice(others, min(count, len(others)), replace=False)])
    return varying(np.asarray(x[chosen], dtype=float)), ~inlier(y)[chosen]


def varying(x: np.ndarray) -> np.ndarray:
    """The columns that vary: PyOD's PCA divides by the variances of directions."""
    return x[:, x.std(0) > 0]


def each_class(name: str, x: np.ndarray, y: np.ndarray, seeds: int = SEEDS) -> Iterator[tuple[str, Labelled]]:
    """Every class in turn as the normal one."""
    for label in np.unique(y):
        for seed in range(seeds):
            yield name, one_class(x, y, lambda labels, label=label: labels == label, seed)


def real_tables() -> Iterator[tuple[str, Labelled]]:
    """Classes as outliers in tables, images, image features and text embeddings."""
    yield from each_class("wine", *load_wine(return_X_y=True))
    x, y = load_breast_cancer(return_X_y=True)
    for seed in range(SEEDS):
        yield "breast cancer, benign", one_class(x, y, lambda labels: labels == 1, seed)
    yield from each_class("digits", *load_digits(return_X_y=True), seeds=1)
    yield from each_class("texture features", *texture_features())
    x, y = docstrings()
    largest = max(np.unique(y), key=lambda name: (y == name).sum())
    for seed in range(SEEDS):
        yield "docstrings of one module", one_class(x, y, lambda labels: labels == largest, seed)


def development_tables() -> Iterator[tuple[str, Labelled]]:
    """The same kinds, of other data."""
    yield from each_class("iris", *load_iris(return_X_y=True))
    yield from each_class("activities", *activities(), seeds=1)
    data = load("usps")
    yield from each_class("usps", data["x_train"][:3000].reshape(3000, -1), data["y_train"][:3000], seeds=1)
    data = load("fashion_mnist")
    pixels = data["x_train"][:3000].reshape(3000, 14, 2, 14, 2).mean((2, 4)).reshape(3000, -1)
    yield from each_class("fashion", pixels, data["y_train"][:3000], seeds=1)
    yield from each_class("questions", *questions(), seeds=1)
    yield from each_class("photographs", *photographs(), seeds=1)


def activities() -> Labelled:
    """Moments of the channels of inertial windows, and the activity."""
    folder = data_folder()
    assert folder is not None, "SUBSPAN_DATA"
    data = np.load(folder / "uci_har" / "uci_har.npz")
    signal = data["x_train"] * data["scale"].reshape(1, -1, 1)
    parts = [signal.mean(2), signal.std(2), signal.min(2), signal.max(2), np.abs(np.diff(signal, axis=2)).mean(2)]
    return np.concatenate(parts, axis=1), data["y_train"]


def questions() -> Labelled:
    """Embeddings of questions, and what they ask for."""
    records = load("icl_text/trec")[:1500]
    x = SentenceEncoder(*load_sentence_encoder()).encode([record["text"] for record in records])
    return x, np.array([record["label"] for record in records])


def photographs() -> Labelled:
    """Pooled features of small photographs, and what they show."""
    data = load("cifar10")
    return image_encoder(64).encode(list(data["x_train"][:1500])), data["y_train"][:1500]


def texture_features() -> Labelled:
    """Pooled features of 64-pixel crops of brick, grass and gravel."""
    crops, names = [], []
    for name, photograph in load("textures").items():
        for top in range(0, 449, 32):
            for left in range(0, 449, 32):
                crops.append(photograph[top : top + 64, left : left + 64])
                names.append(name)
    return image_encoder(96).encode(crops), np.array(names)


def docstrings() -> Labelled:
    """Embeddings of the standard library's docstrings, and their modules."""
    data = read_rows(None)
    assert data.labels is not None
    return np.asarray(data.array()), data.labels


# ---------------------------------------------------------------------- planted rows


def too_long(row: np.ndarray, frame: "Frame", rng: np.random.Generator) -> np.ndarray:
    """A row that was not normalised."""
    return 10 * row


def constant(row: np.ndarray, frame: "Frame", rng: np.random.Generator) -> np.ndarray:
    """The same number in every column, as large as an entry usually is."""
    return np.full_like(row, frame.usual)


def shuffled(row: np.ndarray, frame: "Frame", rng: np.random.Generator) -> np.ndarray:
    """A row with its entries in another order."""
    return rng.permutation(row)


def off_subspace(row: np.ndarray, frame: "Frame", rng: np.random.Generator) -> np.ndarray:
    """A row moved out of the main directions, by four times what is usual outside them."""
    outside = frame.outside.T @ rng.standard_normal(len(frame.outside))
    return row + 4 * frame.usual_outside * frame.scale * outside / np.linalg.norm(outside)


def far_inside(row: np.ndarray, frame: "Frame", rng: np.random.Generator) -> np.ndarray:
    """A row moved inside the main directions, by three times the usual Mahalanobis distance."""
    direction = rng.standard_normal(len(frame.inside))
    length = 3 * np.sqrt(len(direction)) / np.linalg.norm(direction)
    return row + frame.scale * (length * direction * frame.deviations @ frame.inside)


PLANTS = [too_long, constant, shuffled, off_subspace, far_inside]


class Frame:
    """The main directions of a table's standardised columns, which explain 0.9, and the others."""

    def __init__(self, x: np.ndarray) -> None:
        self.scale = np.where(x.std(0) > 0, x.std(0), 1.0)
        self.usual = np.sqrt(np.square(x).mean())
        _, values, directions = np.linalg.svd((x - x.mean(0)) / self.scale, full_matrices=False)
        values = values / np.sqrt(len(x))
        rank = int(np.searchsorted(np.cumsum(values**2) / (values**2).sum(), 0.9)) + 1
        present = values > 1e-9 * values[0]
        self.inside, self.deviations = directions[:rank], values[:rank]
        self.outside = directions[rank:][present[rank:]]
        self.usual_outside = np.sqrt(np.square(values[rank:]).sum())


def planted(x: np.ndarray, plant: Callable[..., np.ndarray], seed: int) -> Labelled:
    """The table with one row in a hundred, at least two, replaced by strange ones made of them."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(x), max(2, round(PLANTED_SHARE * len(x))), replace=False)
    x = varying(np.array(x, dtype=float))
    frame = Frame(x)
    x[chosen] = [plant(row, frame, rng) for row in x[chosen]]
    return x, np.isin(np.arange(len(x)), chosen)


def hosts(development: bool) -> dict[str, np.ndarray]:
    """Tables that strange rows are planted in."""
    if development:
        pixels = load("usps")["x_train"][:1000].reshape(1000, -1)
        return {
            "iris": load_iris().data,
            "activities": activities()[0],
            "usps": pixels,
            "questions": questions()[0],
            "photographs": photographs()[0][:1000],
        }
    return {
        "wine": load_wine().data,
        "breast cancer": load_breast_cancer().data,
        "digits": load_digits().data,
        "diabetes": load_diabetes(scaled=False).data,
        "docstrings": docstrings()[0][:2000],
        "texture features": texture_features()[0],
    }


# ---------------------------------------------------------------------- measuring


def detectors() -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Scores of the rows that a detector is fitted to, higher = stranger."""
    return {
        "SubspaceDetector": lambda x: SubspaceDetector().fit(x).anomaly_score(x),
        "residual": lambda x: SubspaceDetector(distance="residual").fit(x).anomaly_score(x),
        "PCA (PyOD)": lambda x: PCA(random_state=0).fit(x).decision_scores_,
        "ECOD (PyOD)": lambda x: ECOD().fit(x).decision_scores_,
        "isolation forest": lambda x: IForest(random_state=0).fit(x).decision_scores_,
    }


def trials(development: bool) -> Iterator[tuple[str, str, Labelled]]:
    """(kind, table, rows and whether they are strange)."""
    for name, data in development_tables() if development else real_tables():
        yield "real", name, data
    for host, x in hosts(development).items():
        for plant in PLANTS:
            for seed in range(SEEDS):
                yield plant.__name__.replace("_", " "), host, planted(x, plant, seed)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--development", action="store_true", help="the tables that the rule was chosen on")
    options = arguments.parse_args()
    named = detectors()
    found: dict[tuple[str, str], list[list[float]]] = {}
    for kind, table, (x, strange) in trials(options.development):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            areas = [auroc(score(x), strange) for score in named.values()]
        found.setdefault((kind, table), []).append(areas)
    setting = f"AUROC, each detector fitted to the table it scores; {SEEDS} draws a table; PyOD {version('pyod')}"
    record = Record("detect_tables", setting)
    mean = {key: np.mean(values, axis=0) for key, values in found.items()}
    for title, real in (("Real: other classes as outliers", True), ("Planted rows, one in a hundred", False)):
        chosen = {key: value for key, value in mean.items() if (key[0] == "real") == real}
        rows = [[*key[::-1], *(round(float(area), 3) for area in areas)] for key, areas in chosen.items()]
        average = np.mean(list(chosen.values()), axis=0)
        rows.append(["mean", "", *(round(float(area), 3) for area in average)])
        record.table(title, ["table", "kind", *named], rows)
        record.target(f"{title}: ours less the best of the three, on the mean", average[0] - average[2:].max(), -0.02)
        apart = [areas[0] - areas[2:].max() for areas in chosen.values()]
        record.target(f"{title}: ours less the best of the three, worst table", min(apart), -0.02)
    record.save(options.json)


if __name__ == "__main__":
    main()
