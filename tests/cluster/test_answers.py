"""What all clusterers answer: subspaces by index, in the memory that rows ask for."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from subspan.cluster import LeastSquaresRepresentation, ThresholdingSubspaceClustering
from subspan.geometry import Subspace
from subspan.solvers.nearest_subspace import stack_subspaces


@pytest.mark.parametrize("dims", [(2, 4, 6), (4, 4, 4)])
@pytest.mark.parametrize("method", [ThresholdingSubspaceClustering, LeastSquaresRepresentation])
def test_subspaces_are_taken_by_index_whether_their_dimensions_agree_or_not(method, dims):
    random = np.random.default_rng(0)
    parts = [random.normal(size=(60, k)) @ np.linalg.qr(random.normal(size=(30, k)))[0].T for k in dims]
    model = method(3, rank=0.999, random_state=0).fit(np.vstack(parts))
    assert len(model.subspaces_) == 3
    order = model.labels_[[0, 60, 120]]
    assert [model.subspaces_[int(cluster)].dim for cluster in order] == list(dims)
    assert [space.dim for space in model.subspaces_] == [dims[list(order).index(cluster)] for cluster in range(3)]
    assert isinstance(model.subspaces_, Subspace if len(set(dims)) == 1 else tuple)


def test_a_batch_keeps_what_its_members_have_in_common():
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 20, 6)))
    one = [Subspace.fit(part, rank=2) for part in x]
    batch = stack_subspaces(one)
    assert isinstance(batch, Subspace)
    assert batch.count == 20
    for name in ("basis", "center", "variances", "residual_variance", "spectrum"):
        assert torch.equal(getattr(batch, name), torch.stack([getattr(space, name) for space in one]))
    mixed = stack_subspaces([one[0], Subspace.fit(x[1, :9], rank=2)])
    assert isinstance(mixed, Subspace)
    assert mixed.count is None
    given = stack_subspaces([one[0], Subspace(one[1].basis)])
    assert isinstance(given, Subspace)
    assert given.variances is None


WIDE = """
import resource, sys, warnings
import numpy as np
from subspan import cluster
warnings.simplefilter("ignore")
x = np.random.default_rng(0).normal(size=(40, 10_000))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
cluster.KSubspaces(2, 2, n_init=1).fit(x[:, :50])
before = peak()
for make in {makes}:
    make(x)
print((peak() - before) / x.nbytes)
"""


def test_wide_rows_are_worked_on_in_their_own_space():
    names = ("LeastSquaresRepresentation", "LowRankRepresentation", "OMPSubspaceClustering", "SparseSubspaceClustering")
    calls = [f"lambda x: cluster.{name}(2).fit(x).predict(x)" for name in (*names, "ThresholdingSubspaceClustering")]
    calls += ["lambda x: cluster.ElasticNetSubspaceClustering(2, affine=True).fit(x).predict(x)"]
    calls += ["lambda x: cluster.KSubspaces(2, 2, n_init=1, init='lsr').fit(x).predict(x)"]
    calls += ["lambda x: cluster.LowRankMixtureDiffusion(2, 4).fit(x).predict(x)"]
    calls += ["lambda x: cluster.S2CAG(2, features='l2').fit(x).predict(x)"]
    code = WIDE.format(makes="[" + ", ".join(calls) + "]")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(ran.stdout) < 20
