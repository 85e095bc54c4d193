"""Effects of actions beyond those tried, out of observations that bend the hidden state: recovery and extrapolation."""

from __future__ import annotations

import importlib
import warnings
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from subspan.dynamics import ControlFunctionRegressor, Rep4Ex, first_stage
from subspan.measures import affine_recovery
from subspan.nn import MLP
from subspan.nn.training import RowBatches
from subspan.statistics import JointMoments

from .materials import ActedWorld, acted_vectors, acted_windows
from .protocol import Check, Outcome, Progress, Table
from .training import cosine, train
from .trials import Trials, spread


class Sizes(NamedTuple):
    """Rows, windows, steps of encoders and of regressions, dimensions, and seeds."""

    rows: int = 10_000
    windows: int = 2500
    steps: int = 800
    regression: int = 300
    dims: tuple[int, ...] = (1, 2, 4)
    seeds: int = 3


QUICK = Sizes(1000, 200, 80, 80, (2,), 1)
# Actions of one dimension along which effects are drawn.
CURVE = np.linspace(-2, 2, 17)
BATCH, RATE, RADII, CIRCLE, HIDDEN = 1024, 4e-3, (1.0, 1.5, 2.0), 16, (64, 64)
# Variance of the noise that decoders of the variational rivals assume, over that of X.
DECODER_NOISE = 0.01
OURS, UNCONTROLLED, PLAIN, VAE, IVAE = "Rep4Ex", "without control", "autoencoder", "VAE", "iVAE"
LINEAR, ORACLE, NAIVE = "linear projection of X", "the state itself", "Y on A"
ARMS = (OURS, UNCONTROLLED, PLAIN, VAE, IVAE, LINEAR, NAIVE, ORACLE)
# Of other dimensions than 2.
FEW = (OURS, PLAIN, LINEAR, NAIVE, ORACLE)
LEVELS = {
    "strength 0": {"strength": 0.0},
    "strength 1": {"strength": 1.0},
    "quadratic 0.2": {"quadratic": 0.2},
    "quadratic 0.5": {"quadratic": 0.5},
    "noise 0.3": {"noise": 0.3},
}
NOTHING, WINDOWS = "strength 0", "windows of a photograph"


class Variational(nn.Module):
    """A variational autoencoder of the same sizes; conditional: encoder and prior know the actions (iVAE)."""

    def __init__(self, width: int, dim: int, actions: int, conditional: bool) -> None:
        super().__init__()
        self.encoder = MLP((width + conditional * actions, *HIDDEN, 2 * dim), activation="leaky_relu")
        self.decoder = MLP((dim, *HIDDEN, width), activation="leaky_relu")
        self.prior = MLP((actions, *HIDDEN, 2 * dim), activation="leaky_relu") if conditional else None

    def posterior(self, x: Float[Tensor, "n p"], a: Float[Tensor, "n k"]) -> Normal:
        """Of the latents."""
        return _normal(self.encoder(x if self.prior is None else torch.cat([x, a], 1)))

    def forward(self, x: Float[Tensor, "n p"], a: Float[Tensor, "n k"]) -> Float[Tensor, ""]:
        """The negative bound on the likelihood, times twice the decoder's noise over the width."""
        found = self.posterior(x, a)
        prior = Normal(0.0, 1.0) if self.prior is None else _normal(self.prior(a))
        divergence = kl_divergence(found, prior).sum(1).mean()
        return F.mse_loss(self.decoder(found.rsample()), x) + 2 * DECODER_NOISE / x.shape[1] * divergence


def _normal(numbers: Tensor) -> Normal:
    mean, spread_ = numbers.chunk(2, 1)
    return Normal(mean, F.softplus(spread_) + 1e-4)


def variational_latents(world: ActedWorld, dim: int, steps: int, seed: int, *, conditional: bool) -> np.ndarray:
    """Means of the posterior of all rows."""
    scaled = (world.x - world.x.mean(0)) / world.x.std(0)
    x, a = torch.from_numpy(scaled).float(), torch.from_numpy(world.a).float()
    torch.manual_seed(seed)
    model = Variational(x.shape[1], dim, a.shape[1], conditional)
    batches = RowBatches(x, a, size=BATCH, steps=steps)
    train(model, lambda model, batch: model(*batch), batches, learning_rate=RATE, schedule=cosine)
    with torch.no_grad():
        return model.posterior(x, a).mean.double().numpy()


def fitted(world: ActedWorld, steps: int, seed: int, *, penalty: float = 10.0, **options: Any) -> Rep4Ex:
    """Rep4Ex without outcomes; penalty 0: a plain autoencoder."""
    given: dict[str, Any] = {"max_steps": steps, "batch_size": BATCH, "learning_rate": RATE, **options}
    dim = world.z.shape[1]
    return Rep4Ex(dim, penalty=penalty, hidden=HIDDEN, random_state=seed, **given).fit(world.x, world.a)


def asked(radius: float, dim: int) -> np.ndarray:
    """Actions at a distance from the mean: both of one dimension, a circle, or directions drawn once."""
    if dim == 1:
        return radius * np.array([[1.0], [-1.0]])
    if dim == 2:
        turns = np.linspace(0, 2 * np.pi, CIRCLE, endpoint=False)
        return radius * np.stack([np.cos(turns), np.sin(turns)], 1)
    drawn = np.random.default_rng(0).normal(size=(CIRCLE, dim))
    return radius * drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def errors(world: ActedWorld, told: Any) -> dict[str, float]:
    """Mean squared error of predicted effects at each radius."""
    every = [asked(radius, world.a.shape[1]) for radius in RADII]
    return {f"{r:g}": float(np.mean((told(q) - world.effect(q)) ** 2)) for r, q in zip(RADII, every)}


def controlled(world: ActedWorld, z: np.ndarray, steps: int, seed: int) -> Any:
    """Effects by a control function on latents, as a function of actions."""
    options: dict[str, Any] = {"max_steps": steps, "batch_size": BATCH, "random_state": seed}
    return ControlFunctionRegressor(**options).fit(z, world.a, world.y).predict_do


def regressed(world: ActedWorld, rows: np.ndarray, steps: int, seed: int) -> Any:
    """A network of y on rows, as a function."""
    centre, scale = rows.mean(0), rows.std(0)
    x, y = torch.from_numpy((rows - centre) / scale).float(), torch.from_numpy(world.y).float()[:, None]
    torch.manual_seed(seed)
    model = MLP((x.shape[1], *HIDDEN, 1), activation="leaky_relu")
    options: dict[str, Any] = {"learning_rate": 5e-3, "weight_decay": 1e-3, "optimizer": "adamw", "schedule": cosine}
    batches = RowBatches(x, (y - y.mean()) / y.std(), size=BATCH, steps=steps)
    train(model, lambda model, batch: F.mse_loss(model(batch[0]), batch[1]), batches, **options)

    def told(q: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            found = model(torch.from_numpy((q - centre) / scale).float())
        return (found * y.std() + y.mean())[:, 0].double().numpy()

    return told


def without_control(world: ActedWorld, z: np.ndarray, steps: int, seed: int) -> Any:
    """Effects where y is regressed on latents alone."""
    stage, of_z = first_stage(torch.from_numpy(z), torch.from_numpy(world.a)), regressed(world, z, steps, seed)
    noise = stage.residual(torch.from_numpy(z), torch.from_numpy(world.a)).numpy()

    def told(q: np.ndarray) -> np.ndarray:
        return np.array([of_z(mean + noise).mean() for mean in stage.map.map(torch.from_numpy(q)).numpy()])

    return told


def projected(world: ActedWorld, dim: int) -> np.ndarray:
    """The directions of X that go most with the actions: what would do if X were linear in the state."""
    moments = JointMoments(world.x.shape[1], world.a.shape[1]).update(world.x, world.a)
    return moments.cca(dim, shrinkage=0.0).transform_x(world.x).numpy()


class Runs:
    """All arms on the vectors of one dimension; latents that two of them need are found once."""

    def __init__(self, dim: int, sizes: Sizes) -> None:
        self.dim, self.sizes = dim, sizes
        self.worlds: dict[int, ActedWorld] = {}
        self.latents: dict[int, np.ndarray] = {}
        self.curves: dict[str, np.ndarray] = {}

    def __call__(self, arm: str, seed: int) -> dict[str, float]:
        """What is measured of an arm."""
        sizes = self.sizes
        world = self.worlds.setdefault(seed, acted_vectors(sizes.rows, self.dim, seed))
        facts: dict[str, float] = {}
        if arm == NAIVE:
            told = regressed(world, world.a, sizes.regression, seed)
        elif arm == UNCONTROLLED:
            told = without_control(world, self.latents[seed], sizes.regression, seed)
        else:
            z, facts = self.state(arm, world, seed)
            told = controlled(world, z, sizes.regression, seed)
        if self.dim == 1 and arm not in self.curves:
            self.curves[arm] = told(CURVE[:, None])
            self.curves.setdefault("truth", world.effect(CURVE[:, None]))
        return {**facts, **errors(world, told)}

    def state(self, arm: str, world: ActedWorld, seed: int) -> tuple[np.ndarray, dict[str, float]]:
        """What an arm takes for the state, and how much of the state it is."""
        facts: dict[str, float] = {}
        if arm in (VAE, IVAE):
            z = variational_latents(world, self.dim, self.sizes.steps, seed, conditional=arm == IVAE)
        elif arm == LINEAR:
            z = projected(world, self.dim)
        elif arm == ORACLE:
            z = world.z
        else:
            model = fitted(world, self.sizes.steps, seed, penalty=10.0 if arm == OURS else 0.0)
            z = model.transform(world.x)
            facts = {"p": model.invariance_.p_value}
            self.latents.setdefault(seed, z)
        return z, {"recovery": affine_recovery(world.z, z), **facts}


def broken(level: str, sizes: Sizes, arm: str, seed: int) -> dict[str, float]:
    """Where an assumption fails: weak actions, a quadratic part, noise."""
    options: Any = LEVELS[level]
    world = acted_vectors(sizes.rows, 2, seed, **options)
    if arm == NAIVE:
        return errors(world, regressed(world, world.a, sizes.regression, seed))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="A: weak actions")
        model = fitted(world, sizes.steps, seed, penalty=10.0 if arm == OURS else 0.0)
        z, stage = model.transform(world.x), model.first_stage_
        facts = {"recovery": affine_recovery(world.z, z), "p": model.invariance_.p_value}
        facts |= {"weak": float(stage.weak), "correlation": float(stage.correlations[-1])}
        if arm == PLAIN or level == NOTHING:
            return facts
        return facts | errors(world, controlled(world, z, sizes.regression, seed))


def seen(worlds: dict[int, ActedWorld], sizes: Sizes, arm: str, seed: int) -> dict[str, float]:
    """Windows of a photograph."""
    world = worlds.setdefault(seed, acted_windows(sizes.windows, seed))
    if arm == NAIVE:
        return errors(world, regressed(world, world.a, sizes.regression, seed))
    z = world.z
    if arm == LINEAR:
        z = projected(world, 2)
    elif arm != ORACLE:
        penalty = 10.0 if arm == OURS else 0.0
        z = fitted(world, sizes.steps, seed, penalty=penalty, scaling="common").transform(world.x)
    told = errors(world, controlled(world, z, sizes.regression, seed))
    return {"recovery": affine_recovery(world.z, z), **told}


def linear_rivals(count: int, seed: int) -> dict[str, float]:
    """Errors of a slope in the linear case with a seen state, of estimators of instruments that are installed."""
    random = np.random.default_rng(seed)
    a, v = random.uniform(-1, 1, size=(count, 1)), 0.5 * random.normal(size=(count, 1))
    z, other = 2 * a + v, random.normal(size=(count, 1))
    y = 1.5 * z[:, 0] - 3 * v[:, 0] + random.normal(size=count)
    ours = ControlFunctionRegressor("linear").fit(z, a, y)
    told = {
        "subspan, linear": float(np.diff(ours.predict_do([[0.0], [0.5]]))[0]),
        "Y on Z": float(np.polyfit(z[:, 0], y, 1)[0]),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if _installed("econml"):
            from sklearn.linear_model import LinearRegression

            options: dict[str, Any] = {name: LinearRegression() for name in ("model_y_xw", "model_t_xw", "model_z_xw")}
            model: Any = importlib.import_module("econml.iv.dml").OrthoIV(**options, random_state=seed)
            told[f"econml {metadata.version('econml')}"] = float(model.fit(y, z, Z=a, W=other).effect(T0=0, T1=1)[0])
        if _installed("doubleml"):
            from sklearn.linear_model import LinearRegression

            package: Any = importlib.import_module("doubleml")
            data = package.DoubleMLData.from_arrays(other, y, z[:, 0], a[:, 0])
            model = package.DoubleMLPLIV(data, LinearRegression(), LinearRegression(), LinearRegression())
            told[f"doubleml {metadata.version('doubleml')}"] = float(model.fit().coef[0])
    return {name: abs(slope - 1.5) for name, slope in told.items()}


def _installed(name: str) -> bool:
    try:
        importlib.import_module(f"{name}.iv.dml" if name == "econml" else name)
    except ImportError:
        return False
    return True


def protocol(*, quick: bool, seed: int, progress: Progress) -> Outcome:
    """Arms in each dimension, where assumptions fail, on windows of a photograph, and beside packages."""
    with warnings.catch_warnings():
        # All predictions here are made beyond what was seen, on purpose.
        warnings.filterwarnings("ignore", message="A: .* never seen")
        return _measured(QUICK if quick else Sizes(), seed, progress)


def _measured(sizes: Sizes, seed: int, progress: Progress) -> Outcome:
    seeds = range(seed, seed + sizes.seeds)
    cuts = dict(zip(sizes.dims, np.linspace(0, 0.6, len(sizes.dims) + 1)))
    runs = {dim: Runs(dim, sizes) for dim in sizes.dims}
    of: dict[int, Trials[Any]] = {
        dim: Trials(ARMS if dim == 2 else FEW, seeds, run, progress=progress, span=(cuts[dim], cuts[dim] + 0.2))
        for dim, run in runs.items()
    }
    failing: Trials[Any] = Trials(
        [(level, arm) for level in LEVELS for arm in (OURS, PLAIN, NAIVE)],
        seeds,
        lambda arm, each: broken(arm[0], sizes, arm[1], each),
        where=lambda arm, each: (
            (arm[0] == NOTHING and arm[1] != NAIVE)
            or (each == seed and (arm[1] == OURS or (arm[1] == NAIVE and "quadratic" in arm[0])))
        ),
        progress=progress,
        span=(0.6, 0.8),
    )
    worlds: dict[int, ActedWorld] = {}
    windows: Trials[Any] = Trials(
        FEW, seeds, lambda arm, each: seen(worlds, sizes, arm, each), progress=progress, span=(0.8, 0.98)
    )
    rivals = [linear_rivals(2000, each) for each in range(seed, seed + 10)]
    slopes = {name: [each[name] for each in rivals] for name in rivals[0]}
    curves = runs[1].curves if 1 in runs else {}
    return _outcome(sizes, of, failing, windows, _tables(of, failing, windows, slopes, curves), slopes)


def _outcome(
    sizes: Sizes,
    of: dict[int, Trials[Any]],
    failing: Trials[Any],
    windows: Trials[Any],
    tables: list[Table],
    rivals: dict[str, list[float]],
) -> Outcome:
    two, far = of[2], "1.5"
    rival = min(two.mean(arm, far) for arm in (PLAIN, NAIVE))
    nothing = [failing.values((NOTHING, arm), "recovery") for arm in (OURS, PLAIN)]
    others = {dim: trials for dim, trials in of.items() if dim != 2}
    checks = [
        Check.at_least("latents are affine in the state", "R², mean over seeds", two.mean(OURS, "recovery"), 0.99),
        Check.at_most("those of an autoencoder are not", "R², mean over seeds", two.mean(PLAIN, "recovery"), 0.95),
        Check.at_most(
            "as if the state were seen",
            "error at 1.5 over the state's own",
            two.mean(OURS, far) / two.mean(ORACLE, far),
            2,
        ),
        Check.within(
            "nothing is claimed where actions do nothing",
            "R² less an autoencoder's, mean over seeds",
            float(np.mean(nothing[0]) - np.mean(nothing[1])),
            -0.1,
            0.05,
        ),
        Check.at_least(
            "and the test says so",
            "share of seeds with a warning",
            failing.mean((NOTHING, OURS), "weak"),
            1,
            quick=True,
        ),
        Check.at_least(WINDOWS, "R², mean over seeds", windows.mean(OURS, "recovery"), 0.97),
        Check.at_least(
            "effects from windows",
            "error of Y on A at 1.5 over ours",
            windows.mean(NAIVE, far) / windows.mean(OURS, far),
            5,
        ),
        Check.above(
            "beside a linear projection",
            "its error at 1.5 over ours",
            two.mean(LINEAR, far) / two.mean(OURS, far),
            1,
            required=False,
        ),
        *(
            Check.at_least(
                f"{dim} dimension{'s' * (dim > 1)}",
                "error of Y on A at 1.5 over ours",
                trials.mean(NAIVE, far) / trials.mean(OURS, far),
                5,
                required=False,
            )
            for dim, trials in others.items()
        ),
    ]
    return Outcome(
        claim="Latents whose mean is affine in the actions are affine in the hidden state, and a control function on "
        "them predicts actions beyond those tried where regressions fail (no figures of the paper at hand).",
        data=f"a state moved by as many actions, uniform in [-1, 1], and confounded with the outcome, bent into 10 "
        f"dimensions: {sizes.rows} rows; windows of a photograph around a moved centre, features of EfficientNet-Lite0",
        model=f"perceptrons {HIDDEN[0]}-{HIDDEN[1]} both ways, {sizes.steps} steps in batches of {BATCH}; regressions "
        f"of the same size, {sizes.regression} steps",
        metric="squared error of effects at 1.5",
        ours=two.mean(OURS, far),
        baselines=two.means(far, but=OURS),
        main=Check.at_least(
            "effects beyond the actions tried", "error of the best of autoencoder and Y on A over ours",
            rival / two.mean(OURS, far), 5,
        ),
        checks=checks,
        tables=tables,
        notes=_notes(sizes, rivals),
    )  # fmt: skip


def _tables(
    of: dict[int, Trials[Any]],
    failing: Trials[Any],
    windows: Trials[Any],
    rivals: dict[str, list[float]],
    curves: dict[str, np.ndarray],
) -> list[Table]:
    radii = {f"error at {radius:g}": f"{radius:g}" for radius in RADII}
    columns = {**spread("recovery", "R² of the state"), **radii}
    told = [
        trials.table(f"vectors, {dim} dimension{'s' * (dim > 1)}: means over seeds", "effects by", columns, digits=3)
        for dim, trials in of.items()
    ]
    if curves:
        rows = zip(CURVE.tolist(), *(each.tolist() for each in curves.values()))
        told.append(Table.rounded("effects along an action, 1 dimension, one seed", ["action", *curves], rows, 3))
    facts = {"R² of the state": "recovery", "invariance, p": "p", "least correlation": "correlation", **radii}
    return [
        *told,
        windows.table(f"{WINDOWS}: means over seeds", "effects by", columns, digits=3),
        failing.table("where assumptions fail, 2 dimensions", ("what", "effects by"), facts, digits=3),
        Table.rounded(
            "linear case with a seen state, 2000 rows: error of the slope 1.5 over 10 draws",
            ["estimator", "mean", "largest"],
            ([name, float(np.mean(found)), max(found)] for name, found in rivals.items()),
            4,
        ),
    ]


def _notes(sizes: Sizes, rivals: dict[str, list[float]]) -> list[str]:
    absent = [name for name in ("econml", "doubleml") if not any(each.startswith(name) for each in rivals)]
    return [
        "The state's noise has deviation 0.5, actions move it by 2 a unit (a turn); the outcome is 2 sin z1 + 0.3 zd² "
        "and a hidden part that depends on the noise. Actions asked for lie at a distance from the mean; a square of "
        "actions has its corners at 1.41.",
        f"{LINEAR}: onto the directions that go most with the actions. iVAE: encoder and prior know the actions.",
        f"Failing assumptions: strength 0 under {sizes.seeds} seeds, others under one. quadratic: share of a quadratic "
        "part in what actions do; noise: deviation over that of X.",
        *([f"Not installed, so not run: {', '.join(absent)}."] if absent else []),
    ]
