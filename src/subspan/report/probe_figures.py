"""Plots of the page of `subspan probe`; see `figures`."""

from __future__ import annotations

from typing import Any

from .figures import Figure, line, rule

SCORES = {"labels": "share of texts right", "numbers": "R²", "code": "F1 of nodes"}


def layers_figure(facts: dict[str, Any]) -> Figure:
    """Score by layer with its interval, beside shuffled labels, the words alone and the commonest label."""
    rows = facts["layers"]
    numbers = [row["layer"] for row in rows]
    data = [
        line(numbers, _of(rows, "score"), facts["property"], "first", markers=True, error_y=_intervals(rows, "first"))
    ]
    if rows[0]["shuffled"] is not None:
        data.append(line(numbers, _of(rows, "shuffled"), "shuffled labels", "third"))
    data.append(_words(facts, numbers))
    shapes, words = _floors(facts)
    return {
        "data": data,
        "layout": {
            "xaxis": {"title": {"text": "layer (0: what goes into the first block)"}},
            "yaxis": _score_axis(facts, [*_of(rows, "low"), *(row["shuffled"] or 0 for row in rows)]),
            "shapes": shapes,
            "annotations": words,
        },
    }


def ranks_figure(facts: dict[str, Any]) -> Figure:
    """Score by the number of dimensions, beside random ones and shuffled labels."""
    rows = facts["ranks"]
    own = [row for row in rows if row["score"] is not None]
    known = [row for row in own if row["shuffled"] is not None]
    bars = [row for row in own if row["low"] is not None]
    data = [
        line(
            _of(own, "rank"),
            _of(own, "score"),
            "most telling dimensions",
            "first",
            markers=True,
            **({"error_y": _intervals(own, "first")} if len(bars) == len(own) else {}),
        ),
        line(_of(rows, "rank"), _of(rows, "random"), "random dimensions", "second", markers=True),
        line(_of(known, "rank"), _of(known, "shuffled"), "shuffled labels", "third", markers=True),
        _words(facts, _of(rows, "rank")),
    ]
    shapes, words = _floors(facts)
    marks = [rank for rank in _of(rows, "rank") if rank & (rank - 1) == 0]
    return {
        "data": data,
        "layout": {
            "xaxis": {"title": {"text": "dimensions"}, "type": "log", "tickvals": marks, "tickangle": 0},
            "yaxis": _score_axis(facts, [*_of(rows, "random"), *_of(known, "shuffled")]),
            "shapes": shapes,
            "annotations": words,
        },
    }


def downstream_figure(facts: dict[str, Any]) -> Figure:
    """What later layers tell while the subspace is erased, beside a random one."""
    found = facts["downstream"]
    names = {"nothing": ("as it is", "first"), "random": ("without random dimensions", "second")}
    names["subspace"] = ("without the subspace", "third")
    data = [line(found["layers"], found[key], words, role, markers=True) for key, (words, role) in names.items()]
    shape, words = rule(facts["chance"], "chance", axis="y")
    every = [score for key in names for score in found[key]]
    return {
        "data": data,
        "layout": {
            "xaxis": {"title": {"text": "layer"}},
            "yaxis": _score_axis(facts, every),
            "shapes": [shape],
            "annotations": [words],
        },
    }


def _floors(facts: dict[str, Any]) -> tuple[list[Figure], list[Figure]]:
    """A line for what is right by chance; of numbers that is 0."""
    chance = {"labels": "commonest label", "numbers": "", "code": "right-branching trees"}[facts["kind"]]
    if not chance:
        return [], []
    shape, words = rule(facts["chance"], chance, axis="y")
    # At the right, where the first points of the curves are not.
    return [shape], [words | {"x": 1, "xanchor": "right"}]


def _words(facts: dict[str, Any], places: list[Any]) -> Figure:
    ends = [places[0], places[-1]]
    return line(ends, [facts["words"]["value"]] * 2, "the words alone", "fourth")


def _score_axis(facts: dict[str, Any], lowest: list[float]) -> Figure:
    axis: Figure = {"title": {"text": SCORES[facts["kind"]]}}
    if facts["kind"] == "labels":
        axis["tickformat"] = ".0%"
    return axis | {"range": [min(0.0, *(max(value, -0.5) for value in lowest)), 1.04]}


def _of(rows: list[dict[str, Any]], name: str) -> list[Any]:
    return [row[name] for row in rows]


def _intervals(rows: list[dict[str, Any]], role: str) -> Figure:
    return {
        "type": "data",
        "symmetric": False,
        "array": [row["high"] - row["score"] for row in rows],
        "arrayminus": [row["score"] - row["low"] for row in rows],
        "color": role,
        "thickness": 1.5,
    }
