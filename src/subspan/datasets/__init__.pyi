from .bundled import BUNDLED
from .cache import cache_entries, cache_folder, clear_cache
from .channels import ChannelSite, street_canyon
from .features import cached_features, fingerprint
from .graphs import GRAPHS, AttributedGraph, attributed_block_model, docstring_graph, load_graph, read_graph
from .images import AnomalyImages, ImageCollection, anomaly_folder, image_folder, is_anomaly_layout, open_image
from .indexes import open_index, open_table
from .labelled_windows import LABELLED_WINDOWS, LabelledWindows, labelled_windows
from .manifolds import MANIFOLDS, ManifoldKind, ManifoldZoo, PlantedRows
from .packages import WEIGHT_PACKAGES, image_preprocessing, install, is_installed, model_path
from .pretrained import load_language_model, load_model, load_sentence_encoder
from .rows import Rows
from .series import Series, read_series
from .shapes import Shapes, procedural_shapes
from .shared import SHARED, ImageRecords, data_folder, is_available, load
from .sionna_sites import CITIES, SionnaSites
from .solutions import ModelSolutions, model_solutions
from .texts import Docstring, Texts, code_and_docstrings, iterate_records, read_texts, stdlib_docstrings

__all__ = [
    "AnomalyImages",
    "AttributedGraph",
    "BUNDLED",
    "CITIES",
    "ChannelSite",
    "Docstring",
    "GRAPHS",
    "ImageCollection",
    "ImageRecords",
    "LABELLED_WINDOWS",
    "LabelledWindows",
    "MANIFOLDS",
    "ManifoldKind",
    "ManifoldZoo",
    "ModelSolutions",
    "PlantedRows",
    "Rows",
    "SHARED",
    "Series",
    "Shapes",
    "SionnaSites",
    "Texts",
    "WEIGHT_PACKAGES",
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
    "is_anomaly_layout",
    "is_available",
    "is_installed",
    "iterate_records",
    "labelled_windows",
    "load",
    "load_graph",
    "load_language_model",
    "load_model",
    "load_sentence_encoder",
    "model_path",
    "model_solutions",
    "open_image",
    "open_index",
    "open_table",
    "procedural_shapes",
    "read_graph",
    "read_series",
    "read_texts",
    "stdlib_docstrings",
    "street_canyon",
]
