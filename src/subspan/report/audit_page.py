"""The page of `subspan audit`: whether the directions of an update are about one behaviour, and what says so."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from . import audit_figures as figures
from .pieces import counted, details_of, document, figure_of, noun, percent, plural, ranging, rounded, table_of

_VERDICTS = {
    "specific": "The subspace is specific to one behaviour",
    "not specific": "The subspace is not specific to one behaviour",
    "no evidence": "No evidence either way",
    "unequal": "The subspace holds more of one update than of another",
    "alike": "The subspace holds the updates alike",
    "beyond chance": "The subspace holds more of the update than chance would",
    "at chance": "The subspace holds no more of the update than chance would",
}


def render_audit(facts: dict[str, Any]) -> str:
    """The page (HTML) for the facts of `subspan audit`."""
    sections = {
        "verdict": ("What is found", _verdict),
        **({"behaviours": ("What the directions carry", _behaviours)} if facts["behaviours"] else {}),
        "curves": ("What lies in the directions", _curves),
        **({"subspace": ("What is written into the subspace", _subspace)} if facts["subspace"] else {}),
        "layers": ("Layer by layer", _layers),
        "pairs": ("How the updates lie to one another", _pairs),
        **({"states": ("What states of prompts share", _states)} if facts["behaviours"] else {}),
    }
    body = "\n".join(
        f'<section id="{name}" aria-labelledby="{name}-title">\n<h2 id="{name}-title">{title}</h2>\n'
        f"{section(facts)}\n</section>"
        for name, (title, section) in sections.items()
    )
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, (title, _) in sections.items())
    weights = facts["weights"]
    tiles = [(facts["verdict"].capitalize(), f"by {facts['read_from']}")]
    tiles += [
        (
            f"{each['value']:.2f}".replace("-", "−"),
            f"of the update of {escape(name)} is in the directions, beyond chance",
        )
        for name, each in weights["beyond"].items()
    ]
    items = "".join(f"<li><strong>{value}</strong><span>{text}</span></li>" for value, text in tiles)
    tuned = ", ".join(map(escape, facts["tuned"]))
    top = (
        f'<p class="source">The update from {escape(facts["base"])} to {escape(facts["aligned"])} in '
        f"{plural(weights['tensors'], 'tensor', 'tensors')}, and {noun(len(facts['tuned']), 'that', 'those')} on to "
        f'{tuned}.</p><ul class="tiles">{items}</ul>'
    )
    return document(f"Directions of {facts['aligned']}", "subspan audit", top, links, body, facts)


def _verdict(facts: dict[str, Any]) -> str:
    behaviours, weights = facts["behaviours"], facts["weights"]
    if behaviours:
        more = f"<p>By weights alone, {escape(weights['verdict'])}: {escape(weights['reason'])}.</p>"
    else:
        more = (
            '<p class="note">Weights say where updates lie, not what they do. Whether the directions carry one '
            "behaviour rather than another is read with two or more files of prompts (<code>--prompts</code>).</p>"
        )
    reason = facts["reason"]
    return (
        f'<div class="verdict"><p><strong>{_VERDICTS[facts["verdict"]]}</strong></p>'
        f"<p>{escape(reason[0].upper() + reason[1:])}.</p></div>{more}"
    )


def _behaviours(facts: dict[str, Any]) -> str:
    found = facts["behaviours"]
    changes = table_of(
        ["Tuned on", "behaviour", "before", "after", "change, interval", "moved"],
        [
            [
                escape(row["tuned"]),
                escape(row["behaviour"]),
                f"{row['aligned']:.3f}",
                f"{row['full']:.3f}",
                ranging(row["low"], row["high"], _signed),
                "yes" if row["moved"] else "no",
            ]
            for row in found["changes"]
        ],
        numbers_from=2,
    )
    if not found["carried"]:
        return f"<p>Fewer than two behaviours are moved, so nothing can be told from another.</p>{changes}"
    carried = table_of(
        ["Behaviour", *(words for words, _ in figures.KINDS.values())],
        [[escape(name), *(f"{kinds[kind]:.3f}" for kind in figures.KINDS)] for name, kinds in found["carried"].items()],
    )
    figure = figure_of(
        "carried",
        figures.carried_figure(facts),
        f"Share of each behaviour's change that {percent(facts['fraction'])} of the directions carry, and controls",
        "; ".join(f"{name}: {kinds['topk']:.2f}" for name, kinds in found["carried"].items()),
    )
    selective = figure_of(
        "selective",
        figures.selectivity_figure(facts),
        "How much more of a behaviour than of the others the directions carry, less the same of a control",
        "; ".join(
            f"{row['behaviour']} beside {row['control']}: {row['estimate']:.2f}" for row in found["selectivities"]
        ),
    )
    table = table_of(
        ["Behaviour", "beside", "selectivity", "interval"],
        [
            [
                escape(row["behaviour"]),
                figures.KINDS[row["control"]][0],
                _signed(row["estimate"]),
                ranging(row["low"], row["high"], _signed),
            ]
            for row in found["selectivities"]
        ],
        numbers_from=2,
    )
    note = (
        '<p class="note">Carried: the mean of what is left with the part of the update inside the directions alone, '
        "and of what is lost without it. The scaled update has the same energy and no direction of its own: what "
        f"a smaller update does by itself. A selectivity of {found['margin']:g} or more with an interval above 0 "
        "beside both random ones and the scaled update counts as specific.</p>"
    )
    return (
        f"{figure}{selective}{note}{details_of('As numbers', carried + table)}"
        f"{details_of('What tuning changed', changes)}"
    )


def _curves(facts: dict[str, Any]) -> str:
    weights = facts["weights"]
    rows = [
        [
            escape(name),
            percent(share),
            *(f"{curve[kind][place]:.3f}" for kind in ("kept", "drawn", "chance")),
        ]
        for name, curve in weights["curves"].items()
        for place, share in enumerate(weights["fractions"])
    ]
    beyond = table_of(
        ["Update of", "beyond chance", "interval", "cosine"],
        [
            [
                escape(name),
                f"{row['value']:.3f}",
                ranging(row["low"], row["high"], _signed),
                f"{weights['cosines'][name]:.3f}",
            ]
            for name, row in weights["beyond"].items()
        ],
    )
    figure = figure_of(
        "curves",
        figures.curves_figure(facts),
        "Share of each update's energy in the first directions of the update to the aligned model",
        "; ".join(f"{name}: {curve['kept'][-1]:.2f} at the end" for name, curve in weights["curves"].items()),
    )
    note = (
        f'<p class="note">Beyond chance, at {percent(facts["fraction"])} of each tensor’s directions: 0 is what random '
        "subspaces of the same dimensions hold on average, 1 is all. Intervals are from a bootstrap over layers (over "
        "tensors, for fewer than 8), all of them together at 95\u202f%. The cosine is that of the whole updates.</p>"
    )
    head = ["Update of", "of the directions", "main ones", "any of them", "random ones"]
    return f"{figure}{beyond}{note}{details_of('The curves as numbers', table_of(head, rows))}"


def _subspace(facts: dict[str, Any]) -> str:
    found = facts["subspace"]
    rows = [
        [
            escape(name),
            f"{share:.3f}",
            f"{found['chance']:.3f}",
            f"{found['beyond'][name]['value']:.3f}",
            ranging(found["beyond"][name]["low"], found["beyond"][name]["high"], _signed),
        ]
        for name, share in found["shares"].items()
    ]
    lead = (
        f'<p class="lead">{escape(found["file"])}: {escape(found["reason"])}.</p><p class="note">Of what updates of '
        f"{plural(found['matrices'], 'matrix', 'matrices')} add to the states between blocks, the share in "
        f"{counted(found['dimensions'])} of {counted(found['width'])} directions. A random subspace of as many holds "
        "their share of the directions. Beyond chance: 0 is that, 1 is all. Weights say where updates write, not what "
        "they do.</p>"
    )
    if found["unmoved"]:
        named = ", ".join(map(escape, found["unmoved"]))
        lead += f'<p class="note">No matrix that writes into the states is changed by the update of {named}.</p>'
    table = table_of(["Update of", "in the subspace", "in a random one", "beyond chance", "interval"], rows)
    names = list(found["layers"])
    layers = list(dict.fromkeys(layer for name in names for layer in found["layers"][name]))
    each = [
        [escape(layer), *(_or_nothing(found["layers"][name].get(layer), "{:.3f}") for name in names)]
        for layer in layers
    ]
    return f"{lead}{table}{details_of('Every layer', table_of(['Layer', *map(escape, names)], each))}"


def _layers(facts: dict[str, Any]) -> str:
    layers = facts["weights"]["layers"]
    pairs = list(dict.fromkeys(pair for row in layers for pair in row["angles"]))
    names = facts["tuned"]
    rows = [
        [
            escape(row["layer"]),
            *(_or_nothing(row["kept"].get(name), "{:.3f}") for name in names),
            f"{row['chance']:.3f}",
            *(_or_nothing(row["angles"].get(pair), "{:.0f}°") for pair in pairs),
        ]
        for row in layers
    ]
    head = ["Layer", *map(escape, names), "by chance", *map(escape, pairs)]
    shown = ""
    if len(figures.numbered(layers)) > 1:
        shown = figure_of(
            "kept",
            figures.layers_figure(facts),
            f"Share of each update in {percent(facts['fraction'])} of the directions, by layer",
            "A line an update, and what random directions hold.",
        )
        if pairs:
            shown += figure_of(
                "angles",
                figures.angles_figure(facts),
                "Mean angle between the main output directions of two updates, by layer (degrees)",
                "A line a pair of updates; at 90 degrees they have nothing in common.",
            )
    return f"{shown}{details_of('Every layer', table_of(head, rows))}"


def _pairs(facts: dict[str, Any]) -> str:
    rows = [
        [
            f"{escape(row['first'])} · {escape(row['second'])}",
            f"{row['overlap']:.3f}",
            f"{row['chance']:.3f}",
            f"{counted(row['above_twice_chance'])} of {counted(row['matrices'])}",
            f"{row['smallest']:.0f}°",
            f"{row['mean']:.0f}°",
        ]
        for row in facts["weights"]["pairs"]
    ]
    if not rows:
        return "<p>No matrix is changed by two of the updates.</p>"
    note = (
        '<p class="note">Of each update of a matrix the fewest output directions that hold 0.9 of its energy; the '
        "overlap is the mean squared cosine of their principal angles, and by chance that of random subspaces of the "
        "same ranks. Means over matrices.</p>"
    )
    head = ["Updates", "overlap", "by chance", "above twice chance", "smallest angle", "mean angle"]
    return table_of(head, rows) + note


def _states(facts: dict[str, Any]) -> str:
    first, second = list(facts["behaviours"]["prompts"])[:2]
    rows = [
        [escape(row["name"]), "off" if row["centred"] else "on", f"{row['overlap']:.3f}", f"{row['chance']:.3f}"]
        for row in facts["behaviours"]["states"]
    ]
    note = (
        f'<p class="note">At the last token of the prompts of {escape(first)} and {escape(second)}, the directions '
        "that hold half of the energy. With their mean on, most of what states share is that mean.</p>"
    )
    return note + table_of(["Block", "mean", "overlap", "by chance"], rows, numbers_from=2)


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−") if math.isfinite(value) else rounded(value)


def _or_nothing(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
