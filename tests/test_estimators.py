"""One contract for every estimator, and scikit-learn's own checks, which reach each of them as it is shipped.

The contract: any kind of rows in and the same kind out, streams where a fit takes moments, refusal of NaN, sparse rows
and other widths, every parameter checked by `fit`, the subspace that was found, and files.

Nothing is left out but what is named here: `EXCUSED`, which take no matrix of rows, and `NO_BLOBS` (one check of one
clusterer). Those that take two matrices are checked through `WithTarget`, which makes one up.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from sklearn.base import BaseEstimator, clone
from sklearn.utils import check_array
from sklearn.utils.estimator_checks import parametrize_with_checks

from subspace_clusters import union_of_subspaces
from subspan import align, cluster, dynamics, represent
from subspan.align import ModalityGap
from subspan.detect import SubspaceAD, SubspaceDetector
from subspan.dynamics import KoopmanAutoencoder, KoopmanOperator
from subspan.edit import RobustSpikes
from subspan.geometry import CoordinateSubspace, Subspace
from subspan.probe import ConvergentLearning, TopKSAE
from subspan.select import LeverageSelector

DEEP: dict[str, Any] = {"encoder": "linear", "hidden": (8,), "pretrain_steps": 2, "max_steps": 4, "n_init": 1}
CLUSTERERS = [
    cluster.LeastSquaresRepresentation(3),
    cluster.LowRankRepresentation(3, noise="rows", alpha=0.5),
    cluster.OMPSubspaceClustering(3, n_nonzero=4),
    cluster.ThresholdingSubspaceClustering(3),
    cluster.ElasticNetSubspaceClustering(3),
    cluster.SparseSubspaceClustering(3),
    cluster.KSubspaces(3, 4, n_init=1),
    cluster.LowRankMixtureDiffusion(3, 4),
    cluster.S2CAG(3, features="l2"),
    cluster.ManifoldLinearizingClustering(3, z_dim=8, hidden=16, epochs=1, batch_size=32),
    cluster.DeepSubspaceClustering(3, retain=4, structure_steps=2, **DEEP),
    cluster.DSCNetClustering(3, **DEEP),
]
ALONE = [
    *CLUSTERERS,
    SubspaceDetector(4),
    LeverageSelector(0.3, rank=4),
    represent.Matryoshka((4, 8)),
    represent.MatryoshkaIndex((4, 8), shortlist=20),
    TopKSAE(n_atoms=12, k=3, epochs=1),
    KoopmanOperator(6),
    KoopmanAutoencoder(4, hidden=(8,), epochs=1),
]
PAIRED = [
    align.SpaceMap("ridge"),
    align.UpgradeMap("ridge", alpha=0.1),
    align.LambdaOrthogonalAdapter(epochs=1),
    align.SubspaceAligner(4),
    align.ReAlign(normalize=False),
    align.MeanShift(normalize=False),
    align.C3(normalize=False),
    align.BlockwiseCovariance(normalize=False),
    RobustSpikes(rank=4),
    ConvergentLearning(),
]
# Rows and a class of each.
LABELLED = [
    represent.HydraProjector(8, 16, 16, embed_dim=8, gate_hidden=16, epochs=1),
    represent.DynamicSubspaceLearners(8, n_learners=2, epochs=2, final_epochs=1),
    represent.XFactors(residual_dim=3, width=2, epochs=1),
]
# Rows, an action (here, made of the rows) and an outcome of each.
ACTED = [dynamics.Rep4Ex(dim=1, hidden=(4,), max_steps=2, control=dynamics.ControlFunctionRegressor("linear"))]
STREAMED = {
    *("SubspaceDetector", "LeverageSelector", "Matryoshka", "SpaceMap", "UpgradeMap", "SubspaceAligner", "ReAlign"),
    *("LambdaOrthogonalAdapter", "MeanShift", "C3", "BlockwiseCovariance", "RobustSpikes", "ConvergentLearning"),
}
# No subspace is found here; of `SubspaceAligner` there is one a side.
WITHOUT_SUBSPACE = {
    *("SpaceMap", "UpgradeMap", "LambdaOrthogonalAdapter", "SubspaceAligner", "ReAlign", "MeanShift", "C3"),
    *("ConvergentLearning", "MatryoshkaIndex", "TopKSAE", "KoopmanOperator"),
}
TRAINED = {"ManifoldLinearizingClustering", "DeepSubspaceClustering", "DSCNetClustering", "TopKSAE"}
TRAINED |= {type(model).__name__ for model in LABELLED} | {"Rep4Ex", "Rep4ExWithActions", "KoopmanAutoencoder"}
ROWS, CLASSES = union_of_subspaces(noise=0.02, n=15)[:2]
every = pytest.mark.parametrize("model", [*ALONE, *PAIRED, *LABELLED, *ACTED], ids=lambda model: type(model).__name__)
quietly = pytest.mark.filterwarnings("ignore")


def fitted(model: Any, x: Any, y: Any = None) -> Any:
    """A fresh fit with a fixed seed; y: the paired rows, by default a shift of x."""
    if type(model).__name__ in TRAINED:
        pytest.importorskip("lightning")
    again = clone(model)
    if "random_state" in model.get_params():
        again.set_params(random_state=0)
    if type(model) in {type(each) for each in LABELLED}:
        return again.fit(x, CLASSES)
    if type(model) in {type(each) for each in ACTED}:
        return again.fit(x, acted(x), CLASSES.astype(float))
    return again.fit(x) if model in ALONE else again.fit(x, shifted(x) if y is None else y)


def shifted(x: Any) -> Any:
    return [shifted(part) for part in x] if isinstance(x, list) else x * 0.9 + 0.1


def acted(x: Any) -> Any:
    """An action a row, which follows from the row alone."""
    try:
        return check_array(x, dtype=float, ensure_all_finite=False)[:, :1]
    except (TypeError, ValueError):
        return x


def answer(model: Any, x: Any) -> Any:
    for name in ("transform", "transform_x", "score_samples", "predict", "kneighbors"):
        if hasattr(model, name):
            found = getattr(model, name)(x)
            return found[0] if isinstance(found, tuple) else found
    raise AssertionError(f"{model} answers nothing")


@quietly
@every
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_answers_are_in_the_kind_of_the_rows(model: Any, dtype: Any) -> None:
    x = ROWS.astype(dtype)
    plain, tensors = fitted(model, x), fitted(model, torch.from_numpy(x))
    ours, theirs = answer(plain, x), answer(tensors, torch.from_numpy(x))
    assert isinstance(ours, np.ndarray)
    assert isinstance(theirs, torch.Tensor)
    if hasattr(model, "transform") and ours.shape[-1] > 1:
        assert ours.dtype == dtype
        assert theirs.dtype == torch.from_numpy(x).dtype
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-3, atol=2e-3 if dtype is np.float32 else 1e-6)
    assert answer(plain, torch.from_numpy(x)).shape == theirs.shape
    assert plain.n_features_in_ == tensors.n_features_in_ == x.shape[1]
    if hasattr(plain, "labels_"):
        assert isinstance(plain.labels_, np.ndarray)
        assert isinstance(tensors.labels_, torch.Tensor)


@quietly
@every
def test_frames_keep_the_names_of_their_columns(model: Any) -> None:
    frame = pd.DataFrame(ROWS, columns=[f"column {i}" for i in range(ROWS.shape[1])])
    found = fitted(model, frame)
    assert found.feature_names_in_.tolist() == list(frame.columns)
    with pytest.raises(ValueError, match="feature names"):
        answer(found, frame.rename(columns={"column 0": "another"}))
    assert not hasattr(fitted(found, torch.from_numpy(ROWS)), "feature_names_in_")


@quietly
@pytest.mark.parametrize(
    "model", [m for m in [*ALONE, *PAIRED] if type(m).__name__ in STREAMED], ids=lambda model: type(model).__name__
)
def test_a_stream_of_batches_is_fitted_as_its_rows(model: Any) -> None:
    parts = [ROWS[:20], ROWS[20:]]
    np.testing.assert_allclose(answer(fitted(model, parts), ROWS), answer(fitted(model, ROWS), ROWS), atol=1e-6)
    with pytest.raises(ValueError, match=r"column|feature|width|dimension"):
        fitted(model, [ROWS[:20], ROWS[20:, :9]])


@quietly
@every
def test_what_holds_no_rows_is_refused(model: Any) -> None:
    broken = ROWS.copy()
    broken[3, 4] = np.nan
    for rows in (broken, torch.from_numpy(broken)):
        with pytest.raises(ValueError, match="NaN"):
            fitted(model, rows, ROWS if isinstance(rows, np.ndarray) else torch.from_numpy(ROWS))
    found = fitted(model, ROWS)
    for rows in (broken, torch.from_numpy(broken)):
        with pytest.raises(ValueError, match="NaN"):
            answer(found, rows)
    with pytest.raises(ValueError, match="29"):
        answer(found, ROWS[:, 1:])
    if not isinstance(model, cluster.S2CAG):
        for rows in (sparse.csr_matrix(ROWS), torch.from_numpy(ROWS).to_sparse()):
            with pytest.raises(TypeError, match=r"[Ss]parse"):
                fitted(model, rows, ROWS)


@every
def test_every_parameter_is_checked_by_fit(model: Any) -> None:
    for field in dataclasses.fields(model):
        again = clone(model).set_params(**{field.name: object()})
        with pytest.raises(ValueError, match=f"^{field.name}: expected .*, got <object"):
            again.fit(ROWS, *([CLASSES] if model in LABELLED else [ROWS] * (model in [*PAIRED, *ACTED])))


@quietly
@every
def test_the_subspace_found_is_kept(model: Any) -> None:
    found = fitted(model, ROWS)
    if type(model).__name__ in WITHOUT_SUBSPACE:
        assert not {"subspace_", "subspaces_"} & set(dir(found))
    elif model in CLUSTERERS:
        assert len(found.subspaces_) == 3
        assert all(isinstance(found.subspaces_[i], Subspace) for i in range(3))
        assert isinstance(found.subspaces_, Subspace | tuple)
    elif model in LABELLED:
        kind = Subspace if isinstance(found, represent.DynamicSubspaceLearners) else CoordinateSubspace
        assert all(isinstance(each, kind) for each in found.subspaces_)
    else:
        assert isinstance(found.subspace_, Subspace)


@quietly
@every
def test_what_is_saved_answers_alike(model: Any, tmp_path: Path) -> None:
    if not hasattr(model, "save"):
        pytest.skip("is not saved")
    found = fitted(model, ROWS)
    found.save(tmp_path / "model.safetensors")
    again = type(model).load(tmp_path / "model.safetensors")
    np.testing.assert_allclose(answer(again, ROWS), answer(found, ROWS), atol=1e-5)
    assert again.n_features_in_ == found.n_features_in_


# ---------------------------------------------------------------------- scikit-learn's own checks


class WithTarget:
    """scikit-learn's checks have no second matrix with rows of its own: here they get one made from X."""

    def fit(self, X: Any, Y: Any = None) -> Any:
        try:
            target = np.roll(check_array(X, dtype=float), 1, axis=1) + 0.3
        except (TypeError, ValueError):
            target = X
        return super().fit(X, target)  # type: ignore[misc]

    def partial_fit(self, X: Any = None, Y: Any = None) -> Any:
        return super().partial_fit(X, None if Y is None or np.ndim(Y) < 2 else Y)  # type: ignore[misc]


class ReAlignWithTarget(WithTarget, align.ReAlign): ...


class MeanShiftWithTarget(WithTarget, align.MeanShift): ...


class C3WithTarget(WithTarget, align.C3): ...


class BlockwiseWithTarget(WithTarget, align.BlockwiseCovariance): ...


class Rep4ExWithActions(dynamics.Rep4Ex):
    """With actions made of the rows, and the outcomes where they are looked for; so few rows as 10 are given twice."""

    def fit(self, X: Any, y: Any = None) -> Any:
        if isinstance(X, np.ndarray) and X.ndim == 2 and 10 <= len(X) < 20:
            X, y = np.tile(X, (2, 1)), None if y is None else np.tile(y, 2)
        return super().fit(X, acted(X), y)

    def predict(self, X: Any) -> Any:
        return super().predict(X, acted(X))


QUICK_CHECKS = [
    cluster.LeastSquaresRepresentation(n_init=1, affine=True),
    cluster.OMPSubspaceClustering(n_init=1, affine=True),
    cluster.KSubspaces(rank=1, n_init=2),
    cluster.LowRankMixtureDiffusion(2, 1),
    cluster.S2CAG(features="l2", order=2, n_init=1),
    cluster.ManifoldLinearizingClustering(2, z_dim=4, hidden=16, epochs=2, warmup=1, batch_size=32),
    SubspaceDetector(),
    SubspaceDetector(1, distance="mahalanobis", contamination=0.1),
    LeverageSelector(),
    represent.Matryoshka(),
    represent.MatryoshkaIndex(),
    TopKSAE(n_atoms=4, k=2, epochs=1),
    align.SpaceMap(),
    align.SpaceMap("cca"),
    align.UpgradeMap(candidates=("none", "ridge"), alpha=0.1, folds=3, max_queries=20, max_gallery=50),
    align.LambdaOrthogonalAdapter(epochs=1),
    align.SubspaceAligner(1),
    ReAlignWithTarget(),
    MeanShiftWithTarget(),
    C3WithTarget(),
    BlockwiseWithTarget(),
    RobustSpikes("bootstrap", on_empty="identity"),
    ConvergentLearning("sparse"),
    KoopmanOperator(),
    KoopmanAutoencoder(2, hidden=(4,), epochs=1),
    *LABELLED,
    Rep4ExWithActions(dim=1, hidden=(4,), max_steps=2, control=dynamics.ControlFunctionRegressor("linear")),
]
# Of the bases of those above, and costly.
SLOW_CHECKS = [
    cluster.LowRankRepresentation(n_init=1, affine=True, retain=5),
    cluster.ThresholdingSubspaceClustering(n_init=1, affine=True),
    cluster.ElasticNetSubspaceClustering(n_init=1, affine=True),
    cluster.SparseSubspaceClustering(n_init=1, affine=True),
    cluster.DeepSubspaceClustering(
        3,
        encoder="linear",
        hidden=(8, 4),
        pretrain_steps=3,
        max_steps=25,
        structure_steps=3,
        n_init=1,
        retain=5,
        affine=True,
    ),
    cluster.DSCNetClustering(
        3, encoder="linear", hidden=(16,), pretrain_steps=200, max_steps=200, n_init=1, expression_weight=1.0
    ),
]
# What `check_clustering` asks of a clusterer, blobs in the plane told apart, these do not promise; their pages say why.
NO_BLOBS = {"OMPSubspaceClustering": "a pursuit fits any row of a plane by two or three others, of whatever blob"}


def run_check(estimator: BaseEstimator, check: Any) -> None:
    name = type(estimator).__name__
    if name in TRAINED:
        pytest.importorskip("lightning")
    if name in NO_BLOBS and check.func.__name__ == "check_clustering":
        pytest.skip(NO_BLOBS[name])
    check(estimator)


@pytest.mark.filterwarnings("ignore::UserWarning")
@parametrize_with_checks(QUICK_CHECKS)
def test_scikit_learn_checks(estimator: BaseEstimator, check: Any) -> None:
    run_check(estimator, check)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@parametrize_with_checks(SLOW_CHECKS)
def test_scikit_learn_checks_of_those_with_the_same_base(estimator: BaseEstimator, check: Any) -> None:
    run_check(estimator, check)


TESTS = Path(__file__).resolve().parent
# The contract and the checks give an estimator matrices of rows. These take something else, and say here what.
EXCUSED = {
    "Estimator": "the base of all",
    "PairedEstimator": "the base of those with paired rows",
    "RowClusterer": "the base of the clusterers of rows",
    "ControlFunctionRegressor": "states of no more columns than the actions that come with them; Rep4Ex is checked",
    "FrameViews": "windows of 16 samples or more; blobs in a plane are none",
    "MatryoshkaCascade": "logits (sizes, rows, classes)",
    "ModalityGap": "two matrices of paired rows, and it neither transforms nor predicts",
    "ModalityMap": "the base of the maps between modalities, which are checked",
    "SelfExpressiveClustering": "the base of the clusterers by self-expression, which are checked",
    "SubspaceAD": "images and a network; its SubspaceDetector is checked",
}


def estimators() -> set[str]:
    """Names of the classes derived from scikit-learn's BaseEstimator, read from the source; protocols' own left out."""
    bases: dict[str, set[str]] = {}
    for path in (TESTS.parent / "src").rglob("*.py"):
        if "reproduce" not in path.parts:
            for name, above in re.findall(r"^class (\w+)\(([^)]*)\)", path.read_text(encoding="utf-8"), re.MULTILINE):
                bases.setdefault(name, set()).update(re.findall(r"\w+", above))
    found = {"BaseEstimator"}
    while more := {name for name, above in bases.items() if above & found} - found:
        found |= more
    return {name for name in found - {"BaseEstimator"} if not name.startswith("_")}


def test_every_estimator_is_checked() -> None:
    found = estimators()
    assert {"SubspaceDetector", "LeverageSelector", "ReAlign", "RobustSpikes", "SpaceMap"} <= found
    assert set(EXCUSED) <= found
    assert {type(model).__name__ for model in [*ALONE, *PAIRED, *LABELLED, *ACTED]} == found - set(EXCUSED)
    checked = [base.__name__ for model in [*QUICK_CHECKS, *SLOW_CHECKS] for base in type(model).__mro__]
    assert found - set(checked) - set(EXCUSED) == set()


def test_what_is_left_out_of_the_checks_is_said_in_the_docstring() -> None:
    for name in NO_BLOBS:
        assert "blobs in a plane" in " ".join((getattr(cluster, name).__doc__ or "").split())


def test_no_check_is_expected_to_fail() -> None:
    excuses = ("expected_" + "failed_checks", "_xfail_" + "checks")
    folders = [TESTS, TESTS.parent / "src"]
    files = [path for folder in folders for path in folder.rglob("*.py")]
    assert [path.name for path in files if any(word in path.read_text(encoding="utf-8") for word in excuses)] == []


@pytest.mark.parametrize("estimator", [ModalityGap(), SubspaceAD(abs)], ids=["ModalityGap", "SubspaceAD"])
def test_the_excused_keep_their_parameters(estimator: BaseEstimator) -> None:
    parameters = estimator.get_params()
    again = clone(estimator).set_params(**parameters)
    assert {key: repr(value) for key, value in again.get_params().items()} == {
        key: repr(value) for key, value in parameters.items()
    }
    assert not [key for key in vars(again) if key.endswith("_")]
