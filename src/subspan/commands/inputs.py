"""From what a command line names to rows of numbers: tables are opened, texts and images are embedded."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from subspan.base import Progress, silent
from subspan.base.array_files import ArrayRows
from subspan.base.kinds import ARCHIVES, LINES, SEPARATED, TEXTS, check_input, suffix_of
from subspan.base.reading import json_records, readable_name
from subspan.base.rows import all_rows, text_array
from subspan.base.tables import read_entries
from subspan.datasets import (
    AttributedGraph,
    ImageCollection,
    Rows,
    cached_features,
    image_folder,
    image_preprocessing,
    load_model,
    load_sentence_encoder,
    open_table,
    read_graph,
    read_texts,
    stdlib_docstrings,
)
from subspan.models import ImageEncoder, ImagePreprocessing, SentenceEncoder

IMAGE_MODEL = "efficientnet-lite0"
TEXT_MODEL = "minilm"
_MODEL_TITLES = {IMAGE_MODEL: "EfficientNet-Lite0", TEXT_MODEL: "all-MiniLM-L6-v2"}


def read_rows(
    argument: str | None,
    *,
    labels: str | None = None,
    column: str | None = None,
    text_column: str | None = None,
    id_column: str | None = None,
    skip_nan: bool = False,
    progress: Progress = silent,
) -> Rows:
    """The rows that `argument` names; None stands for the docstrings of the running Python's standard library.

    A table is opened (.npy stays memory-mapped); texts (.txt, .jsonl without vectors, or .csv with `text_column`) go
    through the sentence encoder, a folder or zip of images through the vision network, with the features cached.
    labels: a column, or a file with one a row (.npy, .txt, .csv, .jsonl). Raises ValueError, in one line, for what
    cannot be read, and for NaN or infinity unless `skip_nan`.
    """
    if argument is None:
        options = {"labels": labels, "column": column, "text_column": text_column, "id_column": id_column}
        for name, value in options.items():
            if value is not None:
                raise ValueError(
                    f"--{name.replace('_', '-')}: needs a TABLE; without one the standard library's docstrings are "
                    "taken, which are labelled by module"
                )
        return _docstrings(progress)
    path = Path(argument)
    check_input(argument)
    label_file = Path(labels) if labels is not None and Path(labels).is_file() else None
    named: dict[str, Any] = {"id_column": id_column, "label_column": None if label_file is not None else labels}
    if path.is_dir() or suffix_of(path) in ARCHIVES:
        _refuse(argument, "a folder of images", column=column, text_column=text_column, id_column=id_column)
        data = _images(path, argument, named["label_column"], progress)
    elif _holds_texts(path, column, text_column):
        _refuse(argument, "a file of texts", column=column)
        data = _texts(path, argument, text_column, named, progress)
    else:
        data = _table(path, column=column, text_column=text_column, **named)
    if label_file is not None:
        data = replace(data, labels=read_labels(label_file, len(data)), label_name="label")
    data = replace(
        data,
        source=readable_name(argument),
        argument=readable_name(argument),
        label_argument="" if labels is None else readable_name(labels),
        reading=_options(column=column, text_column=text_column),
        pairing=_options(id_column=id_column),
    )
    return _finite(data, skip_nan)


def _options(**columns: str | None) -> tuple[str, ...]:
    """The command line's options that name these columns."""
    given = {f"--{name.replace('_', '-')}": value for name, value in columns.items() if value is not None}
    return tuple(word for option in given.items() for word in option)


def _holds_texts(path: Path, column: str | None, text_column: str | None) -> bool:
    """Whether a file holds texts to embed: lines, records of JSON without vectors, or a table with such a column."""
    suffix = suffix_of(path)
    if suffix in TEXTS:
        return True
    if suffix in SEPARATED:
        return text_column is not None and column is None
    if suffix not in LINES or column is not None:
        return False
    _, first = next(json_records(path), (0, {}))
    vectors = any(isinstance(value, list) and float in map(type, value) for value in first.values())
    return text_column is not None or not (vectors or (first and str not in map(type, first.values())))


def _refuse(argument: str, what: str, **options: str | None) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"--{name.replace('_', '-')}: {argument} is {what}, so there is no column {value!r}")


# ---------------------------------------------------------------------- tables


def _table(path: Path, **columns: str | None) -> Rows:
    data = open_table(path, **columns)
    values, name = data.values, readable_name(path.name)
    if not (isinstance(values, ArrayRows) and values.dtype.kind == "f"):
        # Read once: everything that follows passes over the rows several times.
        values = ArrayRows(all_rows(values, f"path: {str(path)!r}"))
    origin = f"{len(data)} embeddings with {data.dim} dimensions, read from {name}."
    return replace(data, values=values, name=name, origin=origin, kind="rows", form="rows")


def read_labels(path: Path, n: int) -> np.ndarray:
    """The labels of n rows from a file of them: .npy, or texts (see `read_texts`). Raises ValueError for another n."""
    if path.suffix.lower() == ".npy":
        entries = read_entries(path, "--labels")
    else:
        entries = read_texts(path).texts
    names = text_array(entries, f"--labels: {str(path)!r}")
    if len(names) != n:
        raise ValueError(f"--labels: {str(path)!r} has {len(names)} labels for {n} rows")
    return names


def read_nodes(
    table: str, attributes: str | None = None, *, labels: str | None = None, id_column: str | None = None
) -> tuple[AttributedGraph, Rows]:
    """A graph, and its nodes as rows that have names and labels alone: the attributes stay sparse."""
    label_file = Path(labels) if labels is not None and Path(labels).is_file() else None
    graph = read_graph(table, attributes, id_column=id_column, label_column=None if label_file else labels)
    if label_file is not None:
        graph = graph.with_classes(read_labels(label_file, len(graph)).tolist())
    name = readable_name(Path(table).name)
    edges, width = graph.n_edges, graph.n_attributes
    counted = f"{width} attribute{'s' * (width != 1)} and {edges} edge{'s' * (edges != 1)}"
    return graph, Rows(
        np.zeros((len(graph), 1), dtype=np.float32), name=name, argument=readable_name(table),
        origin=f"{len(graph)} nodes with {counted} of {name}.", labels=graph.class_names, ids=graph.names,
    )  # fmt: skip


def _finite(data: Rows, skip: bool) -> Rows:
    """The data when all its rows are finite, or its finite rows where the others may be skipped."""
    finite = data.finite()
    if finite.all():
        return data
    if not skip:
        raise not_finite(data, finite)
    if not finite.any():
        raise ValueError(f"{data.argument}: all {len(data)} rows contain NaN or infinity")
    return replace(data.subset(np.flatnonzero(finite)), dropped=int((~finite).sum()))


def not_finite(data: Rows, finite: np.ndarray) -> ValueError:
    """Why rows that are not all finite are refused."""
    bad = np.flatnonzero(~finite)
    return ValueError(
        f"{data.argument or data.name}: {len(bad)} of {len(data)} rows contain NaN or infinity (the first is row "
        f"{bad[0]}); impute them, or leave them out with --skip-nan"
    )


# ---------------------------------------------------------------------- texts and images


def _docstrings(progress: Progress) -> Rows:
    found = stdlib_docstrings()
    texts = tuple(entry.text for entry in found)
    python = platform.python_version()
    return Rows(
        _encoded_texts(texts, progress),
        name=f"Docstrings of Python {python}",
        origin=f"{len(found)} docstrings of the standard library of Python {python}, embedded with "
        f"{_MODEL_TITLES[TEXT_MODEL]}; the label is the top-level module.",
        labels=np.array([entry.label for entry in found]),
        label_name="module",
        texts=texts,
        ids=np.array([entry.name for entry in found]),
    )


def _texts(path: Path, argument: str, text_column: str | None, named: dict[str, Any], progress: Progress) -> Rows:
    found = read_texts(path, column=text_column, **named)
    empty = [row for row, text in enumerate(found.texts) if not text.strip()]
    if empty:
        raise ValueError(f"{argument}: {len(empty)} of {len(found)} texts are empty (the first is row {empty[0]})")
    name = readable_name(path.name)
    return Rows(
        _encoded_texts(found.texts, progress),
        name=name,
        origin=f"{len(found)} texts of {name}, embedded with {_MODEL_TITLES[TEXT_MODEL]}.",
        labels=None if found.labels is None else text_array(found.labels, f"--labels: of {path.name!r}"),
        label_name=named["label_column"] or "label",
        texts=found.texts,
        ids=None if found.ids is None else text_array(found.ids, f"the ids of {path.name!r}"),
    )


def _encoded_texts(texts: Sequence[str], progress: Progress) -> np.ndarray:
    progress("loading the sentence encoder", 0.0)
    encoder = SentenceEncoder(*load_sentence_encoder(TEXT_MODEL))

    def compute(start: int) -> Iterator[np.ndarray]:
        return _shown(encoder.iterate(texts[start:]), start, len(texts), "embedding the texts", progress)

    options = {"encoder": "sentence", "pool": encoder.pool, "max_length": encoder.max_length}
    return cached_features(compute, model=encoder.model, data=list(texts), options=options)


def _images(path: Path, argument: str, label_column: str | None, progress: Progress) -> Rows:
    if label_column is not None:
        raise ValueError(
            f"--labels: there is no file {label_column!r}; the images of {argument} are labelled by folder"
        )
    images = image_folder(path)
    named = len(set(images.labels)) > 1
    name = readable_name(path.name or str(path))
    return Rows(
        _encoded_images(images, progress),
        name=name,
        origin=f"{len(images)} images of {name}, embedded with {_MODEL_TITLES[IMAGE_MODEL]}"
        + ("; the label is the folder." if named else "."),
        labels=np.array(list(map(readable_name, images.labels))) if named else None,
        label_name="folder",
        images=images,
        ids=np.array(list(map(readable_name, images.names))),
    )


def _encoded_images(images: ImageCollection, progress: Progress) -> np.ndarray:
    progress("loading the vision network", 0.0)
    preprocessing = image_preprocessing(IMAGE_MODEL)
    encoder = ImageEncoder(load_model(IMAGE_MODEL), ImagePreprocessing(**preprocessing), forward=_pooled_features)

    def compute(start: int) -> Iterator[np.ndarray]:
        return _shown(encoder.iterate(images[start:]), start, len(images), "embedding the images", progress)

    return cached_features(compute, model=encoder.model, data=images, options={"encoder": "image", **preprocessing})


def _pooled_features(network: Any, batch: Any) -> Any:
    return network.extract_features(batch).mean((2, 3))


def _shown(
    blocks: Iterable[np.ndarray], start: int, total: int, message: str, progress: Progress
) -> Iterator[np.ndarray]:
    done = start
    for block in blocks:
        yield block
        done += len(block)
        progress(message, done / total)
