"""The page of `subspan embed-series`: a map of the windows, and what a linear probe reads of the label."""

from __future__ import annotations

from html import escape
from typing import Any

from .figures import MARKERS, Figure, line
from .pieces import counted, document, figure_of, percent, plural, table_of

_ROLES = ("first", "second", "third", "fourth")
_OTHERS = "others"
_NAMES = {"features": "learnt features", "spectrum": "spectrum", "samples": "samples"}


def render_series(facts: dict[str, Any]) -> str:
    """The page (HTML) for the facts of `subspan embed-series`."""
    sections = {"map": ("The windows", _map(facts))}
    if facts["probe"] is not None:
        sections["probe"] = (f"What they tell of “{escape(facts['label'])}”", _probe(facts))
    if facts["losses"]:
        sections["training"] = ("The training", _training(facts))
    body = "\n".join(
        f'<section id="{name}" aria-labelledby="{name}-title">\n'
        f'<h2 id="{name}-title">{title}</h2>\n{content}\n</section>'
        for name, (title, content) in sections.items()
    )
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, (title, _) in sections.items())
    tiles = [
        (counted(facts["windows"]), f"windows of {facts['length']} rows"),
        (counted(facts["series"]), "series"),
        (str(len(facts["channels"])), "channels"),
        (counted(facts["features"]), "features"),
    ]
    items = "".join(f"<li><strong>{value}</strong><span>{text}</span></li>" for value, text in tiles)
    by = f" by {escape(facts['model'])}" if facts["model"] is not None else ", learnt from these windows without labels"
    top = f'<p class="source">{escape(facts["source"])}: features{by}.</p><ul class="tiles">{items}</ul>'
    return document(f"Windows of {facts['source']}", "subspan embed-series", top, links, body, facts)


def _groups(found: dict[str, Any]) -> dict[str, list[int]]:
    """Points by group; of many groups the three largest and all others together."""
    points: dict[str, list[int]] = {}
    for place, group in enumerate(found["group"]):
        points.setdefault(group, []).append(place)
    ordered = sorted(points.items(), key=lambda item: -len(item[1]))
    if len(ordered) <= len(_ROLES):
        return dict(ordered)
    rest = [place for _, places in ordered[len(_ROLES) - 1 :] for place in places]
    return {**dict(ordered[: len(_ROLES) - 1]), f"{len(ordered) - len(_ROLES) + 1} {_OTHERS}": rest}


def _map(facts: dict[str, Any]) -> str:
    found = facts["map"]
    traces = []
    for role, (name, places) in zip(_ROLES, _groups(found).items()):
        x, y = ([found[axis][place] for place in places] for axis in "xy")
        dots = {"color": role, "symbol": MARKERS[role], "size": 6, "opacity": 0.65}
        words = [f"window {found['window'][place]}, {escape(found['group'][place])}" for place in places]
        traces.append(line(x, y, name, role) | {"mode": "markers", "marker": dots, "text": words, "hoverinfo": "text"})
    figure: Figure = {
        "data": traces,
        "layout": {
            "xaxis": {"title": {"text": "first direction"}, "zeroline": False},
            "yaxis": {"title": {"text": "second"}, "zeroline": False},
        },
    }
    by = f"“{escape(facts['label'])}”" if facts["label"] is not None else "series"
    caption = (
        f"{plural(len(found['x']), 'window', 'windows')} in the two directions in which features vary most, by {by}"
    )
    note = (
        f'<p class="note">The two directions hold {percent(found["share"])} of the variance of standardised features; '
        "what is apart elsewhere lies together here.</p>"
    )
    return figure_of("map", figure, caption, f"Scatter of windows by {by}.") + note


def _probe(facts: dict[str, Any]) -> str:
    probe = facts["probe"]
    if probe["told"] is None:
        return f"<p>Not read: {escape(probe['reason'])}.</p>"
    rows = probe["rows"]
    shares = [row["share"] for row in rows]
    lines = [
        line(shares, [row[name] for row in rows], words, role, markers=True)
        for role, (name, words) in zip(_ROLES, _NAMES.items())
    ]
    figure: Figure = {
        "data": lines,
        "layout": {
            "xaxis": {
                "title": {"text": "share of the labels"},
                "type": "log",
                "tickvals": shares,
                "ticktext": [f"{share:.0%}" for share in shares],
            },
            "yaxis": {"title": {"text": probe["told"]}},
        },
    }
    best = max(_NAMES, key=lambda name: rows[-1][name])
    few = max(_NAMES, key=lambda name: rows[0][name])
    show = percent if probe["told"] == "accuracy" else lambda value: f"{value:.2f}"
    lead = (
        f"With all labels a linear probe reads most from the {_NAMES[best]} ({show(rows[-1][best])}); with "
        f"{percent(shares[0])} of them from the {_NAMES[few]} ({show(rows[0][few])})."
    )
    if best != "features" and few != "features":
        lead += " The learnt features are no better here: take the plain ones, or train longer."
    told = probe["told"][0].upper() + probe["told"][1:]
    chance = f" The commonest label alone: {show(probe['chance'])}." if probe["told"] == "accuracy" else ""
    cells = [[f"{row['share']:.0%}", str(row["windows"]), *(show(row[name]) for name in _NAMES)] for row in rows]
    table = table_of(["Labels", "windows", *_NAMES.values()], cells)
    note = (
        f'<p class="note">{told} in {escape(probe["how"])} ({counted(probe["held"])} windows), which the '
        f"probe did not learn from, means over draws of the labels.{chance} The training of the features saw those "
        "windows, without labels.</p>"
    )
    if facts["model"] is not None:
        note = note.replace(" The training of the features saw those windows, without labels.", "")
    words = f"{told} by share of the labels, for learnt features, the spectrum and the samples."
    return f'<p class="lead">{lead}</p>{figure_of("probe", figure, words, words)}{table}{note}'


def _training(facts: dict[str, Any]) -> str:
    epochs = list(range(1, len(facts["losses"]) + 1))
    figure: Figure = {
        "data": [line(epochs, facts["losses"], "loss", "first")],
        "layout": {"xaxis": {"title": {"text": "epoch"}}, "yaxis": {"title": {"text": "loss"}}, "showlegend": False},
    }
    words = "Loss of the first stage by epoch; where it still falls at the end, more epochs may help."
    return figure_of("training", figure, words, words)
