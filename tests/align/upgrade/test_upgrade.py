from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from subspan.align import EmbeddingAdapter, SpaceMap, UpgradeMap
from subspan.align.upgrade import unpaired
from subspan.align.upgrade.confidence import Evidence, RetrievalConfidence
from subspan.align.upgrade.held_out import (
    CLOSED_FORMS,
    CrossValidation,
    FoldedPairs,
    HeldOut,
    Retrieval,
    closed_forms,
    complexity,
)
from subspan.datasets import BUNDLED, is_installed, load
from subspan.geometry import AffineMap, Subspace
from subspan.geometry.closed_forms import reduced_rank, ridge
from subspan.solvers import transport_plan
from subspan.statistics import JointMoments

LINEAR = ("none", "translation", "procrustes", "scaled", "low-rank", "cca", "ridge")


def pairs(n: int = 600, d: int = 12, d_y: int | None = None, *, noise: float = 0.1, seed: int = 0):
    """Rows with a decaying spectrum, and a rotation of them (its first d_y coordinates) with noise."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator)).Q[: d_y or d]
    x = torch.randn(n, d, dtype=torch.float64, generator=generator) * torch.arange(1, d + 1) ** -0.5 + 0.3
    y = x @ rotation.mT - 0.2
    return x, y + noise * torch.randn(y.shape, dtype=torch.float64, generator=generator), rotation


def quick(method: str = "auto", **options) -> UpgradeMap:
    return UpgradeMap(method, **({"candidates": LINEAR} if method == "auto" else {}) | options)


# ---------------------------------------------------------------- closed forms


def test_reduced_rank_regression_is_the_best_of_its_rank():
    x, y, _ = pairs(noise=1.0)
    moments = JointMoments(12, 12).update(x, y)
    full = moments.ridge(0.0)
    matrix = reduced_rank(moments.cov_xx, moments.cov_xy, 3, alpha=0.0).matrix
    assert int(torch.linalg.matrix_rank(matrix)) == 3
    centred = x - x.mean(0)
    fitted = centred @ full.matrix.mT
    u, s, vh = torch.linalg.svd(fitted, full_matrices=False)
    torch.testing.assert_close(centred @ matrix.mT, (u[:, :3] * s[:3]) @ vh[:3], atol=1e-9, rtol=0)
    torch.testing.assert_close(
        reduced_rank(moments.cov_xx, moments.cov_xy, 12, alpha=0.1).matrix,
        ridge(moments.cov_xx, moments.cov_xy, alpha=0.1).matrix,
        atol=1e-10,
        rtol=0,
    )


def test_mapped_and_swapped_moments_are_those_of_the_rows():
    x, y, rotation = pairs(d_y=5)
    a, b = rotation.mT[:, :3], torch.eye(5, dtype=torch.float64)[:, :2]
    moments = JointMoments(12, 5).update(x, y)
    for ours, rows in ((moments.map(AffineMap(a.mT), AffineMap(b.mT)), (x @ a, y @ b)), (moments.swapped(), (y, x))):
        direct = JointMoments(rows[0].shape[1], rows[1].shape[1]).update(*rows)
        torch.testing.assert_close(ours.joint.mean, direct.joint.mean, atol=1e-12, rtol=0)
        torch.testing.assert_close(ours.joint.covariance(), direct.joint.covariance(), atol=1e-12, rtol=0)
        assert (ours.d_x, ours.d_y, ours.count) == (direct.d_x, direct.d_y, direct.count)


@pytest.mark.parametrize("method", ["translation", "procrustes", "scaled", "ridge"])
def test_closed_forms_are_those_of_space_map(method):
    x, y, _ = pairs()
    space = SpaceMap(method, alpha=0.01).fit(x, y)
    ours = quick(method, alpha=0.01).fit(x, y)
    torch.testing.assert_close(ours.map_.matrix, space.map_.matrix, atol=1e-10, rtol=0)
    torch.testing.assert_close(ours.transform(x), space.transform(x), atol=1e-10, rtol=0)


def test_low_rank_adds_a_residual_of_that_rank_and_helps_where_there_is_one():
    x, y, rotation = pairs(n=2000, noise=0.05)
    generator = torch.Generator().manual_seed(5)
    bend = (
        torch.randn(12, 2, dtype=torch.float64, generator=generator) @ torch.randn(2, 12, generator=generator).double()
    )
    y = y + x @ bend.mT
    moments = JointMoments(12, 12).update(x, y)
    rotation = moments.procrustes().matrix
    affine = next(iter(closed_forms("low-rank", moments, [{"rank": 4, "alpha": 0.0}])))
    assert int(torch.linalg.matrix_rank(affine.matrix - rotation, atol=1e-9)) == 4

    def error(a: AffineMap) -> float:
        return float((a.map(x) - y).square().sum())

    assert error(affine) < 0.2 * error(moments.procrustes())


def test_few_pairs_leave_the_rest_of_the_space_alone():
    x, y, _ = pairs(n=6, d=12)
    moments = JointMoments(12, 12).update(x, y)
    matrix = next(iter(closed_forms("procrustes", moments, [{}]))).matrix
    values = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(values, torch.tensor([1.0] * 5 + [0.0] * 7, dtype=torch.float64), atol=1e-10, rtol=0)


# ---------------------------------------------------------------- honest selection


def test_folds_partition_the_rows_and_their_moments_add_up():
    x, y, _ = pairs(n=103)
    folded = FoldedPairs(12, 12, folds=5, keep=1000, generator=torch.Generator().manual_seed(0))
    for a, b in zip(x.split(40), y.split(40)):
        folded.update(a, b)
    assert [m.count for m in folded.folds] == [21, 21, 21, 20, 20]
    fold, kept_x, _ = folded.sample
    whole = JointMoments(12, 12).update(x, y)
    torch.testing.assert_close(folded.without().joint.covariance(), whole.joint.covariance(), atol=1e-12, rtol=0)
    left = JointMoments(12, 12).update(kept_x[fold != 2].double(), folded.sample[2][fold != 2].double())
    torch.testing.assert_close(folded.without(2).joint.mean, left.joint.mean, atol=1e-6, rtol=0)
    few = FoldedPairs(12, 12, folds=3, keep=30, generator=torch.Generator().manual_seed(0))
    for a, b in zip(x.split(20), y.split(20)):
        few.update(a, b)
    assert len(few.sample[0]) == 30


def test_maps_chosen_on_leading_axes_are_those_of_the_whole_spaces():
    """Wide spaces are cut while choosing; what queries are mapped by is one affine map, with the mean off the axes."""
    d = 400
    x, y, _ = pairs(n=500, d=d)
    y = y + torch.linspace(-3, 3, d, dtype=torch.float64)
    folded = FoldedPairs(d, d, folds=4, keep=500, generator=torch.Generator().manual_seed(0))
    folded.update(x, y)
    options = {"k": 5, "metric": "euclidean", "target": "neighbours", "max_queries": 40, "normalize": False}
    chosen = CrossValidation(folded, folded.without(), **options)
    parameters = [{"alpha": 0.1}]
    factored = next(iter(chosen.maps("ridge", (1,), parameters)))
    whole = chosen.full_map("ridge", 1, parameters[0])
    torch.testing.assert_close(factored(x), whole.map(x), atol=1e-10, rtol=0)
    # The rows that fitted it are mapped onto their mean.
    fold, kept_x, kept_y = folded.sample
    mapped = whole.map(kept_x[fold != 1].double())
    torch.testing.assert_close(mapped.mean(0), kept_y[fold != 1].double().mean(0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("metric", ["cosine", "euclidean", "inner"])
def test_recall_equals_a_literal_count(metric):
    _, y, _ = pairs(n=60)
    mapped = y[:20] + 0.5 * torch.randn(20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    own = torch.arange(20)
    retrieval = Retrieval(y, 5, metric, "neighbours")
    ours = retrieval.recall(mapped, own, retrieval.neighbours(y[:20], own))
    pair = Retrieval(y, 5, metric, "pair").recall(mapped, own, None)

    def score(a: torch.Tensor, b: torch.Tensor) -> float:
        if metric == "cosine":
            return float(a @ b / (a.norm() * b.norm()))
        return float(a @ b) if metric == "inner" else -float((a - b).square().sum())

    for i in range(20):
        others = [j for j in range(60) if j != i]
        truth = sorted(others, key=lambda j: -score(y[i], y[j]))[:5]
        found = sorted(others, key=lambda j: -score(mapped[i], y[j]))[:5]
        assert float(ours[i]) == pytest.approx(len({*truth} & {*found}) / 5)
        everything = sorted(range(60), key=lambda j: -score(mapped[i], y[j]))[:5]
        assert float(pair[i]) == float(i in everything)


def test_unrelated_spaces_score_at_chance_in_every_candidate():
    """What a selection that looks at its own test rows would not do."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(400, 30, dtype=torch.float64, generator=generator) for _ in range(2))
    model = quick().fit(x, y)
    for row in model.scores_:
        assert row["recall"] < 10 / 399 + 0.012, row
    assert model.method_ == "none"


def test_auto_takes_the_simplest_within_one_standard_error():
    x, y, _ = pairs(n=800, noise=0.05)
    model = quick().fit(x, y)
    assert model.method_ == "procrustes"
    table = {row["method"]: row for row in model.scores_}
    best = max(table.values(), key=lambda row: row["recall"])
    assert table["procrustes"]["recall"] >= best["recall"] - best["standard_error"]
    assert table["none"]["recall"] < 0.5 < table["procrustes"]["recall"]
    assert set(table) == set(LINEAR)
    assert all(row["low"] <= row["recall"] <= row["high"] and row["queries"] == 800 for row in table.values())
    noise = 0.05 * torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    assert quick().fit(x, x + noise).method_ == "none"


def test_auto_takes_ridge_where_no_rotation_is_near():
    x, y, _ = pairs(n=1500, noise=0.02)
    squeeze = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    model = quick().fit(x, y @ squeeze)
    table = {row["method"]: row["recall"] for row in model.scores_}
    assert table[model.method_] >= max(table.values()) - 0.01
    assert table["ridge"] > table["procrustes"] + 0.1
    assert model.method_ in ("ridge", "cca", "low-rank")


@pytest.mark.parametrize("d", [12, 400])
def test_auto_takes_the_shift_where_only_the_mean_has_moved(d):
    x, _, _ = pairs(n=600, d=d)
    shift = 3 * torch.randn(d, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    # In wide spaces maps are chosen on leading axes, which are not the same on both sides.
    candidates = ("none", "translation", "procrustes") if d > 384 else LINEAR
    model = quick(candidates=candidates).fit(x, x + shift)
    assert model.method_ == "translation"
    table = {row["method"]: row["recall"] for row in model.scores_}
    assert table["none"] < 0.5 < 0.95 < table["translation"]
    torch.testing.assert_close(model.transform(x), x + shift, atol=1e-9, rtol=0)
    torch.testing.assert_close(model.inverse_transform(x + shift), x, atol=1e-9, rtol=0)
    narrow = quick("translation").fit(x, (x + shift)[:, :9])
    torch.testing.assert_close(narrow.transform(x), (x + shift)[:, :9], atol=1e-9, rtol=0)


def small_validation() -> CrossValidation:
    x, y, _ = pairs(n=100, d=4)
    folded = FoldedPairs(4, 4, folds=5, keep=100, generator=torch.Generator().manual_seed(0)).update(x, y)
    options: dict[str, Any] = {
        "k": 3,
        "metric": "euclidean",
        "target": "neighbours",
        "max_queries": 100,
        "normalize": False,
    }
    return CrossValidation(folded, folded.without(), **options)


def planted(*means: float, n: int = 400) -> dict[str, HeldOut]:
    """Results of "none", "procrustes" and "ridge" with these means; the last one's standard error is 0.02."""
    spread = 0.4 * torch.tensor([-1.0, 1.0]).repeat(n // 2).double() * ((n - 1) / n) ** 0.5
    parameters: tuple[dict[str, Any], ...] = ({}, {}, {"alpha": 0.1})
    return {
        name: HeldOut(name, options, spread + mean, torch.zeros(n, 4))
        for name, options, mean in zip(("none", "procrustes", "ridge"), parameters, means)
    }


@pytest.mark.parametrize(
    ("means", "chosen"),
    [
        ((0.1, 0.581, 0.6), "procrustes"),  # within one standard error of the best
        ((0.1, 0.579, 0.6), "ridge"),
        ((0.581, 0.59, 0.6), "none"),
        ((0.1, 0.6, 0.5), "procrustes"),
        ((0.6, 0.61, 0.3), "none"),
    ],
)
def test_the_rule_of_one_standard_error(means, chosen, monkeypatch):
    monkeypatch.setattr(RetrievalConfidence, "calibrated", lambda *_: None)
    validation = small_validation()
    model = quick()
    model.moments_ = validation.pairs.without()
    results = planted(*means)
    assert results["ridge"].standard_error == pytest.approx(0.02)
    model._choose_from(results, {}, validation)
    assert model.method_ == chosen
    assert model.recall_ == pytest.approx(results[chosen].mean)
    expected = next(iter(closed_forms(chosen, model.moments_, [results[chosen].parameters])))
    torch.testing.assert_close(model.map_.matrix, expected.matrix)


def test_hyper_parameters_of_a_fold_are_chosen_on_another(monkeypatch):
    """Planted scores by parameter and fold: what a fold itself likes best must not be what it is scored with."""
    validation = small_validation()
    scores = torch.tensor([[0.9, 0.1, 0.9, 0.2, 0.3], [0.4, 0.8, 0.4, 0.8, 0.2]]).double()
    seen = []

    def maps(method, left_out, parameters):
        for number in range(len(parameters)):
            seen.append(left_out)
            yield lambda rows, number=number: torch.full((len(rows), 4), float(number))

    def recall(mapped, place):
        fold = int(validation.query_fold[place[0]])
        assert fold in seen[-1]
        return torch.full((len(place),), float(scores[int(mapped[0, 0]), fold])).double()

    monkeypatch.setattr(validation, "maps", maps)
    monkeypatch.setattr(validation, "recall", recall)
    found = validation.run("ridge", [{"alpha": 1.0}, {"alpha": 2.0}])
    # Folds 0 and 1 choose for each other, 2 and 3 too, and fold 0 for the last.
    by_fold = [float(found.recall[validation.query_fold == fold].mean()) for fold in range(5)]
    assert by_fold == pytest.approx([0.4, 0.1, 0.4, 0.2, 0.3])
    assert found.parameters == {"alpha": 2.0}
    assert set(seen) == {(0, 1), (2, 3), (0, 4), (0,), (1,), (2,), (3,), (4,)}


def test_simple_means_few_parameters():
    weights = [complexity(name, {}, 8, 8) for name in ("none", "translation", "procrustes", "scaled")]
    weights += [complexity("ridge", {"alpha": 1}, 8, 8), complexity("mlp", {"base_complexity": 72, "hidden": 4}, 8, 8)]
    assert weights == [0, 8, 36, 37, 72, 72 + 4 * 17 + 8]
    assert complexity("cca", {"k": 8}, 8, 8) == complexity("ridge", {}, 8, 8)


# ---------------------------------------------------------------- use


@pytest.mark.parametrize(("method", "d_y"), zip(LINEAR, (7, 16, 7, 16, 7, 16, 12)))
def test_files_streams_and_forms_agree(method, d_y, tmp_path):
    x, y, _ = pairs(d=16)
    x, y = x[:, :12].contiguous(), y[:, :d_y].contiguous()
    model = quick(method, normalize=True, random_state=3).fit(x, y)
    assert model.transform(x).shape == y.shape
    assert model.inverse_transform(y).shape == x.shape
    model.save(tmp_path / "map.safetensors")
    loaded = UpgradeMap.load(tmp_path / "map.safetensors")
    for call in ("transform", "confidence"):
        torch.testing.assert_close(getattr(loaded, call)(x), getattr(model, call)(x), atol=1e-12, rtol=0)
    torch.testing.assert_close(loaded.inverse_transform(y), model.inverse_transform(y), atol=1e-12, rtol=0)
    assert loaded.scores_ == model.scores_
    assert loaded.get_params() == model.get_params()
    np.save(tmp_path / "x.npy", x.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r", allow_pickle=False)
    parameters = {name: value for name, value in model.parameters_.items() if name in ("alpha", "rank", "k")}
    streamed = quick(method, normalize=True, **parameters).fit([*x.split(150)], iter(y.split(150)))
    torch.testing.assert_close(streamed.map_.matrix, model.map_.matrix, atol=1e-9, rtol=0)
    from_file = quick(method, normalize=True, **parameters).fit(mapped, y.numpy())
    torch.testing.assert_close(from_file.map_.matrix, model.map_.matrix, atol=1e-9, rtol=0)


def test_the_inverse_undoes_a_rotation():
    x, y, rotation = pairs(noise=0.0)
    model = quick("procrustes").fit(x.numpy(), y.numpy())
    np.testing.assert_allclose(model.inverse_transform(model.transform(x.numpy())), x.numpy(), atol=1e-10)
    torch.testing.assert_close(model.map_.matrix, rotation, atol=1e-9, rtol=0)
    assert model.transform(x.float()).dtype == torch.float32


def test_backward_regression_beats_the_inverse_of_the_forward_one():
    x, y, _ = pairs(n=400, noise=0.6)
    model = quick("ridge", alpha=1e-3).fit(x[:200], y[:200])
    ours = (model.inverse_transform(y[200:]) - x[200:]).square().sum()
    assert float(ours) < float((model.map_.inverse().map(y[200:]) - x[200:]).square().sum())


def adapters():
    x, y, _ = pairs(d=9, d_y=5)
    linear = quick("ridge").fit(x, y).map_
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 9), (6,), (5, 6), (5,))
    hidden = tuple(torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes)
    for normal in (False, True):
        for layers in (None, hidden):
            yield (
                x.float(),
                EmbeddingAdapter(
                    linear.matrix, linear.bias, hidden=layers, normalize_input=normal, normalize_output=normal
                ),
            )


def test_onnx_runs_the_same_map(tmp_path):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    for number, (x, adapter) in enumerate(adapters()):
        path = tmp_path / f"{number}.onnx"
        adapter.to_onnx(path)
        rows = torch.cat([x, torch.zeros(1, 9)])
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        found = session.run(None, {"embeddings": rows.numpy()})[0]
        np.testing.assert_allclose(found, adapter(rows).numpy(), atol=2e-5)
        assert found.shape == (len(rows), 5)


def test_faiss_runs_the_same_map():
    faiss = pytest.importorskip("faiss")
    for x, adapter in adapters():
        if adapter.hidden is not None:
            with pytest.raises(ValueError, match="no chain of FAISS"):
                adapter.to_faiss()
            continue
        rows = x.numpy()
        for transform in adapter.to_faiss():
            rows = transform.apply(rows)
        np.testing.assert_allclose(rows, adapter(x).numpy(), atol=1e-5)
        assert isinstance(transform, faiss.VectorTransform)


def test_adapter_files(tmp_path):
    for x, adapter in adapters():
        adapter.save(tmp_path / "a.safetensors")
        torch.testing.assert_close(EmbeddingAdapter.load(tmp_path / "a.safetensors")(x), adapter(x))


def test_low_confidence_means_low_recall():
    x, y, _ = pairs(n=1500, d=24, noise=0.05)
    generator = torch.Generator().manual_seed(7)
    # Every row gets its own amount of noise, which leaves the anchors' principal subspace.
    x, y = x * (torch.arange(24) < 8), y
    y = x @ torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64, generator=generator)).Q
    amount = torch.rand(len(x), 1, dtype=torch.float64, generator=generator) ** 2
    x = x + amount * torch.randn(x.shape, dtype=torch.float64, generator=generator)
    model = quick("procrustes").fit(x[:1000], y[:1000])
    retrieval = Retrieval(y.float(), 10, "cosine", "neighbours")
    own = torch.arange(1000, 1500)
    recall = retrieval.recall(model.transform(x[1000:]).float(), own, retrieval.neighbours(y[1000:].float(), own))
    confidence = model.confidence(x[1000:])
    assert roc_auc_score((recall > recall.median()).numpy(), confidence.numpy()) > 0.8
    assert float(confidence.mean()) == pytest.approx(float(recall.mean()), abs=0.05)
    assert bool(((confidence >= 0) & (confidence <= 1)).all())
    # By the noise that was planted, recall falls and confidence with it.
    parts = amount[1000:, 0].argsort().tensor_split(4)
    expected, said = ([float(values[part].mean()) for part in parts] for values in (recall, confidence))
    assert expected == sorted(expected, reverse=True)
    assert said == sorted(said, reverse=True)
    assert expected[0] - expected[-1] > 0.3
    assert said == pytest.approx(expected, abs=0.1)
    # What lies beyond the limits is what is hardly ever seen.
    features = model._confidence.evidence(x[1000:], model.transform(x[1000:]))[:, :2]
    beyond = (features > torch.from_numpy(model._confidence.limits)).double().mean(0)
    assert bool(((beyond > 0) & (beyond < 0.04)).all())
    strange = 5 * torch.randn(100, 24, dtype=torch.float64, generator=generator)
    assert float(model.confidence(strange).mean()) < 0.2 * float(confidence.mean())


def test_confidence_falls_with_the_excess_over_what_was_seen(monkeypatch):
    """Beyond the limits nothing is known, whatever the rest of the evidence says."""
    shares = torch.tensor([-1.0, 0.0, 0.5, 2.0, 0.0, 1.0]).double()
    insides = torch.tensor([-1.0, 0.0, -1.0, 0.0, 3.0, 1.0]).double()
    features = torch.zeros(6, 9, dtype=torch.float64)
    features[:, 0], features[:, 1], features[:, 4] = shares, insides, 2.0
    ones = np.ones(9)
    weights = np.array([0, 0, 0, 0, 1.0, 0, 0, 0, 0])
    scores, values = np.array([-1.0, 1.0, 3.0]), np.array([0.1, 0.5, 0.9])
    monkeypatch.setattr(Evidence, "__call__", lambda *_: features)
    space = Subspace(torch.eye(2).double()[:, :1], center=torch.zeros(2).double(), variances=torch.ones(1).double())
    evidence = Evidence(space, space, torch.zeros(3, 2), torch.zeros(3, 2))
    confidence = RetrievalConfidence(evidence, 0 * ones, ones, weights, scores, values, np.zeros(2))
    found = confidence(torch.zeros(6, 2), torch.zeros(6, 2))
    expected = 0.7 * torch.tensor([0.0, 0.0, -0.5, -2.0, -3.0, -2.0]).double().exp()
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    features[:, 4] = 0.0
    assert float(confidence(torch.zeros(6, 2), torch.zeros(6, 2))[0]) == pytest.approx(0.3)


def test_confidence_knows_crowded_neighbourhoods():
    """Where a true neighbour is hardly nearer than the others, a small error of the map loses it."""
    generator = torch.Generator().manual_seed(0)
    # Groups of 11 lie closely together, half of the rows alone; nothing lies outside the anchors' subspace.
    centers = torch.randn(100, 12, dtype=torch.float64, generator=generator).repeat_interleave(11, 0)
    groups = centers + 0.1 * torch.randn(centers.shape, dtype=torch.float64, generator=generator)
    x = torch.cat([groups, torch.randn(1100, 12, dtype=torch.float64, generator=generator)])
    order = torch.randperm(len(x), generator=generator)
    x, grouped = x[order], order < 1100
    y = x @ torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=generator)).Q
    y = y + 0.2 * torch.randn(y.shape, dtype=torch.float64, generator=generator)
    model = quick("procrustes").fit(x[:1600], y[:1600])
    confidence = model.confidence(x[1600:])
    assert roc_auc_score(grouped[1600:].numpy(), confidence.numpy()) > 0.9
    retrieval, own = Retrieval(y.float(), 10, "cosine", "neighbours"), torch.arange(1600, 2200)
    recall = retrieval.recall(model.transform(x[1600:]).float(), own, retrieval.neighbours(y[1600:].float(), own))
    assert float(confidence.mean()) == pytest.approx(float(recall.mean()), abs=0.06)
    # The evidence has a bounded size, and is the same for queries one by one.
    assert len(model._confidence.evidence.anchors_x) == len(model._confidence.evidence.anchors_y) <= 2000
    torch.testing.assert_close(model.confidence(x[1600:1601]), confidence[:1], atol=1e-12, rtol=0)


def test_evidence_equals_a_literal_computation():
    x, y, _ = pairs(n=300, d_y=9)
    evidence = quick("ridge").fit(x[:250], y[:250])._confidence.evidence
    assert len(evidence.anchors_x) == 200
    found = evidence(x[250:], y[250:])
    for i in range(250, 300):
        near, names = [], []
        for row, space, anchors in (
            (x[i], evidence.source, evidence.anchors_x),
            (y[i], evidence.target, evidence.anchors_y),
        ):
            cosines = torch.cosine_similarity(anchors - space.center, row - space.center, dim=-1).sort(descending=True)
            near += [cosines.values[:10].mean(), cosines.values[:10].mean() - cosines.values[:50].mean()]
            names.append(set(cosines.indices[:50].tolist()))
        near.append(torch.tensor(len(names[0] & names[1]) / 50))
        torch.testing.assert_close(found[i - 250, 4:], torch.stack(near).double(), atol=1e-6, rtol=0)


def test_queries_in_calibration_are_not_among_their_own_anchors(monkeypatch):
    x, y, _ = pairs(n=300)
    seen = []
    called = Evidence.__call__

    def spy(self, rows, mapped):
        seen.append(float(torch.cdist(rows.double(), self.anchors_x.double()).amin()))
        return called(self, rows, mapped)

    monkeypatch.setattr(Evidence, "__call__", spy)
    quick("procrustes").fit(x, y)
    assert len(seen) == 5
    assert min(seen) > 1e-3


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="Lightning is not installed")
def test_the_network_learns_what_no_linear_map_can():
    from subspan.align.upgrade.residual_mlp import train_residual

    x, _, _ = pairs(n=1200, d=6)
    y = torch.cat([x, 2 * x.abs()], dim=1)
    moments = JointMoments(6, 12).update(x[:1000], y[:1000])
    affine = moments.ridge(1e-3)
    hidden = train_residual(affine, x[:1000], y[:1000], epochs=12)
    adapter = EmbeddingAdapter(affine.matrix, affine.bias, hidden=hidden)
    before, after = ((m(x[1000:]) - y[1000:]).square().sum() for m in (affine.map, adapter))
    assert float(after) < 0.7 * float(before)
    nothing = train_residual(AffineMap.identity(6), x[:400], x[:400], epochs=1)
    assert float(nothing[2].abs().max()) == 0


# ---------------------------------------------------------------- without pairs


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    rows = torch.from_numpy(np.asarray(load("digits")["x"], dtype=np.float64)).reshape(1797, -1)
    moments = rows - rows.mean(0)
    return moments @ torch.linalg.svd(moments, full_matrices=False)[2][:24].mT


@pytest.mark.slow
def test_a_planted_rotation_of_real_rows_is_found_without_pairs(digits, monkeypatch):
    fits, fitted = [], unpaired._fit
    monkeypatch.setattr(unpaired, "_fit", lambda *arguments: fits.append(fitted(*arguments)) or fits[-1])
    rotation = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    # No row is in both samples.
    x, y = digits[:900], digits[900:] @ rotation
    model = UpgradeMap(metric="euclidean").fit_unpaired(x, y, check=(digits[:100], digits[:100] @ rotation))
    assert model.unpaired_.succeeded, model.unpaired_
    assert model.recall_ > 0.9
    # Nor are pairs needed to know it.
    assert model.unpaired_.agreement > 0.5
    assert model.method_ == "unpaired"
    # Of several maps the one that brings unseen rows nearest is kept.
    assert len(fits) == 4
    best = min(fits, key=lambda fit: fit.distance).affine
    assert torch.equal(model.map_.matrix, best.matrix)
    # Two right maps agree, but not with known pairs that say something else.
    again = iter(fits[:4])
    monkeypatch.setattr(unpaired, "_fit", lambda *_: next(again))
    wrong = digits[torch.randperm(300, generator=torch.Generator().manual_seed(3))] @ rotation
    with pytest.warns(UserWarning, match="recall of the known pairs"):
        model = UpgradeMap().fit_unpaired(x, y, check=(digits[:300], wrong))
    assert model.unpaired_.agreement > 0.5
    assert not model.unpaired_.succeeded


@pytest.fixture(scope="module")
def crops() -> torch.Tensor:
    """EfficientNet-Lite0 features of 1600 crops of the bundled photographs, along 64 principal axes."""
    if not is_installed("efficientnet-lite0"):
        pytest.skip("EfficientNet-Lite0 is not installed")
    from subspan.reproduce.materials.image_features import image_encoder

    photographs = [*BUNDLED["photographs"]().values(), *BUNDLED["textures"]().values()]
    rng = np.random.default_rng(0)
    images = []
    for number in range(1600):
        photograph = photographs[number % len(photographs)]
        top, left = (rng.integers(side - 64) for side in photograph.shape[:2])
        crop = photograph[top : top + 64, left : left + 64]
        images.append(np.repeat(crop[..., None], 3, -1) if crop.ndim == 2 else crop[..., :3])
    rows = torch.from_numpy(image_encoder(64).encode(np.stack(images))).double()
    rows = rows - rows.mean(0)
    return rows @ torch.linalg.svd(rows, full_matrices=False)[2][:64].mT


def test_a_planted_rotation_of_a_networks_features_is_found_without_pairs(crops):
    rotation = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    noise = torch.randn(crops.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    turned = (crops + 0.3 * crops.std() * noise) @ rotation
    # No crop is in both samples, nor among the known pairs.
    model = UpgradeMap().fit_unpaired(crops[:250], turned[750:1000], check=(crops[1500:], turned[1500:]))
    assert model.recall_ > 0.5
    assert model.unpaired_.succeeded
    # Nor are pairs needed to know it.
    assert model.unpaired_.agreement > 0.5


def test_transport_mends_a_rough_rotation(digits):
    rows = torch.nn.functional.normalize(digits.float(), dim=1)
    generator = torch.Generator().manual_seed(6)
    rough = torch.linalg.qr(torch.eye(24) + 0.25 * torch.randn(24, 24, generator=generator)).Q
    rough = rough * rough.diagonal().sign()
    mended = unpaired._transported(rows[:900], rows[900:], rough, np.random.default_rng(0))
    assert float((mended - torch.eye(24)).norm()) < 0.5 * float((rough - torch.eye(24)).norm())
    plan = transport_plan(rows[:300] @ rows[900:1300].mT, 0.05)
    torch.testing.assert_close(plan.sum(0), torch.full((400,), 1 / 400), atol=1e-7, rtol=0)
    torch.testing.assert_close(plan.sum(1), torch.full((300,), 1 / 300), atol=5e-4, rtol=0)
    # From fewer axes to more: the others are found from those.
    grown = unpaired._transported(rows[:900], rows[900:], torch.eye(8), np.random.default_rng(0))
    assert float(grown.diagonal().mean()) > 0.8


@pytest.fixture
def short_search(monkeypatch):
    """Where no map is right, the search for one need not be long."""
    monkeypatch.setattr(unpaired, "_CLUSTERINGS", 4)
    monkeypatch.setattr(unpaired, "_ASSIGNMENTS", 3)
    monkeypatch.setattr(unpaired, "_TRANSPORTS", 2)


@pytest.mark.usefixtures("short_search")
@pytest.mark.parametrize("other", ["noise", "crops"])
def test_failure_without_pairs_is_said(digits, other, request):
    generator = torch.Generator().manual_seed(2)
    y = request.getfixturevalue("crops") if other == "crops" else torch.randn(900, 24, generator=generator)
    with pytest.warns(UserWarning, match="fit_unpaired: failed; the two best maps agree on"):
        model = UpgradeMap().fit_unpaired(digits[:900], y.double())
    assert not model.unpaired_.succeeded
    assert model.unpaired_.agreement < 0.5


@pytest.mark.usefixtures("short_search")
@pytest.mark.parametrize("columns", [1, 3, 40])
def test_few_and_equal_rows_fail_without_pairs_in_words(columns):
    generator = torch.Generator().manual_seed(4)
    x, y = (torch.randint(0, 2, (n, columns), generator=generator).double() for n in (20, 23))
    with pytest.warns(UserWarning, match="fit_unpaired: failed"):
        model = UpgradeMap().fit_unpaired(x, y)
    assert bool(torch.isfinite(model.map_.matrix).all())


def test_of_few_known_pairs_no_more_neighbours_are_asked_than_there_are(monkeypatch):
    same = AffineMap(torch.eye(4, dtype=torch.float64))
    monkeypatch.setattr(unpaired, "_fit", lambda *_: unpaired._Fit(same, 0.0, 1.0, True, 1))
    x, y = torch.randn(2, 30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    # Of four answers to each its own is the farthest.
    _, _, report = unpaired.align_unpaired(x, y, check=(same.matrix, -same.matrix))
    assert report.reason == "recall of the known pairs is 0.000 (chance 0.750)"


@pytest.mark.usefixtures("short_search")
def test_agreement_about_two_places_is_no_success():
    generator = torch.Generator().manual_seed(5)
    x, y = (torch.arange(100) < 90).double().unsqueeze(1).expand(100, 5), torch.randn(100, 5, generator=generator)
    with pytest.warns(UserWarning, match="fit_unpaired: failed"):
        model = UpgradeMap().fit_unpaired(x, y.double())
    assert model.unpaired_.agreement > 0.9


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method"),
        ({"metric": "hamming"}, "metric"),
        ({"target": "luck"}, "target"),
        ({"folds": 2}, "folds"),
        ({"n_neighbors": 0}, "n_neighbors"),
        ({"alpha": -1}, "alpha"),
        ({"candidates": ("ridge", "magic")}, "candidates"),
        ({"method": "mlp"}, "too few for an MLP|needs Lightning"),
    ],
)
def test_bad_parameters_are_named(options, message):
    x, y, _ = pairs(n=100)
    with pytest.raises(ValueError, match=message):
        UpgradeMap(**options).fit(x, y)


def test_bad_rows_are_named(tmp_path):
    x, y, _ = pairs(n=100)
    for bad, message in (
        (lambda: quick().fit(x, y[:-1]), "Y: expected 100 rows"),
        (lambda: quick().fit(x, torch.ones_like(y)), "constant"),
        (lambda: quick().fit([x[:50], x[50:, :5]], [y[:50], y[50:]]), "expected 12 columns"),
        (lambda: quick().fit_unpaired(x[:5], y), "X: needs at least 20"),
        (lambda: quick().fit_unpaired(x, y[:, :1] * 0), "constant|variance"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
    (tmp_path / "no").write_bytes(b"no")
    with pytest.raises(ValueError, match="not a readable"):
        UpgradeMap.load(tmp_path / "no")


def test_too_few_pairs_fall_back_and_say_so():
    x, y, _ = pairs(n=40, d=60)
    with pytest.warns(UserWarning, match="fewer than the 60 dimensions"):
        model = quick().fit(x[:30], y[:30])
    assert {row["method"] for row in model.scores_} == {"none", "translation", "procrustes", "scaled", "ridge"}
    with pytest.warns(UserWarning, match="too few to hold any out"):
        model = quick().fit(x[:5], y[:5])
    assert model.method_ == "procrustes"
    with pytest.raises(ValueError, match="no confidence"):
        model.confidence(x)
    assert CLOSED_FORMS[0] == "none"
