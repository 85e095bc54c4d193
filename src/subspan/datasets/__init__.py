"""Data and pretrained models: bundled, installed, in a local folder, or in their original formats."""

from subspan.datasets.bundled import BUNDLED
from subspan.datasets.cache import cache_entries, cache_folder, cached_features, clear_cache, fingerprint
from subspan.datasets.graphs import (
    GRAPHS,
    AttributedGraph,
    attributed_block_model,
    docstring_graph,
    load_graph,
    read_graph,
)
from subspan.datasets.images import AnomalyImages, ImageCollection, anomaly_folder, image_folder, open_image
from subspan.datasets.packages import (
    WEIGHT_PACKAGES,
    image_preprocessing,
    install,
    is_installed,
    load_language_model,
    load_model,
    load_sentence_encoder,
    model_path,
)
from subspan.datasets.shapes import Shapes, procedural_shapes
from subspan.datasets.shared import SHARED, ImageRecords, data_folder, is_available, load
from subspan.datasets.tables import FiniteCheck, Table, read_table
from subspan.datasets.texts import Docstring, Texts, code_and_docstrings, iterate_records, read_texts, stdlib_docstrings

__all__ = [
    "BUNDLED",
    "GRAPHS",
    "SHARED",
    "WEIGHT_PACKAGES",
    "AnomalyImages",
    "AttributedGraph",
    "Docstring",
    "FiniteCheck",
    "ImageCollection",
    "ImageRecords",
    "Shapes",
    "Table",
    "Texts",
    "anomaly_folder",
    "attributed_block_model",
    "cache_entries",
    "cache_folder",
    "cached_features",
    "clear_cache",
    "code_and_docstrings",
    "data_folder",
    "docstring_graph",
    "fingerprint",
    "image_folder",
    "image_preprocessing",
    "install",
    "is_available",
    "is_installed",
    "iterate_records",
    "load",
    "load_graph",
    "load_language_model",
    "load_model",
    "load_sentence_encoder",
    "model_path",
    "open_image",
    "procedural_shapes",
    "read_graph",
    "read_table",
    "read_texts",
    "stdlib_docstrings",
]
