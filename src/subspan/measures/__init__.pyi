from .affine_recovery import affine_recovery
from .anomaly_maps import aupro, auroc
from .chrf import chrf, chrf_scores
from .compatibility import (
    BackfillCurve,
    average_accuracy,
    average_compatibility,
    backfill_curve,
    common_prefix,
    compatibility_matrix,
)
from .disentanglement import DCI, block_leakage, dci_score, factor_vae_score
from .intrinsic_dimension import two_nn
from .jackknife import jackknife
from .kernel_alignment import gram_matrix, kernel_cka, local_kernel_cka
from .kernels import RandomFeatures, gaussian_kernel, median_bandwidth, squared_distances
from .mutual_information import mutual_information
from .neighbours import knn_overlap, neighbour_purity, recall_at_k
from .neural_collapse import NeuralCollapse, neural_collapse
from .paired import expected_calibration_error, paired_bootstrap, resampled_means
from .partitions import (
    attribute_modularity,
    clustering_accuracy,
    conductance,
    connectivity,
    feature_detection_error,
    modularity,
    pairwise_f1,
    partition_scores,
)
from .pass_rates import pass_at_k
from .probes import CodeLength, ProbeScore, leakage, make_probe, online_code_length, probe_score
from .retrieval import RetrievalScores, prefix_retrieval_scores, retrieval_scores, template_gallery
from .spatial import gram_agreement, spatial_structure
from .unlearning import AnswerScores, forget_quality, model_utility, rouge_l_recall

__all__ = [
    "AnswerScores",
    "BackfillCurve",
    "CodeLength",
    "DCI",
    "NeuralCollapse",
    "ProbeScore",
    "RandomFeatures",
    "RetrievalScores",
    "affine_recovery",
    "attribute_modularity",
    "aupro",
    "auroc",
    "average_accuracy",
    "average_compatibility",
    "backfill_curve",
    "block_leakage",
    "chrf",
    "chrf_scores",
    "clustering_accuracy",
    "common_prefix",
    "compatibility_matrix",
    "conductance",
    "connectivity",
    "dci_score",
    "expected_calibration_error",
    "factor_vae_score",
    "feature_detection_error",
    "forget_quality",
    "gaussian_kernel",
    "gram_agreement",
    "gram_matrix",
    "jackknife",
    "kernel_cka",
    "knn_overlap",
    "leakage",
    "local_kernel_cka",
    "make_probe",
    "median_bandwidth",
    "model_utility",
    "modularity",
    "mutual_information",
    "neighbour_purity",
    "neural_collapse",
    "online_code_length",
    "paired_bootstrap",
    "pairwise_f1",
    "partition_scores",
    "pass_at_k",
    "prefix_retrieval_scores",
    "probe_score",
    "recall_at_k",
    "resampled_means",
    "retrieval_scores",
    "rouge_l_recall",
    "spatial_structure",
    "squared_distances",
    "template_gallery",
    "two_nn",
]
