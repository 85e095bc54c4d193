"""CoSpaDi: one weight by every solver, and whole models."""

import copy
import math
import threading

import pytest
import torch
from torch import nn

from subspan.geometry import Whitener
from subspan.models import SparseDictLinear
from subspan.statistics import Moments
from subspan.weights import (
    CoSpaDi,
    allocate,
    cospadi,
    dictionary_sizes,
    error_curve,
    factorise,
    round_to_bits,
)

SOLVERS = ("procrustes", "ksvd", "mod", "rocket", "svd", "2:4", "round")
DICTIONARIES = SOLVERS[:4]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(n, d, seed=1):
    """Rows whose directions differ much in strength."""
    return normal(n, d, seed=seed) @ (normal(d, d, seed=seed + 1) * torch.logspace(0, -2, d, dtype=torch.float64))


def union_of_planes(outputs, d, planes=8, seed=0):
    """Weights of outputs that lie each in one of several planes of three dimensions."""
    bases = normal(planes, 3, d, seed=seed)
    rows = normal(outputs, 1, 3, seed=seed + 1) @ bases[torch.arange(outputs) % planes]
    return rows.squeeze(1) + 0.01 * normal(outputs, d, seed=seed + 2)


# ---------------------------------------------------------------------- sizes and bits


def test_sizes_of_the_published_example():
    assert dictionary_sizes(4096, 12288, 0.8 * 16 * 4096 * 12288) == (3932, 1966)


@pytest.mark.parametrize("ratio", [0.2, 0.45, 0.7])
@pytest.mark.parametrize(("d_out", "d_in"), [(24, 60), (60, 24), (40, 40), (12, 64)])
@pytest.mark.parametrize("solver", SOLVERS)
def test_bits_are_counted_and_kept_to(solver, d_out, d_in, ratio):
    if solver == "2:4" and ratio > 7 / 16:
        pytest.skip("2:4 saves 7/16")
    found = factorise(normal(d_out, d_in), Moments(d_in).update(inputs(300, d_in)), ratio, solver=solver, max_iter=2)
    assert found.dense_bits == 16 * d_out * d_in
    assert ratio - 1e-9 <= found.ratio < 1
    assert math.isfinite(found.error)
    if solver in DICTIONARIES:
        k, s = found.rank, found.nonzero
        assert found.bits == 16 * d_in * k + 14 * s * d_out + min(k, s * math.ceil(math.log2(k))) * d_out
        assert s == k or found.bits + 14 * d_out + 16 * d_in + 2 * d_out > (1 - ratio) * found.dense_bits * 0.95


@pytest.mark.parametrize("density", [1.5, 2, 3])
def test_atoms_beyond_the_most_go_to_the_codes(density):
    bits = 0.9 * 16 * 30 * 300
    (k, s), (most, more) = (dictionary_sizes(30, 300, bits, density=density, most=m) for m in (None, 20))
    assert k > 20 == most
    assert more > s * 20 / k
    assert 20 * (16 * 30 + 300) + 14 * more * 300 <= bits


# ---------------------------------------------------------------------- errors on data


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_error_is_that_of_the_outputs(solver):
    x, weight = inputs(200, 24), normal(30, 24)
    found = factorise(weight, Moments(24).update(x), 0.3, solver=solver, max_iter=3)
    exact = (x @ (weight - found.dense()).mT).norm() / (x @ weight.mT).norm()
    assert found.error == pytest.approx(float(exact), rel=1e-8)
    torch.testing.assert_close(found.layer(x), x @ found.dense().mT)


@pytest.mark.parametrize("d_out", [10, 40])
def test_whitened_svd_is_the_best_low_rank_on_the_data(d_out):
    x, weight = inputs(200, 24), normal(d_out, 24)
    found = factorise(weight, Moments(24).update(x), 0.4, solver="svd", rounded=False)
    sizes = torch.linalg.svdvals(x @ weight.mT)
    assert found.error == pytest.approx(float(sizes[found.rank :].norm() / sizes.norm()), rel=1e-6)
    assert found.history[-1] == pytest.approx(found.error**2, rel=1e-6)
    assert factorise(weight, None, 0.4, solver="svd").error > 0
    plain = factorise(weight, None, 0.4, solver="svd").dense()
    assert (x @ (weight - plain).mT).norm() > 1.2 * (x @ (weight - found.dense()).mT).norm()


def test_with_all_atoms_read_procrustes_is_whitened_svd():
    metric, weight = Moments(24).update(inputs(200, 24)), normal(40, 24)
    dense = factorise(weight, metric, 0.4, density=1.0, rounded=False)
    assert dense.nonzero == dense.rank
    rank_bits = 16 * dense.rank * (24 + 40)
    low = factorise(weight, metric, bits=rank_bits, solver="svd", rounded=False)
    assert low.rank == dense.rank
    torch.testing.assert_close(dense.dense(), low.dense(), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("solver", ["procrustes", "ksvd", "mod"])
def test_a_dictionary_beats_one_subspace_where_there_are_many(solver):
    weight, x = union_of_planes(240, 40), inputs(300, 40)
    errors = {
        name: factorise(weight, Moments(40).update(x), 0.6, solver=name, max_iter=15, density=4).error
        for name in (solver, "svd")
    }
    assert errors[solver] < 0.9 * errors["svd"]


def test_what_is_fitted_to_data_is_better_on_data():
    weight, x = normal(60, 40), inputs(300, 40)
    found = [factorise(weight, metric, 0.4) for metric in (Moments(40).update(x), None)]
    errors = [(x @ (weight - each.dense()).mT).norm() for each in found]
    assert errors[0] < 0.7 * errors[1]


def test_moments_and_their_whitener_are_one_metric():
    moments, weight = Moments(20).update(inputs(100, 20)), normal(30, 20)
    pair = [factorise(weight, metric, 0.3).dense() for metric in (moments, Whitener.of(moments.second_moment()))]
    torch.testing.assert_close(*pair)


# ---------------------------------------------------------------------- learning


def test_procrustes_never_rises_and_its_atoms_are_orthonormal_on_the_data():
    x, weight = inputs(300, 32), union_of_planes(90, 32)
    found = factorise(weight, Moments(32).update(x), 0.3, tolerance=0.0, max_iter=12, rounded=False)
    assert all(after <= before + 1e-12 for before, after in zip(found.history, found.history[1:]))
    assert found.history[-1] < 0.9 * found.history[0]
    assert found.history[-1] == pytest.approx(found.error**2, rel=1e-6)
    atoms = x @ found.layer.dictionary.detach() / len(x) ** 0.5
    torch.testing.assert_close(atoms.mT @ atoms, torch.eye(found.rank, dtype=torch.float64), atol=1e-8, rtol=0)


def test_a_planted_dictionary_is_found():
    atoms = nn.functional.normalize(normal(30, 20), dim=1)
    codes = torch.zeros(1500, 30, dtype=torch.float64)
    places = torch.rand(1500, 30, generator=torch.Generator().manual_seed(3)).topk(2).indices
    codes.scatter_(1, places, normal(1500, 2, seed=4) + normal(1500, 2, seed=4).sign())
    bits = 30 * (16 * 20 + 1500) + 14 * 2 * 1500
    found = factorise(
        codes @ atoms, bits=bits, density=15, solver="ksvd", init="data", tolerance=-1.0, rounded=False, max_iter=30
    )
    assert (found.rank, found.nonzero) == (30, 2)
    learnt = nn.functional.normalize(found.layer.dictionary.detach().mT, dim=1)
    assert float(((atoms @ learnt.mT).abs().amax(1) > 0.99).double().mean()) > 0.95
    own = found.subspace(0)
    assert float(own.residual(codes[:1] @ atoms).norm() / (codes[:1] @ atoms).norm()) == pytest.approx(
        float((found.dense()[0] - codes[0] @ atoms).norm() / (codes[0] @ atoms).norm()), abs=1e-6
    )


# ---------------------------------------------------------------------- what never stops a run

HARD = {
    "fewer tokens than inputs": lambda w, x: (w, x[:5]),
    "dead inputs": lambda w, x: (w, x * (torch.arange(x.shape[1]) % 3 > 0)),
    "one token": lambda w, x: (w, x[:1]),
    "no input at all": lambda w, x: (w, 0 * x),
    "a zero weight": lambda w, x: (0 * w, x),
    "dead outputs": lambda w, x: (w * (torch.arange(len(w)) % 2).unsqueeze(1), x),
    "equal outputs": lambda w, x: (w[:1].expand_as(w), x),
    "few outputs": lambda w, x: (w[:6], x),
    "huge and tiny inputs": lambda w, x: (w, x * torch.logspace(-6, 6, x.shape[1], dtype=x.dtype)),
}


@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_and_degenerate_layers_do_not_stop_it(solver, case, dtype):
    weight, x = HARD[case](normal(50, 28), inputs(100, 28))
    weight = weight.to(dtype)
    found = factorise(weight, Moments(28).update(x), 0.25, solver=solver, max_iter=2)
    assert found.bits <= 0.75 * found.dense_bits
    assert 0 <= found.error < 1
    assert found.layer(x.to(dtype)).dtype == dtype
    if case == "fewer tokens than inputs" and solver != "2:4":
        assert found.shift > 0
        assert found.error < 0.3
    if case in ("a zero weight", "equal outputs") and solver in ("procrustes", "svd"):
        assert found.error < 0.01


@pytest.mark.parametrize("init", ["data", "procrustes"])
def test_more_atoms_than_inputs_and_outputs(init):
    found = factorise(normal(20, 12), None, 0.05, solver="ksvd", density=6, init=init, max_iter=2)
    assert found.rank > 12
    capped = factorise(normal(40, 12), None, 0.1, density=2)
    assert capped.rank == 12
    assert capped.nonzero > 6


# ---------------------------------------------------------------------- stored numbers


def test_numbers_are_rounded_as_they_are_stored():
    weight, metric = normal(40, 30), Moments(30).update(inputs(200, 30))
    exact, stored = (factorise(weight, metric, 0.3, rounded=flag) for flag in (False, True))
    one, other = exact.layer, stored.layer
    assert isinstance(one, SparseDictLinear)
    assert isinstance(other, SparseDictLinear)
    assert bool((other.dictionary == other.dictionary.bfloat16()).all())
    assert not bool((other.values.bfloat16().view(torch.int16) & 3).any())
    relative = ((one.values - other.values) / one.values).detach().abs().max()
    assert 2.0**-8 < float(relative) < 2.0**-6 + 2.0**-8
    assert stored.error < exact.error + 0.02


def test_two_of_four_stay_by_what_they_do():
    weight = torch.tensor([[4.0, 3.0, 2.0, 1.0, 5.0]])
    assert factorise(weight, None, 0.2, solver="2:4").dense().tolist() == [[4, 3, 0, 0, 5]]
    x = torch.diag(torch.tensor([1.0, 1.0, 1.0, 9.0, 1.0]))
    assert factorise(weight, Moments(5).update(x), 0.2, solver="2:4").dense().tolist() == [[4, 0, 0, 1, 5]]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_errs_by_half_a_step(bits):
    x = normal(9, 70) * torch.logspace(-8, 3, 9, dtype=torch.float64).unsqueeze(1)
    found = round_to_bits(x, bits)
    assert found.shape == x.shape
    parts = [x[:, start : start + 32] for start in range(0, 70, 32)]
    spans = torch.cat([(p.amax(1, keepdim=True) - p.amin(1, keepdim=True)).expand_as(p) for p in parts], 1)
    assert bool(((found - x).abs() <= 1.03 * spans / (2**bits - 1)).all())
    assert max(len(row[:32].unique()) for row in found) <= 2**bits
    assert len(found[0, :32].unique()) > min(2 ** (bits - 2), 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": 1.0}, r"ratio: in \(0, 1\)"),
        ({"ratio": float("nan")}, r"ratio: in \(0, 1\)"),
        ({"ratio": None}, "ratio, bits: give one"),
        ({"bits": 10.0}, "ratio, bits: give one"),
        ({"ratio": 0.999}, "ratio: .* is no atom"),
        ({"ratio": 0.999, "solver": "svd"}, "ratio: .* no rank"),
        ({"ratio": 0.5, "solver": "2:4"}, r"ratio: 2:4 saves 0\.4375"),
        ({"ratio": 0.99, "solver": "round"}, "ratio: .* too few"),
        ({"density": 0.5}, "density: at least 1"),
        ({"metric": Moments(3)}, "metric: has dimension 3"),
        ({"weight": torch.full((4, 4), math.nan)}, "weight: 4 of 4 rows contain NaN"),
    ],
)
def test_bad_input_is_named(change, message):
    given = {"weight": torch.randn(16, 12), "ratio": 0.3} | change
    with pytest.raises(ValueError, match=message):
        factorise(given.pop("weight"), given.pop("metric", None), **given)


# ---------------------------------------------------------------------- whole models


class Network(nn.Module):
    """Two blocks with grouped widths and a head that is tied to the embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 24)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"k": nn.Linear(24, 8), "v": nn.Linear(24, 8, bias=False), "up": nn.Linear(16, 24)})
            for _ in range(3)
        )
        self.head = nn.Linear(24, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block["up"](torch.cat([block["k"](x), block["v"](x)], -1).tanh())
        return self.head(x)


@pytest.fixture
def network():
    return Network().eval()


@pytest.fixture
def batches():
    return [torch.randint(50, (4, 12), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("allocation", ["uniform", "errors"])
def test_a_model_is_compressed_and_given_back(network, batches, solver, allocation):
    if allocation == "errors" and solver in ("2:4", "round"):
        with pytest.raises(ValueError, match="allocation: 'errors' is for dictionaries"):
            CoSpaDi(0.3, solver, allocation).fit(network, batches)
        return
    before = {name: value.clone() for name, value in network.state_dict().items()}
    fitted = CoSpaDi(0.3, solver, allocation, max_iter=2).fit(network, batches)
    assert {layer.name for layer in fitted.report_} == {f"blocks.{b}.{name}" for b in range(3) for name in "kv"} | {
        f"blocks.{b}.up" for b in range(3)
    }
    assert fitted.saved() >= 0.3 - 1e-9
    whole = network(batches[0]).detach()
    surgery = fitted.apply_(network)
    changed = network(batches[0]).detach()
    assert 0 < float((changed - whole).norm() / whole.norm()) < 0.9
    for name, weight in fitted.dense_weights(surgery.undo()).items():
        network.get_parameter(name).data.copy_(weight)
    torch.testing.assert_close(network(batches[0]), changed, atol=1e-5, rtol=1e-4)
    network.load_state_dict(before)
    torch.testing.assert_close(network(batches[0]), whole)


def test_tied_excluded_and_attention_weights_are_left(network, batches):
    fitted = CoSpaDi(0.3, layers=["blocks.*.*", "head"], exclude=r"1\.", max_iter=1).fit(network, batches)
    assert fitted.left_out_["head"] == "its weight is also that of embed"
    assert fitted.left_out_["blocks.1.up"] == "excluded"
    assert len(fitted.layers_) == 6
    network.blocks[2]["k"].weight = network.blocks[0]["k"].weight
    tied = CoSpaDi(0.3, max_iter=1).fit(network, batches)
    first, last = (next(r for r in tied.report_ if r.name == f"blocks.{b}.k") for b in (0, 2))
    assert last.bits == last.dense_bits == 0 < first.bits
    torch.testing.assert_close(*(tied.dense_weights(network)[f"blocks.{b}.k.weight"] for b in (0, 2)))
    with pytest.raises(ValueError, match="layers: none is left of 1"):
        CoSpaDi(0.3, layers="head").fit(network, batches)


def test_layers_of_one_kind_share_a_dictionary(network, batches):
    fitted = CoSpaDi(0.3, group_size=2, max_iter=3).fit(network, batches)
    layers = fitted.layers_
    assert layers["blocks.0.k"].dictionary is layers["blocks.1.k"].dictionary
    assert layers["blocks.2.k"].dictionary is not layers["blocks.0.k"].dictionary
    assert layers["blocks.0.k"].bias is not layers["blocks.1.k"].bias
    pair = [r for r in fitted.report_ if r.name in ("blocks.0.up", "blocks.1.up")]
    shared = layers["blocks.0.up"]
    assert sum(r.bits for r in pair) == shared.bits(16, code_bits=14) * 2 - 16 * (shared.dictionary.numel() + 48)
    alone = {r.name: r.error for r in CoSpaDi(0.3, max_iter=3).fit(network, batches).report_}
    assert alone["blocks.2.up"] == next(r.error for r in fitted.report_ if r.name == "blocks.2.up")


def test_passes_and_resuming_change_nothing(network, batches, tmp_path):
    whole = CoSpaDi(0.3, allocation="errors", max_iter=2).fit(network, batches)
    parts = CoSpaDi(0.3, allocation="errors", max_iter=2, passes=3).fit(network, batches)
    assert [r.error for r in whole.report_] == [r.error for r in parts.report_]
    said = []

    def stop(message, fraction):
        said.append(message)
        if len(said) == 5:
            raise KeyboardInterrupt

    for solver in ("procrustes", "svd", "round"):
        said.clear()
        make = lambda: CoSpaDi(0.3, solver, max_iter=2)  # noqa: B023, E731
        with pytest.raises(KeyboardInterrupt):
            make().fit(network, batches, keep=tmp_path, progress=stop)
        kept = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
        assert kept
        again = make().fit(network, batches, keep=tmp_path)
        assert sum(file.stat().st_mtime_ns == kept.get(file.name) for file in tmp_path.iterdir()) >= 3
        fresh = make().fit(network, batches)
        assert [r.error for r in again.report_] == [r.error for r in fresh.report_]


def test_layers_side_by_side_in_threads(network, batches, monkeypatch):
    alone = CoSpaDi(0.3, max_iter=2).fit(network, batches)
    threads, together, inside = torch.get_num_threads(), threading.Barrier(2, timeout=60), []
    own = cospadi.factorise

    def both(*given, **options):
        if len(inside) < 2:
            inside.append(torch.get_num_threads())
            together.wait()  # is passed only where two layers are worked on at the same time
        return own(*given, **options)

    monkeypatch.setattr(cospadi, "factorise", both)
    torch.set_num_threads(2)
    try:
        found = CoSpaDi(0.3, max_iter=2).fit(network, batches)
        assert torch.get_num_threads() == 2
        broken = copy.deepcopy(network)
        name = found.report_[3].name
        broken.get_submodule(name).weight.data[0, 0] = math.nan
        with pytest.raises(ValueError, match=f"{name}: weight"):
            CoSpaDi(0.3, max_iter=2).fit(broken)
    finally:
        torch.set_num_threads(threads)
    assert inside == [1, 1]
    assert [layer.name for layer in found.report_] == [layer.name for layer in alone.report_]
    assert [layer.error for layer in found.report_] == pytest.approx([layer.error for layer in alone.report_], rel=1e-4)


def test_calibration_rows_that_are_not_finite_are_left_out():
    model = nn.Sequential(nn.Linear(16, 30), nn.ReLU(), nn.Linear(30, 16))
    x = normal(60, 16, dtype=torch.float32)
    x[3, 2] = math.nan
    assert [layer.skipped for layer in CoSpaDi(0.3, max_iter=1).fit(model, [x]).report_] == [1, 1]


def test_bits_go_where_they_save_most():
    assert allocate([[1, 2, 3], [1, 2, 3]], [[9, 4, 0], [1, 0.5, 0]], 4) == [2, 0]
    assert allocate([[1, 2], [1, 2]], [[math.inf, 0], [5, 1]], 3) == [1, 0]
    random = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)).sort(dim=1, descending=True).values
    costs = [[1, 2, 3, 4, 5]] * 4
    found = allocate(costs, random.tolist(), 12)
    best = min(
        float(random[torch.arange(4), torch.tensor(c)].sum())
        for c in torch.cartesian_prod(*[torch.arange(5)] * 4).tolist()
        if sum(c) + 4 <= 12
    )
    assert float(random[torch.arange(4), torch.tensor(found)].sum()) <= best + float(random.diff(dim=1).abs().max())
    with pytest.raises(ValueError, match="budget: 2 bits are the least"):
        allocate([[1], [1]], [[0], [0]], 1)


@pytest.mark.parametrize("solver", ["svd", "procrustes"])
def test_the_curve_is_the_error_before_anything_is_learnt(solver):
    weight, metric = normal(40, 24), Moments(24).update(inputs(200, 24))
    curve = error_curve(weight, metric, [0.2, 0.5, 0.999], solver=solver)
    for ratio, lost in zip([0.2, 0.5], curve):
        assert lost == pytest.approx(factorise(weight, metric, ratio, solver=solver).history[0], rel=1e-3)
    assert curve[2] == math.inf
