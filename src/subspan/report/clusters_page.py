"""The page of `subspan cluster`: clusters, how they hold together, and who stands for them."""

from __future__ import annotations

from html import escape
from typing import Any

from subspan.commands.clustering import count_in_words, kmeans_in_words
from subspan.datasets import Rows

from . import figures
from .pieces import cards_of, counted, details_of, document, figure_of, noun, percent, plural, table_of


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
        (counted(facts["clusters"]), noun(facts["clusters"], "cluster", "clusters")),
        (counted(facts["rows"]), "rows"),
    ]
    tiles += [(f"{facts['silhouette']:.2f}", "silhouette of the subspaces")] if "silhouette" in facts else []
    tiles += [(f"{value:.3f}", f"{name}, against the labels") for name, value in facts.get("scores", {}).items()]
    items = "".join(f"<li><strong>{value}</strong><span>{text}</span></li>" for value, text in tiles)
    top = f'<p class="source">{escape(data.origin)}</p><ul class="tiles">{items}</ul>'
    return document(data.name, "subspan cluster", top, links, body, facts)


def _cluster_table(facts: dict[str, Any]) -> str:
    lead = f"{plural(facts['clusters'], 'cluster', 'clusters')} by {escape(facts['method'])}"
    lead += ", as many as were asked for." if "count" not in facts else f". {count_in_words(facts['count'])}"
    rows = [
        [str(cluster), counted(size), percent(size / facts["rows"]), counted(dim)]
        for cluster, (size, dim) in enumerate(zip(facts["sizes"], facts["dimensions"]))
    ]
    note = f'<p class="note">{escape(kmeans_in_words(facts))}</p>'
    return f'<p class="lead">{lead}</p>{note}{table_of(["Cluster", "rows", "share", "dimensions"], rows)}'


def _cluster_affinity(facts: dict[str, Any]) -> str:
    share = f"{percent(facts['affinity']['within'])} of the affinity lies inside a cluster."
    note = f'<p class="note">{share} Blocks off the diagonal are clusters that hold on to each other.</p>'
    return note + figure_of(
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
    return f'<p class="note">{note}</p>' + table_of(["", *map(str, range(k))], rows)


def _cluster_members(facts: dict[str, Any], data: Rows) -> str:
    parts = []
    for cluster, members in enumerate(facts["representatives"]):
        cards = cards_of([(row, f"cluster {cluster}") for row in members], data)
        parts.append(details_of(f"Cluster {cluster}: {plural(facts['sizes'][cluster], 'row', 'rows')}", cards))
    return "".join(parts)
