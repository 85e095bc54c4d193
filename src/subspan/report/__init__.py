"""The report: what is in a set of embeddings and what can be done with it, as facts and as one HTML page."""

from .embeddings import Embeddings
from .facts import describe
from .inputs import read_embeddings
from .page import render

__all__ = ["Embeddings", "describe", "read_embeddings", "render"]
