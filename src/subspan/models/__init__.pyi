from .attention import attended_representation, attended_tokens, block_attention
from .attention_edges import attention_modules, attention_rows, cut_attention, edges_between
from .capture import Capture, capture, iterate_representations, pool_states
from .continuations import continuation_log_likelihood, greedy_continuations
from .encoders import ImageEncoder, SentenceEncoder
from .factored import LowRankLinear, SparseDictLinear
from .factored_files import load_factored, save_factored
from .features import FeatureGrid, token_grid
from .head_weights import HeadWeights, head_weights
from .intervene import intervene
from .layers import find_blocks, layer_names, linear_names, linear_weight
from .low_rank import LowRankChange, LowRankEdit, add_low_rank
from .moments import SiteMoments, collect_moments
from .output_rows import output_rows
from .permute import permute_units
from .preprocessing import ImagePreprocessing, image_tensor
from .sequences import text_perplexity, token_sequences
from .surgery import Site, Surgery, multiply_adds, replace
from .text_states import TextStates, TextTokens, text_states, text_tokens
from .tokens import SegmentTokens, TokenRoles, predicting_states
from .untrained import random_blocks
from .weight_files import RowBlocks, StoredWeights, weights_of, write_weights
from .weights import StateDelta, SubspaceMap

__all__ = [
    "Capture",
    "FeatureGrid",
    "HeadWeights",
    "ImageEncoder",
    "ImagePreprocessing",
    "LowRankChange",
    "LowRankEdit",
    "LowRankLinear",
    "RowBlocks",
    "SegmentTokens",
    "SentenceEncoder",
    "Site",
    "SiteMoments",
    "SparseDictLinear",
    "StateDelta",
    "StoredWeights",
    "SubspaceMap",
    "Surgery",
    "TextStates",
    "TextTokens",
    "TokenRoles",
    "add_low_rank",
    "attended_representation",
    "attended_tokens",
    "attention_modules",
    "attention_rows",
    "block_attention",
    "capture",
    "collect_moments",
    "continuation_log_likelihood",
    "cut_attention",
    "edges_between",
    "find_blocks",
    "greedy_continuations",
    "head_weights",
    "image_tensor",
    "intervene",
    "iterate_representations",
    "layer_names",
    "linear_names",
    "linear_weight",
    "load_factored",
    "multiply_adds",
    "output_rows",
    "permute_units",
    "pool_states",
    "predicting_states",
    "random_blocks",
    "replace",
    "save_factored",
    "text_perplexity",
    "text_states",
    "text_tokens",
    "token_grid",
    "token_sequences",
    "weights_of",
    "write_weights",
]
