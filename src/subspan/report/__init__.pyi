from .embeddings import Embeddings
from .facts import describe
from .inputs import read_embeddings
from .page import render

__all__ = ["Embeddings", "describe", "read_embeddings", "render"]
