"""What tests of subspace clusterers share: planted unions of subspaces, scikit-learn's checks without that on blobs."""

import warnings
from typing import Any

import numpy as np
import pytest
from sklearn.utils.estimator_checks import estimator_checks_generator


def union_of_subspaces(*, affine=False, noise=0.0, n=40, k=3, dim=4, d=30, seed=0):
    """(rows (k n, d), labels (k n,), bases): n rows in each of k random subspaces, in random order."""
    random = np.random.default_rng(seed)
    bases = [np.linalg.qr(random.normal(size=(d, dim)))[0] for _ in range(k)]
    rows = [random.normal(size=(n, dim)) @ basis.T + (3 * random.normal(size=d) if affine else 0) for basis in bases]
    order = random.permutation(k * n)
    x = np.vstack(rows) + noise * random.normal(size=(k * n, d))
    return x[order], np.repeat(np.arange(k), n)[order], bases


# What `check_clustering` asks of a clusterer, blobs in the plane told apart, these do not promise; their pages say why.
NO_BLOBS = {"OMPSubspaceClustering": "a pursuit fits any row of a plane by two or three others, of whatever blob"}


def check_estimator_but_clustering(estimator: Any) -> None:
    """scikit-learn's checks of one of NO_BLOBS, without `check_clustering`."""
    assert type(estimator).__name__ in NO_BLOBS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for own, check in estimator_checks_generator(estimator):
            if check.func.__name__ != "check_clustering":
                try:
                    check(own)
                except pytest.skip.Exception:
                    continue
                except Exception as error:
                    if type(error).__name__ != "SkipTest":
                        raise
