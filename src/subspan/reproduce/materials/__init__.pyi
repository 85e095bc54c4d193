from .image_features import LabelledImages, PooledFeatures, image_encoder, labelled_images, pooled_features
from .sentence_pairs import SentencePairs, TokenStates, docstring_pairs, labelled_pairs
from .sentences import labelled_texts, text_features
from .shared_space import TEMPLATES, Pairs, Recipe, SharedSpace, dual_encoder
from .small_networks import accuracy, parameter_count, pixels, small_network, trained_network
from .style_generator import FeatureDistance, ModulatedConv, StyleAutoencoder, StyleGenerator

__all__ = [
    "TEMPLATES",
    "FeatureDistance",
    "LabelledImages",
    "ModulatedConv",
    "Pairs",
    "PooledFeatures",
    "Recipe",
    "SentencePairs",
    "SharedSpace",
    "StyleAutoencoder",
    "StyleGenerator",
    "TokenStates",
    "accuracy",
    "docstring_pairs",
    "dual_encoder",
    "image_encoder",
    "labelled_images",
    "labelled_pairs",
    "labelled_texts",
    "parameter_count",
    "pixels",
    "pooled_features",
    "small_network",
    "text_features",
    "trained_network",
]
