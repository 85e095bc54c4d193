"""scikit-learn's own checks reach every estimator as it is shipped.

Nothing is left out but what is named here (`EXCUSED`, which take no matrix of rows, and `SUBCLASSED`, which take two)
and in `subspace_clusters.NO_BLOBS` (one check of one clusterer).
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from sklearn.base import BaseEstimator, clone

from subspace_clusters import NO_BLOBS
from subspan import cluster
from subspan.align import ModalityGap
from subspan.detect import SubspaceAD

TESTS = Path(__file__).resolve().parent
CHECKS = {"parametrize_with_checks", "check_estimator", "estimator_checks_generator", "check_estimator_but_clustering"}
# scikit-learn's checks give an estimator one matrix of rows. These take something else, and say here what.
EXCUSED = {
    "MatryoshkaCascade": "logits (sizes, rows, classes)",
    "ModalityGap": "two matrices of paired rows, and it neither transforms nor predicts",
    "ModalityMap": "the base of the maps between modalities, which are checked",
    "SelfExpressiveClustering": "the base of the clusterers by self-expression, which are checked",
    "SubspaceAD": "images and a network; its SubspaceDetector is checked",
}


# These take a second matrix with rows of its own, which the checks do not have: a subclass in the tests makes one up.
SUBCLASSED = {"BlockwiseCovariance", "C3", "MeanShift", "ReAlign"}


def estimators() -> set[str]:
    """Names of the classes derived from scikit-learn's BaseEstimator, read from the source; protocols' own left out."""
    bases: dict[str, set[str]] = {}
    for path in (TESTS.parent / "src").rglob("*.py"):
        if "reproduce" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases.setdefault(node.name, set()).update(_name(base) for base in node.bases)
    found = {"BaseEstimator"}
    while more := {name for name, above in bases.items() if above & found} - found:
        found |= more
    return {name for name in found - {"BaseEstimator"} if not name.startswith("_")}


def names_checked(source: str, *, subclasses: bool = True) -> set[str]:
    """Names that reach a call of scikit-learn's checks, through variables, functions and subclasses of the file."""
    tree = ast.parse(source)
    defined: dict[str, ast.AST] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and (subclasses or not isinstance(node, ast.ClassDef)):
            defined[node.name] = node
        elif isinstance(node, ast.Assign):
            defined.update({target.id: node.value for target in node.targets if isinstance(target, ast.Name)})
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _name(node.func) in CHECKS]
    waiting: list[ast.AST] = [argument for call in calls for argument in call.args]
    seen: set[str] = set()
    while waiting:
        for node in ast.walk(waiting.pop()):
            name = _name(node)
            if name and name not in seen:
                seen.add(name)
                if name in defined:
                    waiting.append(defined[name])
    return seen


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def sources() -> dict[Path, str]:
    return {path: path.read_text(encoding="utf-8") for path in sorted(TESTS.rglob("test_*.py"))}


def test_every_estimator_is_checked() -> None:
    checked = set().union(*(names_checked(source) for source in sources().values()))
    found = estimators()
    assert {"SubspaceDetector", "LeverageSelector", "ReAlign", "RobustSpikes", "SpaceMap"} <= found
    assert sorted(found - checked - set(EXCUSED)) == []
    assert sorted(set(EXCUSED) - found) == []
    as_shipped = set().union(*(names_checked(source, subclasses=False) for source in sources().values()))
    assert found - as_shipped - set(EXCUSED) == SUBCLASSED


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


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        ("@parametrize_with_checks([A(), B(rank=2)])\ndef test(estimator, check): ...", {"A", "B"}),
        ("class Mine(Base, A): pass\nLIST = [Mine()]\ncheck_estimator(LIST[0])", {"A", "Base"}),
        ("def made(): return [A(m) for m in X]\nfor e in made(): check_estimator(e)", set()),
        ("def made(): return A()\ncheck_estimator(made())", {"A"}),
        ("A().fit(x)", set()),
    ],
)
def test_a_checked_name_is_seen(source: str, seen: set[str]) -> None:
    assert "Base" not in names_checked(source, subclasses=False)
    assert names_checked(source) & {"A", "B", "Base"} == seen
