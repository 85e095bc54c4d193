"""`subspan shorten`, `align` and `upgrade`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from subspan.base.files import write_array
from subspan.base.kinds import INDEXES, TABLES
from subspan.base.outputs import Output, Outputs

from .options import (
    ROWS,
    AsJson,
    Collection,
    Column,
    IdColumn,
    Rank,
    Seed,
    SkipNan,
    TextColumn,
    check_inputs,
    parsed_rank,
)
from .printing import print_facts, print_json, print_line, print_table, progress_bar

# ---------------------------------------------------------------------- shorten

Stored = Annotated[
    str | None,
    typer.Argument(
        metavar="TABLE|INDEX|FOLDER",
        help="What the other verbs read, or a FAISS index, a folder of tables, or Qdrant (see `upgrade`).",
        show_default=False,
    ),
]


def shorten(
    table: Stored = None,
    rank: Rank = "0.95",
    method: Annotated[
        Literal["pca", "matryoshka", "prefix"],
        typer.Option(
            help="The leading principal directions; a rotation of them, trained so that every prefix serves "
            "(--rank N); or the first columns as they are (--rank N)."
        ),
    ] = "pca",
    center: Annotated[
        bool, typer.Option("--center", help="Subtract the mean first. Without it cosines are kept best.")
    ] = False,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="The shorter vectors: .npy, or with ids .safetensors, .parquet, .faiss."),
    ] = Path("short.npy"),
    subspace: Annotated[
        Path | None, typer.Option("--map", help="Write the subspace too, .safetensors, to shorten new rows with.")
    ] = None,
    column: Column = None,
    text_column: TextColumn = None,
    id_column: IdColumn = None,
    collection: Collection = None,
    skip_nan: SkipNan = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Write vectors with fewer columns, and say what recall@10 each number of columns leaves.

    Vectors of unit length are scaled to it again, so that cosine, inner product and L2 still rank them alike; scale
    new rows that `--map` shortens too. Others are left as they come out. The recall is by the metric of the index,
    of tables by cosine, and printed with it. How many directions a share or a rule keeps is counted about the mean, as
    in the report, with `--center` and without.

    Examples:

    - `subspan shorten vectors.npy --rank 128 -o short.npy --map pca.safetensors`

    - `subspan shorten vectors.parquet --id-column id --rank marchenko-pastur --center -o short.parquet`

    - `subspan shorten vectors.npy --method matryoshka --rank 64 -o short.npy`

    - `subspan shorten images.faiss --method prefix --rank 256 -o short.faiss`
    """
    check_inputs(table, kinds=(*ROWS, *INDEXES))
    ranked = parsed_rank(rank)
    from subspan.commands import read_stored, shorten_to
    from subspan.datasets.indexes import is_stored

    stored = table is not None and is_stored(table)
    suffixes = () if stored and not output.suffix else (".npy", ".safetensors", ".parquet", *INDEXES)
    outputs = Outputs(
        Output("-o", output, suffixes, resumable=True), Output("--map", subspace, (".safetensors",)), inputs=(table,)
    )
    with outputs, progress_bar("reading") as progress:
        source = read_stored(
            table, column=column, text_column=text_column, id_column=id_column, collection=collection,
            skip_nan=skip_nan, progress=progress,
        )  # fmt: skip
        facts = shorten_to(
            source, ranked, output, outputs, method=method, center=center, subspace=subspace, seed=seed,
            progress=progress,
        )  # fmt: skip
    if as_json:
        print_json(facts)
        return
    print_facts(facts, "curve", "verified")
    print_table(
        [
            {"columns": entry["columns"], "bytes a row": entry["bytes"]}
            | {name: entry[name]["recall"] for name in ("pca", "matryoshka", "prefix") if name in entry}
            for entry in facts["curve"]
        ]
    )


# ---------------------------------------------------------------------- align


def align(
    source: Annotated[str, typer.Argument(help="Embeddings to map.")],
    target: Annotated[str, typer.Argument(help="Embeddings of the same rows (realign: of any) to map them to.")],
    method: Annotated[
        Literal["procrustes", "scaled", "ridge", "cca", "realign"],
        typer.Option(help="Rotation, rotation and scale, affine, through the shared directions, or without pairs."),
    ] = "procrustes",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the map, .safetensors.")] = None,
    apply: Annotated[Path | None, typer.Option("--apply", help="Write the mapped source rows, .npy.")] = None,
    column: Column = None,
    text_column: TextColumn = None,
    id_column: IdColumn = None,
    skip_nan: SkipNan = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Fit a map from one embedding to another, say how well it does on held-out rows, and keep it.

    Examples:

    - `subspan align old.npy new.npy -o map.safetensors`

    - `subspan align old.parquet new.parquet --method ridge --id-column id --json`

    - `subspan align texts.npy images.npy --method realign --apply mapped.npy`
    """
    outputs = Outputs(
        Output("-o", output, (".safetensors",)), Output("--apply", apply, (".npy",)), inputs=(source, target)
    )
    check_inputs(source, target)
    from subspan.commands import align_rows, read_rows

    reading = {"column": column, "text_column": text_column, "id_column": id_column, "skip_nan": skip_nan}
    with outputs, progress_bar("reading") as progress:
        first, second = (read_rows(path, progress=progress, **reading) for path in (source, target))
        found = align_rows(first, second, method, seed=seed, progress=progress)
        facts = dict(found.facts)
        if output is not None:
            found.kept.save(outputs[output])
            facts["output"] = str(output)
        if apply is not None:
            write_array(outputs[apply], found.fitted.transform(first.array()))
            facts["applied"] = str(apply)
    if as_json:
        print_json(facts)
        return
    print_facts(facts, "held_out")
    print_table(
        [
            {
                "on held-out rows": name,
                "own row first": entry["recall@1"]["value"],
                "own row in 10": entry["recall@10"]["value"],
                "neighbours kept": entry["neighbours_kept"]["share"],
            }
            for name, entry in facts.get("held_out", {}).items()
        ]
    )


# ---------------------------------------------------------------------- upgrade

Index = Annotated[
    str,
    typer.Argument(
        metavar="INDEX",
        help="The vectors in use: a FAISS index (.faiss, .index), a table (.npy, .safetensors, .parquet), a folder "
        "of such tables, or Qdrant (a local folder, or http://…).",
    ),
]
Sample = Annotated[
    str, typer.Argument(metavar="NEW_SAMPLE", help="The new encoder's vectors of some of the same items.")
]
IndexIds = Annotated[
    Path | None, typer.Option("--index-ids", help="Ids of the index, one a row (.npy, .txt), if it holds none.")
]
SampleIds = Annotated[
    Path | None,
    typer.Option("--sample-ids", help="Ids of the sample, one a row. Without ids: as many rows, in one order."),
]
QueriesNew = Annotated[str | None, typer.Option("--queries-new", metavar="TABLE", help="Queries by the new encoder.")]
QueriesOld = Annotated[
    str | None, typer.Option("--queries-old", metavar="TABLE", help="The same queries by the old encoder.")
]
SampleLabels = Annotated[
    str | None,
    typer.Option("--labels", metavar="COLUMN|FILE", help="Labels of the sample: items of one label are relevant."),
]
QueryLabels = Annotated[str | None, typer.Option("--query-labels", metavar="FILE", help="Labels of the queries.")]
Metric = Annotated[
    Literal["cosine", "inner", "euclidean"] | None,
    typer.Option(help="What is ranked by (default: as the index does; tables by cosine if of unit length)."),
]
Method = Annotated[
    str,
    typer.Option(
        help="Which map: linear (the simplest as good as the best on held-out pairs, of procrustes, scaled, "
        "low-rank, cca and ridge), one of these, mlp, or auto (the network too; takes minutes)."
    ),
]
Target = Annotated[
    float, typer.Option(min=0.01, max=1, help="Good enough: this share of the recall of embedding all anew.")
]
Adapter = Annotated[
    list[Path] | None,
    typer.Option(
        "-o",
        "--adapter",
        help="Write the map of new queries to the old space: .safetensors, .onnx, or .faiss (transforms alone).",
    ),
]
Wrapped = Annotated[
    Path | None,
    typer.Option("--wrap", metavar="OUT", help="Write the FAISS index so that it answers new queries: .faiss."),
]
Migrate = Annotated[
    Path | None,
    typer.Option("--migrate", metavar="OUT", help="Write all vectors, mapped into the new space; can be resumed."),
]
Backfill = Annotated[
    Path | None,
    typer.Option(
        "--backfill-order",
        metavar="OUT",
        help="Write the ids in the order to embed them anew, nearest to the sample's new vectors first: .txt or "
        ".npy. The page shows what it is worth against a random order.",
    ),
]
Page = Annotated[Path | None, typer.Option("--report", metavar="OUT", help="Write a page: .html.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check all input and say what would be written; write nothing.")
]


def upgrade(
    index: Index,
    sample: Sample,
    index_ids: IndexIds = None,
    sample_ids: SampleIds = None,
    queries_new: QueriesNew = None,
    queries_old: QueriesOld = None,
    labels: SampleLabels = None,
    query_labels: QueryLabels = None,
    metric: Metric = None,
    method: Method = "linear",
    target: Target = 0.9,
    adapter: Adapter = None,
    wrapped: Wrapped = None,
    migrate: Migrate = None,
    backfill: Backfill = None,
    page: Page = None,
    column: Column = None,
    id_column: IdColumn = None,
    collection: Collection = None,
    dry_run: DryRun = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Say whether a new encoder can serve on an index in use, and write what it takes: adapter, migrated index, order.

    Compares recall@10 of the old encoder, of new queries on old vectors without and with a map, of new queries on
    migrated vectors, and of embedding everything anew; all on held-out pairs. Exits with 1 where nothing short of
    embedding everything anew is good enough.

    Examples:

    - `subspan upgrade images.faiss new_sample.parquet --report upgrade.html`

    - `subspan upgrade images.faiss new.npy --sample-ids ids.npy -o queries.onnx --wrap answers_new_queries.faiss`

    - `subspan upgrade old.parquet new.parquet --labels category --migrate migrated.parquet --backfill-order ids.txt`

    - `subspan upgrade qdrant_folder/ new.parquet --migrate new_folder --json`
    """
    check_inputs(index, sample, queries_new, queries_old, kinds=(*TABLES, *INDEXES))
    from subspan.commands import UpgradeFiles, UpgradeInputs, run_upgrade
    from subspan.report import render_upgrade

    inputs = UpgradeInputs(
        index, sample, index_ids=index_ids, sample_ids=sample_ids, queries_new=queries_new, queries_old=queries_old,
        labels=labels, query_labels=query_labels, column=column, id_column=id_column, collection=collection,
    )  # fmt: skip
    files = UpgradeFiles(tuple(adapter or ()), wrapped, migrate, backfill, page, render_upgrade)
    with progress_bar("reading") as progress:
        facts = run_upgrade(
            inputs, files, metric=metric, method=method, target=target, dry_run=dry_run, seed=seed, progress=progress
        )
    if as_json:
        print_json(facts)
    else:
        _print_upgrade(facts)
    if facts.get("verdict", {}).get("answer") == "re-embed":
        raise typer.Exit(1)


def _print_upgrade(facts: dict[str, Any]) -> None:
    found = facts["index"]
    print_line(
        f"{found['source']}: {found['n']} vectors of {found['d']} dimensions, {found['form']}, {facts['metric']}"
    )
    if "retrieval" not in facts:
        print_line(f"{facts['pairs']} pairs; nothing was fitted or written (--dry-run)")
        for name, path in facts["files"].items():
            print_line(f"  would write {name.replace('_', ' ')}: {path}")
        return
    print_line(
        f"{facts['pairs']} pairs, {facts['fitted_to']} fitted to; {facts['queries']} queries among "
        f"{facts['searched']} held-out items; truth: {facts['truth']}"
    )
    if facts["left_out"]:
        print_line(f"{facts['left_out']} items of the sample are not in the index and are left out")
    if facts["few_pairs"]:
        print_line("fewer pairs to fit to than dimensions: the maps are kept to the directions that the pairs span")
    print_table(
        [
            {
                "queries/collection": name,
                "recall@10": entry["value"],
                "low": entry["interval"][0],
                "high": entry["interval"][1],
            }
            for name, entry in facts["retrieval"].items()
            if entry is not None
        ]
    )
    verdict = facts["verdict"]
    print_line(f"{verdict['answer']}: {verdict['text']}")
    print_line(verdict["reason"])
    if verdict["bridge"]:
        print_line(verdict["bridge"])
    for name, path in facts["files"].items():
        print_line(f"{name.replace('_', ' ')}: {path}")
    if "migrated_index" in facts["files"] and facts["migrated_unit_length"]:
        print_line("the migrated vectors have length one: scale new ones that replace them, or are added, likewise")
