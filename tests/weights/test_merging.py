"""Closed forms of merging: the published steps written out once more, planted truths, and streams from files."""

import pytest
import torch

from subspan.models import StateDelta, StoredWeights, weight_files, write_weights
from subspan.weights import average, dare, iso_c, iso_cts, magnitude_of_share, task_arithmetic, ties, tsv_merge

SHAPES = {"a.weight": (12, 8), "a.bias": (12,), "b.weight": (6, 12), "conv": (4, 3, 2, 2)}
METHODS = (average, task_arithmetic, ties, dare, tsv_merge, iso_c, iso_cts)


def weights(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.fixture
def deltas():
    return [StateDelta.between(weights(0), weights(seed)) for seed in (1, 2, 3)]


def svd(matrix):
    return torch.linalg.svd(matrix, full_matrices=False)


def polar(matrix):
    u, _, vh = svd(matrix)
    return u @ vh


def test_average_and_task_arithmetic(deltas):
    whole = torch.stack([delta["conv"] for delta in deltas])
    torch.testing.assert_close(average(deltas)["conv"], whole.mean(0))
    torch.testing.assert_close(task_arithmetic(deltas, 0.4)["conv"], 0.4 * whole.sum(0))
    torch.testing.assert_close(task_arithmetic(deltas, 1 / 3)["a.bias"], average(deltas)["a.bias"])


@pytest.mark.parametrize("share", [1e-9, 0.01, 0.2, 0.5, 1.0])
def test_the_magnitude_of_a_share_is_exact(deltas, share):
    flat = torch.cat([value.flatten() for value in deltas[0].values()]).abs().sort(descending=True).values
    assert magnitude_of_share(deltas[0], share) == float(flat[max(1, round(share * len(flat))) - 1])


@pytest.mark.parametrize("density", [0.2, 0.7])
def test_ties_by_its_three_steps(deltas, density):
    flat = torch.stack([torch.cat([value.flatten() for value in delta.values()]) for delta in deltas])
    kept = round(density * flat.shape[1])
    limit = flat.abs().sort(dim=1, descending=True).values[:, kept - 1 : kept]
    trimmed = torch.where(flat.abs() >= limit, flat, 0)
    sign = trimmed.sum(0).sign()
    agree = (trimmed.sign() == sign) & (trimmed != 0)
    expected = (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)
    found = torch.cat([value.flatten() for value in ties(deltas, density, 1.0).values()])
    torch.testing.assert_close(found, expected)
    assert 0 < float((found == 0).float().mean()) < 1


def test_dare_keeps_the_mean_and_its_draws_do_not_depend_on_the_order():
    delta = StateDelta.between({"w": torch.zeros(200, 200)}, {"w": torch.ones(200, 200)})
    found = dare([delta, delta], drop=0.9, scaling=0.5)["w"]
    assert set(found.unique().tolist()) == {0.0, 5.0, 10.0}  # two draws of their own, each enlarged tenfold
    assert float(found.mean()) == pytest.approx(1.0, abs=0.05)
    many = [StateDelta.between(weights(0), weights(1))]
    backwards = {name: dare(many)[name] for name in reversed(SHAPES)}
    assert all(torch.equal(dare(many)[name], value) for name, value in backwards.items())
    assert not torch.equal(dare(many, random_state=1)["conv"], dare(many)["conv"])


def test_tsv_merge_written_out(deltas):
    matrices = [delta["a.weight"] for delta in deltas]
    u, s, v = torch.zeros(12, 8), torch.zeros(8), torch.zeros(8, 8)
    for number, matrix in enumerate(matrices):
        parts, place = svd(matrix), slice(2 * number, 2 * number + 2)  # 8 // 3 of each
        u[:, place], s[place], v[place] = parts[0][:, :2], parts[1][:2], parts[2][:2]
    expected = polar(u[:, :6]) @ torch.diag(s[:6]) @ polar(v[:6])
    torch.testing.assert_close(tsv_merge(deltas)["a.weight"], expected, atol=1e-4, rtol=1e-4)
    for name in ("a.bias", "conv"):
        torch.testing.assert_close(tsv_merge(deltas)[name], average(deltas)[name])


def test_isotropic_merging_written_out(deltas):
    matrices = [delta["b.weight"] for delta in deltas]
    total = sum(matrices)
    u, s, v = svd(total)
    torch.testing.assert_close(iso_c(deltas, 2.0)["b.weight"], 2 * s.mean() * u @ v, atol=1e-4, rtol=1e-4)
    # 6 directions, half of them common: one of its own for each of three tasks.
    common, parts = u[:, :3], []
    for matrix in matrices:
        own = svd(matrix - common @ common.T @ matrix)
        parts.append((own[0][:, :1], own[1][:1], own[2][:1]))
    parts.append((common, s[:3], v[:3]))
    left, sizes, right = (torch.cat([p[i] for p in parts], dim) for i, dim in ((0, 1), (1, 0), (2, 0)))
    expected = sizes.mean() * polar(left) @ polar(right)
    torch.testing.assert_close(iso_cts(deltas, common_share=0.5)["b.weight"], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(iso_cts(deltas, common_share=1.0)["b.weight"], iso_c(deltas)["b.weight"])
    assert float(torch.linalg.cond(iso_cts(deltas)["b.weight"])) == pytest.approx(1, abs=1e-3)


def test_updates_in_orthogonal_subspaces_come_back_whole():
    eye = torch.eye(6)
    experts = [{"w": 3 * eye[:, :3] @ eye[:3]}, {"w": 2 * eye[:, 3:] @ eye[3:]}]
    merged = tsv_merge([StateDelta.between({"w": torch.zeros(6, 6)}, expert) for expert in experts])["w"]
    torch.testing.assert_close(merged, sum(expert["w"] for expert in experts))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_every_method_works_tensor_by_tensor_on_files(method, deltas, tmp_path):
    for seed in range(4):
        write_weights(weights(seed), tmp_path / f"{seed}", shard_bytes=256)
    stored = [StateDelta.between(tmp_path / "0", tmp_path / f"{seed}") for seed in (1, 2, 3)]
    write_weights(method(stored).added_to(tmp_path / "0"), tmp_path / "merged", shard_bytes=256)
    found = StoredWeights(tmp_path / "merged")
    base, expected = weights(0), method(deltas)
    assert set(found) == set(SHAPES)
    for name in SHAPES:
        torch.testing.assert_close(found[name], base[name] + expected[name])
    # Where no task changed anything, nothing is made up.
    still = [StateDelta.between(base, {**weights(seed), "a.weight": base["a.weight"]}) for seed in (1, 2)]
    assert not bool(method(still)["a.weight"].any())


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_what_does_not_fit_is_named(method):
    with pytest.raises(ValueError, match="deltas: at least one"):
        method([])
    other = StateDelta.between({"z": torch.zeros(2)}, {"z": torch.ones(2)})
    with pytest.raises(ValueError, match=r"deltas: number 1 has other tensors than the first: a\.bias"):
        method([StateDelta.between(weights(0), weights(1)), other])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: ties(d, 0), r"density: in \(0, 1\]"),
        (lambda d: dare(d, 1.0), r"drop: in \[0, 1\)"),
        (lambda d: iso_cts(d, common_share=1.5), "common_share"),
    ],
)
def test_options_out_of_range(deltas, call, message):
    with pytest.raises(ValueError, match=message):
        call(deltas)


@pytest.mark.parametrize(
    ("method", "dtype"),
    [(average, torch.bfloat16), (task_arithmetic, torch.float32), (ties, torch.float32), (dare, torch.float16)],
)
def test_of_large_tensors_only_some_rows_are_read(method, dtype, tmp_path, monkeypatch):
    # The first by name is small: checks of types look at the first item of a mapping.
    shapes = {"a": (40,), "embed": (501, 40), "head": (3, 3000), "scale": ()}
    generator = torch.Generator().manual_seed(0)
    for folder in ("base", "one", "two"):
        drawn = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        write_weights(drawn, tmp_path / folder)
    monkeypatch.setattr(weight_files, "BLOCK", 4000)
    deltas = [StateDelta.between(tmp_path / "base", tmp_path / name) for name in ("one", "two")]
    expected = dict(method([delta.in_memory() for delta in deltas]).added_to(dict(StoredWeights(tmp_path / "base"))))
    read = []
    for name, own in (("__getitem__", StoredWeights.__getitem__), ("rows", StoredWeights.rows)):
        monkeypatch.setattr(StoredWeights, name, lambda *what, own=own: read.append(own(*what)) or read[-1])
    write_weights(method(deltas).added_to(tmp_path / "base"), tmp_path / "merged", shard_bytes=30_000)
    assert max(value.numel() for value in read) <= 4000
    passes = 3 if method is ties else 1
    assert sum(value.numel() for value in read if value.ndim == 2) == (4 * passes + 1) * (501 * 40 + 3 * 3000)
    monkeypatch.undo()
    found = StoredWeights(tmp_path / "merged")
    assert len(set(found.files.values())) > 1
    for name, value in expected.items():
        assert found[name].dtype == dtype
        torch.testing.assert_close(found[name], value, atol=0, rtol=0)
