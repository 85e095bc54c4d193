"""Hidden representations taken out of torch and transformers models, and changes put back."""

from subspan.models.attention import attended_representation, attended_tokens, block_attention
from subspan.models.capture import Capture, capture, iterate_representations, pool_states
from subspan.models.encoders import ImageEncoder, SentenceEncoder
from subspan.models.features import FeatureGrid, token_grid
from subspan.models.intervene import intervene
from subspan.models.layers import find_blocks, layer_names
from subspan.models.permute import permute_units
from subspan.models.preprocessing import ImagePreprocessing, image_tensor
from subspan.models.tokens import TokenRoles

__all__ = [
    "Capture",
    "FeatureGrid",
    "ImageEncoder",
    "ImagePreprocessing",
    "SentenceEncoder",
    "TokenRoles",
    "attended_representation",
    "attended_tokens",
    "block_attention",
    "capture",
    "find_blocks",
    "image_tensor",
    "intervene",
    "iterate_representations",
    "layer_names",
    "permute_units",
    "pool_states",
    "token_grid",
]
