"""The page of `subspan upgrade`: what to do about a new encoder, and what it was measured to bring."""

from __future__ import annotations

from html import escape
from typing import Any

from . import figures
from .pieces import counted, details_of, document, figure_of, noun, percent, plural, ranging, rounded, table_of


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
    left = facts["left_out"]
    left_out = (
        f" {plural(left, 'more', 'more')} of the sample {noun(left, 'is', 'are')} not in the index, and left out."
    )
    left_out *= bool(left)
    top = (
        f'<p class="source">{counted(facts["items"])} vectors of {escape(facts["index"]["source"])}, and new ones of '
        f"{counted(facts['pairs'])} of its items from {escape(facts['sample']['source'])}.{left_out}</p>"
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
    written = table_of(["Written", ""], files, numbers_from=2) if files else ""
    return (
        f'<div class="verdict"><p><strong>{escape(verdict["text"])}</strong></p>'
        f"<p>{escape(verdict['reason'])}</p></div>{bridge}{few}{written}"
    )


def _upgrade_recall(facts: dict[str, Any]) -> str:
    rows = [
        [
            escape(name),
            f"{entry['value']:.3f}",
            ranging(entry["interval"][0], entry["interval"][1], lambda value: f"{value:.3f}"),
        ]
        for name, entry in facts["retrieval"].items()
        if entry is not None
    ]
    figure = figure_of(
        "upgrade",
        figures.upgrade_figure(facts),
        f"Recall@{facts['k']} by encoder of the queries and of the collection",
        ", ".join(f"{name} {value}" for name, value, _ in rows),
    )
    own = "given queries" if facts["own_queries"] else "held-out items as queries, each left out of its own answers"
    note = (
        f'<p class="note">Truth: {escape(facts["truth"])}. {counted(facts["queries"])} {own}, searched among '
        f"{counted(facts['searched'])} held-out items by {facts['metric']}; the maps measured here were fitted to the "
        f"other {counted(facts['fitted_to'])}. Among all {counted(facts['items'])} items there are more to confuse, so "
        "figures compare the ways and do not forecast the service. Intervals are 95\u202f% bootstrap intervals.</p>"
    )
    return figure + table_of(["Queries / collection", "recall", "interval"], rows) + note


def _upgrade_backfill(facts: dict[str, Any]) -> str:
    curves, shares = facts["backfill"]["curves"], facts["backfill"]["share_needed"]
    needed = shares["ordered"]
    if needed is None:
        lead = "No share of new vectors reaches the target for sure."
    elif needed == 0:
        lead = "No item has to be embedded anew for it: the mapped queries reach the target by themselves."
    else:
        lead = f"{percent(needed)} of the items, about {counted(needed * facts['items'])}, have to be embedded anew."
    if shares["random"] is not None and needed is not None:
        lead += f" In random order it would be {percent(shares['random'])}."
    rows = [
        [percent(point["share"]), f"{point['value']:.3f}", f"{other['value']:.3f}"]
        for point, other in zip(curves["ordered"], curves["random"])
    ]
    figure = figure_of(
        "backfill",
        figures.backfill_figure(facts),
        "New queries on migrated vectors, of which more and more are replaced by new ones",
        f"From {curves['ordered'][0]['value']:.2f} to {curves['ordered'][-1]['value']:.2f}.",
    )
    table = table_of(["Embedded anew", "in the order given", "in random order"], rows, numbers_from=0)
    return f'<p class="lead">{lead}</p>{figure}{details_of("As numbers", table)}'


def _upgrade_index(facts: dict[str, Any]) -> str:
    index = facts["index"]
    scores = facts["maps"]
    rows = [
        ["Kind", escape(index["form"])],
        ["Vectors × dimensions", f"{counted(index['n'])} × {counted(index['d'])}"],
        ["Stored as", escape(index["dtype"]) + ("" if index["exact"] else ", as codes: rows are reconstructions")],
        ["Ranked by", escape(facts["metric"])],
        ["Ids", escape(index["ids"])],
        ["Length of the vectors", ranging(index["lengths"][0], index["lengths"][1], rounded)],
        ["Dimensions of the new encoder", counted(facts["dimensions"]["new"])],
        ["Map of queries, new to old", escape(scores["queries"]["method"])],
        ["Map of vectors, old to new", escape(scores["vectors"]["method"])],
    ]
    return table_of(["", ""], rows)
