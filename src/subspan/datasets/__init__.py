"""Data and pretrained models: bundled, installed, in a local folder, or in their original formats."""

from subspan.datasets.bundled import BUNDLED
from subspan.datasets.cache import cache_folder
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
from subspan.datasets.shared import SHARED, ImageRecords, data_folder, is_available, load
from subspan.datasets.texts import Docstring, Texts, code_and_docstrings, iterate_records, read_texts, stdlib_docstrings

__all__ = [
    "BUNDLED",
    "SHARED",
    "WEIGHT_PACKAGES",
    "AnomalyImages",
    "Docstring",
    "ImageCollection",
    "ImageRecords",
    "Texts",
    "anomaly_folder",
    "cache_folder",
    "code_and_docstrings",
    "data_folder",
    "image_folder",
    "image_preprocessing",
    "install",
    "is_available",
    "is_installed",
    "iterate_records",
    "load",
    "load_language_model",
    "load_model",
    "load_sentence_encoder",
    "model_path",
    "open_image",
    "read_texts",
    "stdlib_docstrings",
]
