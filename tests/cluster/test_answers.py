"""What all clusterers answer: arrays in the kind of their input, subspaces by index, memory that rows ask for."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from subspace_clusters import union_of_subspaces
from subspan.cluster import (
    S2CAG,
    DeepSubspaceClustering,
    DSCNetClustering,
    ElasticNetSubspaceClustering,
    KSubspaces,
    LeastSquaresRepresentation,
    LowRankMixtureDiffusion,
    LowRankRepresentation,
    ManifoldLinearizingClustering,
    OMPSubspaceClustering,
    SparseSubspaceClustering,
    ThresholdingSubspaceClustering,
)
from subspan.geometry import Subspace
from subspan.solvers.nearest_subspace import stack_subspaces

DEEP: dict[str, Any] = {"encoder": "linear", "hidden": (8, 4), "pretrain_steps": 2, "max_steps": 4, "n_init": 1}
EVERY = [
    LeastSquaresRepresentation(3),
    LowRankRepresentation(3, noise="rows", alpha=0.5),
    OMPSubspaceClustering(3, n_nonzero=4),
    ThresholdingSubspaceClustering(3),
    ElasticNetSubspaceClustering(3),
    SparseSubspaceClustering(3),
    KSubspaces(3, 4, n_init=1),
    LowRankMixtureDiffusion(3, 4),
    S2CAG(3, features="l2"),
    ManifoldLinearizingClustering(3, z_dim=8, hidden=16, epochs=1, batch_size=32),
    DeepSubspaceClustering(3, retain=4, structure_steps=2, **DEEP),
    DSCNetClustering(3, **DEEP),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", EVERY, ids=lambda model: type(model).__name__)
def test_answers_are_in_the_kind_of_the_input(model):
    if "Deep" in type(model).__name__ or "Manifold" in type(model).__name__ or "DSC" in type(model).__name__:
        pytest.importorskip("lightning")
    x = union_of_subspaces(n=15)[0]
    model.set_params(random_state=0).fit(torch.from_numpy(x))
    found = {name: value for name, value in vars(model).items() if name.endswith("_") and not name.startswith("_")}
    arrays = sorted(name for name, value in found.items() if isinstance(value, np.ndarray))
    assert arrays == []
    assert isinstance(model.labels_, torch.Tensor)
    assert isinstance(model.predict(torch.from_numpy(x)), torch.Tensor)
    again = model.fit(x)
    tensors = sorted(name for name in found if isinstance(getattr(again, name), torch.Tensor))
    assert tensors == []
    assert isinstance(again.predict(x), np.ndarray)
    if isinstance(model, LowRankMixtureDiffusion):
        assert all(isinstance(part, np.ndarray) for part in model.sample(2))
        assert all(isinstance(part, torch.Tensor) for part in model.fit(torch.from_numpy(x)).sample(2))


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
