"""Finding, running and recording reproductions."""

from __future__ import annotations

import importlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from .protocol import Outcome, Progress, System, tally

SYSTEMS = (
    System(
        "subspacead",
        "Few-shot anomaly detection by the residual to a subspace of patch features",
        "Lendering, Akdag & Bondarev: SubspaceAD (CVPR 2026, arXiv 2602.23013)",
        2026,
        "detect",
        "SubspaceAD",
    ),
    System(
        "scalselect",
        "Training-free data selection by leverage on the dominant subspace",
        "Wu et al.: ScalSelect (arXiv 2602.11636)",
        2026,
        "select",
        "ScalSelect",
    ),
    System(
        "eigenshield",
        "Filtering embeddings through robust spiked eigenvectors",
        "Darabi et al.: EigenShield (arXiv 2502.14976)",
        2025,
        "edit",
        "EigenShield",
    ),
    System(
        "realign",
        "Closed-form alignment of one modality's embeddings to another",
        "Yu et al.: Modality Gap-Driven Subspace Alignment (arXiv 2602.07026)",
        2026,
        "align",
        "ReAlign",
    ),
    System(
        "bt2",
        "Backward-compatible training by two basis changes and a few extra dimensions",
        "Zhou et al.: BT² (ICCV 2023, arXiv 2211.03989)",
        2023,
        "align",
        "BasisTransform",
    ),
    System(
        "lambda-orthogonality",
        "Maps between frozen embedding models, as near to a rotation as one asks",
        "Ricci et al.: λ-Orthogonality Regularization (NeurIPS 2025, arXiv 2509.16664)",
        2025,
        "align",
        "LambdaOrthogonalAdapter",
    ),
    System(
        "sts",
        "Test-time steering of a zero-shot classifier in the spectrum of its prototypes",
        "Dafnis & Metaxas: Spectrum-Aware Test-Time Steering (NeurIPS 2025, arXiv 2511.09809)",
        2025,
        "edit",
        "SpectralSteering",
    ),
    System(
        "embedding-upgrade",
        "New queries on an old index through the best of the closed-form maps",
        "Schönemann: A generalized solution of the orthogonal Procrustes problem (Psychometrika 31, 1966)",
        1966,
        "align",
        "UpgradeMap",
    ),
    System(
        "plato-3d-text",
        "Aligning two unimodal encoders inside the subspaces that they share",
        "Hadgi et al.: Escaping Plato's Cave (CVPR 2025, arXiv 2503.05283)",
        2025,
        "align",
        "SubspaceAligner",
    ),
    System(
        "irepa",
        "Representation alignment that transfers an encoder's spatial structure",
        "Singh et al.: What Matters for Representation Alignment (ICLR 2026, arXiv 2512.10794)",
        2026,
        "align",
        "RepresentationAlignment",
    ),
    System(
        "matryoshka",
        "One embedding whose prefixes are embeddings, for adaptive classification and search",
        "Kusupati et al.: Matryoshka Representation Learning (NeurIPS 2022, arXiv 2205.13147)",
        2022,
        "represent",
        "Matryoshka",
    ),
    System(
        "stationary-simplex",
        "Embeddings that stay comparable through fine-tuning and replacement, on a fixed simplex",
        "Biondi et al.: Stationary Representations (CVPR 2024, arXiv 2405.02581)",
        2024,
        "align",
        "SimplexClassifier",
    ),
    System(
        "s2cag",
        "Clustering the nodes of a graph by attributes and links, in linear time",
        "Lin et al.: Spectral Subspace Clustering for Attributed Graphs (KDD 2025, arXiv 2411.11074)",
        2025,
        "cluster",
        "S2CAG",
    ),
    System(
        "subspace-clustering",
        "Clustering rows by the subspaces that they lie in: self-expression and K-subspaces",
        "You et al.: Oracle Based Active Set Algorithm for Scalable Elastic Net Subspace Clustering (CVPR 2016)",
        2016,
        "cluster",
        "ElasticNetSubspaceClustering",
    ),
    System(
        "gcr",
        "A classifier whose classes are subspaces, learned by steps along geodesics",
        "Wang, Li & Zhang: Grassmann Class Representation (ICCV 2023, arXiv 2308.01547)",
        2023,
        "nn",
        "GrassmannHead",
    ),
    System(
        "simvq",
        "Vector quantisation that uses all its codes: one learnt map of a frozen codebook",
        "Zhu et al.: Addressing Representation Collapse with One Linear Layer (arXiv 2411.02038)",
        2024,
        "nn",
        "SimVQ",
    ),
    System(
        "butterfly",
        "Linear maps as products of sparse butterfly factors: learnt, built, or found in a matrix by algebra",
        "Dao et al.: Learning Fast Algorithms for Linear Transforms (ICML 2019, arXiv 1903.05895)",
        2019,
        "nn",
        "Butterfly",
    ),
    System(
        "ulsam",
        "One spatial attention map for each group of channels, in the place of whole blocks",
        "Saini et al.: ULSAM (WACV 2020, arXiv 2006.15102)",
        2020,
        "nn",
        "SubspaceAttention",
    ),
    System(
        "causal-grassmann",
        "Sequences mixed by the planes of token pairs in place of attention",
        "Zhang Chong: Attention Is Not What You Need (arXiv 2512.19428)",
        2025,
        "nn",
        "GrassmannMixing",
    ),
    System(
        "householder-projector",
        "Generators edited along few orthogonal directions: low-rank projections with equal gains",
        "Song et al.: Householder Projector for Unsupervised Latent Semantics Discovery (ICCV 2023, arXiv 2307.08012)",
        2023,
        "nn",
        "HouseholderProjector",
    ),
    System(
        "crate",
        "Transformers whose layers compress tokens onto learnt subspaces and make them sparse",
        "Yu et al.: White-Box Transformers via Sparse Rate Reduction (arXiv 2311.13110)",
        2023,
        "nn",
        "CRATE",
    ),
    System(
        "diffusion-subspace-clustering",
        "Low-rank mixtures as diffusion models: denoising, clustering and editing by subspaces",
        "Wang et al.: Diffusion Models Learn Low-Dimensional Distributions via Subspace Clustering (arXiv 2409.02426)",
        2024,
        "cluster",
        "LowRankMixtureDiffusion",
    ),
    System(
        "deep-subspace-clustering",
        "Clustering faces and objects by one self-expression of all layers, without labels or tuning",
        "Sindičić & Kopriva: Label-independent hyperparameter-free deep subspace clustering (arXiv 2504.18179)",
        2025,
        "cluster",
        "DeepSubspaceClustering",
    ),
    System(
        "mlc",
        "A union of orthogonal subspaces and its clusters learnt at once, without labels",
        "Ding et al.: Unsupervised Manifold Linearizing and Clustering (ICCV 2023, arXiv 2301.01805)",
        2023,
        "cluster",
        "ManifoldLinearizingClustering",
    ),
    System(
        "convergent-learning",
        "Units and subspaces that independently trained networks have in common",
        "Li et al.: Convergent Learning (ICLR 2016, arXiv 1511.07543)",
        2016,
        "probe",
        "ConvergentLearning",
    ),
)
"""Every system with a protocol."""

_PACKAGES = ("subspan", "torch", "numpy", "scipy", "scikit-learn", "transformers")


def find(names: Iterable[str]) -> list[System]:
    """Systems by name; "all" stands for every one. Raises ValueError for an unknown name."""
    known = {system.name: system for system in SYSTEMS}
    wanted: list[System] = []
    for name in names:
        if name != "all" and name not in known:
            near = get_close_matches(name, known, n=3)
            meant = f"did you mean {' or '.join(near)}? " if near else ""
            raise ValueError(f"name: unknown system {name!r}; {meant}`subspan list` has all {len(known)}")
        wanted += [s for s in (SYSTEMS if name == "all" else [known[name]]) if s not in wanted]
    if not wanted:
        raise ValueError("name: give one or more systems, or all; `subspan list` has them")
    return wanted


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on, and the machine in words."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found["python"] = platform.python_version()
    found["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
    return found


def run(
    system: System, *, quick: bool = False, seed: int = 0, progress: Progress | None = None, results: Path | None = None
) -> dict[str, Any]:
    """Run one protocol and return its record; with `results` it is written there as NAME.json (quick: NAME.quick.json).

    The record holds system, claim, data, model, metric, ours, baselines, bar, holds, seconds and versions, and beside
    them the checks, tables, notes, seed and whether it was the quick form.
    """
    protocol: Callable[..., Outcome] = importlib.import_module(f"subspan.reproduce.{system.module}").protocol
    started = time.perf_counter()
    outcome = protocol(quick=quick, seed=seed, progress=progress or _silent)
    record = {
        "system": system.name,
        **outcome.facts(),
        "seconds": round(time.perf_counter() - started, 1),
        "versions": versions(),
        "quick": quick,
        "seed": seed,
    }
    if results is not None:
        # Here and not above: the list of systems needs no torch.
        from subspan.base.files import atomic_write

        results.mkdir(parents=True, exist_ok=True)
        with atomic_write(results / f"{system.name}{'.quick' if quick else ''}.json") as path:
            path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return record


def _silent(message: str, fraction: float) -> None:
    """Swallow progress."""


def recorded(name: str) -> dict[str, Any] | None:
    """The record of the full run that came with the package, or None where there is none."""
    file = resources.files("subspan.reproduce").joinpath("results", f"{name}.json")
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def listing() -> list[dict[str, Any]]:
    """One entry a system: name, title, paper, year, room, public name, and how its recorded run turned out."""
    entries = []
    for system in SYSTEMS:
        record = recorded(system.name)
        claim, held, checks = tally(record) if record else (None, 0, 0)
        entries.append(
            {
                "name": system.name,
                "title": system.title,
                "paper": system.paper,
                "year": system.year,
                "room": system.room,
                "public": f"subspan.{system.room}.{system.public}",
                "main_claim": {True: "yes", False: "no", None: "not recorded"}[claim],
                "checks": f"{held} of {checks}",
            }
        )
    return entries
