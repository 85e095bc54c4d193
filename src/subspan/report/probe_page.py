"""The page of `subspan probe`: where a model keeps a property, in how many dimensions, and what erasing it costs."""

from __future__ import annotations

from html import escape
from typing import Any

from . import probe_figures as figures
from .pieces import counted, details_of, document, figure_of, percent, plural, ranging, rounded, table_of

_VERDICTS = {
    "kept": "The model keeps it, beyond the words",
    "in the words": "Not found beyond the words themselves",
    "not found": "Not found",
}
_WAYS = {
    "nothing": "nothing",
    "subspace": "the subspace",
    "eraser": "by the eraser, which moves states least",
    "random subspace": "as many random dimensions",
}


def render_probe(facts: dict[str, Any]) -> str:
    """The page (HTML) for the facts of `subspan probe`."""
    sections = {
        "verdict": ("What is found", _verdict(facts)),
        "layers": ("In which layers", _layers(facts)),
        "ranks": ("In how many dimensions", _ranks(facts)),
    }
    if facts["erased"]:
        sections["erased"] = ("What erasing it does", _erased(facts))
        sections["use"] = ("Use it", _use(facts))
    sections["read"] = ("What was read", _read(facts))
    body = "\n".join(
        f'<section id="{name}" aria-labelledby="{name}-title">\n'
        f'<h2 id="{name}-title">{heading}</h2>\n{content}\n</section>'
        for name, (heading, content) in sections.items()
    )
    links = "".join(f'<li><a href="#{name}">{heading}</a></li>' for name, (heading, _) in sections.items())
    tiles = [
        (_score(facts, facts["score"]["value"]), f"{_unit(facts)}, of {plural(facts['texts'], 'text', 'texts')}"),
        (_score(facts, facts["words"]["value"]), "by the words alone"),
        (_between(facts), f"{'layers' if _many(facts) else 'layer'} that read it best, of {facts['blocks']}"),
        (f"{facts['rank']} of {counted(facts['width'])}", "dimensions are enough"),
    ]
    items = "".join(f"<li><strong>{value}</strong><span>{text}</span></li>" for value, text in tiles)
    top = (
        f'<p class="source">{escape(facts["property"])} in {escape(facts["model"])}, read from '
        f'{escape(facts["source"])}.</p><ul class="tiles">{items}</ul>'
    )
    title = f"Where {facts['model']} keeps “{facts['property']}”"
    return document(title, "subspan probe", top, links, body, facts)


def _verdict(facts: dict[str, Any]) -> str:
    reason = facts["reason"]
    beyond = facts["beyond_words"]
    more = (
        f"Above the words by {_signed(beyond['value'])}, interval {ranging(beyond['low'], beyond['high'], _signed)} "
        "over texts."
    )
    if facts["verdict"] == "in the words":
        more += " A word list would do as well: nothing here says that the model adds anything of its own."
    if facts["verdict"] == "not found":
        more += " A property that no linear probe reads may still be there in another form."
    return (
        f'<div class="verdict"><p><strong>{_VERDICTS[facts["verdict"]]}</strong></p>'
        f"<p>{escape(reason[0].upper() + reason[1:])}.</p></div><p>{more}</p>"
    )


def _layers(facts: dict[str, Any]) -> str:
    rows = facts["layers"]
    figure = figure_of(
        "layers",
        figures.layers_figure(facts),
        f"Read in texts not learnt from, by layer ({figures.SCORES[facts['kind']]})",
        f"Highest at layer {facts['layer']}; the words alone give {facts['words']['value']:.2f}.",
    )
    table = table_of(
        ["Layer", "score", "interval", "shuffled labels"],
        [
            [
                str(row["layer"]),
                f"{row['score']:.3f}",
                ranging(row["low"], row["high"], lambda value: f"{value:.3f}"),
                "" if row["shuffled"] is None else f"{row['shuffled']:.3f}",
            ]
            for row in rows
        ],
    )
    chosen = (
        "The verdict takes in every fold the layer that the other folds choose, so its score may lie a little below "
        "the highest point."
    )
    if facts["kind"] == "code":
        chosen = "The layer is chosen on functions that are neither learnt from nor tested on."
    note = (
        '<p class="note">Layer 0 is what goes into the first block; layer i is what the i-th block gives. The words '
        "alone: the mean over the words as they go in, which knows which words there are and not their order. "
        f"Intervals are 95\u202f%, over texts. {chosen}</p>"
    )
    return f"{figure}{note}{details_of('Every layer', table)}"


def _ranks(facts: dict[str, Any]) -> str:
    figure = figure_of(
        "ranks",
        figures.ranks_figure(facts),
        f"Read from so many dimensions of layer {facts['layer']}, in texts not learnt from",
        f"{facts['rank']} dimensions are enough; as many random ones give less.",
    )
    table = table_of(
        ["Dimensions", "most telling", "random", "shuffled labels"],
        [
            [
                str(row["rank"]),
                *("" if row[key] is None else f"{row[key]:.3f}" for key in ("score", "random", "shuffled")),
            ]
            for row in facts["ranks"]
        ],
    )
    if facts["kind"] == "code":
        note = "The projection is learnt for each number of dimensions anew."
    else:
        most = {"labels": "one less than it has classes", "numbers": "one"}[facts["kind"]]
        note = (
            f"A linear reading of {escape(facts['property'])} has at most {most}. The number given is the smallest "
            "that is not clearly below all of them. Random dimensions are of states whose columns have one variance."
        )
    return f'{figure}<p class="note">{note}</p>{details_of("As numbers", table)}'


def _erased(facts: dict[str, Any]) -> str:
    several = any(row["name"] for row in facts["erased"])
    near = any(row["neighbours"] is not None for row in facts["erased"])
    rows = [
        [
            _WAYS[row["way"]],
            *([escape(row["name"] or facts["property"])] if several else []),
            f"{row['score']:.3f}",
            ranging(row["low"], row["high"], lambda value: f"{value:.3f}"),
            f"{row['chance']:.3f}",
            *(["" if row["neighbours"] is None else f"{row['neighbours']:.3f}"] if near else []),
        ]
        for row in facts["erased"]
    ]
    head = [
        "Taken out",
        *(["read anew"] if several else []),
        "score",
        "interval",
        "chance",
        *(["by neighbours"] if near else []),
    ]
    table = table_of(head, rows, numbers_from=1 + several)
    note = (
        "What is taken out is learnt on one half of the texts; probes are learnt anew and tested on the other half, so "
        "that what is left over from learning on few texts shows. In the texts that it is learnt on, nothing linear "
        "is left."
    )
    if facts["kind"] == "code":
        note = "The probe is learnt anew on states without these dimensions."
    parts = [table, f'<p class="note">{note}</p>']
    if facts["perplexity"]:
        cells = [
            [_WAYS[way], rounded(value), f"{percent(abs(value / facts['perplexity']['nothing'] - 1))} "
             f"{'more' if value >= facts['perplexity']['nothing'] else 'less'}"]
            for way, value in facts["perplexity"].items()
        ]  # fmt: skip
        cells[0][2] = ""
        parts.append(table_of(["Taken out at all tokens", "perplexity of neutral text", ""], cells))
    if facts["downstream"]:
        found = facts["downstream"]
        what = f"Read anew from later layers while it is erased at layer {facts['layer']}, {found['texts']} texts"
        if len(found["layers"]) > 2:
            said = f"At the end {found['subspace'][-1]:.2f}, as it is {found['nothing'][-1]:.2f}."
            parts.append(figure_of("downstream", figures.downstream_figure(facts), what, said))
        else:
            head = ["Layer", "as it is", "without the subspace", "without random dimensions"]
            keys = ("nothing", "subspace", "random")
            cells = [
                [str(layer), *(f"{found[key][place]:.3f}" for key in keys)]
                for place, layer in enumerate(found["layers"])
            ]
            parts.append(table_of(head, cells, caption=what))
        parts.append(
            f'<p class="note">What later layers tell was computed again by the blocks between, from what was not '
            f"linear. Of each text's ten nearest neighbours in layer {found['layers'][-1]}, "
            f"{percent(found['subspace_neighbours'])} stay; without as many random dimensions "
            f"{percent(found['random_neighbours'])}.</p>"
        )
    return "".join(parts)


def _use(facts: dict[str, Any]) -> str:
    name, site = facts["site"]
    where = f'"{escape(name)}"' + (', site="input"' if site == "input" else "")
    lines = [
        *(["import json", ""] if facts["coordinates"] else []),
        "from subspan.edit import erase_subspace, steer_subspace",
        "from subspan.geometry import AffineMap, Subspace",
        "from subspan.models import intervene",
        "",
        'space = Subspace.load("subspace.safetensors")',
        f"with intervene(model, {where.split(',')[0]}, erase_subspace(space).map{where[len(where.split(',')[0]) :]}):",
        "    model(**batch)  # without it",
    ]
    if facts["coordinates"]:
        label = escape(next(iter(facts["coordinates"])))
        lines += [
            f'toward = json.load(open("probe.json"))["coordinates"]["{label}"]',
            "steer_subspace(space, toward).map  # set to it;  add=True, strength=2: push toward it",
            'AffineMap.load("eraser.safetensors").map  # erases it and moves states least',
        ]
    parts = (
        f"The first {facts['rank']} of the {facts['dimensions']} dimensions in the file read the property; all of them "
        "together take it out."
    )
    if facts["kind"] == "code":
        parts = f"The file holds the {facts['dimensions']} dimensions from which trees are read."
    return (
        f"<p>{parts} Leave the first position as it is: its state is of another size.</p>"
        f"<pre><code>{chr(10).join(lines)}</code></pre>"
    )


def _read(facts: dict[str, Any]) -> str:
    rows = [
        ["Texts", counted(facts["texts"])],
        *([[f"Left out, {escape(reason)}", counted(count)] for reason, count in facts["left_out"].items()]),
        *(
            [["Read in part", f"{counted(facts['cut'])}, of more than {facts['max_tokens']} tokens"]]
            if facts["cut"]
            else []
        ),
        ["State of a text", escape(facts["read_at"])],
        ["Best layer", f"{facts['layer']} ({escape(facts['site'][1])} of <code>{escape(facts['site'][0])}</code>)"],
    ]
    parts = [table_of(["", ""], rows)]
    if facts["classes"]:
        sizes = sorted(facts["classes"].items(), key=lambda row: -row[1])
        table = table_of(["Class", "texts"], [[escape(name), counted(count)] for name, count in sizes])
        parts.append(details_of(f"{len(sizes)} classes", table))
    return "".join(parts)


def _unit(facts: dict[str, Any]) -> str:
    return {"labels": "right in texts held out", "numbers": "R² in texts held out", "code": "F1 in functions held out"}[
        facts["kind"]
    ]


def _score(facts: dict[str, Any], value: float) -> str:
    return percent(value) if facts["kind"] == "labels" else f"{value:.2f}".replace("-", "−")


def _many(facts: dict[str, Any]) -> bool:
    return facts["last_layer"] > facts["first_layer"]


def _between(facts: dict[str, Any]) -> str:
    return f"{facts['first_layer']} to {facts['last_layer']}" if _many(facts) else str(facts["first_layer"])


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")
