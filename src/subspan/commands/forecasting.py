"""What follows a series: an operator whose delays and rank are chosen on its end, judged beside plain rivals."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import norm

from subspan.base import Progress
from subspan.base.columns import listed
from subspan.base.reading import quoted
from subspan.datasets import Series
from subspan.dynamics import KoopmanOperator, seasonal_naive
from subspan.statistics import Moments

from .columns import Columns

_DELAYS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_RANKS: tuple[float | None, ...] = (None, 0.9999, 0.999, 0.99, 0.95, 0.9)
# Numbers in a state that are tried, origins of forecasts that judge, and rows on which delays are chosen.
_WIDEST, _ORIGINS, _CHOOSING = 256, 48, 200_000
_RIDGE = 1e-6
_SHOWN = 6

Forecaster = Callable[[np.ndarray, int, np.ndarray | None], np.ndarray]


class _Windows(NamedTuple):
    """Histories (m, h, c) of forecasts, what followed (m, steps, c), and the inputs on the way (m, steps, k)."""

    histories: Float[np.ndarray, "m h c"]
    futures: Float[np.ndarray, "m s c"]
    inputs: Float[np.ndarray, "m s k"] | None

    def error(self, forecast: Forecaster, scale: np.ndarray) -> np.ndarray:
        """Root mean square error of each step ahead, over the deviation of each channel."""
        apart = (forecast(self.histories, self.futures.shape[1], self.inputs) - self.futures) / scale
        return np.sqrt(np.mean(apart**2, axis=(0, 2)))


class Parted(NamedTuple):
    """A series whose channels and inputs are apart."""

    series: Series
    inputs: Series | None


def part_inputs(series: Series, names: Sequence[str]) -> Parted:
    """The columns `names` as inputs, the others as channels. Raises ValueError for unknown ones, and for all."""
    if not names:
        return Parted(series, None)
    unknown = [name for name in names if name not in series.channels]
    if unknown or len(set(names)) == series.dim:
        what = f"has no {quoted(unknown[0])}" if unknown else "has no other channel than the inputs"
        raise ValueError(f"--inputs: {series.source} {what}; it has {listed(series.channels)}")
    acting = [series.channels.index(name) for name in names]
    kept = [place for place in range(series.dim) if place not in acting]

    def columns(places: list[int]) -> Series:
        parts = tuple(part[:, places] for part in series.trajectories)
        return Series(
            parts, tuple(series.channels[place] for place in places), series.time_step, series.time_unit, series.ids,
            series.times, series.source, series.filled,
        )  # fmt: skip

    return Parted(columns(kept), columns(acting))


def forecast_series(
    series: Series,
    *,
    steps: int = 50,
    delays: int | None = None,
    rank: int | float | str | None = "auto",
    inputs: Series | None = None,
    level: float = 0.9,
    progress: Progress,
) -> tuple[dict[str, Any], Columns]:
    """Facts of a forecast, and the forecast as columns (id, step, time, channel, forecast, lower, upper).

    delays, rank: None and "auto" are chosen by roll-outs over a part before the tail. Inputs are known in the tail; of
    the steps ahead the last ones go on.

    Raises ValueError for a series that is too short to hold out a tail of so many steps.
    """
    started = time.perf_counter()
    parts = _cut(series, steps)
    tails = {p.index: p.tail for p in parts}
    progress("seasons", 0.0)
    scale, mean = _scale(series, tails)
    season = _season(series, parts)
    chosen, tried = _choose(series, inputs, parts, steps, _candidates(series, parts, season, delays, rank), progress)
    progress("held-out tail", 0.7)
    before = _fitted(series, inputs, tails, chosen)
    tail = _windows(series, inputs, {p.index: (p.tail, p.length) for p in parts}, steps, max(chosen[0], season or 1))
    rivals: dict[str, Forecaster] = {"persistence": _plain(seasonal_naive(1))}
    if season:
        rivals[f"season of {season}"] = _plain(seasonal_naive(season))
    rivals["mean"] = lambda x, n, u: np.broadcast_to(mean, (len(x), n, len(mean)))
    errors = {name: tail.error(each, scale) for name, each in {"operator": _rolled(before), **rivals}.items()}
    progress("forecast", 0.85)
    final = _fitted(series, inputs, {}, chosen)
    ahead, columns = _ahead(final, series, inputs, steps, level)
    total = {name: float(np.sqrt(np.mean(each**2))) for name, each in errors.items()}
    best = min((name for name in total if name != "operator"), key=lambda name: total[name])
    facts = {
        "source": series.source, "trajectories": len(series), "rows": int(sum(series.lengths)),
        "channels": list(series.channels), "inputs": [] if inputs is None else list(inputs.channels),
        "filled": series.filled, "time_step": series.time_step, "time_unit": series.time_unit, "steps": steps,
        "delays": chosen[0], "rank": chosen[1], "dimensions": len(np.asarray(final.eigenvalues_)), "season": season,
        "tried": tried, "origins": len(tail.histories), "judged": len(parts), "error": total, "best_rival": best,
        "better": total["operator"] < total[best],
        "errors": {name: [float(value) for value in each] for name, each in errors.items()},
        "level": level, **_coverage(before, tail, steps, level), "modes": _modes(final, series),
        "eigenvalues": [[float(v.real), float(v.imag)] for v in np.asarray(final.eigenvalues_)],
        "shown": _shown(series, ahead, before, tail, level), "seed": 0,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"subspan": version("subspan")}, "seconds": time.perf_counter() - started,
    }  # fmt: skip
    return facts, columns


# ---------------------------------------------------------------------- parts


class _Part(NamedTuple):
    """Where a trajectory is cut: it is fitted up to `check`, delays are chosen up to `tail`, and judged to its end."""

    index: int
    check: int
    tail: int
    length: int


def _cut(series: Series, steps: int) -> list[_Part]:
    """The trajectories that are long enough to be judged."""

    def cut(length: int, ahead: int) -> tuple[int, int]:
        tail = length - max(ahead, length // 4)
        return tail - max(ahead, length // 5), tail

    found = []
    for index, length in enumerate(series.lengths):
        check, tail = cut(length, steps)
        if check >= _fewest(steps):
            found.append(_Part(index, check, tail, length))
    if not found:
        longest = max(series.lengths)
        most = max((n for n in range(1, longest // 2) if cut(longest, n)[0] >= _fewest(n)), default=0)
        hint = f"ask for at most {most} steps" if most else "that is too few for any forecast"
        raise ValueError(f"--steps: {series.source} has at most {longest} rows, too few to hold out {steps}; {hint}")
    return found


def _fewest(steps: int) -> int:
    """Rows to fit to, at the least."""
    return max(8, steps // 2)


def _before(series: Series | None, stops: Mapping[int, int], last: int | None = None) -> list[np.ndarray] | None:
    """The trajectories up to their stops, whole where they have none; of each its `last` rows at most."""
    if series is None:
        return None
    ends = [part[: stops.get(index)] for index, part in enumerate(series.trajectories)]
    return ends if last is None else [part[-last:] for part in ends]


def _scale(series: Series, stops: Mapping[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Deviation (1 where constant) and mean of each channel over what is fitted."""
    moments = Moments(series.dim)
    for index, start, block in series.batches():
        moments.update(block[: max(0, stops.get(index, len(series.trajectories[index])) - start)])
    deviation = moments.covariance(0).diagonal().clamp_min(0).sqrt().numpy()
    mean = moments.mean.numpy()
    return np.where(deviation > 1e-12 * np.abs(mean), deviation, 1.0), mean


def _season(series: Series, parts: list[_Part]) -> int | None:
    """The lag of the highest peak of the autocorrelation, up to a third of what is fitted; None without a peak."""
    longest = max(parts, key=lambda p: p.check)
    rows = np.asarray(series.trajectories[longest.index][max(0, longest.check - 100_000) : longest.check], np.float64)
    t = np.linspace(-1, 1, len(rows))
    rows = rows - rows.mean(axis=0)
    rows = rows - np.outer(t, t @ rows / (t @ t))
    deviation = rows.std(axis=0)
    rows = rows[:, deviation > 1e-12] / deviation[deviation > 1e-12]
    if rows.shape[1] == 0:
        return None
    power = np.abs(np.fft.rfft(rows, 2 * len(rows), axis=0)) ** 2
    raw = np.fft.irfft(power.mean(axis=1))[: len(rows) // 3 + 1]
    found = raw / np.arange(len(rows), len(rows) - len(raw), -1)
    peaks = [lag for lag in range(2, len(found) - 1) if found[lag - 1] < found[lag] >= found[lag + 1]]
    best = max(peaks, key=lambda lag: found[lag], default=None)
    return None if best is None or found[best] < 0.1 * found[0] else best


def _windows(
    series: Series, inputs: Series | None, spans: Mapping[int, tuple[int, int]], steps: int, history: int
) -> _Windows:
    """Forecasts from origins spread evenly over a span of each trajectory that is judged."""
    histories, futures, acting = [], [], []
    for index, (start, stop) in spans.items():
        first, last = max(start, history), stop - steps
        each = min(_ORIGINS // len(spans) + 1, last - first + 1)
        for origin in np.unique(np.linspace(first, last, each).astype(int)) if each > 0 else ():
            part = series.trajectories[index]
            histories.append(part[origin - history : origin])
            futures.append(part[origin : origin + steps])
            if inputs is not None:
                acting.append(inputs.trajectories[index][origin - 1 : origin - 1 + steps])
    if not histories:
        raise ValueError(f"--delays: no trajectory of {series.source} has {history} rows before what is held out")
    double = [np.stack(each).astype(np.float64) for each in (histories, futures)]
    return _Windows(double[0], double[1], np.stack(acting).astype(np.float64) if acting else None)


# ---------------------------------------------------------------------- choice


def _candidates(
    series: Series, parts: list[_Part], season: int | None, delays: int | None, rank: int | float | str | None
) -> list[tuple[int, list[Any]]]:
    """Delays, and ranks of each, that are tried."""
    shortest = min(p.check for p in parts)
    most = min(max(1, _WIDEST // series.dim), max(1, shortest // 3))
    every = [d for d in (*_DELAYS, season or 1, (season or 1) + 1) if d <= most]
    if delays is not None:
        if delays >= shortest:
            raise ValueError(f"--delays: {delays} rows are asked for, {shortest} of {series.source} are fitted")
        every = [delays]
    return [(each, list(_RANKS) if rank == "auto" else [rank]) for each in sorted(set(every))]


def _choose(
    series: Series,
    inputs: Series | None,
    parts: list[_Part],
    steps: int,
    candidates: list[tuple[int, list[Any]]],
    progress: Progress,
) -> tuple[tuple[int, Any], list[dict[str, Any]]]:
    """The delays and rank of least error of roll-outs over the rows from `check` to `tail`; and all that were tried."""
    checks = {p.index: p.check for p in parts}
    scale = _scale(series, checks)[0]
    spans = {p.index: (p.check, p.tail) for p in parts}
    tried: list[dict[str, Any]] = []
    last = _CHOOSING // len(series)
    for place, (delays, ranks) in enumerate(candidates):
        progress(f"{delays} delays", 0.05 + 0.65 * place / len(candidates))
        model = _fitted(series, inputs, checks, (delays, None), last)
        windows = _windows(series, inputs, spans, steps, delays)
        for rank in ranks:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                solved = model.solved(rank=rank)
            error = float(np.sqrt(np.mean(windows.error(_rolled(solved), scale) ** 2)))
            size = len(np.asarray(solved.eigenvalues_))
            if np.isfinite(error) and not any(row["delays"] == delays and row["dimensions"] == size for row in tried):
                tried.append({"delays": delays, "rank": rank, "dimensions": size, "error": error})
    if not tried:
        raise ValueError(f"{series.source}: no operator gives a finite forecast; look for values out of all range")
    best = min(tried, key=lambda row: row["error"])
    return (best["delays"], best["rank"]), sorted(tried, key=lambda row: row["error"])


def _fitted(
    series: Series, inputs: Series | None, stops: Mapping[int, int], chosen: tuple[int, Any], last: int | None = None
) -> KoopmanOperator:
    """An operator of these delays and rank on the trajectories up to their stops; those too short are left out."""
    delays, rank = chosen
    rows, acting = _before(series, stops, last), _before(inputs, stops, last)
    assert rows is not None
    long = [index for index, part in enumerate(rows) if len(part) > delays]
    model = KoopmanOperator(rank, delays=delays, ridge=_RIDGE, clip_spectral_radius=1.0)
    kept = None if acting is None else [acting[index] for index in long]
    return model.fit([rows[index] for index in long], inputs=kept)


def _rolled(model: KoopmanOperator) -> Forecaster:
    return lambda x, n, u: model.predict(x, n, u)


def _plain(forecast: Callable[[Any, int], Any]) -> Forecaster:
    return lambda x, n, u: forecast(x, n)


# ---------------------------------------------------------------------- what is said


def _coverage(model: KoopmanOperator, tail: _Windows, steps: int, level: float) -> dict[str, Any]:
    """How often the intervals hold what came, by step and together."""
    reach = float(norm.ppf(0.5 + level / 2)) * model.deviations(steps).numpy()
    inside = np.abs(model.predict(tail.histories, steps, tail.inputs) - tail.futures) <= reach
    return {"coverage": float(inside.mean()), "coverage_by_step": inside.mean(axis=(0, 2)).tolist()}


def _modes(model: KoopmanOperator, series: Series) -> list[dict[str, Any]]:
    """One of each pair of conjugates, by energy: period and decay in the unit of time, and where it is strongest."""
    period, decay = model.timescales(series.time_step)
    values, modes = np.asarray(model.eigenvalues_), np.abs(np.asarray(model.modes_))
    energy = np.asarray(model.mode_energies_)
    strong = modes / np.where(modes.max(axis=0) > 0, modes.max(axis=0), 1)
    rows = []
    for index in np.argsort(-energy, kind="stable"):
        turn = float(np.imag(values[index]))
        if turn < -1e-12:
            continue
        pair = 2.0 if turn > 1e-12 else 1.0
        rows.append({
            "period": _finite(period[index]), "decay": _finite(decay[index]), "modulus": float(abs(values[index])),
            "energy": pair * float(energy[index]), "channel": series.channels[int(strong[index].argmax())],
        })  # fmt: skip
    total = sum(row["energy"] for row in rows) or 1.0
    return [{**row, "energy": row["energy"] / total} for row in rows]


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _ahead(
    model: KoopmanOperator,
    series: Series,
    inputs: Series | None,
    steps: int,
    level: float,
) -> tuple[dict[int, Any], Columns]:
    """What follows each trajectory that is long enough, and the same as columns."""
    columns: Columns = {name: [] for name in ("id", "step", "time", "channel", "forecast", "lower", "upper")}
    found = {}
    for index, part in enumerate(series.trajectories):
        if len(part) < model.delays:
            continue
        acting = None
        if inputs is not None:
            acting = np.repeat(np.asarray(inputs.trajectories[index][-1:], dtype=np.float64), steps, axis=0)
        rows = np.asarray(part[-model.delays :], dtype=np.float64)
        told = found[index] = model.forecast(rows, steps, acting, level=level)
        times = series.times_after(index, steps)
        for place, channel in enumerate(series.channels):
            columns["id"] += [series.ids[index]] * steps
            columns["step"] += range(1, steps + 1)
            columns["time"] += [str(time) if times.dtype.kind == "M" else float(time) for time in times]
            columns["channel"] += [channel] * steps
            for name, values in (("forecast", told.mean), ("lower", told.lower), ("upper", told.upper)):
                columns[name] += values[:, place].tolist()
    return found, columns


def _shown(
    series: Series, ahead: Mapping[int, Any], model: KoopmanOperator, tail: _Windows, level: float
) -> list[dict[str, Any]]:
    """A few channels for the page: the end of the first trajectory, what follows, and one forecast of the tail."""
    index = next(iter(ahead))
    steps = len(ahead[index].mean)
    kept = min(series.lengths[index], max(4 * steps, 200))
    rows = np.asarray(series.trajectories[index][-kept:], dtype=np.float64)
    told = model.predict(tail.histories[-1:], steps, None if tail.inputs is None else tail.inputs[-1:])[0]
    reach = float(norm.ppf(0.5 + level / 2)) * model.deviations(steps).numpy()
    time = (np.arange(series.lengths[index] - kept, series.lengths[index] + steps) * series.time_step).tolist()
    return [
        {
            "channel": series.channels[place], "id": series.ids[index], "time": time, "rows": rows[:, place].tolist(),
            "mean": ahead[index].mean[:, place].tolist(), "lower": ahead[index].lower[:, place].tolist(),
            "upper": ahead[index].upper[:, place].tolist(), "tail": tail.futures[-1, :, place].tolist(),
            "tail_mean": told[:, place].tolist(), "tail_lower": (told - reach)[:, place].tolist(),
            "tail_upper": (told + reach)[:, place].tolist(),
        }
        for place in range(min(series.dim, _SHOWN))
    ]  # fmt: skip
