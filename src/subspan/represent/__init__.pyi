from .cascade import MatryoshkaCascade
from .causal_grassmann import CausalGrassmannConfig, CausalGrassmannForCausalLM
from .matryoshka import Matryoshka
from .nested_search import MatryoshkaIndex
from .nested_training import NestedTraining
from .truncation import Truncated, truncate

__all__ = [
    "CausalGrassmannConfig",
    "CausalGrassmannForCausalLM",
    "Matryoshka",
    "MatryoshkaCascade",
    "MatryoshkaIndex",
    "NestedTraining",
    "Truncated",
    "truncate",
]
