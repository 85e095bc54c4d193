"""Plots of a report as plotly traces, told apart by dash and marker as well as by colour.

Colours are roles ("first", "second", …), which the page turns into the colours of its light or dark theme.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

Figure = dict[str, Any]

SUBSET_NAMES = {
    "medoids": "medoids of clusters",
    "farthest": "farthest first",
    "leverage": "highest leverage",
    "random": "random",
}
_DASHES = {"first": "solid", "second": "dash", "third": "dot", "fourth": "dashdot"}
MARKERS = {"first": "circle", "second": "square", "third": "diamond", "fourth": "triangle-up"}


def line(x: list[Any], y: list[Any], name: str, role: str, *, markers: bool = False, **trace: Any) -> dict[str, Any]:
    """A line in the colour and dash of a role, with its marker."""
    return {
        "type": "scatter",
        "mode": "lines+markers" if markers else "lines",
        "x": x,
        "y": y,
        "name": escape(name),
        "line": {"color": role, "dash": _DASHES[role], "width": 2.5},
        "marker": {"color": role, "symbol": MARKERS[role], "size": 9},
        **trace,
    }


def _steps(edges: list[float], heights: list[float], name: str, role: str) -> dict[str, Any]:
    """A histogram as an outline: two of them stay readable on top of each other."""
    return line([*edges], [*heights, heights[-1]], name, role, fill="tozeroy", fillcolor=f"{role}-faint") | {
        "line": {"color": role, "dash": _DASHES[role], "width": 2, "shape": "hv"}
    }


def rule(value: float, text: str, *, axis: str, role: str = "muted", side: str = "left") -> tuple[Figure, Figure]:
    """A straight line across the plot at `value` of an axis, and its words."""
    along, across = ("y", "x") if axis == "x" else ("x", "y")
    shape = {
        "type": "line",
        f"{across}0": value,
        f"{across}1": value,
        f"{across}ref": across,
        f"{along}0": 0,
        f"{along}1": 1,
        f"{along}ref": "paper",
        "line": {"color": role, "dash": "dot", "width": 1.5},
    }
    words: Figure = {
        "text": text,
        "showarrow": False,
        "bgcolor": "card",
        "font": {"color": "ink", "size": 12},
        across: value,
    }
    words |= {f"{across}ref": across, f"{along}ref": "paper"}
    if axis == "x":
        words |= {"y": 1, "yanchor": "top", "xanchor": side}
    else:
        words |= {"x": 0, "yanchor": "bottom", "xanchor": "left"}
    return shape, words


def contents_figure(facts: dict[str, Any]) -> Figure:
    """Cosines to the nearest neighbour beside cosines of random pairs."""
    histograms = facts["cosine_histograms"]
    edges, shares = histograms["edges"], histograms["shares"]
    return {
        "data": [
            _steps(edges, shares["random pair"], "two random rows", "second"),
            _steps(edges, shares["nearest neighbour"], "a row and its nearest neighbour", "first"),
        ],
        "layout": {
            "xaxis": {"title": {"text": "cosine"}},
            "yaxis": {"title": {"text": "share of sampled rows"}, "tickformat": ".0%", "rangemode": "tozero"},
        },
    }


def spectrum_figure(facts: dict[str, Any]) -> Figure:
    """Variance along each principal direction, with the edge of noise and the ranks."""
    values = [value for value in facts["variances"] if value > facts["variances"][0] * 1e-10]
    edge, words = rule(facts["noise_edge"], "edge of pure noise", axis="y")
    words["y"] = math.log10(facts["noise_edge"])
    shapes, annotations = [edge], [words]
    marked = {"effective": "effective rank", "95% of the variance": "95 % of the variance"}
    for position, (key, label) in enumerate(marked.items()):
        rank = facts["ranks"][key]
        mark, text = rule(rank, f"{label}: {rank}", axis="x", side="right" if rank > len(values) / 3 else "left")
        text["x"], text["y"] = math.log10(rank), 1 - 0.09 * position
        shapes.append(mark)
        annotations.append(text)
    return {
        "data": [line(list(range(1, len(values) + 1)), values, "variance", "first")],
        "layout": {
            "xaxis": {"title": {"text": "principal direction"}, "type": "log", "dtick": 1},
            "yaxis": {"title": {"text": "variance"}, "type": "log", "exponentformat": "power", "dtick": 1},
            "shapes": shapes,
            "annotations": annotations,
            "showlegend": False,
        },
    }


def _intervals(curve: list[dict[str, Any]], value: str, color: str) -> dict[str, Any]:
    """Error bars from the points' intervals."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [point["interval"][1] - point[value] for point in curve],
        "arrayminus": [point[value] - point["interval"][0] for point in curve],
        "color": color,
        "thickness": 1.5,
    }


def shortening_figure(facts: dict[str, Any]) -> Figure:
    """Recall of the true neighbours against dimensions."""
    names = {"pca": ("PCA", "first"), "prefix": ("first columns as they are", "second")}
    data = []
    for key, (name, role) in names.items():
        curve = facts["curves"][key]
        data.append(
            line(
                [point["dims"] for point in curve],
                [point["recall"] for point in curve],
                name,
                role,
                markers=True,
                error_y=_intervals(curve, "recall", role),
            )
        )
    shape, words = rule(0.95, "95 %", axis="y")
    return {
        "data": data,
        "layout": {
            "xaxis": {"title": {"text": "dimensions kept"}, "type": "log", "tickvals": _powers(facts), "tickangle": 0},
            "yaxis": {"title": {"text": f"recall@{facts['k']}"}, "tickformat": ".0%", "range": [0, 1.04]},
            "shapes": [shape],
            "annotations": [words],
        },
    }


def _powers(facts: dict[str, Any]) -> list[int]:
    dims = [point["dims"] for point in facts["curves"]["pca"]]
    powers = [k for k in dims if k & (k - 1) == 0]
    return powers + [k for k in dims[-1:] if k > 1.4 * powers[-1]]


def outlier_figure(facts: dict[str, Any]) -> Figure:
    """How far rows lie from the others, and where the fence stands."""
    histogram = facts["histogram"]
    shapes, annotations = [], []
    if facts["fence"] < histogram["edges"][-1]:
        shape, words = rule(facts["fence"], "fence ", axis="x", side="right")
        shapes, annotations = [shape], [words]
    return {
        "data": [_steps(histogram["edges"], histogram["counts"], "rows", "first")],
        "layout": {
            "xaxis": {"title": {"text": "standard deviations beyond the usual"}},
            "yaxis": {"title": {"text": "rows"}, "rangemode": "tozero"},
            "shapes": shapes,
            "annotations": annotations,
            "showlegend": False,
        },
    }


def subset_figure(facts: dict[str, Any]) -> Figure:
    """Share of all rows within a cosine distance of the subset."""
    shares = [percent / 100 for percent in range(101)]
    return {
        "data": [
            line(facts["methods"][key]["distance_curve"], shares, name, role)
            for (key, name), role in zip(SUBSET_NAMES.items(), _DASHES)
        ],
        "layout": {
            "xaxis": {"title": {"text": "cosine distance to the nearest chosen row"}, "rangemode": "tozero"},
            "yaxis": {"title": {"text": "share of rows within it"}, "tickformat": ".0%", "range": [0, 1.02]},
        },
    }


def label_figure(facts: dict[str, Any]) -> Figure | None:
    """Mean principal angle between every two class subspaces."""
    subspaces = facts["subspaces"]
    if subspaces is None:
        return None
    labels = [escape(label) for label in subspaces["labels"]]
    # Classes are placed by number: shortened names may coincide.
    places = list(range(len(labels)))
    axis = {
        "tickvals": places,
        "ticktext": [escape(label if len(label) <= 18 else label[:17] + "…") for label in subspaces["labels"]],
        "tickfont": {"size": 11},
        "showgrid": False,
        "zeroline": False,
        "automargin": True,
    }
    angles = subspaces["mean_angle"]
    return {
        "data": [
            {
                "type": "heatmap",
                "z": [[None if i == j else round(angles[i][j], 1) for j in places] for i in places],
                "x": places,
                "y": places,
                "colorscale": "sequential",
                "reversescale": True,
                "hoverongaps": False,
                "hoverinfo": "text",
                "hovertext": [[f"{labels[i]} and {labels[j]}: {angles[i][j]:.1f}°" for j in places] for i in places],
                "xgap": 1,
                "ygap": 1,
                "texttemplate": "%{z:.0f}" if len(labels) <= 12 else "",
                "colorbar": {"title": {"text": "degrees"}, "thickness": 12, "outlinewidth": 0},
            }
        ],
        "layout": {
            "xaxis": {**axis, "tickangle": -90},
            "yaxis": {**axis, "autorange": "reversed"},
            "height": 560,
        },
    }


def affinity_figure(facts: dict[str, Any]) -> Figure:
    """Affinity between rows in the order of their clusters: blocks where clusters hold together."""
    cells, ends = facts["affinity"]["cells"], facts["affinity"]["ends"]
    owner = [next(cluster for cluster, end in enumerate(ends) if place < end) for place in range(len(cells))]
    starts = [0, *ends[:-1]]
    axis = {
        "tickvals": [(start + end - 1) / 2 for start, end in zip(starts, ends)],
        "ticktext": [str(cluster) for cluster in range(len(ends))],
        "title": {"text": "cluster"},
        "showgrid": False,
        "zeroline": False,
        "range": [-0.5, len(cells) - 0.5],
    }
    lines = []
    for end in ends[:-1]:
        for along, across in (("x", "y"), ("y", "x")):
            lines.append(
                {"type": "line", f"{across}0": end - 0.5, f"{across}1": end - 0.5, f"{along}0": -0.5,
                 f"{along}1": len(cells) - 0.5, "line": {"color": "muted", "width": 1}}
            )  # fmt: skip
    return {
        "data": [
            {
                "type": "heatmap",
                # Most cells are small beside the largest; their roots can be told apart.
                "z": [[round(math.sqrt(value), 3) for value in row] for row in cells],
                "colorscale": "sequential",
                "hoverinfo": "text",
                "hovertext": [
                    [f"clusters {owner[i]} and {owner[j]}: {value:.3f}" for j, value in enumerate(row)]
                    for i, row in enumerate(cells)
                ],
                "zmin": 0,
                "zmax": 1,
                "colorbar": {"title": {"text": "√ affinity"}, "thickness": 12, "outlinewidth": 0},
            }
        ],
        "layout": {
            "xaxis": axis,
            "yaxis": {**axis, "range": axis["range"][::-1]},
            "shapes": lines,
            "height": 560,
        },
    }


def retrieval_figure(facts: dict[str, Any]) -> Figure:
    """Cross-retrieval on held-out rows for each map."""
    measures = {
        "recall@1": ("finds its own row first", "first", lambda entry: entry["recall@1"]),
        "recall@10": ("finds its own row in 10", "second", lambda entry: entry["recall@10"]),
        "neighbours kept": ("keeps its 10 neighbours", "third", lambda entry: entry["neighbours_kept"]),
    }
    names = list(facts["retrieval"])[::-1]
    data = []
    for position, (text, role, pick) in enumerate(measures.values()):
        entries = [pick(facts["retrieval"][name]) for name in names]
        values = [entry.get("value", entry.get("share")) for entry in entries]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": values,
                "y": [row + 0.18 * (1 - position) for row in range(len(names))],
                "name": text,
                "marker": {"color": role, "symbol": MARKERS[role], "size": 11},
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [entry["interval"][1] - value for entry, value in zip(entries, values)],
                    "arrayminus": [value - entry["interval"][0] for entry, value in zip(entries, values)],
                    "color": role,
                    "thickness": 1.5,
                },
            }
        )
    return {
        "data": data,
        "layout": {
            "xaxis": {"title": {"text": "share of held-out queries"}, "tickformat": ".0%", "range": [-0.03, 1.05]},
            "yaxis": {"tickvals": list(range(len(names))), "ticktext": names, "automargin": True, "zeroline": False},
        },
    }


def canonical_figure(facts: dict[str, Any]) -> Figure:
    """Held-out correlations of the canonical pairs."""
    correlations = facts["canonical_correlations"]
    shape, words = rule(facts["shared_dimensions"]["correlation_above"], "counts as shared", axis="y")
    # Of unrelated directions 19 in 20 correlate by less on as many rows.
    by_chance, chance_words = rule(2 / facts["rows_held_out"] ** 0.5, "chance", axis="y")
    return {
        "data": [line(list(range(1, len(correlations) + 1)), correlations, "correlation", "first")],
        "layout": {
            "xaxis": {"title": {"text": "canonical pair"}},
            "yaxis": {"title": {"text": "correlation on held-out rows"}, "range": [-0.15, 1.03]},
            "shapes": [shape, by_chance],
            "annotations": [words, chance_words],
            "showlegend": False,
        },
    }


def upgrade_figure(facts: dict[str, Any]) -> Figure:
    """Recall@10 of each way to answer new queries, with its interval."""
    ways = {name: entry for name, entry in facts["retrieval"].items() if entry is not None}
    shape, words = rule(facts["backfill"]["need"], f"{facts['target']:.0%} of new/new", axis="y")
    lowest = min(ways, key=lambda name: ways[name]["value"])
    return {
        "data": [
            {
                "type": "bar",
                "x": list(ways),
                "y": [entry["value"] for entry in ways.values()],
                "marker": {"color": "first"},
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "array": [entry["interval"][1] - entry["value"] for entry in ways.values()],
                    "arrayminus": [entry["value"] - entry["interval"][0] for entry in ways.values()],
                    "color": "ink",
                    "thickness": 1.5,
                },
            }
        ],
        "layout": {
            "xaxis": {"title": {"text": "queries / collection"}},
            "yaxis": {"title": {"text": f"recall@{facts['k']}"}, "tickformat": ".0%", "range": [0, 1.04]},
            "shapes": [shape],
            # Where the lowest bar leaves room for it.
            "annotations": [words | {"x": lowest, "xref": "x", "xanchor": "center"}],
            "showlegend": False,
        },
    }


def backfill_figure(facts: dict[str, Any]) -> Figure:
    """Recall@10 of new queries against the share of the items embedded anew."""
    names = {"ordered": "in the order given", "random": "in random order"}
    data = []
    for (key, name), role in zip(names.items(), _DASHES):
        curve = facts["backfill"]["curves"][key]
        data.append(
            line(
                [point["share"] for point in curve],
                [point["value"] for point in curve],
                name,
                role,
                markers=True,
                error_y=_intervals(curve, "value", role),
            )
        )
    shape, words = rule(facts["backfill"]["need"], f"{facts['target']:.0%} of new/new", axis="y")
    return {
        "data": data,
        "layout": {
            "xaxis": {
                "title": {"text": "share of the items embedded anew"},
                "tickformat": ".0%",
                "range": [-0.03, 1.03],
            },
            "yaxis": {"title": {"text": f"recall@{facts['k']}"}, "tickformat": ".0%", "range": [0, 1.04]},
            "shapes": [shape],
            # At the right, below the line: the first points of the curves lie at the left.
            "annotations": [words | {"x": 1, "xanchor": "right", "yanchor": "top"}],
        },
    }


def layer_error_figure(errors: Mapping[str, Mapping[int, float]]) -> Figure:
    """Errors of layers, a row a kind and a column a block."""
    blocks = sorted({block for row in errors.values() for block in row})
    kinds = list(errors)
    return {
        "data": [
            {
                "type": "heatmap",
                "x": [str(block) for block in blocks],
                "y": [escape(kind) for kind in kinds],
                "z": [[errors[kind].get(block) for block in blocks] for kind in kinds],
                "colorscale": "sequential",
                "hoverinfo": "text",
                "hovertext": [
                    [
                        f"{escape(kind)}, block {block}: {errors[kind][block]:.3f}" if block in errors[kind] else ""
                        for block in blocks
                    ]
                    for kind in kinds
                ],
                "zmin": 0,
                "zmax": max(value for row in errors.values() for value in row.values()),
                "xgap": 1,
                "ygap": 1,
                "colorbar": {"thickness": 12, "outlinewidth": 0},
            }
        ],
        "layout": {
            "xaxis": {"title": {"text": "block"}, "showgrid": False, "zeroline": False, "type": "category"},
            "yaxis": {"showgrid": False, "zeroline": False, "autorange": "reversed", "type": "category"},
            "height": 150 + 30 * len(kinds),
        },
    }


def overlap_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Overlaps of updates beside what chance gives, matrices in falling order."""
    place = list(range(1, len(rows) + 1))
    ordered = sorted(rows, key=lambda row: -row["overlap"])
    names = [escape(row["tensor"]) for row in ordered]
    return {
        "data": [
            line(place, [row["overlap"] for row in ordered], "the experts' updates", "first", text=names),
            line(place, [row["by_chance"] for row in ordered], "random directions", "second", text=names),
        ],
        "layout": {
            "xaxis": {"title": {"text": "matrices, the most overlapping first"}},
            "yaxis": {"title": {"text": "overlap"}, "range": [0, 1.04]},
        },
    }


def unlearning_figure(states: Mapping[str, Mapping[str, float]], names: Mapping[str, str]) -> Figure:
    """Figures of a model in its states, a line of points a figure."""
    roles = dict(zip(names, MARKERS))
    return {
        "data": [
            line(list(states), [found[name] for found in states.values()], names[name], role, markers=True)
            for name, role in roles.items()
        ],
        "layout": {
            "xaxis": {"type": "category"},
            "yaxis": {"title": {"text": "probability, share of words"}, "range": [0, 1.04]},
        },
    }


def course_figure(course: Sequence[Mapping[str, float]], terms: Mapping[str, str]) -> Figure:
    """Terms of a loss over the steps of a training."""
    steps = [row["step"] for row in course]
    return {
        "data": [
            line(steps, [row[name] for row in course], words, role, markers=len(steps) < 40)
            for (name, words), role in zip(terms.items(), MARKERS)
        ],
        "layout": {"xaxis": {"title": {"text": "step"}}, "yaxis": {"title": {"text": "loss"}}},
    }
