"""Checkpoints as vectors: the algebra of deltas, in memory and from shards, and subspaces by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from subspan.geometry import Subspace
from subspan.models.weight_files import StoredWeights, weights_of, write_weights
from subspan.models.weights import StateDelta, SubspaceMap, as_matrix

SHAPES = {"embed": (7, 4), "bias": (5,), "filters": (3, 2, 2, 2), "scale": ()}


def state(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    return drawn | {"steps": torch.tensor(seed)}


@pytest.fixture
def base():
    return state(0)


@pytest.fixture
def delta(base):
    return StateDelta.between(base, state(1))


def flat(mapping):
    return torch.cat([mapping[name].flatten().double() for name in SHAPES])


def same(found, expected):
    assert set(found) == set(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_base_and_delta_are_the_tuned_one_and_nothing_is_changed(base, delta):
    kept = {name: value.clone() for name, value in base.items()}
    assert set(delta) == set(SHAPES)
    same(dict(delta.added_to(base)), state(1) | {"steps": base["steps"]})
    same(base, kept)


def test_deltas_are_vectors(base, delta):
    other = StateDelta.between(base, state(2))
    a, b = flat(delta), flat(other)
    mixed = 0.3 * delta - other * 2 + -delta
    torch.testing.assert_close(flat(mixed), -0.7 * a - 2 * b, rtol=1e-5, atol=1e-6)
    assert delta.norm() == pytest.approx(float(a.norm()))
    assert delta.dot(other) == pytest.approx(float(a @ b), rel=1e-5)
    assert delta.cosine(other) == pytest.approx(float(a @ b / a.norm() / b.norm()), rel=1e-5)
    assert delta.norms()["bias"] == pytest.approx(float(delta["bias"].norm()))
    with pytest.raises(ValueError, match="zero"):
        delta.cosine(0 * delta)
    part = StateDelta({"bias": torch.Size((5,))}, {"bias": torch.ones(5)}.__getitem__)
    torch.testing.assert_close((part + delta)["bias"], delta["bias"] + 1)
    assert set(part + delta) == set(SHAPES)


def test_it_is_computed_when_it_is_asked_for_or_once(base):
    read = []
    delta = StateDelta.between(base, state(1)).map(lambda name, value: (read.append(name), value)[1])
    halved = 0.5 * delta
    assert read == []
    kept = halved.in_memory()
    assert sorted(read) == sorted(SHAPES)
    torch.testing.assert_close(flat(kept), flat(kept + 0 * kept))
    assert len(read) == len(SHAPES)


def test_masks_and_magnitudes_leave_what_they_say(delta):
    mask = torch.arange(28).reshape(7, 4) % 3 == 0
    kept = delta.masked({"embed": mask})
    torch.testing.assert_close(kept["embed"], delta["embed"] * mask)
    torch.testing.assert_close(kept["bias"], delta["bias"])
    sparse = delta.sparsified(0.25)
    assert {name: int((sparse[name] != 0).sum()) for name in sparse} == {
        "embed": 7,
        "bias": 1,
        "filters": 6,
        "scale": 1,
    }
    left = delta["embed"][sparse["embed"] == 0].abs().max()
    assert float(sparse["embed"][sparse["embed"] != 0].abs().min()) >= float(left)
    same(delta.sparsified(1.0), delta)
    for wrong in ({"embed": torch.ones(4, 7)}, {"nothing": torch.ones(2)}):
        with pytest.raises(ValueError, match="masks"):
            delta.masked(wrong)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("side", ["left", "right"])
def test_subspaces_are_spans_of_singular_vectors(delta, side):
    spaces = delta.subspaces(2, side=side)
    for name, value in delta.items():
        u, s, vh = torch.linalg.svd(as_matrix(value), full_matrices=False)
        k = min(2, len(s))
        vectors = (u[:, :k] if side == "left" else vh[:k].mT).contiguous()
        assert spaces[name].dim == k
        torch.testing.assert_close(spaces[name].projector, vectors @ vectors.mT, atol=1e-5, rtol=0)


def test_inside_and_outside_make_the_whole_and_full_rank_is_all(base, delta):
    reference = StateDelta.between(base, state(3))
    spaces = reference.subspaces(0.7)
    inside, outside = delta.projected(spaces), delta.projected(spaces, outside=True)
    torch.testing.assert_close(flat(inside + outside), flat(delta))
    assert abs(inside.dot(outside)) < 1e-4
    # Of orthogonal projections the cosine is the root of the share of the energy.
    assert delta.cosine(inside) ** 2 == pytest.approx((inside.norm() / delta.norm()) ** 2, rel=1e-4)
    u, v = delta["bias"], reference["bias"]
    torch.testing.assert_close(inside["bias"], (u @ v) / (v @ v) * v)
    one = {"embed": spaces["embed"]}
    torch.testing.assert_close(delta.projected(one)["bias"], delta["bias"])
    same(delta.projected(delta.subspaces(100)), delta)


def test_rank_stops_where_the_numbers_do_and_zero_has_no_subspace(base):
    tuned = {name: value.clone() for name, value in base.items()}
    tuned["embed"] = base["embed"] + torch.outer(torch.arange(7.0), torch.ones(4))
    spaces = StateDelta.between(base, tuned).subspaces(3)
    assert list(spaces) == ["embed"]
    assert spaces["embed"].dim == 1


@pytest.mark.parametrize(("dtype", "shards"), [(torch.float32, 4), (torch.bfloat16, 3)])
def test_shards_are_read_one_tensor_at_a_time_and_written_whole(tmp_path, base, delta, dtype, shards):
    for seed, name in ((0, "base"), (1, "tuned")):
        write_weights(state(seed, dtype), tmp_path / name, shard_bytes=64)
    files = sorted(path.name for path in (tmp_path / "base").iterdir())
    assert files[0] == f"model-00001-of-0000{shards}.safetensors"
    assert files[-1] == "model.safetensors.index.json"
    assert len(files) == shards + 1
    stored = StateDelta.between(tmp_path / "base", tmp_path / "tuned")
    assert all(value.dtype == torch.float32 for value in stored.values())
    torch.testing.assert_close(flat(stored), flat(delta), atol=0.03 if dtype is torch.bfloat16 else 1e-7, rtol=0)
    write_weights(stored.added_to(tmp_path / "base"), tmp_path / "again")
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["model.safetensors"]
    same(load_file(tmp_path / "again" / "model.safetensors"), state(1, dtype) | {"steps": base["steps"]})
    index = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in state(0, dtype).values())
    reopened = StoredWeights(tmp_path / "base" / "model.safetensors.index.json")
    same(reopened, state(0, dtype))
    with pytest.raises(ValueError, match="exists"):
        write_weights(base, tmp_path / "base")


def test_names_that_the_delta_lacks_are_said(delta):
    spaces = delta.subspaces(1)
    with pytest.raises(ValueError, match="subspaces: the delta has no other"):
        delta.projected({"other": next(iter(spaces.values()))})
    with pytest.raises(ValueError, match="masks: the delta has no other"):
        delta.masked({"other": torch.ones(2)})


def test_a_killed_run_goes_on_after_the_shards_it_has(tmp_path, base, delta):
    computed = []

    def sums(kill_at=None):
        def noted(name, value):
            computed.append(name)
            if name == kill_at:
                raise KeyboardInterrupt
            return value

        return delta.map(noted).added_to(base)

    options = {"shard_bytes": 64, "resume": "sum of two"}
    with pytest.raises(KeyboardInterrupt):
        write_weights(sums("scale"), tmp_path / "model", **options)
    assert not (tmp_path / "model").exists()
    first, computed[:] = list(computed), []
    write_weights(sums(), tmp_path / "model", **options, finish=lambda made: (made / "config.json").write_text("{}"))
    assert 0 < len(computed) < len(first) + len(delta) - 1  # of what is in whole shards nothing is computed twice
    same(dict(StoredWeights(tmp_path / "model")), dict(delta.added_to(base)))
    assert (tmp_path / "model" / "config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    # Other settings start from the beginning.
    with pytest.raises(KeyboardInterrupt):
        write_weights(sums("scale"), tmp_path / "other", **options)
    computed.clear()
    write_weights(sums(), tmp_path / "other", shard_bytes=64, resume="another sum")
    assert set(computed) == set(delta)
    with pytest.raises(ValueError, match="resume: needs a mapping"):
        write_weights(delta.items(), tmp_path / "third", resume="x")


def test_a_run_that_fails_leaves_nothing(tmp_path, base, delta):
    broken = delta.map(lambda name, value: value / (0 if name == "filters" else 1))
    with pytest.raises(ValueError, match="'filters' contains NaN or infinity"):
        write_weights(broken.added_to(base), tmp_path / "model", shard_bytes=8)
    with pytest.raises(ValueError, match="'bias' comes twice"):
        write_weights([("bias", base["bias"])] * 2, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_damaged_checkpoints_are_named(tmp_path, base):
    write_weights(base, tmp_path / "model", shard_bytes=64)
    index = tmp_path / "model" / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    save_file({"bias": torch.ones(5)}, tmp_path / "secret.safetensors")
    for wrong in ("../secret.safetensors", "absent.safetensors", 3):
        index.write_text(json.dumps({"weight_map": listed["weight_map"] | {"bias": wrong}}))
        with pytest.raises(ValueError, match=r"weight_map|no such file"):
            StoredWeights(tmp_path / "model")
    index.write_text(json.dumps({"weight_map": listed["weight_map"] | {"other": listed["weight_map"]["bias"]}}))
    with pytest.raises(ValueError, match="model-0000"):
        StoredWeights(tmp_path / "model")["other"]
    index.unlink()
    with pytest.raises(ValueError, match="4 safetensors files"):
        StoredWeights(tmp_path / "model")
    (tmp_path / "file.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="not a readable"):
        StoredWeights(tmp_path / "file.safetensors")


def test_checkpoints_that_differ_are_told_apart(base):
    tuned = state(1)
    tuned["embed"] = torch.zeros(8, 4)
    del tuned["bias"]
    tuned["head"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"only in base: bias; only in tuned: head; of other shapes: embed"):
        StateDelta.between(base, tuned)
    loose = StateDelta.between(base, tuned, strict=False)
    assert list(loose) == ["filters", "scale"]
    assert loose.left_out == ("bias", "head", "embed")
    with pytest.raises(ValueError, match="base: lacks"):
        list(StateDelta.between(base, state(1)).added_to({"bias": base["bias"]}))
    with pytest.raises(ValueError, match="int8, expected floating point"):
        StateDelta.between(base, state(1) | {"embed": torch.zeros(7, 4, dtype=torch.int8)})["embed"]
    with pytest.raises(ValueError, match="no floating-point"):
        StateDelta.between({"steps": base["steps"]}, {"steps": base["steps"]})


def test_modules_are_changed_in_place_and_tied_weights_once():
    torch.manual_seed(0)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head, self.norm = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False), nn.BatchNorm1d(3)
            self.head.weight = self.embed.weight
            self.register_buffer("scratch", torch.zeros(2), persistent=False)

    before, after = Tied(), Tied()
    after.norm.running_mean.fill_(3)
    delta = StateDelta.between(before, after).in_memory()
    assert list(delta) == ["embed.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"]
    assert "head.weight" not in weights_of(before)
    (0.5 * delta).apply_(before)
    (0.5 * delta).apply_(before)
    same(before.state_dict(), after.state_dict())
    assert before.head.weight is before.embed.weight


def test_a_delta_is_in_a_model_for_a_while(base):
    model = nn.BatchNorm1d(3)
    before = {name: (value, value.clone()) for name, value in weights_of(model).items()}
    tuned = {
        name: value + torch.rand(()) if value.is_floating_point() else value for name, (_, value) in before.items()
    }
    delta = StateDelta.between(model, tuned).only(["weight", "running_mean"])
    assert list(delta) == ["weight", "running_mean"]
    pointers = {name: value.data_ptr() for name, (value, _) in before.items()}

    def inside():
        with delta.applied(model) as changed:
            assert changed is model
            torch.testing.assert_close(model.weight, tuned["weight"])
            torch.testing.assert_close(model.running_mean, tuned["running_mean"])
            assert model.bias.data_ptr() == pointers["bias"]
            model.weight.data.zero_()
            raise KeyError("within")

    with pytest.raises(KeyError, match="within"):
        inside()
    for name, (value, copy) in before.items():
        assert weights_of(model)[name] is value
        assert torch.equal(value, copy)
        assert value.data_ptr() == pointers[name]
    with pytest.raises(ValueError, match="base: lacks"), StateDelta.between(base, state(1)).applied(model):
        pass
    with pytest.raises(ValueError, match="names: the delta has no wrong"):
        delta.only(["weight", "wrong"])


def test_subspaces_by_name_survive_a_file(tmp_path, delta):
    spaces = delta.subspaces(0.9)
    spaces.save(tmp_path / "spaces.safetensors")
    again = SubspaceMap.load(tmp_path / "spaces.safetensors")
    assert list(again) == list(spaces)
    for name in spaces:
        assert torch.equal(again[name].basis, spaces[name].basis)
        assert again[name].count == spaces[name].count
    assert again.overlap(spaces) == pytest.approx(dict.fromkeys(spaces, 1.0), abs=1e-6)
    assert again.to(torch.float64)["embed"].basis.dtype == torch.float64
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors"):
        SubspaceMap.load(tmp_path / "other.safetensors")
    assert SubspaceMap({"a": Subspace.random(6, 2)}).overlap({"b": Subspace.random(6, 2)}) == {}
