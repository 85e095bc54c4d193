"""The page of `subspan report`: the facts of a set of embeddings, a section each."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from html import escape
from typing import Any

from subspan.datasets import Rows

from . import figures
from .pieces import (
    call_of,
    cards_of,
    command_line,
    counted,
    details_of,
    document,
    figure_of,
    noun,
    percent,
    plural,
    ranging,
    rounded,
    table_of,
)

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


# ---------------------------------------------------------------------- top


def _tiles(facts: dict[str, Any]) -> str:
    contents, spectrum, short = facts["contents"], facts["spectrum"], facts["shortening"]
    low, high = spectrum["effective_rank"]["interval"]
    dims, full = short["smallest"]["pca"]["95%"], contents["columns"]
    beyond = facts["outliers"]["beyond_fence"]
    tiles = [
        (counted(contents["rows"]), f"{noun(contents['rows'], 'row', 'rows')} of {counted(full)} numbers"),
        (
            rounded(spectrum["effective_rank"]["value"]),
            f"effective rank, 95\u202f% interval {ranging(low, high, rounded)}",
        ),
        (
            counted(dims) if dims < full else "none",
            f"dimensions keep 95\u202f% of the neighbours, of {counted(full)}"
            if dims < full
            else "of the dimensions can go if 95\u202f% of the neighbours are to stay",
        ),
        (
            counted(beyond),
            f"{noun(beyond, 'row lies', 'rows lie')} far from the others",
        ),
    ]
    if facts.get("labels"):
        tiles.append(
            (
                percent(facts["labels"]["neighbours_with_same_label"]["share"]),
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
    copies, beside = "No row is repeated exactly", ""
    if repeated:
        share = percent(near["share_with_exact_copy"])
        copies = f"{plural(repeated, 'row repeats', 'rows repeat')} an earlier one exactly ({share} have such a copy)"
        beside = " beside these"
    lead = (
        f"{copies}, and {percent(near['share_of_sampled_rows'])} of the rows have a near copy{beside} (the nearest "
        f"other row at a cosine of at least {near['cosine_at_least']}). Two random rows have a cosine of {cosine:.2f} "
        f"on average: {spread}."
    )
    norms = facts["norms"]
    size = (
        "all rows have length 1"
        if facts["unit_norm"]
        else f"from {rounded(norms['min'])} to {rounded(norms['max'])}, median {rounded(norms['median'])}"
    )
    table = table_of(
        ["", ""],
        [
            ["Rows × columns", f"{counted(rows)} × {counted(facts['columns'])}"],
            ["Stored as", f"{escape(facts['dtype'])}, {rounded(facts['megabytes'])} MB"],
            ["Rows equal to an earlier row", counted(repeated)],
            ["Rows with an exact copy", percent(near["share_with_exact_copy"])],
            ["Rows with a near copy that is none", percent(near["share_of_sampled_rows"])],
            ["Rows with NaN or infinity, left out", counted(facts["rows_with_nan_left_out"])],
            ["Rows that are all zeros", counted(facts["zero_rows"])],
            ["Length of the rows", size],
            ["Mean cosine of two rows", f"{cosine:.3f}"],
            ["Share of the energy in the mean", percent(facts["mean_share_of_energy"])],
            ["Cosine to the nearest other row, median", f"{facts['cosine_to_nearest']['median']:.3f}"],
        ],
    )
    figure = figure_of(
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
        pairs = details_of("Near copies, the closest first", cards_of(cards, data))
    return f'<p class="lead">{lead}</p>{table}{figure}{pairs}' + command_line(
        "Choose rows and leave the copies out:", call_of("select", data, "--unique -m 1.0 -o kept.csv")
    )


def _spectrum(facts: dict[str, Any], data: Rows) -> str:
    columns, effective = data.dim, facts["effective_rank"]
    ranks = facts["ranks"]
    above = ranks["marchenko-pastur"]
    low, high = effective["interval"]
    lead = (
        f"The variance is spread as over {rounded(effective['value'])} equal directions "
        f"(95\u202f% interval {ranging(low, high, rounded)}) of the {counted(columns)} there are; "
        f"{counted(ranks['95% of the variance'])} of them hold 95\u202f% of it, and {counted(above)} stand out from "
        "noise."
    )
    names = {
        "marchenko-pastur": "Above the noise edge (Marchenko–Pastur)",
        "gavish-donoho": "Worth keeping for denoising (Gavish–Donoho)",
        "effective": "Effective rank (entropy of the spectrum)",
        "elbow": "Elbow (profile likelihood)",
    }
    table = table_of(
        ["Rule", "rank"],
        [[names.get(rule, f"{rule.replace('%', chr(0x202F) + '%')}"), counted(rank)] for rule, rank in ranks.items()],
    )
    exponent = facts["power_law_exponent"]
    slope = f"On a log–log plot the variances fall like rank<sup>−{exponent:.2f}</sup>. " if exponent else ""
    figure = figure_of(
        "spectrum",
        figures.spectrum_figure(facts),
        "Variance along each principal direction, both axes logarithmic",
        f"A falling line from {rounded(facts['variances'][0])}; the noise edge is at {rounded(facts['noise_edge'])}.",
    )
    note = (
        f'<p class="note">{slope}The edge is where directions of pure, equal noise would end; the noise level is taken '
        "from the median of the spectrum, so structure in the tail raises it.</p>"
    )
    return f'<p class="lead">{lead}</p>{figure}{note}{details_of("Ranks by rule", table)}' + command_line(
        "Keep as many directions as a rule says:", call_of("shorten", data, "--rank 0.95 -o short.npy")
    )


def _shortening(facts: dict[str, Any], data: Rows) -> str:
    full, smallest = data.dim, facts["smallest"]
    dims, prefix = smallest["pca"]["95%"], smallest["prefix"]["95%"]
    if dims < full:
        saved = 1 - dims / full
        lead = (
            f"PCA to {counted(dims)} of {counted(full)} dimensions keeps 95\u202f% of each row's {facts['k']} nearest "
            f"neighbours and saves {percent(saved)} of the size"
        )
        # Any n rows lie in n directions, so that many keep all of the neighbours whatever the encoder.
        few = f" (as {counted(len(data))} rows span no more than that, further rows may need more)"
        lead += (few if dims >= len(data) - 1 else "") + "; "
    else:
        lead = f"No smaller PCA on the grid keeps 95\u202f% of each row's {facts['k']} nearest neighbours; "
    lead += (
        f"cutting the columns after the first {counted(prefix)} does the same without a map."
        if prefix < full
        else "simply cutting columns off does not, so this is no embedding trained to be cut."
    )
    itemsize = facts["bytes_per_row"]["itemsize"]
    by_dims = {point["dims"]: point for point in facts["curves"]["prefix"]}
    rows = [
        [
            counted(point["dims"]),
            percent(point["recall"]),
            percent(by_dims[point["dims"]]["recall"]),
            f"{counted(point['dims'] * itemsize)} B",
        ]
        for point in facts["curves"]["pca"]
    ]
    figure = figure_of(
        "shortening",
        figures.shortening_figure(facts),
        f"Share of the true {facts['k']} nearest neighbours found, against dimensions kept (logarithmic)",
        f"Two rising lines. PCA reaches 95 % at {dims} dimensions, the first columns at {prefix}.",
    )
    note = (
        f'<p class="note">Neighbours by {facts["metric"]}, for {counted(facts["queries"])} sampled rows among '
        f"{counted(facts['searched_rows'])}; bars are 95\u202f% bootstrap intervals. PCA here keeps the leading "
        "directions of the uncentred second moment, which preserve inner products.</p>"
    )
    table = table_of(["Dimensions", "PCA", "first columns", "a row"], rows, numbers_from=0)
    target = dims if dims < full else max(1, full // 2)
    return f'<p class="lead">{lead}</p>{figure}{note}{details_of("The numbers", table)}' + command_line(
        "Write the shorter vectors and the map:",
        call_of("shorten", data, f"--rank {target} -o short.npy --map map.safetensors"),
    )


def _outliers(facts: dict[str, Any], data: Rows) -> str:
    beyond, count = facts["beyond_fence"], len(data)
    lead = (
        f"{plural(beyond, 'row lies', 'rows lie')} so far from the others that "
        f"{'it deserves' if beyond == 1 else 'they deserve'} a look."
        if beyond
        else "No row lies strikingly far from the others."
    )
    figure = figure_of(
        "outliers",
        figures.outlier_figure(facts),
        "How far the rows lie from the others",
        f"A histogram with median {rounded(facts['scores']['median'])}; the fence is at {rounded(facts['fence'])}.",
    )
    fence = (
        '<p class="note">A score counts standard deviations beyond what is usual, of standardised columns: of the '
        f"distance from the mean, or of that in and out of the {counted(facts['rank'])} directions which explain "
        f"{percent(facts['explained'])} of the variance, whichever is larger. The fence stands three interquartile "
        f"ranges above the upper quartile; {percent(beyond / count)} of the rows are beyond it. The rows farthest "
        "out:</p>"
    )
    cards = cards_of(
        [(entry["row"], f"score {rounded(entry['score'])}") for entry in facts["examples"]],
        data,
    )
    return f'<p class="lead">{lead}</p>{figure}{fence}{cards}' + command_line(
        "Score every row:", call_of("detect", data, "-o scores.csv")
    )


def _subset(facts: dict[str, Any], data: Rows) -> str:
    size, methods, best = facts["size"], facts["methods"], facts["best"]
    ours, random = methods[best], methods["random"]
    lead = (
        f"Of four ways to choose {counted(size)} rows, “{figures.SUBSET_NAMES[best]}” stands for the others best: half "
        f"of all rows are within a cosine distance of {ours['distance_to_nearest']['median']:.2f} of one of them"
    )
    if best != "random":
        lead += f" (random rows: {random['distance_to_nearest']['median']:.2f})"
    lead += f", and they span {percent(ours['energy_retained'])} of the energy in the main directions"
    if ours["labels_met"] is not None:
        lead += f" and meet {percent(ours['labels_met'])} of the labels"
    head = ["Chosen by", "median distance", "95th percentile", "energy kept"]
    rows = [
        [
            figures.SUBSET_NAMES[name],
            f"{entry['distance_to_nearest']['median']:.3f}",
            f"{entry['distance_to_nearest']['p95']:.3f}",
            percent(entry["energy_retained"]),
        ]
        for name, entry in methods.items()
    ]
    if ours["labels_met"] is not None:
        head.append("labels met")
        for row, entry in zip(rows, methods.values()):
            row.append(percent(entry["labels_met"]))
    figure = figure_of(
        "subset",
        figures.subset_figure(facts),
        "Share of all rows within a distance of the chosen ones: higher covers better",
        f"Rising curves. Median distance to the nearest chosen row: {ours['distance_to_nearest']['median']:.2f} for "
        f"{best}, {random['distance_to_nearest']['median']:.2f} for random rows.",
    )
    note = (
        '<p class="note">Medoids sit in the middle of clusters; farthest-first leaves no row alone; the highest '
        "leverage spans the space and so likes the unusual; random rows follow the crowd (mean of 5 draws). Energy is "
        f"that of the {counted(facts['rank'])} main directions. The chosen rows that stand for most:</p>"
    )
    cards = cards_of(
        [(entry["row"], f"nearest to {plural(entry['stands_for'], 'row', 'rows')}") for entry in facts["examples"]],
        data,
    )
    return f'<p class="lead">{lead}.</p>{figure}{table_of(head, rows)}{note}{cards}' + command_line(
        "Choose rows and write them:", call_of("select", data, f"-m {size} --method {best} -o chosen.csv")
    )


def _labels(facts: dict[str, Any], data: Rows) -> str:
    purity = facts["neighbours_with_same_label"]
    low, high = purity["interval"]
    lead = (
        f"{percent(purity['share'])} of a row's {purity['k']} nearest neighbours carry its {escape(facts['name'])} "
        f"(95\u202f% interval {ranging(low, high, percent)}; chance would give {percent(purity['chance'])}), and "
        f"{percent(facts['variance_between_classes'])} of the variance lies between the class means."
    )
    parts = [f'<p class="lead">{lead}</p>']
    subspaces = facts["subspaces"]
    figure = figures.label_figure(facts)
    if figure is not None:
        alike = subspaces["most_alike"]
        parts.append(
            figure_of(
                "labels",
                figure,
                f"Mean principal angle between the {subspaces['dim']}-dimensional subspaces of the "
                f"{len(subspaces['labels'])} largest classes: the smaller, the more alike they vary",
                f"A heat map. Most alike: {alike[0]['labels'][0]} and {alike[0]['labels'][1]}.",
            )
        )
        parts.append(
            table_of(
                ["Most alike", "overlap", "smallest angle"],
                [
                    [
                        " and ".join(escape(label) for label in pair["labels"]),
                        percent(pair["overlap"]),
                        f"{pair['smallest_angle']:.0f}°",
                    ]
                    for pair in alike
                ],
                caption="Share of directions in common; random subspaces of this size would have "
                f"{percent(subspaces['overlap_of_random_subspaces'])}",
            )
        )
    if facts["suspects"]:
        cards = [
            (entry["row"], f"{entry['votes']} of {purity['k']} neighbours: {escape(entry['neighbours_say'])}")
            for entry in facts["suspects"]
        ]
        asked = f"{counted(facts['suspects_found'])} of {counted(facts['rows_asked'])} sampled rows"
        parts.append(details_of(f"Labels to check: {asked} sit among another class", cards_of(cards, data)))
    classes = [[escape(entry["label"]), counted(entry["rows"])] for entry in facts["largest"]]
    parts.append(
        details_of(f"The largest of {counted(facts['classes'])} classes", table_of(["Class", "rows"], classes))
    )
    labels = f"--labels {shlex.quote(data.label_argument)} " if data.label_argument else ""
    parts.append(
        command_line(
            "Ask the neighbours of every row for its label:",
            call_of("detect", data, f"{labels}--label-errors -o labels_to_check.csv"),
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
        f"{counted(shared['count'])} of {counted(shared['of'])} dimensions; "
        f"{percent(facts['neighbours_in_common']['share'])} of a row's 10 neighbours are the same in both "
        f"({percent(facts['neighbours_in_common']['chance'])} by chance)."
    )
    rows = [
        [
            escape(name),
            *(percent(entry[key]["value"]) for key in ("recall@1", "recall@10")),
            percent(entry["neighbours_kept"]["share"]),
        ]
        for name, entry in facts["retrieval"].items()
    ]
    retrieval = figure_of(
        "retrieval",
        figures.retrieval_figure(facts),
        f"Queries of {target} in the mapped rows of {source}, on rows the maps were not fitted to",
        verdict["reason"],
    )
    canonical = figure_of(
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
        + table_of(["Map", "own row first", "own row in 10", "neighbours kept"], rows)
        + f'<p class="note">Maps are fitted on {counted(facts["rows_fitted"])} rows; {counted(facts["queries"])} '
        f"queries are searched among the other {counted(facts['rows_held_out'])}, with 95\u202f% bootstrap "
        "intervals.</p>" + canonical + '<div class="verdict"><p><strong>Can I switch encoders without re-embedding? '
        f"{escape(verdict['text'])}</strong></p>"
        f"<p>{escape(verdict['reason'])} A yes asks for {percent(bars['recall@10'])} and "
        f"{percent(bars['neighbours_kept'])} at the lower ends of their intervals.</p></div>"
        + command_line(
            "Fit the map on all rows and keep it:",
            f"subspan align {files} --method {verdict['method']} -o map.safetensors",
        )
    )
