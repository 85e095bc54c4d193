from .acted_worlds import ActedWorld, acted_vectors, acted_windows
from .digit_changes import digit_changes
from .disturbed_views import SHIFTS, Draw, Views, corrupt, drawn_views, named_pictures
from .flows import lorenz, vortex_street
from .image_features import LabelledImages, PooledFeatures, cached_maps, image_encoder, labelled_images, pooled_features
from .joint_spaces import JointSpace, classifier_rows, fitted_logit_scale, linear_space
from .known_factors import FactorPictures, factor_pictures
from .paired_worlds import World, code_world, shape_worlds
from .pasted_defects import Scene, pasted_defects
from .sentence_pairs import SentencePairs, TokenStates, docstring_pairs, labelled_pairs
from .sentences import labelled_texts, text_features
from .shared_space import DIGIT_NAMES, TEMPLATES, Pairs, Recipe, SharedSpace, dual_encoder
from .small_networks import accuracy, parameter_count, pixels, small_network, trained_network
from .style_generator import FeatureDistance, ModulatedConv, StyleAutoencoder, StyleGenerator

__all__ = [
    "DIGIT_NAMES",
    "SHIFTS",
    "TEMPLATES",
    "ActedWorld",
    "Draw",
    "FactorPictures",
    "FeatureDistance",
    "JointSpace",
    "LabelledImages",
    "ModulatedConv",
    "Pairs",
    "PooledFeatures",
    "Recipe",
    "Scene",
    "SentencePairs",
    "SharedSpace",
    "StyleAutoencoder",
    "StyleGenerator",
    "TokenStates",
    "Views",
    "World",
    "accuracy",
    "acted_vectors",
    "acted_windows",
    "cached_maps",
    "classifier_rows",
    "code_world",
    "corrupt",
    "digit_changes",
    "docstring_pairs",
    "drawn_views",
    "dual_encoder",
    "factor_pictures",
    "fitted_logit_scale",
    "image_encoder",
    "labelled_images",
    "labelled_pairs",
    "labelled_texts",
    "linear_space",
    "named_pictures",
    "parameter_count",
    "pasted_defects",
    "pixels",
    "pooled_features",
    "shape_worlds",
    "small_network",
    "text_features",
    "trained_network",
    "lorenz",
    "vortex_street",
]
