from .description import describe
from .embeddings import Embeddings
from .inputs import read_embeddings

__all__ = ["Embeddings", "describe", "read_embeddings"]
