"""Data and pretrained models: bundled, installed, in a local folder, or in their original formats."""

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

__all__ = [
    "WEIGHT_PACKAGES",
    "image_preprocessing",
    "install",
    "is_installed",
    "load_language_model",
    "load_model",
    "load_sentence_encoder",
    "model_path",
]
