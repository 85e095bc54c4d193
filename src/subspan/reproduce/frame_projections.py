"""Frame projections on sensors of people: features from views of a window, beside augmentations and transforms."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from subspan.datasets import labelled_windows
from subspan.dynamics import SlicedGaussianLoss
from subspan.geometry import AffineMap, procrustes, ridge
from subspan.measures import make_probe, probe_score
from subspan.nn import MLP, SeriesEncoder, nt_xent
from subspan.represent import FrameViews, SeriesFeatures

from .protocol import Check, Outcome, Progress, Table
from .training import cosine, shuffled, train
from .trials import Column, Trials, spread


class Sizes(NamedTuple):
    """Sets of windows, at most so many to learn from and to test on, epochs of both stages, seeds."""

    sets: tuple[str, ...] = ("uci_har", "watch_har", "troika_hr")
    train: int = 2400
    test: int = 1000
    epochs: int = 6
    mapper_epochs: int = 20
    seeds: int = 3


QUICK = Sizes(("uci_har",), 200, 200, 1, 1, 1)
HAR, WATCH, HEART = "UCI HAR", "watch", "heart rate"
NAMES = {"uci_har": HAR, "watch_har": WATCH, "troika_hr": HEART}
# Half of the published widths.
DIM, WIDTH, SCALES, STRIDE, BATCH, RATE, DROPOUT = 64, 16, 16, 8, 64, 3e-3, 0.2
TEMPERATURE, SIGREG_WEIGHT = 0.15, 0.05
OURS, ALONE, RIDGE, TURNED, ALL = "frame views", "no maps", "ridge maps", "Procrustes maps", "all three encoders"
FOURIER, MORLET = "time and Fourier", "time and Morlet"
RANDOM, RANDOM_ALL, SIMCLR, SIGREG = "untrained", "untrained, all three encoders", "SimCLR", "SIGReg"
RAW, SPECTRUM, ROCKET = "samples", "spectrum", "MiniRocket"
ARMS = (OURS, ALONE, RIDGE, TURNED, ALL, FOURIER, MORLET, RANDOM, RANDOM_ALL, SIMCLR, SIGREG, RAW, SPECTRUM, ROCKET)
# On the second and the third set only these are run.
EVERYWHERE = (OURS, ALONE, RANDOM, SIMCLR, RAW, SPECTRUM, ROCKET)
# Shares of the labels, and draws of each.
SHARES = {"1 %": (0.01, 5), "5 %": (0.05, 5), "20 %": (0.2, 2)}


class Data(NamedTuple):
    """Windows to learn from and to test on, of different people, and their labels."""

    x: Float[Tensor, "n c l"]
    y: np.ndarray
    held: Float[Tensor, "m c l"]
    truth: np.ndarray
    counts: bool


@cache
def drawn(name: str, seed: int, sizes: Sizes) -> Data:
    """Both parts; level and strength of a pulse say nothing of its rate, so those windows are standardised."""
    windows = labelled_windows(name)
    test = windows.split(seed)
    x = torch.from_numpy(windows.x).float()
    if name == "troika_hr":
        x = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True).clamp_min(1e-6)
    draws = np.random.default_rng(seed)
    fit, held = (
        draws.permutation(np.flatnonzero(part))[:most] for part, most in ((~test, sizes.train), (test, sizes.test))
    )
    return Data(x[fit], windows.y[fit], x[held], windows.y[held], bool(windows.classes))


# ---------------------------------------------------------------------- what is learnt


def views(data: Data, sizes: Sizes, seed: int, names: tuple[str, ...], **options: Any) -> FrameViews:
    """The system."""
    given: dict[str, Any] = {"dim": DIM, "width": WIDTH, "n_scales": SCALES, "time_stride": STRIDE, "dropout": DROPOUT}
    given |= {"temperature": TEMPERATURE, "batch_size": BATCH, "learning_rate": RATE, "random_state": seed}
    given |= {"epochs": sizes.epochs, "mapper_epochs": sizes.mapper_epochs, **options}
    return FrameViews(names, **given).fit(data.x)


def jittered(x: Float[Tensor, "b c l"]) -> Float[Tensor, "b c l"]:
    """Every channel a little stronger or weaker, and noise."""
    return x * (1 + 0.2 * torch.randn(*x.shape[:2], 1)) + 0.1 * torch.randn_like(x)


def permuted(x: Float[Tensor, "b c l"]) -> Float[Tensor, "b c l"]:
    """Up to five pieces of each window in another order, and noise."""
    rows = []
    for window in x:
        cuts = torch.randint(1, x.shape[-1], (int(torch.randint(1, 5, ())),)).sort().values
        pieces = window.tensor_split(cuts, -1)
        rows.append(torch.cat([pieces[place] for place in torch.randperm(len(pieces))], -1))
    return jittered(torch.stack(rows))


class Augmented(nn.Module):
    """The same encoder of series with a projector, taught by two augmentations of each window."""

    def __init__(self, data: Data) -> None:
        super().__init__()
        channels = data.x.shape[1]
        self.features = SeriesFeatures(channels, SeriesEncoder(channels, DIM, width=WIDTH, dropout=DROPOUT), {})
        self.features.set_scale(data.x)
        self.projector = MLP((DIM, DIM, DIM), activation="relu")
        self.gaussian = SlicedGaussianLoss(num_proj=256)

    def pair(self, x: Float[Tensor, "b c l"]) -> tuple[Tensor, Tensor]:
        """Embeddings of two augmentations."""
        x = self.features.standardize(x)
        return tuple(self.projector(self.features.encode(change(x))) for change in (jittered, permuted))  # pyright: ignore


def contrast(model: Augmented, batch: list[Tensor]) -> Tensor:
    """SimCLR."""
    return nt_xent(*model.pair(batch[0]), temperature=TEMPERATURE)


def gaussian(model: Augmented, batch: list[Tensor]) -> Tensor:
    """LeJEPA: the two are to be one, and all of them normally distributed."""
    first, second = model.pair(batch[0])
    near = (first - second).square().mean()
    spread_out = (model.gaussian(first) + model.gaussian(second)) / 2
    return (1 - SIGREG_WEIGHT) * near + SIGREG_WEIGHT * spread_out


def augmented(data: Data, sizes: Sizes, seed: int, loss: Callable[..., Tensor]) -> SeriesFeatures:
    """As many steps, of the same batches, as the first stage of the system."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        batches = shuffled(data.x, batch_size=BATCH, seed=seed)
        given: dict[str, Any] = {"learning_rate": RATE, "weight_decay": 1e-6, "epochs": sizes.epochs}
        return train(Augmented(data), loss, batches, schedule=cosine, **given).features


# ---------------------------------------------------------------------- what is read


@torch.no_grad()
def encoded(model: FrameViews, x: Float[Tensor, "n c l"]) -> list[Tensor]:
    """Vectors of all three encoders."""
    return [torch.cat(parts) for parts in zip(*(model.network_.encode(block) for block in x.split(256)))]


def mapped(model: FrameViews, data: Data, kind: str) -> list[np.ndarray]:
    """The vector of the series and linear guesses of the others, of both parts."""
    own, *others = encoded(model, data.x)
    held = encoded(model, data.held)[0]
    maps: list[AffineMap] = []
    for other in others:
        joint = torch.cov(torch.cat([own, other], 1).mT)
        given: dict[str, Any] = {"mean_x": own.mean(0), "mean_y": other.mean(0)}
        xx, xy = joint[:DIM, :DIM], joint[:DIM, DIM:]
        maps.append(ridge(xx, xy, **given) if kind == RIDGE else procrustes(xy, cov_xx=xx, **given))
    return [torch.cat([h, *(each.map(h) for each in maps)], 1).numpy() for h in (own, held)]


def rocket(data: Data, seed: int) -> list[np.ndarray]:
    """aeon's MiniRocket with a quarter of its kernels, as many as there are windows."""
    made = import_module("aeon.transformations.collection.convolution_based").MiniRocket(
        n_kernels=2500, random_state=seed
    )
    return [
        np.asarray(rows, np.float64) for rows in (made.fit_transform(data.x.numpy()), made.transform(data.held.numpy()))
    ]


def arm_features(arm: str, data: Data, sizes: Sizes, seed: int, ours: Callable[[], FrameViews]) -> list[np.ndarray]:
    """Features of both parts; `ours`: the trained system, of which five arms are parts."""
    both = (data.x, data.held)
    if arm in (RAW, SPECTRUM):
        seen = both if arm == RAW else [torch.fft.rfft(x, norm="ortho").abs() for x in both]
        return [rows.flatten(1).numpy() for rows in seen]
    if arm == ROCKET:
        return rocket(data, seed)
    if arm in (RIDGE, TURNED):
        return mapped(ours(), data, arm)
    if arm in (ALL, RANDOM_ALL):
        model = ours() if arm == ALL else views(data, sizes, seed, ("fourier", "morlet"), **UNTRAINED)
        return [torch.cat(encoded(model, x), 1).numpy() for x in both]
    if arm in (SIMCLR, SIGREG):
        features = augmented(data, sizes, seed, contrast if arm == SIMCLR else gaussian)
        with torch.no_grad():
            return [torch.cat([features(block) for block in x.split(256)]).numpy() for x in both]
    if arm in (FOURIER, MORLET):
        model = views(data, sizes, seed, ("fourier" if arm == FOURIER else "morlet",))
    else:
        model = ours() if arm != RANDOM else views(data, sizes, seed, ("fourier",), **UNTRAINED)
    found = [model.transform(x).numpy() for x in both]
    return [rows[:, :DIM] for rows in found] if arm in (ALONE, RANDOM) else found


# One step at a rate of nearly nothing, so that running means are those of data.
UNTRAINED: dict[str, Any] = {"epochs": 1, "mapper_epochs": 1, "learning_rate": 1e-12}


def read(fit: np.ndarray, held: np.ndarray, data: Data, seed: int) -> dict[str, float]:
    """What linear probes read of people who were not learnt from."""
    if not data.counts:
        guessed = make_probe("regression").fit(fit, data.y).predict(held)
        return {"error": float(np.abs(guessed - data.truth).mean())}
    facts = {"accuracy": probe_score(fit, data.y, kind="ridge", test=(held, data.truth)).score}
    draws = np.random.default_rng(seed)
    for name, (share, times) in SHARES.items():
        count, scores = max(2, round(share * len(fit))), []
        while len(scores) < times:
            some = draws.permutation(len(fit))[:count]
            if len(np.unique(data.y[some])) > 1:
                scores.append(probe_score(fit[some], data.y[some], kind="ridge", test=(held, data.truth)).score)
        facts[name] = float(np.mean(scores))
    return facts


def protocol(*, quick: bool, seed: int, progress: Progress) -> Outcome:
    """Every arm on the first set, the main ones on the others, under every seed."""
    sizes = QUICK if quick else Sizes()
    has_rocket = find_spec("aeon") is not None
    arms = [
        (NAMES[name], arm)
        for name in sizes.sets
        for arm in (ARMS if name == "uci_har" else EVERYWHERE)
        if arm != ROCKET or has_rocket
    ]
    sources = {NAMES[name]: name for name in sizes.sets}

    @cache
    def ours(name: str, each: int) -> FrameViews:
        return views(drawn(name, each, sizes), sizes, each, ("fourier", "morlet"))

    def measure(arm: tuple[str, str], each: int) -> dict[str, float]:
        data = drawn(sources[arm[0]], each, sizes)
        fit, held = arm_features(arm[1], data, sizes, each, lambda: ours(sources[arm[0]], each))
        return read(fit, held, data, each)

    trials: Trials[Any] = Trials(arms, range(seed, seed + sizes.seeds), measure, progress=progress)
    return Outcome(
        claim="Features from views of a series in an orthonormal basis and a frame, without augmentations, are better "
        "than those from augmentations (nine data sets; 70.7 and 68.6 % on HHAR, 8.84 and 9.80 beats a minute).",
        data="; ".join(f"{name}: {_counted(drawn(source, seed, sizes))}" for name, source in sources.items())
        + "; nobody is in both parts",
        model=f"half the published widths (d = {DIM}), {SCALES} scales, every {STRIDE}th place of the scalogram, "
        f"{sizes.epochs} epochs in batches of {BATCH} and {sizes.mapper_epochs} of the maps",
        metric="accuracy of a linear probe, UCI HAR",
        ours=trials.mean((HAR, OURS), "accuracy"),
        baselines={arm[1]: value for arm, value in trials.means("accuracy", but=(HAR, OURS)).items() if arm[0] == HAR},
        main=Check.above("above SimCLR of as many steps", "accuracy, mean over sets", _gap(trials, sizes, SIMCLR), 0),
        checks=_checks(trials, sizes, has_rocket),
        tables=_tables(trials, sources),
        notes=[
            "Linear probes: ridge, chosen by leave-one-out. For them ridge and Procrustes maps of the same vector add "
            "no new functions, only weights.",
            f"MiniRocket: aeon {version('aeon')}, 2500 kernels."
            if has_rocket
            else "MiniRocket: aeon is not installed.",
            "SIGReg is LeJEPA's: two augmentations are to be one vector, and all vectors normally distributed.",
            "Batches, rate and dropout are for short trainings; the authors train for 256 epochs.",
        ],
    )


def _gap(trials: Trials[Any], sizes: Sizes, other: str, ours: str = OURS) -> float:
    """In accuracy, mean over the sets of activities."""
    names = [NAMES[name] for name in sizes.sets if NAMES[name] != HEART]
    return float(np.mean([trials.gap((name, ours), (name, other), "accuracy") for name in names]))


def _checks(trials: Trials[Any], sizes: Sizes, has_rocket: bool) -> list[Check]:
    worse = min(trials.mean((HAR, arm), "accuracy") for arm in (FOURIER, MORLET))
    gap = trials.gap
    known = trials.mean((HAR, SPECTRUM), "accuracy")
    checks = [
        Check.at_least("activities can be read", "accuracy from the spectrum, UCI HAR", known, 0.5, quick=True),
        Check.at_least("beside the untrained encoder", "accuracy, mean over sets", _gap(trials, sizes, RANDOM), 0.05),
        Check.at_least(
            "both views at least the worse one",
            "accuracy, UCI HAR",
            trials.mean((HAR, OURS), "accuracy") - worse,
            0,
        ),
        Check.above(
            "with 1 % of the labels, beside SimCLR", "accuracy, UCI HAR", gap((HAR, OURS), (HAR, SIMCLR), "1 %"), 0
        ),
        Check.above("maps add something", "accuracy, mean over sets", _gap(trials, sizes, ALONE), 0, required=False),
        Check.above(
            "beside SIGReg", "accuracy, UCI HAR", gap((HAR, OURS), (HAR, SIGREG), "accuracy"), 0, required=False
        ),
        Check.above(
            "beside the spectrum", "accuracy, mean over sets", _gap(trials, sizes, SPECTRUM), 0, required=False
        ),
    ]
    if HEART in (NAMES[name] for name in sizes.sets):
        said = "heart rate beside SimCLR"
        checks.append(Check.below(said, "error, beats a minute", gap((HEART, OURS), (HEART, SIMCLR), "error"), 0))
    if has_rocket:
        said = "beside MiniRocket"
        checks.append(Check.above(said, "accuracy, mean over sets", _gap(trials, sizes, ROCKET), 0, required=False))
    return checks


def _tables(trials: Trials[Any], sources: dict[str, str]) -> list[Table]:
    columns: dict[str, Any] = {**spread("accuracy", "all labels"), **{name: Column(name) for name in reversed(SHARES)}}
    tables = []
    for name in sources:
        arms = [arm for arm in trials.arms if arm[0] == name]
        if name == HEART:
            tables.append(
                trials.table(
                    "heart rate: mean absolute error in beats a minute, over seeds with other people each",
                    ("set", "features"),
                    spread("error"),
                    arms=arms,
                )
            )
        else:
            title = f"{name}: accuracy of a linear probe by share of the labels, means over seeds"
            tables.append(trials.table(title, ("set", "features"), columns, digits=3, arms=arms))
    return tables


def _counted(data: Data) -> str:
    return (
        f"{len(data.x)} windows of {data.x.shape[1]} channels and {data.x.shape[2]} samples, {len(data.held)} to test"
    )
