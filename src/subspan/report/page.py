"""One HTML page that shows the facts of a report, complete in itself: it needs no network and no other file."""

from __future__ import annotations

import base64
import io
import json
import shlex
from collections.abc import Callable
from html import escape
from importlib import resources
from typing import Any

from subspan.commands.clustering import count_in_words, kmeans_in_words
from subspan.datasets import Rows

from . import figures

_THUMBNAIL = 160
_SNIPPET = 320
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_TITLES = {
    "contents": "What is in the data",
    "spectrum": "How many directions it uses",
    "shortening": "How far it can be shortened",
    "outliers": "What does not fit",
    "subset": "A representative few",
    "labels": "How the labels lie in it",
    "against": "Beside the other embedding",
}


def render(facts: dict[str, Any], data: Rows) -> str:
    """The page (HTML) for the facts of `describe`; texts and thumbnails of rows are taken from `data`."""
    sections: dict[str, Callable[[dict[str, Any], Rows], str]] = {
        "contents": _contents,
        "spectrum": _spectrum,
        "shortening": _shortening,
        "outliers": _outliers,
        "subset": _subset,
        "labels": _labels,
        "against": _against,
    }
    present = {name: facts[name] for name in sections if facts.get(name) is not None}
    body = "\n".join(
        f'<section id="{name}" aria-labelledby="{name}-title">\n<h2 id="{name}-title">{_TITLES[name]}</h2>\n'
        f"{sections[name](present[name], data)}\n</section>"
        for name in present
    )
    links = "".join(f'<li><a href="#{name}">{_TITLES[name]}</a></li>' for name in present)
    top = f'<p class="source">{escape(facts["data"]["source"])}</p>\n{_tiles(facts)}'
    return document(facts["data"]["name"], "subspan report", top, links, body, facts)


def document(title: str, brand: str, top: str, links: str, body: str, facts: dict[str, Any]) -> str:
    """A page (HTML) around ready sections: its head, styles, contents, numbers as JSON and the scripts of its plots."""
    title = escape(title)
    style = resources.files("subspan.report").joinpath("page.css").read_text(encoding="utf-8")
    script = resources.files("subspan.report").joinpath("page.js").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{title} · {brand}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<header>
<p class="brand">{brand}</p>
<h1>{title}</h1>
{top}
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{body}
</main>
<footer>
<p>subspan {escape(facts["versions"]["subspan"])} · {escape(facts["created"])} · seed {facts["seed"]} ·
{facts["seconds"]:.0f} s. The numbers of this page are in it as JSON, in the element with the id <code>facts</code>.</p>
</footer>
<script type="application/json" id="facts">{_json(facts)}</script>
<script type="text/plain" id="plotly">{_plotly()}</script>
<script>
{script}</script>
</body>
</html>
"""


# ---------------------------------------------------------------------- pieces


def _json(value: Any) -> str:
    """JSON that may stand inside a script element: no `<` survives, so nothing in a text can end the element."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def _plotly() -> str:
    """plotly.js with the kinds of plots that pages have, compressed; the page unpacks it."""
    packed = resources.files("subspan.report").joinpath("plotly-cartesian.min.js.gz").read_bytes()
    return base64.b64encode(packed).decode("ascii")


def _figure(name: str, figure: dict[str, Any], caption: str, alternative: str) -> str:
    return (
        f"<figure><figcaption>{caption}</figcaption>"
        f'<div class="plot" data-figure="figure-{name}" role="img" aria-label="{escape(alternative)}"></div>'
        f'<script type="application/json" id="figure-{name}">{_json(figure)}</script></figure>'
    )


def _table(head: list[str], rows: list[list[str]], *, caption: str = "", numbers_from: int = 1) -> str:
    """A table of ready HTML cells; columns from `numbers_from` on are right-aligned."""

    def cells(row: list[str], tag: str) -> str:
        kinds = [' class="number"' if column >= numbers_from else "" for column in range(len(row))]
        return "".join(f"<{tag}{kind}>{cell}</{tag}>" for cell, kind in zip(row, kinds))

    title = f"<caption>{caption}</caption>" if caption else ""
    lines = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    top = f"<thead><tr>{cells(head, 'th')}</tr></thead>" if any(head) else ""
    return f'<div class="wide-scroll"><table>{title}{top}<tbody>{lines}</tbody></table></div>'


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>{content}</details>"


def _command(what: str, command: str) -> str:
    return f'<p class="command"><span>{what}</span> <code>{escape(command)}</code></p>'


def _call(verb: str, data: Rows, options: str) -> str:
    skipping = ["--skip-nan"] if data.dropped else []
    argument = [data.argument] if data.argument else []
    return f"{shlex.join(['subspan', verb, *argument, *data.reading, *skipping])} {options}"


def _cards(entries: list[tuple[int, str]], data: Rows) -> str:
    """Rows with a note each, as thumbnails, texts, or names alone."""
    kind = "cards pictures" if data.images is not None else "cards"
    return f'<ul class="{kind}">{"".join(_card(row, note, data) for row, note in entries)}</ul>'


def _card(row: int, note: str, data: Rows) -> str:
    picture = "" if data.images is None else f'<img alt="" src="{thumbnail(data.images[row])}">'
    name, label = data.row_name(row), "" if data.labels is None else str(data.labels[row])
    # The images of a folder are named by it and labelled by it.
    label = f" · {escape(label)}" if label and label not in name.split("/")[:-1] else ""
    text = "" if data.texts is None else f"<p>{escape(_snippet(data.texts[row]))}</p>"
    return f"<li>{picture}<b>{escape(name)}</b><small>{note}{label}</small>{text}</li>"


def _snippet(text: str) -> str:
    lines = [" ".join(line.split()) for line in text.splitlines()]
    short = "\n".join(line for line in lines if line)
    return short if len(short) <= _SNIPPET else short[: _SNIPPET - 1] + "…"


def thumbnail(image: Any) -> str:
    """A PIL image as a small JPEG in a data address."""
    small = image.convert("RGB")
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _count(value: float) -> str:
    """A whole number with thin spaces between the thousands."""
    return f"{round(value):,}".replace(",", "\u202f")


def _number(value: float) -> str:
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.2e}"


def _percent(share: float) -> str:
    """A share in percent; nothing that is less than all is shown as 100 %."""
    rounded = f"{share:.1%}" if share < 0.1 or share > 0.9 else f"{share:.0%}"
    if rounded == "100.0%" and share < 1:
        rounded = "99.9%"
    return rounded.replace(".0%", "%").replace("%", "\u202f%")


def _interval(low: float, high: float, show: Callable[[float], str]) -> str:
    return f"{show(low)} to {show(high)}"


def _noun(count: int, one: str, many: str) -> str:
    return one if count == 1 else many


def _plural(count: int, one: str, many: str) -> str:
    return f"{_count(count)} {_noun(count, one, many)}"


# ---------------------------------------------------------------------- top


def _tiles(facts: dict[str, Any]) -> str:
    contents, spectrum, short = facts["contents"], facts["spectrum"], facts["shortening"]
    low, high = spectrum["effective_rank"]["interval"]
    dims, full = short["smallest"]["pca"]["95%"], contents["columns"]
    beyond = facts["outliers"]["beyond_fence"]
    tiles = [
        (_count(contents["rows"]), f"{_noun(contents['rows'], 'row', 'rows')} of {_count(full)} numbers"),
        (
            _number(spectrum["effective_rank"]["value"]),
            f"effective rank, 95\u202f% interval {_interval(low, high, _number)}",
        ),
        (
            _count(dims) if dims < full else "none",
            f"dimensions keep 95\u202f% of the neighbours, of {_count(full)}"
            if dims < full
            else "of the dimensions can go if 95\u202f% of the neighbours are to stay",
        ),
        (
            _count(beyond),
            f"{_noun(beyond, 'row lies', 'rows lie')} far from the others",
        ),
    ]
    if facts.get("labels"):
        tiles.append(
            (
                _percent(facts["labels"]["neighbours_with_same_label"]["share"]),
                "of the nearest neighbours share the label",
            )
        )
    if facts.get("against"):
        verdict = facts["against"]["verdict"]["answer"]
        tiles.append((verdict.capitalize(), "switch encoders without re-embedding?"))
    items = "".join(f"<li><strong>{value}</strong><span>{text}</span></li>" for value, text in tiles)
    return f'<ul class="tiles">{items}</ul>'


# ---------------------------------------------------------------------- sections


def _contents(facts: dict[str, Any], data: Rows) -> str:
    rows, repeated, near = facts["rows"], facts["duplicate_rows"], facts["near_duplicates"]
    cosine = facts["mean_cosine"]
    spread = (
        "the rows use all sides of the space"
        if abs(cosine) < 0.1
        else "the rows lean to one side of the space"
        if cosine < 0.5
        else "the rows crowd into a narrow cone, so raw cosines tell little apart"
    )
    copies = (
        f"{_plural(repeated, 'row repeats', 'rows repeat')} an earlier one exactly"
        if repeated
        else "No row is repeated exactly"
    )
    lead = (
        f"{copies}, and {_percent(near['share_of_sampled_rows'])} of the rows have a near copy (cosine of at least "
        f"{near['cosine_at_least']}). Two random rows have a cosine of {cosine:.2f} on average: {spread}."
    )
    norms = facts["norms"]
    size = (
        "all rows have length 1"
        if facts["unit_norm"]
        else f"from {_number(norms['min'])} to {_number(norms['max'])}, median {_number(norms['median'])}"
    )
    table = _table(
        ["", ""],
        [
            ["Rows × columns", f"{_count(rows)} × {_count(facts['columns'])}"],
            ["Stored as", f"{escape(facts['dtype'])}, {_number(facts['megabytes'])} MB"],
            ["Rows equal to an earlier row", _count(repeated)],
            ["Rows with NaN or infinity, left out", _count(facts["rows_with_nan_left_out"])],
            ["Rows that are all zeros", _count(facts["zero_rows"])],
            ["Length of the rows", size],
            ["Mean cosine of two rows", f"{cosine:.3f}"],
            ["Share of the energy in the mean", _percent(facts["mean_share_of_energy"])],
            ["Cosine to the nearest other row, median", f"{facts['cosine_to_nearest']['median']:.3f}"],
        ],
    )
    figure = _figure(
        "contents",
        figures.contents_figure(facts),
        "Cosine of a row with its nearest neighbour, and of two random rows",
        f"Histograms. Median cosine to the nearest neighbour {facts['cosine_to_nearest']['median']:.2f}, "
        f"mean cosine of random rows {cosine:.2f}.",
    )
    pairs = ""
    if near["pairs"]:
        cards = [
            (row, f"cosine {pair['cosine']:.4f} with {escape(data.row_name(other))}")
            for pair in near["pairs"]
            for row, other in [pair["rows"]]
        ]
        pairs = _details("Near copies, the closest first", _cards(cards, data))
    return f'<p class="lead">{lead}</p>{table}{figure}{pairs}' + _command(
        "Choose rows and leave the copies out:", _call("select", data, "--unique -m 1.0 -o kept.csv")
    )


def _spectrum(facts: dict[str, Any], data: Rows) -> str:
    columns, effective = data.dim, facts["effective_rank"]
    ranks = facts["ranks"]
    above = ranks["marchenko-pastur"]
    low, high = effective["interval"]
    lead = (
        f"The variance is spread as over {_number(effective['value'])} equal directions "
        f"(95\u202f% interval {_interval(low, high, _number)}) of the {_count(columns)} there are; "
        f"{_count(ranks['95% of the variance'])} of them hold 95\u202f% of it, and {_count(above)} stand out from "
        "noise."
    )
    names = {
        "marchenko-pastur": "Above the noise edge (Marchenko–Pastur)",
        "gavish-donoho": "Worth keeping for denoising (Gavish–Donoho)",
        "effective": "Effective rank (entropy of the spectrum)",
        "elbow": "Elbow (profile likelihood)",
    }
    table = _table(
        ["Rule", "rank"],
        [[names.get(rule, f"{rule.replace('%', chr(0x202F) + '%')}"), _count(rank)] for rule, rank in ranks.items()],
    )
    exponent = facts["power_law_exponent"]
    slope = f"On a log–log plot the variances fall like rank<sup>−{exponent:.2f}</sup>. " if exponent else ""
    figure = _figure(
        "spectrum",
        figures.spectrum_figure(facts),
        "Variance along each principal direction, both axes logarithmic",
        f"A falling line from {_number(facts['variances'][0])}; the noise edge is at {_number(facts['noise_edge'])}.",
    )
    note = (
        f'<p class="note">{slope}The edge is where directions of pure, equal noise would end; the noise level is taken '
        "from the median of the spectrum, so structure in the tail raises it.</p>"
    )
    return f'<p class="lead">{lead}</p>{figure}{note}{_details("Ranks by rule", table)}' + _command(
        "Keep as many directions as a rule says:", _call("shorten", data, "--rank 0.95 -o short.npy")
    )


def _shortening(facts: dict[str, Any], data: Rows) -> str:
    full, smallest = data.dim, facts["smallest"]
    dims, prefix = smallest["pca"]["95%"], smallest["prefix"]["95%"]
    if dims < full:
        saved = 1 - dims / full
        lead = (
            f"PCA to {_count(dims)} of {_count(full)} dimensions keeps 95\u202f% of each row's {facts['k']} nearest "
            f"neighbours and saves {_percent(saved)} of the size"
        )
        # Any n rows lie in n directions, so that many keep all of the neighbours whatever the encoder.
        few = f" (as {_count(len(data))} rows span no more than that, further rows may need more)"
        lead += (few if dims >= len(data) - 1 else "") + "; "
    else:
        lead = f"No smaller PCA on the grid keeps 95\u202f% of each row's {facts['k']} nearest neighbours; "
    lead += (
        f"cutting the columns after the first {_count(prefix)} does the same without a map."
        if prefix < full
        else "simply cutting columns off does not, so this is no embedding trained to be cut."
    )
    itemsize = facts["bytes_per_row"]["itemsize"]
    by_dims = {point["dims"]: point for point in facts["curves"]["prefix"]}
    rows = [
        [
            _count(point["dims"]),
            _percent(point["recall"]),
            _percent(by_dims[point["dims"]]["recall"]),
            f"{_count(point['dims'] * itemsize)} B",
        ]
        for point in facts["curves"]["pca"]
    ]
    figure = _figure(
        "shortening",
        figures.shortening_figure(facts),
        f"Share of the true {facts['k']} nearest neighbours found, against dimensions kept (logarithmic)",
        f"Two rising lines. PCA reaches 95 % at {dims} dimensions, the first columns at {prefix}.",
    )
    note = (
        f'<p class="note">Neighbours by {facts["metric"]}, for {_count(facts["queries"])} sampled rows among '
        f"{_count(facts['searched_rows'])}; bars are 95\u202f% bootstrap intervals. PCA here keeps the leading "
        "directions of the uncentred second moment, which preserve inner products.</p>"
    )
    table = _table(["Dimensions", "PCA", "first columns", "a row"], rows, numbers_from=0)
    target = dims if dims < full else max(1, full // 2)
    return f'<p class="lead">{lead}</p>{figure}{note}{_details("The numbers", table)}' + _command(
        "Write the shorter vectors and the map:",
        _call("shorten", data, f"--rank {target} -o short.npy --map map.safetensors"),
    )


def _outliers(facts: dict[str, Any], data: Rows) -> str:
    beyond, count = facts["beyond_fence"], len(data)
    lead = (
        f"{_plural(beyond, 'row lies', 'rows lie')} so far from the others that "
        f"{'it deserves' if beyond == 1 else 'they deserve'} a look."
        if beyond
        else "No row lies strikingly far from the others."
    )
    figure = _figure(
        "outliers",
        figures.outlier_figure(facts),
        "How far the rows lie from the others",
        f"A histogram with median {_number(facts['scores']['median'])}; the fence is at {_number(facts['fence'])}.",
    )
    fence = (
        '<p class="note">A score counts standard deviations beyond what is usual, of standardised columns: of the '
        f"distance from the mean, or of that in and out of the {_count(facts['rank'])} directions which explain "
        f"{_percent(facts['explained'])} of the variance, whichever is larger. The fence stands three interquartile "
        f"ranges above the upper quartile; {_percent(beyond / count)} of the rows are beyond it. The rows farthest "
        "out:</p>"
    )
    cards = _cards(
        [(entry["row"], f"score {_number(entry['score'])}") for entry in facts["examples"]],
        data,
    )
    return f'<p class="lead">{lead}</p>{figure}{fence}{cards}' + _command(
        "Score every row:", _call("detect", data, "-o scores.csv")
    )


def _subset(facts: dict[str, Any], data: Rows) -> str:
    size, methods, best = facts["size"], facts["methods"], facts["best"]
    ours, random = methods[best], methods["random"]
    lead = (
        f"Of four ways to choose {_count(size)} rows, “{figures.SUBSET_NAMES[best]}” stands for the others best: half "
        f"of all rows are within a cosine distance of {ours['distance_to_nearest']['median']:.2f} of one of them"
    )
    if best != "random":
        lead += f" (random rows: {random['distance_to_nearest']['median']:.2f})"
    lead += f", and they span {_percent(ours['energy_retained'])} of the energy in the main directions"
    if ours["labels_met"] is not None:
        lead += f" and meet {_percent(ours['labels_met'])} of the labels"
    head = ["Chosen by", "median distance", "95th percentile", "energy kept"]
    rows = [
        [
            figures.SUBSET_NAMES[name],
            f"{entry['distance_to_nearest']['median']:.3f}",
            f"{entry['distance_to_nearest']['p95']:.3f}",
            _percent(entry["energy_retained"]),
        ]
        for name, entry in methods.items()
    ]
    if ours["labels_met"] is not None:
        head.append("labels met")
        for row, entry in zip(rows, methods.values()):
            row.append(_percent(entry["labels_met"]))
    figure = _figure(
        "subset",
        figures.subset_figure(facts),
        "Share of all rows within a distance of the chosen ones: higher covers better",
        f"Rising curves. Median distance to the nearest chosen row: {ours['distance_to_nearest']['median']:.2f} for "
        f"{best}, {random['distance_to_nearest']['median']:.2f} for random rows.",
    )
    note = (
        '<p class="note">Medoids sit in the middle of clusters; farthest-first leaves no row alone; the highest '
        "leverage spans the space and so likes the unusual; random rows follow the crowd (mean of 5 draws). Energy is "
        f"that of the {_count(facts['rank'])} main directions. The chosen rows that stand for most:</p>"
    )
    cards = _cards(
        [(entry["row"], f"nearest to {_plural(entry['stands_for'], 'row', 'rows')}") for entry in facts["examples"]],
        data,
    )
    return f'<p class="lead">{lead}.</p>{figure}{_table(head, rows)}{note}{cards}' + _command(
        "Choose rows and write them:", _call("select", data, f"-m {size} --method {best} -o chosen.csv")
    )


def _labels(facts: dict[str, Any], data: Rows) -> str:
    purity = facts["neighbours_with_same_label"]
    low, high = purity["interval"]
    lead = (
        f"{_percent(purity['share'])} of a row's {purity['k']} nearest neighbours carry its {escape(facts['name'])} "
        f"(95\u202f% interval {_interval(low, high, _percent)}; chance would give {_percent(purity['chance'])}), and "
        f"{_percent(facts['variance_between_classes'])} of the variance lies between the class means."
    )
    parts = [f'<p class="lead">{lead}</p>']
    subspaces = facts["subspaces"]
    figure = figures.label_figure(facts)
    if figure is not None:
        alike = subspaces["most_alike"]
        parts.append(
            _figure(
                "labels",
                figure,
                f"Mean principal angle between the {subspaces['dim']}-dimensional subspaces of the "
                f"{len(subspaces['labels'])} largest classes: the smaller, the more alike they vary",
                f"A heat map. Most alike: {alike[0]['labels'][0]} and {alike[0]['labels'][1]}.",
            )
        )
        parts.append(
            _table(
                ["Most alike", "overlap", "smallest angle"],
                [
                    [
                        " and ".join(escape(label) for label in pair["labels"]),
                        _percent(pair["overlap"]),
                        f"{pair['smallest_angle']:.0f}°",
                    ]
                    for pair in alike
                ],
                caption="Share of directions in common; random subspaces of this size would have "
                f"{_percent(subspaces['overlap_of_random_subspaces'])}",
            )
        )
    if facts["suspects"]:
        cards = [
            (entry["row"], f"{entry['votes']} of {purity['k']} neighbours: {escape(entry['neighbours_say'])}")
            for entry in facts["suspects"]
        ]
        asked = f"{_count(facts['suspects_found'])} of {_count(facts['rows_asked'])} sampled rows"
        parts.append(_details(f"Labels to check: {asked} sit among another class", _cards(cards, data)))
    classes = [[escape(entry["label"]), _count(entry["rows"])] for entry in facts["largest"]]
    parts.append(_details(f"The largest of {_count(facts['classes'])} classes", _table(["Class", "rows"], classes)))
    labels = f"--labels {shlex.quote(data.label_argument)} " if data.label_argument else ""
    parts.append(
        _command(
            "Ask the neighbours of every row for its label:",
            _call("detect", data, f"{labels}--label-errors -o labels_to_check.csv"),
        )
    )
    return "".join(parts)


def _against(facts: dict[str, Any], data: Rows) -> str:
    shared, verdict = facts["shared_dimensions"], facts["verdict"]
    source, target = escape(facts["source"]), escape(facts["target"])
    alike = facts["cka_debiased"]
    debiased = "" if alike is None else f", without that chance it is {alike:.2f}"
    lead = (
        f"The two agree to {facts['cka']:.2f} by linear CKA (1 is the same up to rotation and scale; the same rows "
        f"paired at random would reach {facts['cka_by_chance']:.2f}{debiased}) and share "
        f"{_count(shared['count'])} of {_count(shared['of'])} dimensions; "
        f"{_percent(facts['neighbours_in_common']['share'])} of a row's 10 neighbours are the same in both "
        f"({_percent(facts['neighbours_in_common']['chance'])} by chance)."
    )
    rows = [
        [
            escape(name),
            *(_percent(entry[key]["value"]) for key in ("recall@1", "recall@10")),
            _percent(entry["neighbours_kept"]["share"]),
        ]
        for name, entry in facts["retrieval"].items()
    ]
    retrieval = _figure(
        "retrieval",
        figures.retrieval_figure(facts),
        f"Queries of {target} in the mapped rows of {source}, on rows the maps were not fitted to",
        verdict["reason"],
    )
    canonical = _figure(
        "canonical",
        figures.canonical_figure(facts),
        "Correlation of the canonical directions of the two, on held-out rows",
        f"A falling line; {shared['count']} pairs are above {shared['correlation_above']}.",
    )
    bars = verdict["bars"]["yes"]
    skipping = ["--skip-nan"] * facts["rows_left_out"]
    files = shlex.join([data.argument or "OLD", facts["target_argument"], *data.reading, *data.pairing, *skipping])
    return (
        f'<p class="lead">{lead}</p>{retrieval}'
        + _table(["Map", "own row first", "own row in 10", "neighbours kept"], rows)
        + f'<p class="note">Maps are fitted on {_count(facts["rows_fitted"])} rows; {_count(facts["queries"])} queries '
        f"are searched among the other {_count(facts['rows_held_out'])}, with 95\u202f% bootstrap intervals.</p>"
        + canonical
        + '<div class="verdict"><p><strong>Can I switch encoders without re-embedding? '
        f"{escape(verdict['text'])}</strong></p>"
        f"<p>{escape(verdict['reason'])} A yes asks for {_percent(bars['recall@10'])} and "
        f"{_percent(bars['neighbours_kept'])} at the lower ends of their intervals.</p></div>"
        + _command(
            "Fit the map on all rows and keep it:",
            f"subspan align {files} --method {verdict['method']} -o map.safetensors",
        )
    )


# ---------------------------------------------------------------------- upgrade


def render_upgrade(facts: dict[str, Any]) -> str:
    """The page (HTML) for the facts of `subspan upgrade`."""
    sections = {
        "verdict": ("What to do", _upgrade_verdict),
        "recall": ("What new queries find", _upgrade_recall),
        "backfill": ("Embedding a part anew", _upgrade_backfill),
        "index": ("The collection", _upgrade_index),
    }
    body = "\n".join(
        f'<section id="{name}" aria-labelledby="{name}-title">\n<h2 id="{name}-title">{title}</h2>\n'
        f"{section(facts)}\n</section>"
        for name, (title, section) in sections.items()
    )
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, (title, _) in sections.items())
    retrieval, verdict = facts["retrieval"], facts["verdict"]
    tiles = [(verdict["answer"].capitalize(), "what to do")]
    tiles += [
        (f"{entry['value']:.3f}", f"recall@{facts['k']}, {name}")
        for name, entry in retrieval.items()
        if entry is not None
    ]
    items = "".join(f"<li><strong>{value}</strong><span>{text}</span></li>" for value, text in tiles)
    top = (
        f'<p class="source">{_count(facts["items"])} vectors of {escape(facts["index"]["source"])}, and new ones of '
        f"{_count(facts['pairs'])} of its items from {escape(facts['sample']['source'])}.</p>"
        f'<ul class="tiles">{items}</ul>'
    )
    return document("A new encoder for an old index", "subspan upgrade", top, links, body, facts)


def _upgrade_verdict(facts: dict[str, Any]) -> str:
    verdict = facts["verdict"]
    bridge = f"<p>{escape(verdict['bridge'])}</p>" if verdict["bridge"] else ""
    few = (
        '<p class="note">There are fewer pairs to fit to than dimensions, so a map without much freedom was chosen; '
        "more pairs may well change the answer.</p>"
        if facts["few_pairs"]
        else ""
    )
    files = [[escape(name.replace("_", " ")), escape(str(path))] for name, path in facts.get("files", {}).items()]
    written = _table(["Written", ""], files, numbers_from=2) if files else ""
    return (
        f'<div class="verdict"><p><strong>{escape(verdict["text"])}</strong></p>'
        f"<p>{escape(verdict['reason'])}</p></div>{bridge}{few}{written}"
    )


def _upgrade_recall(facts: dict[str, Any]) -> str:
    rows = [
        [
            escape(name),
            f"{entry['value']:.3f}",
            _interval(entry["interval"][0], entry["interval"][1], lambda value: f"{value:.3f}"),
        ]
        for name, entry in facts["retrieval"].items()
        if entry is not None
    ]
    figure = _figure(
        "upgrade",
        figures.upgrade_figure(facts),
        f"Recall@{facts['k']} by encoder of the queries and of the collection",
        ", ".join(f"{name} {value}" for name, value, _ in rows),
    )
    own = "given queries" if facts["own_queries"] else "held-out items as queries, each left out of its own answers"
    note = (
        f'<p class="note">Truth: {escape(facts["truth"])}. {_count(facts["queries"])} {own}, searched among '
        f"{_count(facts['searched'])} held-out items by {facts['metric']}; the maps measured here were fitted to the "
        f"other {_count(facts['fitted_to'])}. Among all {_count(facts['items'])} items there are more to confuse, so "
        "figures compare the ways and do not forecast the service. Intervals are 95\u202f% bootstrap intervals.</p>"
    )
    return figure + _table(["Queries / collection", "recall", "interval"], rows) + note


def _upgrade_backfill(facts: dict[str, Any]) -> str:
    curves, shares = facts["backfill"]["curves"], facts["backfill"]["share_needed"]
    needed = shares["ordered"]
    lead = (
        "No share of new vectors reaches the target for sure."
        if needed is None
        else f"{_percent(needed)} of the items, about {_count(needed * facts['items'])}, have to be embedded anew."
    )
    if shares["random"] is not None and needed is not None:
        lead += f" In random order it would be {_percent(shares['random'])}."
    rows = [
        [_percent(point["share"]), f"{point['value']:.3f}", f"{other['value']:.3f}"]
        for point, other in zip(curves["ordered"], curves["random"])
    ]
    figure = _figure(
        "backfill",
        figures.backfill_figure(facts),
        "New queries on migrated vectors, of which more and more are replaced by new ones",
        f"From {curves['ordered'][0]['value']:.2f} to {curves['ordered'][-1]['value']:.2f}.",
    )
    table = _table(["Embedded anew", "in the order given", "in random order"], rows, numbers_from=0)
    return f'<p class="lead">{lead}</p>{figure}{_details("As numbers", table)}'


def _upgrade_index(facts: dict[str, Any]) -> str:
    index = facts["index"]
    scores = facts["maps"]
    rows = [
        ["Kind", escape(index["form"])],
        ["Vectors × dimensions", f"{_count(index['n'])} × {_count(index['d'])}"],
        ["Stored as", escape(index["dtype"]) + ("" if index["exact"] else ", as codes: rows are reconstructions")],
        ["Ranked by", escape(facts["metric"])],
        ["Ids", escape(index["ids"])],
        ["Length of the vectors", _interval(index["lengths"][0], index["lengths"][1], _number)],
        ["Dimensions of the new encoder", _count(facts["dimensions"]["new"])],
        ["Map of queries, new to old", escape(scores["queries"]["method"])],
        ["Map of vectors, old to new", escape(scores["vectors"]["method"])],
    ]
    return _table(["", ""], rows)


# ---------------------------------------------------------------------- clusters


def render_clusters(facts: dict[str, Any], data: Rows) -> str:
    """The page (HTML) for the facts of `subspan cluster`; texts and thumbnails of rows are taken from `data`."""
    sections = {
        "clusters": ("The clusters", _cluster_table(facts)),
        **({"affinity": ("How they hold together", _cluster_affinity(facts))} if "affinity" in facts else {}),
        "angles": ("How their subspaces lie", _cluster_angles(facts)),
        "representatives": ("Who stands for them", _cluster_members(facts, data)),
    }
    body = "\n".join(
        f'<section id="{name}" aria-labelledby="{name}-title">\n'
        f'<h2 id="{name}-title">{title}</h2>\n{content}\n</section>'
        for name, (title, content) in sections.items()
    )
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, (title, _) in sections.items())
    tiles = [
        (_count(facts["clusters"]), _noun(facts["clusters"], "cluster", "clusters")),
        (_count(facts["rows"]), "rows"),
    ]
    tiles += [(f"{facts['silhouette']:.2f}", "silhouette of the subspaces")] if "silhouette" in facts else []
    tiles += [(f"{value:.3f}", f"{name}, against the labels") for name, value in facts.get("scores", {}).items()]
    items = "".join(f"<li><strong>{value}</strong><span>{text}</span></li>" for value, text in tiles)
    top = f'<p class="source">{escape(data.origin)}</p><ul class="tiles">{items}</ul>'
    return document(data.name, "subspan cluster", top, links, body, facts)


def _cluster_table(facts: dict[str, Any]) -> str:
    lead = f"{_plural(facts['clusters'], 'cluster', 'clusters')} by {escape(facts['method'])}"
    lead += ", as many as were asked for." if "count" not in facts else f". {count_in_words(facts['count'])}"
    rows = [
        [str(cluster), _count(size), _percent(size / facts["rows"]), _count(dim)]
        for cluster, (size, dim) in enumerate(zip(facts["sizes"], facts["dimensions"]))
    ]
    note = f'<p class="note">{escape(kmeans_in_words(facts))}</p>'
    return f'<p class="lead">{lead}</p>{note}{_table(["Cluster", "rows", "share", "dimensions"], rows)}'


def _cluster_affinity(facts: dict[str, Any]) -> str:
    share = f"{_percent(facts['affinity']['within'])} of the affinity lies inside a cluster."
    note = f'<p class="note">{share} Blocks off the diagonal are clusters that hold on to each other.</p>'
    return note + _figure(
        "affinity",
        figures.affinity_figure(facts),
        "Affinity between rows in the order of their clusters, as a share of the largest; in each cluster the rows "
        "nearest to its subspace come first.",
        f"Heat map of the affinity between rows ordered by {facts['clusters']} clusters. {share}",
    )


def _cluster_angles(facts: dict[str, Any]) -> str:
    k = facts["clusters"]
    rows = [[str(i), *("" if i == j else f"{facts['angles'][i][j]:.0f}°" for j in range(k))] for i in range(k)]
    note = "Mean principal angle of each pair: the nearer to 90°, the further apart; near 0° two clusters may be one."
    return f'<p class="note">{note}</p>' + _table(["", *map(str, range(k))], rows)


def _cluster_members(facts: dict[str, Any], data: Rows) -> str:
    parts = []
    for cluster, members in enumerate(facts["representatives"]):
        cards = _cards([(row, f"cluster {cluster}") for row in members], data)
        parts.append(_details(f"Cluster {cluster}: {_plural(facts['sizes'][cluster], 'row', 'rows')}", cards))
    return "".join(parts)
