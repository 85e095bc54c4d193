"""The page of `subspan forecast`: what comes next, how it did on what was held out, and of which modes it is made."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from .figures import Figure, line
from .pieces import counted, details_of, document, figure_of, percent, plural, rounded, table_of

_SHOWN_MODES = 12
_ROLES = ("first", "second", "third", "fourth")


def render_forecast(facts: dict[str, Any]) -> str:
    """The page (HTML) for the facts of `subspan forecast`."""
    sections = {
        "next": ("What comes next", _next(facts)),
        "held-out": ("How it did on rows held out", _held_out(facts)),
        "modes": ("Modes", _modes(facts)),
        "chosen": ("What was chosen", _chosen(facts)),
    }
    body = "\n".join(
        f'<section id="{name}" aria-labelledby="{name}-title">\n'
        f'<h2 id="{name}-title">{heading}</h2>\n{content}\n</section>'
        for name, (heading, content) in sections.items()
    )
    links = "".join(f'<li><a href="#{name}">{heading}</a></li>' for name, (heading, _) in sections.items())
    rival = facts["best_rival"]
    tiles = [
        (f"{facts['error']['operator']:.2f}", f"error over {plural(facts['steps'], 'step', 'steps')}, in deviations"),
        (f"{facts['error'][rival]:.2f}", f"of {escape(_named(rival))}, the best plain forecast"),
        (percent(facts["coverage"]), f"of what came lay in the intervals of {percent(facts['level'])}"),
        (counted(facts["dimensions"]), f"dimensions, from {plural(facts['delays'], 'row', 'rows')} a state"),
    ]
    items = "".join(f"<li><strong>{value}</strong><span>{text}</span></li>" for value, text in tiles)
    many = f"{counted(facts['trajectories'])} trajectories, " if facts["trajectories"] > 1 else ""
    filled = f", {plural(facts['filled'], 'value', 'values')} filled in" if facts["filled"] else ""
    top = (
        f'<p class="source">{many}{plural(facts["rows"], "row", "rows")} of '
        f'{plural(len(facts["channels"]), "channel", "channels")}{filled}.</p><ul class="tiles">{items}</ul>'
    )
    title = f"{plural(facts['steps'], 'step', 'steps')} ahead of {facts['source'].rsplit('/', 1)[-1]}"
    return document(title, "subspan forecast", top, links, body, facts)


def _named(rival: str) -> str:
    return f"the last {rival}" if rival.startswith("season") else f"the {rival}" if rival == "mean" else rival


def _next(facts: dict[str, Any]) -> str:
    figures = [
        figure_of(
            f"next-{place}",
            _series_figure(shown, facts),
            f"{escape(shown['channel'])}"
            + (f", trajectory {escape(shown['id'])}" if facts["trajectories"] > 1 else ""),
            f"{shown['channel']} ends at {rounded(shown['rows'][-1])}; after {facts['steps']} steps it is expected at "
            f"{rounded(shown['mean'][-1])}, between {rounded(shown['lower'][-1])} and {rounded(shown['upper'][-1])}.",
        )
        for place, shown in enumerate(facts["shown"])
    ]
    left = len(facts["channels"]) - len(facts["shown"])
    more = f" {plural(left, 'channel is', 'channels are')} not shown." if left > 0 else ""
    inputs = f" Inputs ({escape(', '.join(facts['inputs']))}) go on at their last values." if facts["inputs"] else ""
    note = (
        f'<p class="note">Bands are to hold each value with {percent(facts["level"])}; the earlier one is a forecast '
        f"of rows that were not fitted.{inputs}{more}</p>"
    )
    return "".join(figures) + note


def _series_figure(shown: dict[str, Any], facts: dict[str, Any]) -> Figure:
    time, n, steps = shown["time"], len(shown["rows"]), facts["steps"]
    ahead, tail = time[n:], time[n - steps : n]
    data = [
        *_band(tail, shown["tail_lower"], shown["tail_upper"], "second"),
        *_band(ahead, shown["lower"], shown["upper"], "first"),
        line(time[:n], shown["rows"], "series", "fourth") | {"line": {"color": "ink", "width": 1.5}},
        line(tail, shown["tail_mean"], "forecast of rows held out", "second"),
        line([time[n - 1], *ahead], [shown["rows"][-1], *shown["mean"]], "forecast", "first"),
    ]
    unit = facts["time_unit"] or ("rows" if facts["time_step"] == 1 else "")
    title = f"since the first row ({unit})" if unit else "since the first row"
    return {
        "data": data,
        "layout": {"xaxis": {"title": {"text": title}}, "yaxis": {"title": {"text": escape(shown["channel"])}}},
    }


def _band(x: list[float], lower: list[float], upper: list[float], role: str) -> list[Figure]:
    return [
        {
            "type": "scatter", "mode": "lines", "x": [*x, *x[::-1]], "y": [*upper, *lower[::-1]], "fill": "toself",
            "fillcolor": f"{role}-faint", "line": {"color": f"{role}-faint", "width": 0}, "hoverinfo": "skip",
            "showlegend": False,
        }
    ]  # fmt: skip


def _held_out(facts: dict[str, Any]) -> str:
    rival = facts["best_rival"]
    if facts["better"]:
        gain = 1 - facts["error"]["operator"] / facts["error"][rival]
        said = f"The operator is better than every plain forecast: {percent(gain)} less error than {_named(rival)}."
    else:
        said = (
            f"The operator is no better than {_named(rival)}: use that. What it says of modes may hold all the same, "
            "as far as they come back in other parts of the series."
        )
    off = facts["coverage"] - facts["level"]
    trust = "about as often as they say"
    if abs(off) > 0.05:
        trust = "less often than they say: take them as wider" if off < 0 else "more often than they say: they are wide"
    figure = figure_of(
        "errors",
        _errors_figure(facts),
        f"Error by steps ahead, in deviations of a channel, {plural(facts['origins'], 'forecast', 'forecasts')}",
        said,
    )
    rows = [
        [escape(name), *(f"{errors[h - 1]:.3f}" for h in _horizons(facts)), f"{facts['error'][name]:.3f}"]
        for name, errors in facts["errors"].items()
    ]
    table = table_of(["", *(f"step {h}" for h in _horizons(facts)), "all"], rows)
    note = (
        f'<p class="note">The last quarter of each trajectory, and at least {plural(facts["steps"], "row", "rows")}, '
        "was not fitted and chose nothing. Intervals come from the error of one step, carried through the operator; "
        f"they held {percent(facts['coverage'])} of what came, {trust}.</p>"
    )
    return f'<div class="verdict"><p><strong>{said}</strong></p></div>{figure}{note}{details_of("As numbers", table)}'


def _horizons(facts: dict[str, Any]) -> list[int]:
    last = facts["steps"]
    return sorted({1, max(1, last // 4), max(1, last // 2), last})


def _errors_figure(facts: dict[str, Any]) -> Figure:
    ahead = list(range(1, facts["steps"] + 1))
    data = [line(ahead, errors, name, _ROLES[place]) for place, (name, errors) in enumerate(facts["errors"].items())]
    return {
        "data": data,
        "layout": {
            "xaxis": {"title": {"text": "steps ahead"}},
            "yaxis": {"title": {"text": "error / deviation"}, "rangemode": "tozero"},
        },
    }


def _modes(facts: dict[str, Any]) -> str:
    unit = f" ({facts['time_unit']})" if facts["time_unit"] else ""
    rows = [
        [
            "does not turn" if mode["period"] is None else rounded(mode["period"]),
            "lasts" if mode["decay"] is None else rounded(mode["decay"]),
            f"{mode['modulus']:.4f}",
            percent(mode["energy"]),
            escape(mode["channel"]),
        ]
        for mode in facts["modes"]
    ]
    head = [f"Period{unit}", f"decay time{unit}", "modulus", "energy", "most in"]
    figure = figure_of(
        "spectrum",
        _spectrum_figure(facts),
        "Eigenvalues of the operator, in the unit circle",
        f"{sum(mode['modulus'] > 0.99 for mode in facts['modes'])} modes lie within 1% of the circle and last.",
    )
    table = table_of(head, rows[:_SHOWN_MODES], numbers_from=0)
    more = (
        details_of(f"All {len(rows)} modes", table_of(head, rows, numbers_from=0)) if len(rows) > _SHOWN_MODES else ""
    )
    note = (
        '<p class="note">On the circle a mode lasts, inside it decays; the angle is the share of a turn in a step. '
        "After the decay time a mode is 1/e of what it was. Energy is each mode's mean square in the series; modes are "
        "not orthogonal, so that it may change with the delays.</p>"
    )
    return f"{figure}{table}{more}{note}"


def _spectrum_figure(facts: dict[str, Any]) -> Figure:
    turn = [2 * math.pi * place / 120 for place in range(121)]
    circle = line([math.cos(a) for a in turn], [math.sin(a) for a in turn], "unit circle", "fourth")
    circle |= {"line": {"color": "muted", "width": 1}, "hoverinfo": "skip", "showlegend": False}
    points = {
        "type": "scatter", "mode": "markers", "name": "eigenvalues", "showlegend": False,
        "x": [value[0] for value in facts["eigenvalues"]], "y": [value[1] for value in facts["eigenvalues"]],
        "marker": {"color": "first", "size": 8, "symbol": "circle"},
    }  # fmt: skip
    return {
        "data": [circle, points],
        "layout": {
            "xaxis": {"title": {"text": "real part"}, "range": [-1.15, 1.15], "constrain": "domain"},
            "yaxis": {"title": {"text": "imaginary part"}, "range": [-1.15, 1.15], "scaleanchor": "x"},
        },
    }


def _chosen(facts: dict[str, Any]) -> str:
    rows = [
        [str(row["delays"]), "all" if row["rank"] is None else escape(str(row["rank"])), str(row["dimensions"]),
         f"{row['error']:.4f}"]
        for row in facts["tried"]
    ]  # fmt: skip
    head = ["Delays", "rank", "dimensions", "error"]
    count = plural(len(rows), "operator was", "operators were")
    said = f"{count} tried on the rows before those held out; the first was taken."
    return f"<p>{said}</p>{table_of(head, rows[:5], numbers_from=0)}" + (
        details_of("All", table_of(head, rows, numbers_from=0)) if len(rows) > 5 else ""
    )
