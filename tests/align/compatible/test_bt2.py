"""Two basis changes that keep a new embedding comparable with an old one."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from subspan.align import BasisTransform, BT2Head, BT2Loss, TeacherDataset, old_class_means, teacher_features
from subspan.geometry import Subspace
from subspan.geometry.grassmann import random_basis


def unit(n, d, seed=0, dtype=torch.float64):
    rows = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.normalize(rows, dim=-1).to(dtype)


SHAPES = [(12, 12, 4, 2.0), (12, 8, 3, 3.0), (8, 10, 4, 2.0), (10, 10, 0, 1.5), (6, 4, 4, 2.0), (5, 9, 4, 2.0)]


@pytest.mark.parametrize(("d_new", "d_old", "k", "scale"), SHAPES)
def test_the_length_is_constant_and_inner_products_blend_those_of_f_and_e(d_new, d_old, k, scale):
    model = BasisTransform(d_new, d_old, k, scale).double()
    f, e = unit(30, d_new), unit(30, k, 1)
    out = model(f, e)
    assert out.full.shape == (30, d_new + k)
    assert out.compatible.shape == (30, d_old)
    torch.testing.assert_close(torch.cat([out.compatible, out.residual], 1), out.full)
    lengths = out.full.square().sum(1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, (k > 0) + scale**2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.full @ out.full.mT, e @ e.mT + scale**2 * f @ f.mT, rtol=1e-5, atol=1e-5)
    found_f, found_e = model.recover(out.full)
    torch.testing.assert_close(found_f, f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_e, e, rtol=1e-5, atol=1e-5)
    joint = torch.cat([e, f], 1)
    torch.testing.assert_close(model.affine_map.map(joint), out.full, rtol=1e-5, atol=1e-5)


def test_with_identity_bases_the_output_is_the_concatenation():
    model = BasisTransform(10, 7, 3, 2.0, init="identity")
    f, e = unit(5, 10, dtype=torch.float32), unit(5, 3, 1, dtype=torch.float32)
    torch.testing.assert_close(model(f, e).full, torch.cat([e, 2 * f], 1))
    torch.testing.assert_close(model(f, e).compatible, torch.cat([e, 2 * f[:, :4]], 1))


def test_without_extra_dimensions_it_is_a_rotation_of_the_new_vector():
    model = BasisTransform(9, 9, 0, 2.0)
    f = unit(40, 9, dtype=torch.float32)
    out = model(f, f[:, :0])
    rotation = model.old_basis.weight @ model.new_basis.weight
    torch.testing.assert_close(out.compatible, 2 * f @ rotation.mT)
    assert out.residual.shape == (40, 0)


def test_visible_and_residual_subspaces_are_complements_and_are_what_the_compatible_part_sees():
    model = BasisTransform(12, 8, 3)
    visible, residual = model.visible_subspace, model.residual_subspace
    assert visible.basis.shape == (12, 5)
    assert residual.distance(visible.complement()) < 1e-6
    f, e = unit(20, 12, dtype=torch.float32), unit(20, 3, 1, dtype=torch.float32)
    moved = f + residual.project(unit(20, 12, 2)).float()
    torch.testing.assert_close(model(moved, e).compatible, model(f, e).compatible, rtol=0, atol=1e-5)
    shifted = f + visible.project(unit(20, 12, 2)).float()
    assert float((model(shifted, e).compatible - model(f, e).compatible).detach().abs().max()) > 0.1
    with pytest.raises(ValueError, match="'visible' is empty"):
        _ = BasisTransform(6, 4, 4).visible_subspace
    with pytest.raises(ValueError, match="'residual' is empty"):
        _ = BasisTransform(4, 6, 2).residual_subspace


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_leave_the_bases_exact(dtype):
    model = BasisTransform(16, 12, 4)
    f, e = unit(8, 16, dtype=torch.float32).to(dtype), unit(8, 4, 1, dtype=torch.float32).to(dtype)
    out = model(f, e)
    assert out.full.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = model(f, e)
    torch.testing.assert_close(cast.full, out.full, rtol=0, atol=1e-5)


def planted(n=600, d_new=12, d_old=10, k=4, scale=2.0):
    """f, e and an old model that sees f through planted directions."""
    f, e = unit(n, d_new, 1, torch.float32), unit(n, k, 2, torch.float32)
    seen = random_basis(d_new, d_old - k, generator=torch.Generator().manual_seed(3))
    r2 = random_basis(d_old, d_old, generator=torch.Generator().manual_seed(4)).float()
    old = F.normalize(torch.cat([e, scale * f @ seen.float()], 1) @ r2.mT, dim=-1)
    return f, e, old, Subspace(seen)


def fitted(model, f, e, old, steps=400):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = 1 - F.cosine_similarity(model(f, e).compatible, old).mean()
        loss.backward()
        optimizer.step()
        schedule.step()
    return float(loss.detach())


def test_training_the_bases_alone_finds_what_the_old_model_sees():
    f, e, old, seen = planted()
    losses, models = [], []
    for sign in (1, -1):
        model = BasisTransform(12, 10, 4, generator=torch.Generator().manual_seed(5))
        start = model.old_basis.weight.detach().clone()
        start[:, 0] *= sign
        model.old_basis.weight = start
        losses.append(fitted(model, f, e, old))
        models.append(model)
    best = models[int(np.argmin(losses))]
    assert min(losses) < 1e-3
    assert float(best.visible_subspace.angles(seen).max()) < math.radians(1)
    for basis in (best.new_basis, best.old_basis):
        assert float((basis.weight @ basis.weight.mT - torch.eye(basis.d)).abs().max()) < 1e-5


def test_a_warm_start_begins_near_the_planted_answer():
    f, e, old, seen = planted(4000)
    cold = BasisTransform(12, 10, 4, generator=torch.Generator().manual_seed(5))
    warm = copy.deepcopy(cold).warm_start(f, e, old)

    def loss(model):
        return float(1 - F.cosine_similarity(model(f, e).compatible, old).mean().detach())

    assert loss(warm) < 0.02 < 0.5 < loss(cold)
    assert float(warm.visible_subspace.angles(seen).max()) < 0.2
    # With k = d_old the old space is reached through e alone, by a reflection as well as by a rotation.
    turn = random_basis(4, 4, generator=torch.Generator().manual_seed(6)).float()
    for old_from_e in (e @ turn.mT, e @ turn.mT * torch.tensor([-1.0, 1, 1, 1])):
        every = BasisTransform(12, 4, 4).warm_start(f, e, old_from_e)
        torch.testing.assert_close(every(f, e).compatible, old_from_e, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((8, 4, 5), "k: must lie"), ((8, 13, 4), "d_old: at most"), ((8, 4, 2, 0.0), "scale"), ((0, 1, 0), "d_new")],
)
def test_impossible_shapes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        BasisTransform(*arguments)


def test_wrong_widths_are_named():
    with pytest.raises(ValueError, match="f, e: expected widths 8 and 2"):
        BasisTransform(8, 4, 2)(torch.ones(3, 8), torch.ones(3, 3))


# ------------------------------------------------------------------------------------------------ head and loss


def test_the_head_follows_the_published_wiring():
    torch.manual_seed(0)
    head = BT2Head(20, 12, 8, 3, num_classes=5)
    g = torch.randn(6, 20)
    out = head(g)
    f = F.normalize(g[:, :12], dim=-1)
    e = F.normalize(F.normalize(head.old_branch(g.relu()), dim=-1)[:, :3], dim=-1)
    torch.testing.assert_close(out.new, f)
    torch.testing.assert_close(out.extra, e)
    torch.testing.assert_close(out.logits, f @ head.classifier.weight.mT)
    torch.testing.assert_close(out.full, head.transform(f, e).full)
    # One row at a time gives the same, and other pooled widths go through a linear layer.
    torch.testing.assert_close(torch.cat([head(row[None]).full for row in g]), out.full)
    assert BT2Head(33, 12, 8, 0, num_classes=5)(torch.randn(2, 33)).full.shape == (2, 12)


def test_zero_features_give_no_nan():
    head = BT2Head(20, 12, 8, 3, num_classes=5)
    loss, _ = BT2Loss(torch.randn(5, 8))(
        head(torch.zeros(2, 20)), torch.tensor([0, 1]), unit(2, 8).float(), unit(2, 12).float()
    )
    loss.backward()
    assert bool(torch.isfinite(loss))
    assert all(bool(torch.isfinite(p.grad).all()) for p in head.parameters() if p.grad is not None)


def test_the_loss_is_its_four_terms_written_out():
    torch.manual_seed(1)
    head, means = BT2Head(20, 12, 8, 3, num_classes=5), torch.randn(5, 8)
    out = head(torch.randn(7, 20))
    y, old, new = torch.tensor([0, 1, 2, 3, 4, 0, 1]), unit(7, 8, 3, torch.float32), unit(7, 12, 4, torch.float32)
    total, terms = BT2Loss(means, (2.0, 3.0, 4.0))(out, y, old, new)
    expected = 0.0
    for i in range(7):
        b = out.compatible[i] / out.compatible[i].norm()
        classes = torch.stack([torch.dot(means[c], b) for c in range(5)])
        expected += -out.logits[i].log_softmax(0)[y[i]] + 2 * (1 - torch.dot(new[i], out.new[i]))
        expected += -3 * classes.log_softmax(0)[y[i]] + 4 * (1 - torch.dot(old[i], b))
    torch.testing.assert_close(total, expected / 7)
    assert list(terms) == ["classification", "new_matching", "influence", "old_matching"]
    total.backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name
    with pytest.raises(ValueError, match="lambdas"):
        BT2Loss(means, (1.0, 2.0))


def test_unless_said_otherwise_the_terms_pull_with_the_published_weights():
    torch.manual_seed(2)
    head, means = BT2Head(33, 12, 8, 3, num_classes=5), torch.randn(5, 8)
    y, old, new = torch.tensor([0, 1, 2, 3]), unit(4, 8, 3, torch.float32), unit(4, 12, 4, torch.float32)
    out = head(torch.randn(4, 33))
    total, terms = BT2Loss(means)(out, y, old, new)
    parts = list(head.parameters())
    found = torch.autograd.grad(total, parts, retain_graph=True)
    pulls = [
        torch.autograd.grad(terms[name], parts, retain_graph=True, materialize_grads=True)
        for name in ("classification", "new_matching", "influence", "old_matching")
    ]
    for gradient, *each in zip(found, *pulls):
        torch.testing.assert_close(gradient, each[0] + each[1] + 10 * each[2] + 5 * each[3])
    smooth, _ = BT2Loss(means, label_smoothing=0.2, temperature=0.5)(out, y, old, new)
    soft = F.cross_entropy(out.logits, y, label_smoothing=0.2)
    warm = F.cross_entropy(F.normalize(out.compatible, dim=1) @ means.mT / 0.5, y)
    torch.testing.assert_close(
        smooth - total, soft - terms["classification"] + 10 * (warm - terms["influence"]), rtol=1e-4, atol=1e-5
    )


# ------------------------------------------------------------------------------------------------ teachers


def test_class_means_are_those_of_unit_rows_and_absent_classes_are_named():
    rows = torch.randn(60, 4, dtype=torch.float64)
    labels = np.arange(60) % 3
    means = old_class_means(rows.numpy(), labels)
    for c in range(3):
        torch.testing.assert_close(means[c].double(), F.normalize(rows[c::3], dim=1).mean(0), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="no sample of class 3"):
        old_class_means(rows, labels, 4)
    assert bool((old_class_means(rows, labels, 4, missing="drop")[3] == 0).all())
    with pytest.raises(ValueError, match="labels: must lie"):
        old_class_means(rows, labels, 2)
    with pytest.raises(ValueError, match="old: 1 of 60 rows"):
        old_class_means(rows.index_fill(0, torch.tensor(3), torch.nan), labels)


def test_teacher_features_are_computed_once_and_kept_as_a_memory_map(tmp_path):
    calls = []

    def encoder(batch):
        calls.append(len(batch))
        return batch.flatten(1) * 3

    inputs = np.random.default_rng(0).normal(size=(70, 2, 5)).astype(np.float32)
    first = teacher_features(encoder, inputs, tmp_path / "old.npy", batch_size=32)
    assert isinstance(first, np.memmap)
    assert calls == [32, 32, 6]
    np.testing.assert_allclose(first, F.normalize(torch.from_numpy(inputs).flatten(1), dim=1), atol=1e-6)
    np.testing.assert_array_equal(teacher_features(encoder, inputs, tmp_path / "old.npy"), first)
    assert calls == [32, 32, 6, 1, 1]
    for other in (lambda batch: encoder(batch).roll(1, 1), lambda batch: encoder(batch)[:, :4]):
        with pytest.raises(ValueError, match="is of another encoder or of other inputs"):
            teacher_features(other, inputs, tmp_path / "old.npy")
    with pytest.raises(ValueError, match="is of another encoder or of other inputs"):
        teacher_features(encoder, inputs[::-1].copy(), tmp_path / "old.npy")
    with pytest.raises(ValueError, match="expected 60 rows"):
        teacher_features(encoder, inputs[:60], tmp_path / "old.npy")
    with pytest.raises(ValueError, match=r"ends in \.npy"):
        teacher_features(encoder, inputs, tmp_path / "old.bin")
    with pytest.raises(ValueError, match="encoder: "):
        teacher_features(lambda batch: batch.flatten(1) * torch.nan, inputs, tmp_path / "nan.npy")
    assert [path.name for path in tmp_path.iterdir()] == ["old.npy"]


def test_the_data_set_reads_memory_maps_and_any_ids(tmp_path):
    inputs, labels = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32), np.arange(20) % 3 * 100 + 7
    old = teacher_features(lambda batch: batch[:, :4], inputs, tmp_path / "old.npy")
    with pytest.warns(UserWarning, match="new: rows are not of unit length"):
        data = TeacherDataset(inputs, labels, old, 2 * inputs)
    assert data.classes.tolist() == [7, 107, 207]
    x, y, o, n = next(iter(data.loader(8, shuffle=False)))
    torch.testing.assert_close(x, torch.from_numpy(inputs[:8]))
    assert y.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    torch.testing.assert_close(o, torch.from_numpy(np.array(old[:8])))
    torch.testing.assert_close(n, F.normalize(x, dim=1))
    torch.testing.assert_close(data[3][3], n[3])
    listed = TeacherDataset(list(torch.from_numpy(inputs)), torch.from_numpy(labels), old, np.asarray(n)[[0] * 20])
    torch.testing.assert_close(listed.__getitems__([2, 5])[0], torch.from_numpy(inputs[[2, 5]]))
    with pytest.raises(ValueError, match="old: expected 20 rows"):
        TeacherDataset(inputs, labels, old[:3], inputs)
    with pytest.raises(ValueError, match="labels: expected 20"):
        TeacherDataset(inputs, labels[:3], old, inputs)
    with pytest.raises(ValueError, match="new: 20 of 20 rows"):
        TeacherDataset(inputs, labels, old, inputs * np.nan)
