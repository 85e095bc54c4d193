"""The defaults of every system are those it was published with, or differ for a reason that is said here.

One row a default: the callable, its parameter, the value, and where the value stands. Rows are sorted by room.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from subspan import align, cluster, dynamics, edit, measures, nn, probe, represent, select


class Default(NamedTuple):
    """`made(…, parameter=value)` is what a call without the parameter does; `where` says who says so."""

    made: Callable[..., Any]
    parameter: str
    value: Any
    where: str


PUBLISHED = [
    # nn: Grassmann class representation
    Default(nn.GrassmannHead, "rank", 8, "innerlee/GCR, all configurations"),
    Default(nn.GrassmannHead, "scale", 25.0, "innerlee/GCR, all configurations"),
    Default(nn.RiemannianSGD, "lr", 0.1, "innerlee/GCR, ResNet recipe"),
    Default(nn.RiemannianSGD, "momentum", 0.9, "innerlee/GCR, ResNet recipe"),
    Default(nn.RiemannianSGD, "weight_decay", 0.0, "planes have no scale, innerlee/GCR excludes them"),
    Default(nn.RiemannianSGD, "transport", "project", "innerlee/GCR projects its buffer at each step"),
    Default(nn.with_riemannian, "manifold_lr", 0.1, "innerlee/GCR, beside AdamW"),
    # nn: ULSAM
    Default(nn.SubspaceAttention, "groups", 4, "Saini et al. (2020), ImageNet"),
    Default(nn.SubspaceAttention, "pool", 3, "Saini et al. (2020)"),
    Default(nn.SubspaceAttention, "momentum", 0.1, "0.9 in Nandan91/ULSAM is TensorFlow's convention misread"),
    Default(nn.SubspaceAttention, "residual", True, "Saini et al. (2020)"),
    Default(nn.SubspaceAttention, "gate", "default", "Nandan91/ULSAM, torch's own batch norm start"),
    # nn: causal Grassmann
    Default(nn.GrassmannMixing, "rank", 32, "Zhang Chong (2025), language model"),
    Default(nn.GrassmannMixing, "offsets", (1, 2, 4, 8, 12, 16), "Zhang Chong (2025), six layers"),
    Default(nn.GrassmannMixing, "normalize", True, "Zhang Chong (2025)"),
    Default(nn.GrassmannMixing, "output_projection", False, "Zhang Chong (2025), text; its counts need True"),
    Default(nn.GrassmannMixing, "epsilon", 1e-3, "ours: relative, since nearly parallel pairs have no plane"),
    Default(nn.GrassmannBlock, "ffn", None, "Zhang Chong (2025): 4 d"),
    Default(nn.GrassmannBlock, "dropout", 0.1, "Zhang Chong (2025), pair head"),
    Default(nn.GrassmannLanguageModel, "d_model", 256, "Zhang Chong (2025)"),
    Default(nn.GrassmannLanguageModel, "context", 128, "Zhang Chong (2025), six layers"),
    Default(nn.GrassmannLanguageModel, "dropout", 0.1, "alphaXiv/paper-implementations"),
    Default(nn.GrassmannPairHead, "rank", 64, "Zhang Chong (2025), SNLI"),
    Default(nn.GrassmannPairHead, "window", 8, "Zhang Chong (2025), SNLI"),
    Default(nn.GrassmannPairHead, "stride", 8, "Zhang Chong (2025), SNLI"),
    Default(nn.GrassmannPairHead, "layers", 2, "Zhang Chong (2025), SNLI"),
    Default(nn.GrassmannPairHead, "d_model", 256, "Zhang Chong (2025), SNLI"),
    Default(nn.GrassmannPairHead, "heads", 4, "Zhang Chong (2025), SNLI"),
    Default(nn.GrassmannPairHead, "ffn", 512, "Zhang Chong (2025), SNLI"),
    Default(nn.GrassmannPairHead, "dropout", 0.1, "Zhang Chong (2025), SNLI"),
    # nn: CRATE
    Default(nn.ISTA, "step", 0.1, "Ma-Lab-Berkeley/CRATE, classifier"),
    Default(nn.ISTA, "threshold", 0.1, "Ma-Lab-Berkeley/CRATE, classifier"),
    Default(nn.ISTA, "steps", 1, "Yu et al. (2023)"),
    Default(nn.ISTA, "expansion", 1, "Yu et al. (2023)"),
    Default(nn.ISTA, "nonnegative", True, "Yu et al. (2023)"),
    Default(nn.CRATELayer, "step", 0.1, "Ma-Lab-Berkeley/CRATE, classifier"),
    Default(nn.CRATELayer, "threshold", 0.1, "Ma-Lab-Berkeley/CRATE, classifier"),
    Default(nn.CRATELayer, "strict", None, "Ma-Lab-Berkeley/CRATE: the output map is its own"),
    Default(nn.CRATELayer, "dropout", 0.0, "Ma-Lab-Berkeley/CRATE"),
    Default(nn.SubspaceSelfAttention, "tied", False, "Ma-Lab-Berkeley/CRATE"),
    Default(nn.SubspaceSelfAttention, "orthonormal", False, "Ma-Lab-Berkeley/CRATE"),
    Default(nn.CRATE, "pool", "class", "Ma-Lab-Berkeley/CRATE"),
    Default(nn.CRATE.preset, "patch_size", 16, "Ma-Lab-Berkeley/CRATE"),
    Default(nn.CRATE.preset, "image_size", 224, "Ma-Lab-Berkeley/CRATE"),
    Default(nn.CRATEAutoencoder, "masked", 0.75, "Pai et al. (2024)"),
    Default(nn.CRATEAutoencoder, "threshold", 0.5, "Ma-Lab-Berkeley/CRATE, masked autoencoder's encoder"),
    Default(nn.CRATEAutoencoder, "normalize", False, "Pai et al. (2024): optional"),
    Default(nn.CRATELanguageModel.preset, "context", 1024, "Yu et al. (2023), GPT-2's frame"),
    Default(nn.CRATELanguageModel.preset, "vocabulary", 50_257, "Yu et al. (2023), GPT-2's frame"),
    # nn: butterfly
    Default(nn.Butterfly, "bias", True, "HazyResearch/butterfly"),
    Default(nn.Butterfly, "blocks", 1, "HazyResearch/butterfly"),
    Default(nn.Butterfly, "increasing", True, "HazyResearch/butterfly"),
    Default(nn.Butterfly, "complex", False, "HazyResearch/butterfly"),
    Default(nn.Butterfly, "tied", False, "HazyResearch/butterfly, new interface"),
    Default(nn.Butterfly, "init", "ortho", "an option there, whose own default is randn: lengths are kept exactly"),
    Default(nn.butterfly_factorize, "permutation", "bit-reversal", "Dao et al. (2019): the Fourier transform's"),
    # nn: Householder projector
    Default(nn.HouseholderProjector, "rank", 10, "KingJamesSong/HouseholderGAN, diag_size"),
    Default(nn.HouseholderProjector, "gain", "one", "KingJamesSong/HouseholderGAN: S = 1"),
    Default(nn.HouseholderProjector, "bias", True, "KingJamesSong/HouseholderGAN"),
    Default(nn.HouseholderProjector.from_linear, "rank", 10, "KingJamesSong/HouseholderGAN, diag_size"),
    Default(nn.HouseholderProjector.from_linear, "gain", "mean", "its older revision: keeps the trained layer's scale"),
    # nn: SimVQ
    Default(nn.SimVQ, "commitment", 0.25, "youngsheen/SimVQ, on the latents' half"),
    Default(nn.SimVQ, "bias", True, "youngsheen/SimVQ: nn.Linear with its bias"),
    Default(nn.SimVQ, "basis_dim", None, "youngsheen/SimVQ: the width of the latents"),
    Default(nn.SimVQ, "estimator", "straight-through", "Zhu et al. (2024)"),
    Default(nn.SimVQ, "train_basis", False, "Zhu et al. (2024): the codes are frozen"),
    Default(nn.ResidualSimVQ, "dropout", False, "lucidrains/vector-quantize-pytorch"),
    # align: iREPA
    Default(nn.PatchProjector, "kind", "conv", "Singh et al. (2026)"),
    Default(nn.PatchProjector, "kernel_size", 3, "Singh et al. (2026), README"),
    Default(nn.PatchProjector, "hidden", 2048, "Yu et al. (2024), REPA"),
    Default(nn.SpatialNorm, "gamma", 0.8, "End2End-Diffusion/iREPA, pixel space (0.6 in latent space)"),
    Default(nn.SpatialNorm, "eps", 1e-6, "End2End-Diffusion/iREPA"),
    Default(nn.SpatialNorm, "remove_rank", None, "Singh et al. (2026): the mean alone"),
    Default(align.RepresentationAlignment, "norm", "spatial", "Singh et al. (2026)"),
    Default(align.RepresentationAlignment, "weight", 0.5, "End2End-Diffusion/iREPA, pixel space, and REPA"),
    # align: BT²
    Default(align.BasisTransform, "k", 32, "YifeiZhou02/BT-2, both configurations"),
    Default(align.BasisTransform, "scale", 2.0, "YifeiZhou02/BT-2, both configurations (its class says 3)"),
    Default(align.BasisTransform, "orthogonal_map", "matrix_exp", "YifeiZhou02/BT-2"),
    Default(align.BT2Head, "k", 32, "YifeiZhou02/BT-2, both configurations"),
    Default(align.BT2Head, "scale", 2.0, "YifeiZhou02/BT-2, both configurations"),
    Default(align.BT2Loss, "lambdas", (1.0, 10.0, 5.0), "YifeiZhou02/BT-2, both configurations"),
    Default(align.BT2Loss, "temperature", 1.0, "YifeiZhou02/BT-2: none"),
    Default(align.BT2Loss, "label_smoothing", 0.0, "YifeiZhou02/BT-2: its trainer uses plain cross entropy"),
    Default(align.BackwardCompatibleModule.objective, "learning_rate", 1e-3, "YifeiZhou02/BT-2"),
    Default(align.BackwardCompatibleModule.objective, "weight_decay", 2**-15, "YifeiZhou02/BT-2, CIFAR-100"),
    Default(align.BackwardCompatibleModule.objective, "warmup", 0.05, "YifeiZhou02/BT-2, CIFAR-100: 5 of 100 epochs"),
    # align: λ-orthogonality
    Default(nn.LambdaOrthogonality, "lam_rel", None, "0.375, Ricci et al. (2025): λ = 12 at 1024 dimensions"),
    Default(nn.LambdaOrthogonality, "alpha", None, "ours, 100 / λ: Ricci et al. (2025) do not say"),
    Default(align.LambdaOrthogonalAdapter, "backward", "lambda", "Ricci et al. (2025)"),
    Default(align.LambdaOrthogonalAdapter, "forward", "affine", "Ricci et al. (2025): affine or a small network"),
    Default(align.LambdaOrthogonalAdapter, "lam", None, "given by lam_rel"),
    Default(align.LambdaOrthogonalAdapter, "lam_rel", 0.375, "Ricci et al. (2025): λ = 12 at 1024 dimensions"),
    Default(align.LambdaOrthogonalAdapter, "alpha", None, "ours, 100 / λ: Ricci et al. (2025) do not say"),
    Default(align.LambdaOrthogonalAdapter, "penalty", 1.0, "Ricci et al. (2025)"),
    Default(align.LambdaOrthogonalAdapter, "learning_rate", 1e-3, "Ricci et al. (2025)"),
    Default(align.LambdaOrthogonalAdapter, "weights", (1.0, 1.0, 1.0), "ours: Ricci et al. (2025) do not say"),
    Default(align.LambdaOrthogonalAdapter, "temperature", 0.1, "ours: Ricci et al. (2025) do not say"),
    Default(align.LambdaOrthogonalAdapter, "symmetric", False, "ours: Ricci et al. (2025) do not say"),
    Default(align.LambdaOrthogonalAdapter, "normalize", True, "ours: Ricci et al. (2025) do not say"),
    Default(align.LambdaOrthogonalAdapter, "start", "procrustes", "ours: a step from outside can jump the gate"),
    Default(align.LambdaOrthogonalAdapter, "epochs", 30, "ours: Ricci et al. (2025) do not say"),
    # align: stationary representations
    Default(align.SimplexClassifier, "preallocated", 1024, "miccunifi/iamcl2r"),
    Default(align.SimplexClassifier, "index", "front", "miccunifi/iamcl2r: models trained elsewhere"),
    Default(align.SimplexClassifier, "normalize", False, "miccunifi/iamcl2r"),
    Default(align.SimplexClassifier, "scale", 1.0, "miccunifi/iamcl2r: none"),
    Default(align.HOCLoss, "mu", 10.0, "miccunifi/iamcl2r"),
    Default(align.HOCLoss, "same_class", "constant", "miccunifi/iamcl2r: multiplied to 0, not removed"),
    Default(align.CompatibleCE, "lam", 0.1, "miccunifi/iamcl2r"),
    Default(align.Rehearsal, "per_class", 20, "miccunifi/iamcl2r"),
    Default(align.BalancedBatches, "batch_size", 128, "miccunifi/iamcl2r"),
    Default(align.StationaryModule, "lam", 0.1, "miccunifi/iamcl2r"),
    Default(align.StationaryModule, "mu", 10.0, "miccunifi/iamcl2r"),
    Default(align.StationaryModule, "memory", 20, "miccunifi/iamcl2r"),
    Default(align.StationaryModule, "batch_size", 128, "miccunifi/iamcl2r"),
    Default(align.StationaryModule.objective, "learning_rate", 1e-3, "miccunifi/iamcl2r"),
    Default(align.StationaryModule.objective, "momentum", 0.9, "miccunifi/iamcl2r"),
    Default(align.StationaryModule.objective, "weight_decay", 5e-4, "miccunifi/iamcl2r"),
    # align: 3D and text in shared subspaces
    Default(align.SubspaceAligner, "n_components", 50, "Hadgi et al. (2025)"),
    Default(align.SubspaceAligner, "method", "affine", "Hadgi et al. (2025): better for matching than local CKA"),
    Default(align.SubspaceAligner, "subspace", "cca", "Hadgi et al. (2025)"),
    Default(align.SubspaceAligner, "kernel", "linear", "mayug/0-shot-llm-vision"),
    # cluster: the classic family
    Default(cluster.LeastSquaresRepresentation, "alpha", 0.1, "Lu et al. (2012), in units of the mean energy"),
    Default(cluster.LeastSquaresRepresentation, "retain", 9, "ours: the dimension of faces and objects"),
    Default(cluster.LowRankRepresentation, "alpha", 10.0, "ours: Liu et al. (2013) choose it by data set"),
    Default(cluster.LowRankRepresentation, "noise", "gaussian", "Favaro et al. (2011), closed form"),
    Default(cluster.ElasticNetSubspaceClustering, "gamma", 50.0, "ChongYou/subspace-clustering"),
    Default(cluster.ElasticNetSubspaceClustering, "l1_ratio", 0.95, "You et al. (2016): 0.9 to 1"),
    Default(cluster.ElasticNetSubspaceClustering, "max_support", 50, "ChongYou/subspace-clustering"),
    Default(cluster.OMPSubspaceClustering, "n_nonzero", 10, "ChongYou/subspace-clustering"),
    Default(cluster.OMPSubspaceClustering, "tolerance", 1e-6, "ChongYou/subspace-clustering"),
    # cluster: deep subspace clustering
    Default(cluster.DeepSubspaceClustering, "learning_rate", 1e-3, "lovro-sinda/LIHFSS-SVDSC"),
    Default(cluster.DeepSubspaceClustering, "max_steps", 700, "lovro-sinda/LIHFSS-SVDSC"),
    Default(cluster.DeepSubspaceClustering, "look_every", 50, "ours: the published rule is not in its code"),
    Default(cluster.DeepSubspaceClustering, "pretrain_steps", 100, "lovro-sinda/LIHFSS-SVDSC"),
    Default(cluster.DeepSubspaceClustering, "retain", 9, "lovro-sinda/LIHFSS-SVDSC, faces and objects"),
    Default(cluster.DeepSubspaceClustering, "n_init", 20, "lovro-sinda/LIHFSS-SVDSC"),
    Default(cluster.DeepSubspaceClustering, "channels", (3, 3, 5), "Ji et al. (2017), ORL"),
    Default(cluster.DeepSubspaceClustering, "kernels", (3, 3, 3), "Ji et al. (2017), ORL"),
    Default(cluster.DSCNetClustering, "coefficient_weight", 1.0, "Ji et al. (2017), ORL"),
    Default(cluster.DSCNetClustering, "expression_weight", 0.2, "Ji et al. (2017), ORL"),
    Default(cluster.DSCNetClustering, "fraction", 0.2, "Ji et al. (2017), ORL"),
    Default(cluster.DSCNetClustering, "dim", 3, "Ji et al. (2017), ORL"),
    Default(cluster.DSCNetClustering, "power", 1.0, "Ji et al. (2017), ORL"),
    Default(cluster.DSCNetClustering, "max_steps", 700, "Ji et al. (2017), ORL"),
    # cluster: attributed graphs
    Default(cluster.S2CAG, "order", 10, "HKBU-LAGAS/S2CAG"),
    Default(cluster.S2CAG, "decay", 0.9, "HKBU-LAGAS/S2CAG"),
    Default(cluster.S2CAG, "gamma", 1.0, "Lin et al. (2025); the code's flag says 0.9"),
    Default(cluster.S2CAG, "n_iter", None, "HKBU-LAGAS/S2CAG: 7, modularity 50"),
    Default(cluster.S2CAG, "rescale", "rowsum", "HKBU-LAGAS/S2CAG"),
    Default(cluster.S2CAG, "loops", 2, "HKBU-LAGAS/S2CAG"),
    Default(cluster.S2CAG, "rounding", "kmeans+snem", "ours: the published start depends on the sign of a vector"),
    # cluster: manifold linearizing and clustering
    Default(cluster.ManifoldLinearizingClustering, "eps2", 0.1, "Ding et al. (2023), the code's value"),
    Default(cluster.ManifoldLinearizingClustering, "eta", 0.175, "Ding et al. (2023), CIFAR-10"),
    Default(cluster.ManifoldLinearizingClustering, "warmup", 50, "Ding et al. (2023), CIFAR-10"),
    Default(cluster.ManifoldLinearizingClustering, "z_dim", 64, "ours: 128 in Ding et al. (2023), for a GPU"),
    Default(cluster.ManifoldLinearizingClustering, "hidden", 1024, "ours: 4096 in Ding et al. (2023), for a GPU"),
    Default(cluster.ManifoldLinearizingClustering, "batch_size", 512, "ours: 1024 in Ding et al. (2023), for a GPU"),
    # cluster: low-rank mixtures
    Default(cluster.LowRankMixtureDiffusion, "floor", "residual", "Tipping & Bishop (1999); 0 in Wang et al. (2024)"),
    Default(cluster.LowRankMixtureDiffusion, "init", "shape-interaction", "ours: random starts hide the transition"),
    # represent: Matryoshka
    Default(represent.Matryoshka, "dims", None, "Kusupati et al. (2022): halved from d down to 8"),
    Default(represent.Matryoshka, "weights", None, "Kusupati et al. (2022): all 1"),
    Default(represent.Matryoshka, "efficient", False, "Kusupati et al. (2022): MRL before MRL-E"),
    Default(represent.Matryoshka, "learning_rate", None, "ours: 3e-3, or 1e-2 for linear maps with labels"),
    Default(represent.Matryoshka, "batch_size", None, "ours: 256, fewer for few rows"),
    Default(represent.MatryoshkaIndex, "shortlist", 200, "Kusupati et al. (2022)"),
    Default(nn.MatryoshkaLinear, "efficient", False, "RAIVNLab/MRL"),
    Default(nn.MatryoshkaLinear, "bias", True, "RAIVNLab/MRL"),
    Default(nn.MatryoshkaLinear, "normalize", False, "RAIVNLab/MRL"),
    Default(nn.MatryoshkaLogitLoss, "weights", None, "RAIVNLab/MRL: all 1"),
    Default(nn.MatryoshkaLoss, "weights", None, "Kusupati et al. (2022): all 1"),
    # probe: SAE manifolds
    Default(probe.TopKSAE, "n_atoms", None, "Bhalla et al. (2026) and its replication: four times the width"),
    Default(probe.TopKSAE, "loss", "mse", "lgngrvs/nonlinear-features: cleaner there than L1"),
    Default(probe.TopKSAE, "dead_weight", 0.05, "lgngrvs/nonlinear-features"),
    Default(probe.TopKSAE, "learning_rate", 3e-3, "lgngrvs/nonlinear-features"),
    Default(probe.TopKSAE, "batch_size", 1024, "lgngrvs/nonlinear-features"),
    Default(probe.TopKSAE, "epochs", 10, "lgngrvs/nonlinear-features"),
    Default(nn.SparseAutoencoder, "dead_weight", 0.05, "lgngrvs/nonlinear-features"),
    Default(probe.capture_curve, "max_atoms", 64, "Bhalla et al. (2026), code"),
    Default(probe.capture_curve, "outlier", 3.0, "Bhalla et al. (2026), code"),
    Default(probe.tuning_curves, "sigma", 3.0, "Bhalla et al. (2026), code"),
    Default(probe.ManifoldCapture, "share", 0.95, "Bhalla et al. (2026), code"),
    Default(probe.ManifoldCapture, "n_tuned", 10, "Bhalla et al. (2026), code"),
    Default(probe.ManifoldCapture, "controls", 5, "ours: draws of each random control"),
    Default(probe.IsingGraph, "lambdas", (0.16, 0.08, 0.04, 0.02, 0.01, 0.005), "goodfire-ai/param-decomp"),
    Default(probe.IsingGraph, "gamma", 0.5, "goodfire-ai/param-decomp"),
    Default(probe.IsingGraph, "rates", (0.02, 0.98), "goodfire-ai/param-decomp"),
    Default(probe.IsingGraph, "max_iter", 300, "goodfire-ai/param-decomp"),
    Default(probe.IsingGraph, "alpha", 0.01, "Bhalla et al. (2026), code"),
    Default(probe.AtomGroups, "method", "louvain", "goodfire-ai/param-decomp; Leiden is under the GPL"),
    Default(probe.AtomGroups, "least_weight", 0.005, "Bhalla et al. (2026), code"),
    Default(probe.AtomGroups, "resolution", 1.0, "Bhalla et al. (2026), code"),
    Default(probe.AtomGroups, "min_size", 2, "Bhalla et al. (2026), code"),
    # probe: convergent learning
    Default(probe.ConvergentLearning, "method", "matching", "Li et al. (2016)"),
    Default(probe.ConvergentLearning, "sign", "auto", "Li et al. (2016) for ReLU units; magnitudes elsewhere are ours"),
    Default(measures.mutual_information, "bins", 10, "YixuanLi/convergent_learning, beside a bin of zeros"),
    # probe: ICL circuit
    Default(probe.draw_examples, "k", 4, "Cho et al. (2025)"),
    Default(probe.encode_report, "neighbours", 64, "hc495/ICL_Circuit, of 512 prompts"),
    Default(probe.merge_report, "neighbours", 64, "hc495/ICL_Circuit, of 512 prompts"),
    Default(probe.merge_report, "threshold", 5.0, "Cho et al. (2025): 5 / tokens of the prompt"),
    Default(probe.retrieval_report, "threshold", 5.0, "Cho et al. (2025): 5 / tokens of the prompt"),
    Default(probe.ICLCircuit.ablate, "keep_self", True, "ours: rows without any key attend to all alike"),
    Default(
        probe.ICLCircuit.ablate, "include_query", False, "the note in hc495/ICL_Circuit; its loop has the query, too"
    ),
    # align: ReAlign
    Default(align.ReAlign, "steps", ("anchor", "trace", "centroid"), "Yu et al. (2026)"),
    Default(align.ReAlign, "n_centroid", 1, "Yu et al. (2026)"),
    # select: ScalSelect
    Default(select.ScalSelect, "mass", 0.9, "Wu et al. (2026)"),
    Default(select.ScalSelect, "rank", 0.9, "Wu et al. (2026)"),
    Default(select.ScalSelect, "center", True, "Wu et al. (2026), published run"),
    Default(select.ScalSelect, "standardize", False, "Wu et al. (2026), published run"),
    Default(select.ScalSelect, "row_norm", False, "Wu et al. (2026), published run"),
    Default(select.ScalSelect, "block", 0, "Wu et al. (2026), the first block"),
    Default(select.ScalSelect, "max_length", 4096, "Wu et al. (2026), published code"),
    Default(select.ScalSelect, "batch_size", 1, "Wu et al. (2026), published code"),
    # edit: spectral steering
    Default(edit.SpectralSteering, "steps", 1, "Dafnis & Metaxas (2025)"),
    Default(edit.SpectralSteering, "learning_rate", 5e-3, "Dafnis & Metaxas (2025)"),
    Default(edit.SpectralSteering, "optimizer", "adamw", "Dafnis & Metaxas (2025)"),
    Default(edit.SpectralSteering, "keep", 0.1, "Dafnis & Metaxas (2025), of 64 views"),
    Default(edit.SpectralSteering, "per_class", False, "Dafnis & Metaxas (2025), shared coefficients"),
    Default(edit.SpectralSteering, "reg", 0.0, "ours: without effect in the one published step"),
    # represent: Hydra
    Default(represent.PairGate, "embed_dim", 512, "erow/vitookit, BasicGate"),
    Default(represent.PairGate, "hidden", 1024, "erow/vitookit, BasicGate"),
    Default(represent.PairGate, "fuse", "mean", "erow/vitookit, BasicGate"),
    Default(represent.ArbitraryPairLoss, "temperature", 0.1, "Wu et al. (2024), CIFAR recipe"),
    Default(represent.ArbitraryPairLoss, "pairing", "arbitrary", "Wu et al. (2024)"),
    Default(represent.ArbitraryPairLoss, "average", "pairs", "erow/vitookit, multipos_ce_loss"),
    Default(represent.HydraTraining, "hidden", 2048, "erow/vitookit"),
    Default(represent.HydraProjector, "out_dim", 256, "erow/vitookit"),
    Default(represent.HydraProjector, "gate_norm", "layer", "ours: batches of few classes have few pairs"),
    # dynamics: Information Koopman
    Default(dynamics.KoopmanAutoencoder, "alpha", 2.0, "Cheng et al. (2026), physical simulations"),
    Default(dynamics.KoopmanAutoencoder, "beta", 0.0, "Cheng et al. (2026), physical simulations: none"),
    Default(dynamics.KoopmanAutoencoder, "gamma", 0.1, "Cheng et al. (2026); their code has the other sign"),
    Default(dynamics.KoopmanAutoencoder, "id_weight", 0.1, "Wenxuan52/InformationKoopman, cylinder"),
    Default(dynamics.KoopmanAutoencoder, "neighbours", 3, "Cheng et al. (2026), physical simulations"),
    Default(dynamics.KoopmanAutoencoder, "temperature", 0.1, "Wenxuan52/InformationKoopman, what its trainer takes"),
    Default(dynamics.KoopmanAutoencoder, "negatives", "sequence", "Wenxuan52/InformationKoopman"),
    Default(dynamics.KoopmanAutoencoder, "operator", "pooled", "ours: means of windows' operators are biased low"),
    Default(dynamics.KoopmanAutoencoder, "ridge", 0.1, "Wenxuan52/InformationKoopman"),
    Default(dynamics.KoopmanAutoencoder, "detach_operator", True, "Wenxuan52/InformationKoopman"),
    Default(dynamics.KoopmanAutoencoder, "dropout", 0.0, "ours: 0.1 in their networks for fields"),
    Default(dynamics.KoopmanAutoencoder, "window", 16, "Wenxuan52/InformationKoopman, cylinder"),
    Default(dynamics.KoopmanAutoencoder, "epochs", 20, "ours: 300 there, of fewer windows"),
    Default(dynamics.KoopmanAutoencoder, "batch_size", 16, "Wenxuan52/InformationKoopman, cylinder"),
    Default(dynamics.KoopmanAutoencoder, "learning_rate", 1e-3, "Wenxuan52/InformationKoopman"),
    Default(dynamics.KoopmanAutoencoder, "gradient_clip", 1.0, "Wenxuan52/InformationKoopman"),
    Default(dynamics.VonNeumannEntropy, "eps", 1e-8, "Wenxuan52/InformationKoopman"),
    # represent: XFactors
    Default(represent.XFactors, "factor_dim", 2, "ICML26-anon/XFactors, whatever is asked for"),
    Default(represent.XFactors, "residual_dim", 126, "ICML26-anon/XFactors"),
    Default(represent.XFactors, "width", 48, "ICML26-anon/XFactors"),
    Default(represent.XFactors, "temperature", 0.03, "ICML26-anon/XFactors, training"),
    Default(represent.XFactors, "kl_weight", 1e-6, "ICML26-anon/XFactors"),
    Default(represent.XFactors, "contrast_weight", None, "ICML26-anon/XFactors: 0.1 over the number of factors"),
    Default(represent.XFactors, "correlation_weight", 0.0, "ICML26-anon/XFactors, off"),
    Default(represent.XFactors, "epochs", 50, "ICML26-anon/XFactors"),
    Default(represent.XFactors, "learning_rate", 1e-3, "ICML26-anon/XFactors, AdamW's own"),
    Default(represent.XFactors, "weight_decay", 1e-2, "ICML26-anon/XFactors, AdamW's own"),
    Default(represent.XFactors, "gradient_clip", 3.0, "ICML26-anon/XFactors"),
    Default(represent.XFactors, "batch_size", None, "ours: 128 in place of 32, so that rare values repeat"),
    Default(represent.XFactors, "decode_directions", False, "ICML26-anon/XFactors, which has no such choice"),
    # represent: dynamic subspace learners
    Default(represent.FrameViews, "dim", 128, "Demirel & Holz (2025)"),
    Default(represent.FrameViews, "width", 32, "Demirel & Holz (2025)"),
    Default(represent.FrameViews, "n_scales", 48, "eth-siplab/Learning-with-FrameProjections"),
    Default(represent.FrameViews, "mapper_hidden", 64, "Demirel & Holz (2025); their code has 1"),
    Default(represent.FrameViews, "dropout", 0.5, "eth-siplab/Learning-with-FrameProjections"),
    Default(represent.FrameViews, "temperature", 0.15, "eth-siplab/Learning-with-FrameProjections"),
    Default(
        represent.FrameViews, "mapper_weight", 1.0, "between 128 (paper) and 1 / batch (code); 128 keeps one point"
    ),
    Default(represent.FrameViews, "epochs", 256, "Demirel & Holz (2025), each stage"),
    Default(
        represent.FrameViews, "learning_rate", 1e-3, "eth-siplab/Learning-with-FrameProjections; 3e-3 in the paper"
    ),
    Default(represent.FrameViews, "batch_size", 256, "ours: 1024 in the paper, at a higher rate"),
    Default(represent.FrameViews, "weight_decay", 1e-6, "eth-siplab/Learning-with-FrameProjections"),
    Default(nn.MorletView, "scales", (1.0, 128.0), "eth-siplab/Learning-with-FrameProjections"),
    Default(nn.MorletView, "norm", "l1", "ours: a tight frame; l2 is what PyWavelets and their code have"),
    Default(represent.DynamicSubspaceLearners, "out_dim", 128, "adigasu/Dynamic_subspace_learners"),
    Default(represent.DynamicSubspaceLearners, "patience", 10, "adigasu/Dynamic_subspace_learners"),
    Default(represent.DynamicSubspaceLearners, "threshold", 0.5, "adigasu/Dynamic_subspace_learners"),
    Default(represent.DynamicSubspaceLearners, "recluster", 2, "adigasu/Dynamic_subspace_learners"),
    Default(represent.DynamicSubspaceLearners, "batch_size", 32, "adigasu/Dynamic_subspace_learners"),
    Default(represent.DynamicSubspaceLearners, "learning_rate", 1e-3, "1e-5 fine-tunes a network; here a layer is new"),
    Default(represent.MarginLoss, "beta", 1.2, "adigasu/Dynamic_subspace_learners"),
    Default(represent.MarginLoss, "margin", 0.2, "adigasu/Dynamic_subspace_learners"),
    Default(represent.NearestNegativeSampler, "cutoff", 0.5, "adigasu/Dynamic_subspace_learners"),
    Default(nn.AttentionPool2d, "reduction", (8, 32), "adigasu/Dynamic_subspace_learners"),
]


def name(row: Default) -> str:
    return f"{row.made.__qualname__}-{row.parameter}"


@pytest.mark.parametrize("row", PUBLISHED, ids=name)
def test_defaults_are_the_published_ones(row: Default) -> None:
    default = inspect.signature(row.made).parameters[row.parameter].default
    assert default == row.value, f"{name(row)}: {row.value!r} ({row.where}), got {default!r}"
    assert type(default) is type(row.value)


def test_each_default_has_one_row_and_says_where_it_stands() -> None:
    names = [name(row) for row in PUBLISHED]
    assert len(set(names)) == len(names)
    assert all(row.where for row in PUBLISHED)
