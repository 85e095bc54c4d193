"""`subspan cluster`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from subspan.base.files import write_text
from subspan.base.kinds import GRAPHS, TABLES
from subspan.base.outputs import Output, Outputs

from .options import PAGES, ROWS, AsJson, Column, IdColumn, Labels, Seed, SkipNan, TextColumn, check_inputs
from .printing import print_json, print_line, print_table, progress_bar, short

Table = Annotated[
    str | None,
    typer.Argument(
        metavar="TABLE|FOLDER|GRAPH",
        help="What the other verbs read, or a graph: an edge list (.edges, or any text with --attributes) or an "
        ".npz with adj_* and attr_* arrays.",
        show_default=False,
    ),
]
Clusters = Annotated[
    int | None,
    typer.Option("-c", "-k", "--clusters", min=1, help="How many. Left out: counted, and said how far to trust."),
]
Method = Annotated[
    Literal["auto", "lsr", "lrr", "ssc", "ensc", "omp", "tsc", "ksubspaces"],
    typer.Option(help="Rows: how each is expressed by others. auto: lsr (tsc above 5 000 rows) or k-means."),
]
Dim = Annotated[int | None, typer.Option("--dim", min=1, help="Dimension that each cluster's subspace has.")]
Affine = Annotated[bool, typer.Option("--affine", help="The subspaces need not go through the origin.")]
Attributes = Annotated[
    str | None, typer.Option("--attributes", metavar="TABLE", help="Graphs: a row of attributes for each node.")
]
Objective = Annotated[Literal["conductance", "modularity"], typer.Option(help="Graphs: S²CAG or M-S²CAG.")]
Order = Annotated[int, typer.Option(min=0, help="Graphs: steps of the walks that smooth the attributes.")]
Decay = Annotated[float, typer.Option(min=0, help="Graphs: weight of each step against the one before.")]
OutputFile = Annotated[
    Path | None, typer.Option("-o", "--output", help="Write the cluster of every row: .csv, .json or .npz.")
]
Page = Annotated[Path | None, typer.Option("--report", help="Write a page on the clusters, .html.")]


def cluster(
    table: Table = None,
    clusters: Clusters = None,
    method: Method = "auto",
    dim: Dim = None,
    affine: Affine = False,
    attributes: Attributes = None,
    objective: Objective = "conductance",
    order: Order = 10,
    decay: Decay = 0.9,
    output: OutputFile = None,
    page: Page = None,
    labels: Labels = None,
    column: Column = None,
    text_column: TextColumn = None,
    id_column: IdColumn = None,
    skip_nan: SkipNan = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Cluster rows, images or the nodes of a graph by the subspaces that they lie in.

    Labels, where given, are compared with the clusters and never used to find them.

    Examples:

    - `subspan cluster faces/ -c 40 --dim 9 -o clusters.csv --report clusters.html`

    - `subspan cluster vectors.npy --json`

    - `subspan cluster cora.npz -c 7 --order 16 --decay 1.2`

    - `subspan cluster links.edges --attributes words.csv --id-column id -o clusters.npz`
    """
    outputs = Outputs(
        Output("-o", output, (".csv", ".json", ".npz")), Output("--report", page, PAGES),
        inputs=(table, attributes, labels),
    )  # fmt: skip
    check_inputs(table, kinds=(*ROWS, *GRAPHS) if attributes is None else ())
    check_inputs(attributes, kinds=TABLES)
    if attributes is not None and table is None:
        raise ValueError("--attributes: needs an edge list")
    from subspan.commands import cluster_graph, cluster_rows, read_nodes, read_rows
    from subspan.datasets.graphs import is_graph_file

    graph = table is not None and (attributes is not None or (Path(table).is_file() and is_graph_file(table)))
    if graph and (method != "auto" or dim is not None or affine or text_column is not None or column is not None):
        raise ValueError("--method, --dim, --affine, --column and --text-column: for rows, not for a graph")
    with outputs, progress_bar("reading") as progress:
        if graph:
            nodes, data = read_nodes(str(table), attributes, labels=labels, id_column=id_column)
            options: dict[str, Any] = {"objective": objective, "order": order, "decay": decay}
            found = cluster_graph(nodes, clusters, seed=seed, progress=progress, **options)
        else:
            data = read_rows(
                table, labels=labels, column=column, text_column=text_column, id_column=id_column, skip_nan=skip_nan,
                progress=progress,
            )  # fmt: skip
            found = cluster_rows(data, clusters, method=method, dim=dim, affine=affine, seed=seed, progress=progress)
        facts = found.facts
        if output is not None:
            found.found(data).write(outputs[output], "cluster")
            facts["output"] = str(output)
        if page is not None:
            from subspan.report import render_clusters

            facts["report"] = str(page)
            write_text(outputs[page], render_clusters(facts, data))
    if as_json:
        print_json({**facts, "labels": found.labels.tolist()})
    else:
        _print_clusters(facts)


def _print_clusters(facts: dict[str, Any]) -> None:
    from subspan.commands.clustering import count_in_words, kmeans_in_words

    names = ("rows", "method", "clusters", "silhouette", "modularity", "output", "report")
    shown = {name: facts[name] for name in names if facts.get(name) is not None}
    print_line(", ".join(f"{name} {short(value)}" for name, value in shown.items()))
    if "count" in facts:
        advice = "" if facts["count"]["trusted"] else " Say how many with --clusters."
        print_line(count_in_words(facts["count"]) + advice)
    if "scores" in facts:
        print_line("against the labels: " + ", ".join(f"{name} {value:.3f}" for name, value in facts["scores"].items()))
    print_line(kmeans_in_words(facts))
    clusters = zip(facts["sizes"], facts["dimensions"], facts["representatives"])
    print_table(
        [
            {"cluster": index, "rows": size, "dimensions": dim, "representatives": " ".join(map(str, rows))}
            for index, (size, dim, rows) in enumerate(clusters)
        ]
    )
