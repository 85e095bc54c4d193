"""Plots of the page of `subspan audit`; see `figures`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from typing import Any

from .figures import MARKERS, Figure, line, rule

_ROLES = tuple(MARKERS)
KINDS = {
    "topk": ("main directions", "first"),
    "randomk": ("any of its directions", "third"),
    "random": ("random directions", "second"),
    "scaled": ("scaled update", "fourth"),
}


def curves_figure(facts: dict[str, Any]) -> Figure:
    """Share of each update in the main directions, and in random ones."""
    weights = facts["weights"]
    shares = weights["fractions"]
    shown = dict(zip(facts["tuned"], _ROLES))
    data = [line(shares, weights["curves"][name]["kept"], name, role, markers=True) for name, role in shown.items()]
    data.append(_chance(shares, next(iter(weights["curves"].values()))["chance"]))
    return {
        "data": data,
        "layout": {
            "xaxis": {"title": {"text": "share of each tensor's directions"}, "tickformat": ".0%"},
            "yaxis": {"title": {"text": "share of the update"}, "tickformat": ".0%", "range": [0, 1.04]},
        },
    }


def layers_figure(facts: dict[str, Any]) -> Figure:
    """Share of each update in the main directions, by numbered layer."""
    layers = numbered(facts["weights"]["layers"])
    data = []
    for name, role in zip(facts["tuned"], _ROLES):
        there = [(number, row["kept"][name]) for number, row in layers if name in row["kept"]]
        data.append(line([x for x, _ in there], [y for _, y in there], name, role, markers=len(layers) < 40))
    data.append(_chance([number for number, _ in layers], [row["chance"] for _, row in layers]))
    return {
        "data": data,
        "layout": {
            "xaxis": {"title": {"text": "layer"}, "dtick": _step(layers)},
            "yaxis": {"title": {"text": "share of the update"}, "tickformat": ".0%", "rangemode": "tozero"},
        },
    }


def angles_figure(facts: dict[str, Any]) -> Figure:
    """Mean angle of pairs of updates, by numbered layer; of many pairs the first ones."""
    layers = numbered(facts["weights"]["layers"])
    pairs = dict.fromkeys(pair for _, row in layers for pair in row["angles"])
    data = []
    for pair, role in zip(pairs, _ROLES):
        there = [(number, row["angles"][pair]) for number, row in layers if pair in row["angles"]]
        data.append(line([x for x, _ in there], [y for _, y in there], pair, role, markers=len(layers) < 40))
    return {
        "data": data,
        "layout": {
            "xaxis": {"title": {"text": "layer"}, "dtick": _step(layers)},
            "yaxis": {"title": {"text": "degrees"}, "range": [0, 92], "dtick": 15},
        },
    }


def carried_figure(facts: dict[str, Any]) -> Figure:
    """What directions and controls carry of each behaviour."""
    carried = facts["behaviours"]["carried"]
    names = [escape(name) for name in carried]
    data = []
    for place, (kind, (words, role)) in enumerate(KINDS.items()):
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [kinds[kind] for kinds in carried.values()],
                "y": [row + 0.12 * (1.5 - place) for row in range(len(names))],
                "name": words,
                "marker": {"color": role, "symbol": MARKERS[role], "size": 11},
            }
        )
    return {
        "data": data,
        "layout": {
            "xaxis": {"title": {"text": "share of the change that is carried"}, "tickformat": ".0%"},
            "yaxis": _rows(names),
        },
    }


def selectivity_figure(facts: dict[str, Any]) -> Figure:
    """Selectivities with their intervals, and the margin from which they count."""
    found = facts["behaviours"]
    controls = [kind for kind in KINDS if any(row["control"] == kind for row in found["selectivities"])]
    names = list(found["carried"])
    data = []
    for place, control in enumerate(controls):
        rows = [row for row in found["selectivities"] if row["control"] == control]
        words, role = KINDS[control]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [row["estimate"] for row in rows],
                "y": [names.index(row["behaviour"]) + 0.16 * (1 - place) for row in rows],
                "name": f"beside: {words}",
                "marker": {"color": role, "symbol": MARKERS[role], "size": 10},
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [row["high"] - row["estimate"] for row in rows],
                    "arrayminus": [row["estimate"] - row["low"] for row in rows],
                    "color": role,
                    "thickness": 1.5,
                },
            }
        )
    shape, words = rule(found["margin"], f"{found['margin']:g}", axis="x")
    return {
        "data": data,
        "layout": {
            "xaxis": {"title": {"text": "selectivity"}, "zeroline": True},
            "yaxis": _rows([escape(name) for name in names]),
            "shapes": [shape],
            "annotations": [words],
        },
    }


def numbered(layers: Sequence[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """(number, facts) of the layers whose name ends in a number, in their order; of the longest stack of them."""
    stacks: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for row in layers:
        found = re.fullmatch(r"(.*?)(\d+)", row["layer"])
        if found is not None:
            stacks.setdefault(found[1], []).append((int(found[2]), row))
    return sorted(max(stacks.values(), key=len, default=[]), key=lambda pair: pair[0])


def _step(layers: Sequence[tuple[int, dict[str, Any]]]) -> int:
    """Whole layers from one place on the axis to the next."""
    return max(1, round((layers[-1][0] - layers[0][0]) / 8))


def _rows(names: list[str]) -> dict[str, Any]:
    """An axis with a row a name."""
    places = list(range(len(names)))
    room = [-0.5, len(names) - 0.5]
    return {"tickvals": places, "ticktext": names, "range": room, "automargin": True, "zeroline": False}


def _chance(x: list[Any], y: list[Any]) -> dict[str, Any]:
    return line(x, y, "random directions", "fourth") | {"line": {"color": "muted", "dash": "dot", "width": 1.5}}
