"""Saved objects of every kind, tampered with field by field: they are refused in one line that names the file."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sources import SOURCE, nodes_of, source_files
from subspan.align import LambdaOrthogonalAdapter, ReAlign, SubspaceAligner, UpgradeMap
from subspan.align.modality.modality_map import ProjectedAffine
from subspan.align.upgrade.adapter import EmbeddingAdapter
from subspan.base.saved import fits
from subspan.detect import RandomRotations, SubspaceAD, SubspaceDetector
from subspan.geometry import AffineMap, Subspace
from subspan.models import (
    LowRankLinear,
    SiteMoments,
    SparseDictLinear,
    SubspaceMap,
    collect_moments,
    load_factored,
    save_factored,
)
from subspan.represent import FrameViews, Matryoshka, MatryoshkaCascade, MatryoshkaIndex
from subspan.select.shards import RepresentationShards, Shard
from subspan.statistics import Moments

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(120, 6, generator=GENERATOR) * torch.linspace(3, 1, 6)
Y = X @ torch.randn(6, 5, generator=GENERATOR) + 0.1 * torch.randn(120, 5, generator=GENERATOR)
Load = Callable[[Path], Any]


def grid(images: Tensor) -> Tensor:
    """Features (b, h, w, d) of images (b, 3, s, s), for a detector without a network."""
    return nn.functional.avg_pool2d(images, 4).movedim(1, -1)


def subspace(path: Path) -> Load:
    Subspace.fit(X, rank=3).save(path)
    return Subspace.load


def affine_map(path: Path) -> Load:
    AffineMap(X[:5], X[:5, 0]).save(path)
    return AffineMap.load


def moments(path: Path) -> Load:
    Moments(6).update(X).save(path, rows=120, batch_size=8)
    return Moments.load


def site_moments(path: Path) -> Load:
    model = nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 2))
    collect_moments(model, [X], ["0", "1"]).save(path)
    return SiteMoments.load


def subspaces_by_name(path: Path) -> Load:
    SubspaceMap({"a": Subspace.fit(X, rank=3), "b": Subspace.fit(Y, rank=2)}).save(path)
    return SubspaceMap.load


def factored_layers(path: Path) -> Load:
    sparse = SparseDictLinear(Y[:6, :4], torch.tensor([[0, 3], [1, 2], [3, 0]]), Y[:3, :2], Y[0, :3])
    save_factored(nn.Sequential(sparse, LowRankLinear(X[:5, :2], X[:2, :3], X[0, :5])), path)
    return lambda path: load_factored(nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 5)), path)


def projected_affine(path: Path) -> Load:
    ReAlign().fit(X, X.flip(1)).to_module().save(path)
    return ProjectedAffine.load


def subspace_aligner(path: Path) -> Load:
    SubspaceAligner(3).fit(X, Y).save(path)
    return SubspaceAligner.load


def embedding_adapter(path: Path) -> Load:
    hidden = (X[:4], X[0, :4], X[:5, :4], X[0, :5])
    EmbeddingAdapter(X[:5], X[0, :5], hidden=hidden, normalize_input=True).save(path)
    return EmbeddingAdapter.load


def upgrade_map(path: Path) -> Load:
    UpgradeMap("ridge", folds=3, candidates=("ridge",)).fit(X, Y).save(path)
    return UpgradeMap.load


def lambda_orthogonal_adapter(path: Path) -> Load:
    pytest.importorskip("lightning", reason="the adapter trains with Lightning (extra: train)")
    LambdaOrthogonalAdapter(epochs=1, random_state=0).fit(X, X.flip(1)).save(path)
    return LambdaOrthogonalAdapter.load


def detector(path: Path) -> Load:
    SubspaceDetector(3).fit(X).save(path)
    return SubspaceDetector.load


def image_detector(path: Path) -> Load:
    images = [torch.rand(3, 16, 16, generator=GENERATOR) for _ in range(4)]
    model = SubspaceAD(grid, image_size=16, augment=RandomRotations(1), rank=2).fit(images)
    model.calibrate(images).save(path)
    return lambda path: SubspaceAD.load(path, grid)


def matryoshka(path: Path) -> Load:
    Matryoshka((2, 4), center=True).fit(X.numpy()).save(path)
    return Matryoshka.load


def matryoshka_with_heads(path: Path) -> Load:
    pytest.importorskip("lightning", reason="heads train with Lightning (extra: train)")
    Matryoshka((2, 4), "mlp", hidden=3, epochs=1).fit(X.numpy(), (X[:, 0] > 0).numpy()).save(path)
    return Matryoshka.load


def matryoshka_index(path: Path) -> Load:
    MatryoshkaIndex(dims=(2, 6), shortlist=20).fit(X.numpy()).save(path)
    return MatryoshkaIndex.load


def matryoshka_cascade(path: Path) -> Load:
    logits = torch.randn(3, 60, 4, generator=GENERATOR)
    MatryoshkaCascade((2, 4, 6)).fit(logits, torch.arange(60) % 4).save(path)
    return MatryoshkaCascade.load


def frame_views(path: Path) -> Load:
    pytest.importorskip("lightning", reason="the views train with Lightning (extra: train)")
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))  # the usual one has very many fields
    options: Any = {"dim": 4, "width": 2, "n_scales": 8, "mapper_hidden": 2, "epochs": 1, "encoder": encoder}
    FrameViews(views=("fourier",), **options).fit(X.reshape(20, 36)).save(path)
    return lambda path: FrameViews.load(path, encoder=encoder)


def backward_compatible(path: Path) -> Load:
    from subspan.align import BackwardCompatibleModule, BT2Head, BT2Loss

    def model() -> Any:
        return BackwardCompatibleModule(nn.Linear(6, 8), BT2Head(8, 4, 3, 2, num_classes=4), BT2Loss(X[:4, :3]))

    model().save_weights(path)
    return model().load_weights


def revision_projector(path: Path) -> Load:
    from subspan.align import ReVision

    projector = nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 8))
    model: Any = SimpleNamespace(projector=projector, n_tokens=1)
    ReVision.save_projector(model, path)
    return lambda path: ReVision.load_projector(model, path)


def representation_shard(path: Path) -> Load:
    shards = RepresentationShards(path.parent / "pool", {})
    shards.write(0, Shard(["a", "b"], torch.tensor([[1.0, 2.0], [torch.nan, torch.nan]]), "digest"))
    shards.path(0).rename(path)

    def load(tampered: Path) -> Shard:
        tampered.replace(shards.path(0))
        found = shards.read(0)
        if found is None:  # a damaged shard is made anew
            raise ValueError(f"path: {str(tampered)!r}")
        return found

    return load


MAKERS = (
    subspace, affine_map, moments, site_moments, subspaces_by_name, factored_layers, projected_affine, subspace_aligner,
    embedding_adapter, upgrade_map,
    lambda_orthogonal_adapter, detector, image_detector, matryoshka, matryoshka_with_heads, matryoshka_index,
    matryoshka_cascade, frame_views, backward_compatible, revision_projector, representation_shard,
)  # fmt: skip
# Tables whose number of rows nothing else in the file says.
FREE = {"subspace_aligner": {"held_out"}, "matryoshka_index": {"database"}}
# What an object may do without; every other change is refused.
OPTIONAL = {
    "subspace": {"center", "variances", "residual_variance", "spectrum", "count"},
    "affine_map": {"bias"},
    "subspaces_by_name": {
        f"{name}{part}" for name in "ab" for part in ("", ":center", ":variances", ":residual_variance", ":spectrum")
    },
    "factored_layers": {"0:bias", "1:bias", "0", "1"},
    "moments": {"rows", "batch_size", "source", "seen"},
    "subspace_aligner": {"correlations", "held_out", "subspace"},
    "upgrade_map": {"inverse.bias", "recall", "unpaired", "alpha", "rank", "k", "candidates"},
    "lambda_orthogonal_adapter": {
        "backward.bias", "lam", "lam_rel", "alpha", "batch_size", "determinant", "random_state",
    },
    "detector": {"center", "residual_variance", "contamination", "offset", "variances", "spectrum"},
    "image_detector": {
        "center", "residual_variance", "contamination", "offset", "threshold", "layers", "preprocessing", "augment",
        "mask", "window", "random_state", "variances", "spectrum",
    },
    "matryoshka_index": {"dims"},
}  # fmt: skip


@pytest.fixture(scope="module", params=MAKERS, ids=lambda make: make.__name__)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Load]:
    path = tmp_path_factory.mktemp("saved") / "object.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load = request.param(path)
    return request.param.__name__, path, load


def contents(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["subspan"])  # noqa: SIM118


def write(path: Path, arrays: dict[str, Tensor], facts: str) -> None:
    save_file({name: value.clone() for name, value in arrays.items()}, path, {"subspan": facts})


def tampered_arrays(arrays: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for name, value in arrays.items():
        rest = {other: kept for other, kept in arrays.items() if other != name}
        yield f"drop {name}", rest
        yield f"rename {name}", rest | {f"{name}_": value}
        yield f"retype {name}", rest | {name: value.to(torch.int16)}
        yield f"axis {name}", rest | {name: value.unsqueeze(0)}
        if value.ndim and len(value) > 1:
            yield f"shorten {name}", rest | {name: value[:-1].contiguous()}
            yield f"lengthen {name}", rest | {name: torch.cat([value, value[-1:]])}
        if value.is_floating_point():
            for bad in (torch.nan, torch.inf):
                broken = value.clone()
                broken.view(-1)[0] = bad
                yield f"{bad} {name}", rest | {name: broken}
    yield "add fit", arrays | {"fit": torch.ones(3)}
    yield "none", {"nothing": torch.ones(1)}


def tampered_facts(facts: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, value in facts.items():
        rest = {other: kept for other, kept in facts.items() if other != name}
        yield f"drop {name}", rest
        yield f"rename {name}", rest | {f"{name}_": value}
        yield f"object {name}", rest | {name: {"a": {}}}
        yield f"list {name}", rest | {name: [{}]}
        if isinstance(value, int | float):
            yield f"nan {name}", rest | {name: float("nan")}
            yield f"text {name}", rest | {name: "many"}
        if isinstance(value, dict):
            yield from ((what, rest | {name: inner}) for what, inner in tampered_facts(value))
    yield "add fit", facts | {"fit": "a method is replaced"}


def test_an_honest_file_is_read(saved: tuple[str, Path, Load]) -> None:
    _, path, load = saved
    honest = path.with_name("honest.safetensors")
    honest.write_bytes(path.read_bytes())
    load(honest)


def test_every_tampered_field_is_refused(saved: tuple[str, Path, Load]) -> None:
    name, path, load = saved
    arrays, facts = contents(path)
    changed = [(what, new, facts) for what, new in tampered_arrays(arrays)]
    changed += [(what, arrays, new) for what, new in tampered_facts(facts)]
    assert len(changed) > 8
    passed, unnamed = set(), []
    tampered = path.with_name("tampered.safetensors")
    for what, new_arrays, new_facts in changed:
        write(tampered, new_arrays, json.dumps(new_facts))
        try:
            load(tampered)
        except ValueError as error:
            unnamed += [] if str(tampered) in str(error) and "\n" not in str(error) else [(what, str(error))]
        else:
            passed.add(what)
    assert unnamed == []
    may_pass = {f"drop {field}" for field in OPTIONAL.get(name, set())}
    assert passed <= may_pass | {
        f"{what} {field}" for what in ("shorten", "lengthen") for field in FREE.get(name, set())
    }
    for other in ("{}", "[]", "7", "{", '{"kind": "pickle"}'):
        write(tampered, arrays, other)
        with pytest.raises(ValueError, match="tampered"):
            load(tampered)


def test_only_one_place_reads_saved_objects() -> None:
    readers = {
        path.relative_to(SOURCE).as_posix()
        for path, source in source_files().items()
        for node in nodes_of(source)
        if isinstance(node, ast.ImportFrom)
        and str(node.module).startswith("safetensors")
        and {"safe_open", "load_file"} & {alias.name for alias in node.names}
    }
    # Tables that people bring, and published weights, are no saved objects.
    saved = {name for name in readers if not name.startswith(("datasets/", "models/"))}
    assert saved - {"base/tables.py", "base/array_files.py"} == {"base/saved.py"}


def test_kinds_of_facts() -> None:
    assert fits(1, float)
    assert not fits(True, int)
    assert not fits(float("inf"), float)
    assert fits([[1, 2]], list[tuple[int, int]])
    assert not fits([[1, 2, 3]], list[tuple[int, int]])
    assert fits({"count": 3, "degrees": [0, 9.5], "padding": "zeros", "interpolation": "nearest"}, RandomRotations)
    assert not fits({"count": 3, "degrees": [0, 9.5], "padding": "holes", "interpolation": "nearest"}, RandomRotations)
    assert not fits({"count": 3}, RandomRotations)
