"""The estimator that puts nested prefixes on frozen embeddings."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from subspan.represent import Matryoshka, Truncated, truncate
from subspan.statistics import Moments


def rows(n=200, d=16, seed=0):
    generator = np.random.default_rng(seed)
    return generator.standard_normal((n, d)) * np.arange(1, d + 1) ** -0.7 + 0.1


@pytest.mark.parametrize("center", [False, True])
def test_the_principal_flag_is_that_of_the_moments(center):
    x = rows()
    model = Matryoshka((2, 4, 8), center=center).fit(x)
    whole = Moments(16).update(x).subspace(8, center=center)
    for m in (2, 4, 8):
        assert float(model.subspace_.truncate(m).angles(whole.truncate(m)).max()) < 1e-6
    z = Matryoshka((2, 4, 8), center=center, normalize=False).fit(x).transform(x)
    assert z.shape == (200, 8)
    expected = (x - (x.mean(0) if center else 0)) @ model.subspace_.basis.numpy()
    ratio = z / expected
    np.testing.assert_allclose(ratio, ratio.flat[0], rtol=1e-3)
    assert [block.dim for block in model.subspace_.split((2, 4))] == [2, 2, 4]


def test_whole_rows_keep_their_cosines_and_prefixes_have_unit_length():
    x = rows()
    model = Matryoshka().fit(x)
    assert model.dims_ == (8, 16)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    z = model.transform(x)
    np.testing.assert_allclose(z @ z.T, unit @ unit.T, atol=1e-5)
    short = model.shorten(x, 3)
    np.testing.assert_allclose(np.linalg.norm(short, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(short, z[:, :3] / np.linalg.norm(z[:, :3], axis=1, keepdims=True), atol=1e-6)


def test_a_file_is_read_as_its_rows(tmp_path):
    x = rows().astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    whole = Matryoshka((4, 8)).fit(x)
    streamed = Matryoshka((4, 8)).fit(tmp_path / "x.npy")
    assert float(whole.subspace_.angles(streamed.subspace_).max()) < 1e-5
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="bad"):
        Matryoshka.load(tmp_path / "bad.safetensors")


def planted(n=600, d=16, classes=4, seed=0):
    """Classes in the directions of least variance: what principal components drop first."""
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    x = generator.standard_normal((n, d)) * np.linspace(3, 0.5, d)
    x[:, -3:] += 1.5 * np.random.default_rng(7).standard_normal((classes, 3))[labels]
    return x, labels


def accuracy(z, labels):
    """Nearest class mean."""
    means = np.stack([z[labels == c].mean(0) for c in np.unique(labels)])
    return float(np.mean(((z[:, None] - means) ** 2).sum(-1).argmin(1) == labels))


@pytest.mark.parametrize("kind", ["rotation", "mlp"])
def test_labels_bring_the_classes_into_the_first_coordinates(kind, tmp_path):
    pytest.importorskip("lightning")
    x, labels = planted()
    names = np.array(["a", "b", "c", "d"])[labels]
    rate, epochs = (0.1, 30) if kind == "rotation" else (0.02, 15)
    options = {"epochs": epochs, "batch_size": 100, "learning_rate": rate, "hidden": 32, "random_state": 0}
    model = Matryoshka((3, 16), kind=kind, **options).fit(x, names)
    pca = Matryoshka((3, 16)).fit(x)
    assert accuracy(model.shorten(x, 3), labels) > accuracy(pca.shorten(x, 3), labels) + 0.2
    assert model.losses_[-1] < model.losses_[0]
    assert list(model.classes_) == ["a", "b", "c", "d"]
    assert model.logits(x).shape == (2, 600, 4)
    model.save(tmp_path / "m.safetensors")
    loaded = Matryoshka.load(tmp_path / "m.safetensors")
    np.testing.assert_allclose(loaded.transform(x), model.transform(x), atol=1e-5)
    np.testing.assert_allclose(loaded.logits(x), model.logits(x), atol=1e-4)
    if kind == "rotation":
        basis = model.subspace_.basis
        torch.testing.assert_close(basis.mT @ basis, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-9)
        again = Matryoshka(**model.get_params()).fit(x, names)
        np.testing.assert_array_equal(again.transform(x), model.transform(x))


@pytest.mark.parametrize("kind", ["rotation", "linear", "mlp"])
def test_what_nothing_was_set_for_is_trained_enough(kind):
    pytest.importorskip("lightning")
    x, labels = planted(1000)
    test, truth = planted(1000, seed=5)
    model = Matryoshka((3, 16), kind, hidden=32, random_state=0).fit(x, labels)
    pca = Matryoshka((3, 16)).fit(x)
    first, last = (model.logits(test).argmax(-1) == truth).mean(1)
    assert first > accuracy(pca.shorten(test, 3), truth) + 0.15
    assert last > LogisticRegression().fit(x, labels).score(test, truth) - 0.1


@pytest.mark.parametrize("objective", ["labels", "pairs", "similarity"])
def test_the_objective_pulls_as_written_and_both_ways(objective):
    pytest.importorskip("lightning")
    from subspan.nn import MatryoshkaAdapter
    from subspan.represent.nested_training import NestedTraining

    x, y = (torch.from_numpy(rows(20, 6, seed=seed).astype(np.float32)) for seed in (0, 1))
    labels = torch.arange(20) % 3
    adapter = MatryoshkaAdapter(6, (2, 6), kind="linear")
    torch.manual_seed(0)
    options = {"weights": [2.0, 1.0], "temperature": 0.3, "num_classes": 3 if objective == "labels" else 0}
    module = NestedTraining(adapter, objective, dims=(2, 6), **options)
    batch = {"labels": (x, labels), "pairs": (x, y), "similarity": (x,)}[objective]
    (found,) = torch.autograd.grad(module.training_loss(batch), adapter.map.weight)
    loss = torch.zeros(())
    for weight, m in ((2, 2), (1, 6)):
        z, w = adapter(x)[:, :m], adapter(y)[:, :m]
        if objective == "labels":
            term = F.cross_entropy(module.heads.logits(z, m), labels)
        elif objective == "pairs":
            logits = F.normalize(z, dim=1) @ F.normalize(w, dim=1).mT / 0.3
            truth = torch.arange(20)
            term = (F.cross_entropy(logits, truth) + F.cross_entropy(logits.mT, truth)) / 2
        else:
            error = F.normalize(z, dim=1) @ F.normalize(z, dim=1).mT - F.normalize(x, dim=1) @ F.normalize(x, dim=1).mT
            term = error[~torch.eye(20, dtype=torch.bool)].square().mean()
        loss = loss + weight * term
    torch.testing.assert_close(found, torch.autograd.grad(loss, adapter.map.weight)[0])


def test_pairs_bring_what_they_share_into_the_first_coordinates():
    pytest.importorskip("lightning")
    generator = np.random.default_rng(0)
    shared = generator.standard_normal((400, 3))
    x, y = (
        np.hstack([3 * generator.standard_normal((400, 9)), shared + 0.2 * generator.standard_normal((400, 3))])
        for _ in range(2)
    )
    options = {"epochs": 40, "batch_size": 100, "learning_rate": 0.1, "temperature": 0.2, "random_state": 0}
    model = Matryoshka((3, 12), kind="rotation", **options).fit(x, y)
    found = model.shorten(x, 3) @ model.shorten(y, 3).T
    plain = Matryoshka((3, 12)).fit(np.vstack([x, y]))
    before = plain.shorten(x, 3) @ plain.shorten(y, 3).T
    truth = np.arange(400)
    assert np.mean(found.argmax(1) == truth) > 5 * np.mean(before.argmax(1) == truth) + 0.05
    assert float(model.subspace_.truncate(3).basis[9:].square().sum()) > 2.5


def test_without_labels_prefixes_keep_cosines_no_worse_than_the_start():
    pytest.importorskip("lightning")
    x = rows(300).astype(np.float32)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)

    def error(model):
        z = model.shorten(x, 4)
        return float(np.mean((z @ z.T - unit @ unit.T) ** 2))

    model = Matryoshka((4, 16), kind="rotation", epochs=20, learning_rate=0.01, batch_size=100, random_state=0).fit(x)
    assert error(model) < error(Matryoshka((4, 16)).fit(x))


def test_truncate_takes_arrays_modules_and_encoders():
    x = rows(5).astype(np.float32)
    np.testing.assert_array_equal(truncate(x, 3, normalize=False), x[:, :3])
    assert np.linalg.norm(truncate(x, 3), axis=1) == pytest.approx(np.ones(5), abs=1e-6)
    half = truncate(torch.from_numpy(x).half(), 3)
    assert half.dtype == torch.float16
    assert torch.equal(truncate(torch.zeros(2, 4), 1), torch.zeros(2, 1))
    layer = torch.nn.Linear(16, 8)
    cut = truncate(layer, 2)
    assert isinstance(cut, Truncated)
    torch.testing.assert_close(cut(torch.from_numpy(x)), truncate(layer(torch.from_numpy(x)).detach(), 2))

    class Encoder:
        def encode(self, items):
            return np.stack([x[item] for item in items])

        def iterate(self, items):
            yield self.encode(items)

    np.testing.assert_array_equal(truncate(Encoder(), 3).encode([0, 2]), truncate(x[[0, 2]], 3))
    np.testing.assert_array_equal(next(truncate(Encoder(), 3).iterate([1])), truncate(x[[1]], 3))


@pytest.mark.parametrize(
    ("options", "x", "y", "message"),
    [
        ({"kind": "tree"}, rows(), None, "kind"),
        ({"dims": (4, 17)}, rows(), None, "dims"),
        ({"dims": (4, 4)}, rows(), None, "repeated"),
        ({"dims": (2.5,)}, rows(), None, "dims"),
        ({"dims": (2, 4), "weights": (1,)}, rows(), None, "weights"),
        ({}, np.full((5, 3), np.nan), None, "NaN"),
        ({}, np.ones((5, 3)) * 0, None, "constant"),
        ({"kind": "rotation"}, rows(), np.zeros(200), "1 class"),
        ({"kind": "rotation"}, rows(), np.zeros(3), "y: expected 200"),
        ({"kind": "rotation"}, rows(), np.zeros((200, 3)), "y: expected 16 columns"),
    ],
)
def test_bad_input_is_named(options, x, y, message):
    with pytest.raises(ValueError, match=message):
        Matryoshka(**options).fit(x, y)
