"""The pages of `subspan compress`, `merge` and `unlearn`, which lie in the folders that these write."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from . import figures
from .pieces import counted, details_of, document, figure_of, noun, percent, plural, rounded, table_of

_SHOWN = 12


def render_compression(facts: dict[str, Any]) -> str:
    """The page (HTML) for the facts of `subspan compress`."""
    sections = {"outcome": ("What it costs", _cost(facts)), "layers": ("Layer by layer", _layers(facts))}
    tiles = [
        (percent(facts["saved"]), "of the bits of the linear layers saved"),
        (
            f"{rounded(facts['megabytes_after'])}\u202fMB",
            f"they take, of {rounded(facts['megabytes_before'])}\u202fMB in 16-bit numbers",
        ),
        (f"{facts['mean_error']:.3f}", "mean relative error of a layer's outputs"),
    ]
    if facts["perplexity_before"] is not None:
        after = f"perplexity on held-out text, {rounded(facts['perplexity_before'])} before"
        tiles.insert(0, (rounded(facts["perplexity_after"]), after))
    source = f"{facts['base']} by {facts['solver']}, calibrated on {facts['calibration']}"
    return _page("A compressed checkpoint", "subspan compress", source, tiles, sections, facts)


def render_merge(facts: dict[str, Any]) -> str:
    """The page (HTML) for the facts of `subspan merge`."""
    rows = facts["overlaps"]
    sections = {**({"overlaps": ("How the experts overlap", _overlaps(rows))} if rows else {})}
    sections["written"] = ("What was written", _merged(facts))
    tiles = [
        (counted(len(facts["experts"])), "experts of one base"),
        (escape(facts["method"]), "way of merging"),
        (f"{rounded(facts['megabytes'])}\u202fMB", f"in {plural(facts['tensors'], 'tensor', 'tensors')}"),
    ]
    if rows:
        above = sum(row["overlap"] > 2 * row["by_chance"] for row in rows)
        tiles.append((f"{above} of {len(rows)}", "matrices overlap more than twice as much as by chance"))
    source = f"{facts['base']} with the updates of {', '.join(facts['experts'])}"
    return _page("A merged checkpoint", "subspan merge", source, tiles, sections, facts)


def render_unlearning(facts: dict[str, Any]) -> str:
    """The page (HTML) for the facts of `subspan unlearn`."""
    states = facts["figures"]
    before, after, tuned = (states[name] for name in ("before", "after", "tuned_on"))
    sections = {
        "outcome": ("What is forgotten, and what it costs", _forgotten(facts)),
        "layers": ("Where the weights changed", _leaks(facts)),
        "course": ("Step by step", _course(facts["course"])),
    }
    tiles = [
        (
            f"{after['forget_probability']:.2f}",
            f"probability of what is to go, {before['forget_probability']:.2f} before",
        ),
        (f"{after['retain_probability']:.2f}", f"of what is to stay, {before['retain_probability']:.2f} before"),
        (f"{tuned['forget_probability']:.2f}", "of what is to go, after tuning on other texts"),
        (percent(facts["leakage"]), f"of the change in what is kept, {percent(facts['leakage_by_chance'])} by chance"),
    ]
    source = f"{facts['base']} without {plural(facts['forget'], 'answer', 'answers')}, by {facts['method']}"
    title = "An unlearned checkpoint" if facts["merged"] else "An adapter that unlearns"
    return _page(title, "subspan unlearn", source, tiles, sections, facts)


def _page(
    title: str,
    brand: str,
    source: str,
    tiles: Sequence[tuple[str, str]],
    sections: Mapping[str, tuple[str, str]],
    facts: dict[str, Any],
) -> str:
    body = "\n".join(
        f'<section id="{name}" aria-labelledby="{name}-title">\n'
        f'<h2 id="{name}-title">{heading}</h2>\n{content}\n</section>'
        for name, (heading, content) in sections.items()
    )
    links = "".join(f'<li><a href="#{name}">{heading}</a></li>' for name, (heading, _) in sections.items())
    items = "".join(f"<li><strong>{value}</strong><span>{text}</span></li>" for value, text in tiles)
    top = f'<p class="source">{escape(source)}</p><ul class="tiles">{items}</ul>'
    return document(title, brand, top, links, body, facts)


# ---------------------------------------------------------------------- compress


def _cost(facts: dict[str, Any]) -> str:
    before, after, simple = (facts[f"perplexity_{name}"] for name in ("before", "after", "rounded"))
    if before is None:
        lead = "What the model says was not measured: no text was left for it, or it predicts no tokens."
    else:
        held = plural(facts["held_sequences"], "sequence", "sequences")
        lead = (
            f"On {held} of the same text that it was not calibrated on, the perplexity goes from {rounded(before)} to "
            f"{rounded(after)}, {_more(after / before - 1)}."
        )
    if simple is not None:
        lead += f" Rounding each number to as many bits gives {rounded(simple)}" + (
            ", which is less, and costs no time: <code>--solver round</code>." if simple < after else "."
        )
    table = table_of(
        ["", "before", "after"],
        [
            ["Linear layers, MB", rounded(facts["megabytes_before"]), rounded(facts["megabytes_after"])],
            *([] if before is None else [["Perplexity, held-out text", rounded(before), rounded(after)]]),
            *([] if simple is None else [["The same, by rounding to as many bits", "", rounded(simple)]]),
        ],
        caption="Sizes are the bits that are counted, before in 16-bit numbers; without embeddings and head.",
    )
    note = (
        '<p class="note">The weights in <code>model.safetensors</code> are multiplied out, at full size, so that '
        "transformers loads them as they are"
    )
    factored = facts["solver"] in ("procrustes", "ksvd", "mod", "rocket", "svd")
    note += (
        "; <code>factored/layers.safetensors</code> has the factors, in the bits counted.</p>" if factored else ".</p>"
    )
    calibration = (
        f'<p class="note">Calibrated on {plural(facts["sequences"], "sequence", "sequences")} of '
        f"{counted(facts['tokens'])} tokens. Text of another kind may suffer more: measure on your own task.</p>"
    )
    return f'<p class="lead">{lead}</p>{table}{note}{calibration}'


def _more(share: float) -> str:
    return f"{percent(abs(share))} {'more' if share >= 0 else 'less'}"


def _layers(facts: dict[str, Any]) -> str:
    changed = [row for row in facts["layers"] if row["solver"] != "dense"]
    layers = sorted(changed, key=lambda row: -row["error"])
    worst = layers[0]
    lead = (
        f"Of {plural(len(layers), 'layer', 'layers')} the outputs of {_code(worst['name'])} change most, "
        f"by {percent(worst['error'])} of their size, those of {_code(layers[-1]['name'])} least, by "
        f"{percent(layers[-1]['error'])}."
    )
    figure = figure_of(
        "layers",
        figures.layer_error_figure(_by_kind_and_block(changed, "error")),
        "Relative error of the outputs on the calibration text, by kind of layer and block",
        f"Heat map of {len(layers)} errors from {layers[-1]['error']:.3f} to {worst['error']:.3f}.",
    )
    head = ["Layer", "error", "atoms or rank", "read", "saved"]
    rows = [
        [
            _code(row["name"]),
            f"{row['error']:.3f}",
            counted(row["rank"]),
            "all" if row["nonzero"] is None else counted(row["nonzero"]),
            percent(1 - row["bits"] / row["dense_bits"]) if row["dense_bits"] else "shared",
        ]
        for row in layers
    ]
    shifted, dense = sum(row["shift"] > 0 for row in layers), facts["left_out"]
    notes = ["Read: atoms that each output reads. Saved: share of the layer's bits."]
    if shifted:
        whose = "layer has" if shifted == 1 else "layers have"
        notes.append(
            f"{counted(shifted)} {whose} inputs that do not span their space; it was filled up by the least bit."
        )
    if dense:
        notes.append(f"{plural(dense, 'layer', 'layers')} stayed as {noun(dense, 'it was', 'they were')}.")
    return (
        f'<p class="lead">{lead}</p>{figure}<p class="note">{" ".join(notes)}</p>'
        f"{table_of(head, rows[:_SHOWN], caption='The worst')}{details_of('All layers', table_of(head, rows))}"
    )


def _code(name: str) -> str:
    """A dotted name that may be broken behind its dots."""
    return f"<code>{escape(name).replace('.', '.<wbr>')}</code>"


def _by_kind_and_block(layers: Sequence[Mapping[str, Any]], value: str) -> dict[str, dict[int, float]]:
    """Values by what stands behind the first number of a name, and that number."""
    found: dict[str, dict[int, float]] = {}
    for row in layers:
        number = re.search(r"\.?(\d+)\.?", row["name"])
        kind = row["name"] if number is None else row["name"][number.end() :] or row["name"][: number.start()]
        found.setdefault(kind, {})[0 if number is None else int(number[1])] = row[value]
    return found


# ---------------------------------------------------------------------- merge


def _overlaps(rows: Sequence[Mapping[str, Any]]) -> str:
    first, sizes = rows[0], [row["overlap"] for row in rows]
    lead = (
        f"The experts' updates overlap most beyond chance in {_code(first['tensor'])}: "
        f"{first['overlap']:.2f}, where random directions of as many dimensions would have {first['by_chance']:.2f}."
    )
    figure = figure_of(
        "overlaps",
        figures.overlap_figure(rows),
        "Mean squared cosine of the principal angles between the experts' updates, matrices in falling order",
        f"Two lines over {len(rows)} matrices: overlaps from {max(sizes):.2f} to {min(sizes):.2f}, and by chance.",
    )
    note = (
        '<p class="note">Of the output directions that hold 90\u202f% of each update\'s energy, mean over pairs. '
        "Far above chance the experts quarrel, or agree: sums add up what they share. At chance they leave each other "
        "alone.</p>"
    )
    head = ["Matrix", "overlap", "by chance", "directions", "of"]
    cells = [
        [
            _code(row["tensor"]),
            f"{row['overlap']:.3f}",
            f"{row['by_chance']:.3f}",
            counted(row["rank"]),
            counted(row["of"]),
        ]
        for row in rows
    ]
    table = table_of(head, cells[:_SHOWN], caption="The most beyond chance")
    return f'<p class="lead">{lead}</p>{figure}{note}{table}{details_of("All matrices", table_of(head, cells))}'


def _merged(facts: dict[str, Any]) -> str:
    rows = [["Base", escape(facts["base"])], *(["Expert", escape(name)] for name in facts["experts"])]
    rows += [["Way of merging", escape(facts["method"])]]
    rows += [[escape(name.replace("_", " ")), rounded(value)] for name, value in facts["options"].items()]
    rows += [["Tensors", counted(facts["tensors"])], ["Megabytes", rounded(facts["megabytes"])]]
    note = '<p class="note">Nothing was evaluated: measure it on the tasks of the experts before use.</p>'
    return table_of(["", ""], rows) + note


# ---------------------------------------------------------------------- unlearn

_FIGURES = {
    "forget_probability": "to be forgotten",
    "forget_rouge": "still said of it",
    "retain_probability": "to be kept",
    "held_out_probability": "to be kept, held out",
}
_STATES = {"before": "before", "after": "after", "in_4_bits": "in 4 bits", "tuned_on": "after tuning"}
# A fifth of what was forgotten.
_BACK = 0.2


def _forgotten(facts: Mapping[str, Any]) -> str:
    states = {_STATES[name]: found for name, found in facts["figures"].items()}
    names = {name: words for name, words in _FIGURES.items() if name in states["before"]}
    before, after = states["before"], states["after"]
    gone = before["forget_probability"] - after["forget_probability"]
    lost = before["retain_probability"] - after["retain_probability"]
    lead = (
        f"A right answer to what is to be forgotten is given a probability of {after['forget_probability']:.2f} a "
        f"token, {before['forget_probability']:.2f} before; one that is to be kept "
        f"{after['retain_probability']:.2f}, {before['retain_probability']:.2f} before."
    )
    if gone <= 0:
        verdict = "Nothing was forgotten: more epochs, or a higher learning rate."
    else:
        back = {
            state: (states[state]["forget_probability"] - after["forget_probability"]) / gone
            for state in (_STATES["in_4_bits"], _STATES["tuned_on"])
        }
        again = [f"{state} ({percent(share)})" for state, share in back.items() if share > _BACK]
        verdict = f"Of what went, some is back {' and '.join(again)}." if again else "Neither check brings it back."
        if lost > gone / 2:
            verdict += " What is to be kept suffers more than half as much: lower the learning rate."
    figure = figure_of(
        "states",
        figures.unlearning_figure(states, names),
        "Mean probability a token of right answers, and the share of their words that is still said",
        "; ".join(f"{words}: {before[name]:.2f} before, {after[name]:.2f} after" for name, words in names.items()),
    )
    rows = [[words, *(f"{found[name]:.3f}" for found in states.values())] for name, words in names.items()]
    asked = plural(facts["forget"], "answer", "answers")
    held = f", and {counted(facts['held_out'])} to be kept that were not trained on" if facts["held_out"] else ""
    note = (
        f'<p class="note">Measured on {asked} to be forgotten, {counted(facts["retain"])} to be kept{held}; of many on '
        "the first. In 4 bits: all linear layers rounded. After tuning: a few steps on text about neither. Nothing was "
        "asked in other words: do so before you rely on it.</p>"
    )
    return f'<p class="lead">{lead} {verdict}</p>{figure}{table_of(["", *states], rows)}{note}'


def _leaks(facts: Mapping[str, Any]) -> str:
    layers = sorted(facts["layer_facts"], key=lambda row: -row["leakage"])
    worst = layers[0]
    lead = (
        f"Of the change, {percent(facts['leakage'])} of the norm lies in the main directions of what is kept, where a "
        f"random one would have {percent(facts['leakage_by_chance'])}; most in {_code(worst['name'])}, "
        f"{percent(worst['leakage'])}."
    )
    figure = figure_of(
        "layers",
        figures.layer_error_figure(_by_kind_and_block(facts["layer_facts"], "leakage")),
        "Share of each layer's change that lies in the main directions of what is kept, by kind of layer and block",
        f"Heat map of {len(layers)} shares from {layers[-1]['leakage']:.2f} to {worst['leakage']:.2f}.",
    )
    head = ["Layer", "in what is kept", "by chance", "start in it"]
    rows = [
        [_code(row["name"]), f"{row['leakage']:.3f}", f"{row['by_chance']:.3f}", f"{row['start']:.3f}"]
        for row in layers
    ]
    note = '<p class="note">Start in it: overlap of the directions that the update starts in with those kept.</p>'
    return (
        f'<p class="lead">{lead}</p>{figure}{note}{table_of(head, rows[:_SHOWN], caption="The most")}'
        f"{details_of('All layers', table_of(head, rows))}"
    )


def _course(course: Sequence[Mapping[str, float]]) -> str:
    terms = {"forget": "to forget", "retain": "to keep", "orthogonality": "to stay out of what is kept"}
    figure = figure_of(
        "course",
        figures.course_figure(course, terms),
        "Terms of the loss, with their weights",
        "; ".join(
            f"{words}: {course[0][name]:.3g} at first, {course[-1][name]:.3g} at last" for name, words in terms.items()
        ),
    )
    return figure
