"""The defaults of every system are those it was published with, or differ for a reason that is said here.

One row a default: the callable, its parameter, the value, and where the value stands. Rows are sorted by room.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from subspan import align, nn


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
