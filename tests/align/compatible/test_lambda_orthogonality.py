"""Adapters between frozen embedding models."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from subspan.align import LambdaOrthogonalAdapter
from subspan.geometry.closed_forms import procrustes
from subspan.geometry.grassmann import random_basis
from subspan.measures.retrieval import retrieval_scores
from subspan.nn import orthogonality_defect


def pairs(n=300, d=8, *, determinant=None, noise=0.0, seed=0):
    """New rows, and old ones that are a rotation of them with noise."""
    generator = torch.Generator().manual_seed(seed)
    q = random_basis(d, d, generator=generator).float()
    if determinant is not None and float(torch.linalg.det(q)) * determinant < 0:
        q[:, 0] *= -1
    new = torch.randn(n, d, generator=generator)
    return new, new @ q.mT + noise * torch.randn(n, d, generator=generator)


def quick(**options):
    return LambdaOrthogonalAdapter(**({"epochs": 5, "batch_size": 64, "random_state": 0} | options))


ONLY_BACKWARD = {"weights": (0.0, 1.0, 0.0), "normalize": False, "batch_size": 1000}


def test_without_penalty_and_contrast_it_is_least_squares():
    new, _ = pairs()
    generator = torch.Generator().manual_seed(5)
    old = new @ torch.randn(8, 8, generator=generator) + 1 + 0.3 * torch.randn(300, 8, generator=generator)
    model = quick(backward="affine", epochs=800, learning_rate=0.03, **ONLY_BACKWARD).fit(new, old)
    solution = torch.linalg.lstsq(torch.cat([new, torch.ones(300, 1)], 1), old).solution
    torch.testing.assert_close(model.map_.matrix, solution[:-1].mT.contiguous(), rtol=0, atol=0.02)
    torch.testing.assert_close(model.map_.bias, solution[-1], rtol=0, atol=0.02)
    free = quick(lam=math.inf, epochs=800, learning_rate=0.03, **ONLY_BACKWARD).fit(new, old)
    torch.testing.assert_close(free.map_.matrix, model.map_.matrix)


@pytest.mark.parametrize("determinant", [1, -1])
def test_strict_training_reaches_the_best_rotation_that_its_start_allows(determinant):
    new, old = pairs(determinant=determinant, noise=0.5)
    cross = new.double().mT @ old.double() / len(new)

    def error(matrix):
        return float((new.double() @ matrix.double().mT - old.double()).square().mean())

    # From the identity the exponential reaches rotations alone: Kabsch's optimum.
    from_identity = quick(backward="strict", start="identity", epochs=500, learning_rate=0.03, **ONLY_BACKWARD)
    from_identity.fit(new, old)
    kabsch = error(procrustes(cross, determinant=1).matrix)
    assert error(from_identity.map_.matrix) == pytest.approx(kabsch, rel=0.01)
    assert float(torch.linalg.det(from_identity.map_.matrix)) == pytest.approx(1, abs=1e-4)
    free = quick(backward="strict", epochs=3, **ONLY_BACKWARD).fit(new, old)
    best = error(procrustes(cross).matrix)
    assert error(free.map_.matrix) == pytest.approx(best, rel=0.01)
    assert (best < 0.9 * kabsch) is (determinant == -1)
    fixed = quick(backward="strict", determinant=-determinant, epochs=1, **ONLY_BACKWARD).fit(new, old)
    assert float(torch.linalg.det(fixed.map_.matrix)) == pytest.approx(-determinant, abs=1e-4)


def test_a_strict_map_changes_no_distance_and_no_ranking():
    new, old = pairs(noise=0.3)
    labels = torch.arange(300) % 10
    model = quick(backward="strict", learning_rate=1e-2).fit(new, old, labels)
    unit, mapped = F.normalize(new, dim=1), model.transform(new)
    torch.testing.assert_close(torch.cdist(mapped, mapped), torch.cdist(unit, unit), rtol=0, atol=1e-3)
    torch.testing.assert_close(mapped @ mapped.mT, unit @ unit.mT, rtol=0, atol=1e-5)
    before, after = (retrieval_scores(rows, rows, labels, labels, exclude_self=True) for rows in (unit, mapped))
    assert after.cmc() == pytest.approx(before.cmc(), abs=1e-5)
    assert after.mean_average_precision == pytest.approx(before.mean_average_precision, abs=1e-5)
    assert model.orthogonality_defect_ < 1e-4


def stretched(n=64, rows=1500):
    """Old rows that are a stretched rotation of the new ones, far beyond any λ tested."""
    u, v = (random_basis(n, n, generator=torch.Generator().manual_seed(seed)).float() for seed in (1, 2))
    new = torch.randn(rows, n, generator=torch.Generator().manual_seed(3))
    return new, new @ (u @ torch.diag(torch.linspace(0.1, 2.8, n)) @ v.mT).mT


@pytest.mark.parametrize("lam", [3.0, 12.0])
def test_a_planted_stretch_is_followed_until_lambda(lam):
    new, old = stretched()
    options = {"weights": (0.0, 1.0, 0.0), "normalize": False, "batch_size": 1500, "epochs": 700, "random_state": 0}
    model = LambdaOrthogonalAdapter(lam=lam, learning_rate=2e-3, **options).fit(new, old)
    assert 0.88 * lam < model.orthogonality_defect_ < 1.02 * lam
    assert model.orthogonality_defect_ == pytest.approx(model.map_.orthogonality_defect, rel=1e-3)


def test_a_penalty_that_is_outweighed_says_so_and_the_safeguard_holds_it():
    new, old = stretched()
    options = {"weights": (0.0, 1.0, 0.0), "normalize": False, "batch_size": 1500, "epochs": 300, "penalty": 1e-3}
    with pytest.warns(UserWarning, match="penalty was jumped or outweighed"):
        loose = LambdaOrthogonalAdapter(lam=6.0, learning_rate=5e-3, **options).fit(new, old)
    assert loose.orthogonality_defect_ > 9
    held = LambdaOrthogonalAdapter(lam=6.0, learning_rate=5e-3, safeguard=True, **options).fit(new, old)
    assert held.orthogonality_defect_ <= 6.0 * (1 + 1e-4)


def stepped(weights, **options):
    """How far one step under some terms moves B and F, each by Adam's first step: the rate, whatever the gradient."""
    new, old = pairs(40, noise=0.5)
    options = {
        "epochs": 1,
        "batch_size": 40,
        "learning_rate": 1e-3,
        "backward": "affine",
        "start": "identity",
    } | options
    model = quick(weights=weights, **options).fit(new, old)
    return model.map_.matrix - torch.eye(8), model.forward_.weight - torch.eye(8), model, new, old


def test_lifted_old_vectors_and_mapped_new_ones_meet_half_way():
    """The first term moves its target too: F's target is B as it is trained, not B as it was."""
    moved_b, moved_f, _, new, old = stepped((1.0, 0.0, 0.0))
    x, y = F.normalize(new, dim=1), F.normalize(old, dim=1)
    b, f = (torch.eye(8, requires_grad=True) for _ in range(2))
    grad_b, grad_f = torch.autograd.grad((y @ f.mT - x @ b.mT).square().mean(), (b, f))
    for moved, gradient in ((moved_b, grad_b), (moved_f, grad_f)):
        clear = gradient.abs() > 1e-4
        assert int(clear.sum()) > 50
        torch.testing.assert_close(moved[clear], -1e-3 * gradient[clear].sign(), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_contrast_moves_both_maps_against_the_raw_old_vectors_too(symmetric):
    moved_b, moved_f, model, new, old = stepped((0.0, 0.0, 1.0), symmetric=symmetric)
    x, y = F.normalize(new, dim=1), F.normalize(old, dim=1)
    b, f = (torch.eye(8, requires_grad=True) for _ in range(2))
    truth = torch.arange(40)

    def contrast(anchors, candidates):
        logits = F.normalize(anchors, dim=1) @ F.normalize(candidates, dim=1).mT / model.temperature
        there, back = F.cross_entropy(logits, truth), F.cross_entropy(logits.mT, truth)
        return (there + back) / 2 if symmetric else there

    grad_b, grad_f = torch.autograd.grad(contrast(y @ f.mT, x @ b.mT) + contrast(y @ f.mT, y), (b, f))
    for moved, gradient in ((moved_b, grad_b), (moved_f, grad_f)):
        clear = gradient.abs() > 1e-4
        assert int(clear.sum()) > 50
        torch.testing.assert_close(moved[clear], -1e-3 * gradient[clear].sign(), rtol=1e-2, atol=1e-5)


def test_the_old_vectors_are_a_fixed_target_of_the_backward_map():
    moved_b, moved_f, *_ = stepped((0.0, 1.0, 0.0))
    assert float(moved_f.abs().max()) == 0
    assert float(moved_b.abs().max()) > 9e-4


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("d_old", [5, 8, 11])
def test_the_first_objective_is_the_formula(labelled, d_old):
    new, old = pairs(40)
    old = torch.cat([old, old], 1)[:, :d_old]
    labels = torch.arange(40) % 7 if labelled else None
    # A vanishing step leaves the starting maps in place, so that the history holds their terms.
    model = quick(epochs=1, learning_rate=1e-12, lam=0.0, temperature=0.2, start="identity").fit(new, old, labels)
    x, y = F.normalize(new, dim=1), F.normalize(old, dim=1)
    mapped = x
    lifted = y @ torch.eye(8, d_old).mT
    m = min(8, d_old)

    def contrast(a, c):
        logits = F.normalize(a, dim=1) @ F.normalize(c, dim=1).mT / 0.2
        total = 0.0
        for i in range(40):
            same = [j for j in range(40) if (labels[i] == labels[j] if labelled else i == j)]
            total -= sum(float(logits[i].log_softmax(0)[j]) for j in same) / len(same) / 40
        return total

    (terms,) = model.history_
    assert terms["forward"] == pytest.approx(float((lifted - mapped).square().mean()), rel=1e-4)
    assert terms["backward"] == pytest.approx(float((mapped[:, :m] - y[:, :m]).square().mean()), rel=1e-4)
    expected = contrast(lifted, mapped) + contrast(lifted[:, :m], y[:, :m])
    assert terms["contrast"] == pytest.approx(expected, rel=1e-4)
    assert terms["penalty"] == pytest.approx(0, abs=1e-5)


def test_old_lifted_and_new_vectors_share_one_space():
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(10, 12, generator=generator)
    labels = torch.arange(500) % 10
    new = centers[labels] + 0.6 * torch.randn(500, 12, generator=generator)
    old = new @ random_basis(12, 12, generator=generator).float() + 0.6 * torch.randn(500, 12, generator=generator)
    fit, test = slice(0, 300), slice(300, 500)

    def score(queries, gallery):
        m = min(queries.shape[1], gallery.shape[1])
        found = retrieval_scores(queries[:, :m], gallery[:, :m], labels[test], labels[test], exclude_self=True)
        return found.mean_average_precision

    for d_old, ways in ((12, ("strict", "lambda", "affine")), (9, ("lambda",))):
        part = old[:, :d_old]
        own = score(part[test], part[test])
        for backward in ways:
            model = quick(backward=backward, epochs=40, learning_rate=5e-3).fit(new[fit], part[fit], labels[fit])
            mapped, lifted = model.transform(new[test]), model.transform_old(part[test])
            assert mapped.shape == lifted.shape == (200, 12)
            assert score(mapped, part[test]) > own
            assert score(lifted, lifted) > own - 0.02
            assert score(mapped, lifted) > own


def test_forward_alone_leaves_new_vectors_as_they_are():
    new, old = pairs(noise=0.2)
    model = quick(backward="none", forward="mlp", weights=(1.0, 0.0, 0.0), epochs=40).fit(new, old)
    unit = F.normalize(new, dim=1)
    lifted = model.transform_old(old)
    assert float(F.cosine_similarity(lifted, unit).mean()) > 0.8
    assert model.orthogonality_defect_ < 1e-6
    assert set(model.history_[0]) == {"forward"}
    # One row at a time: batch normalisation is that of the training.
    torch.testing.assert_close(model.transform_old(old[:1]), lifted[:1])


def test_arrays_memory_maps_and_half_precision(tmp_path):
    new, old = pairs(100)
    whole = quick().fit(new, old)
    np.save(tmp_path / "new.npy", new.numpy())
    np.save(tmp_path / "old.npy", old.numpy())
    stored = [np.load(tmp_path / name, mmap_mode="r") for name in ("new.npy", "old.npy")]
    mapped = quick().fit(*stored)
    torch.testing.assert_close(mapped.map_.matrix, whole.map_.matrix)
    assert isinstance(mapped.transform(stored[0]), np.ndarray)
    assert isinstance(mapped.transform_old(stored[1]), np.ndarray)
    half = quick().fit(new.half(), old.half())
    torch.testing.assert_close(half.map_.matrix, whole.map_.matrix, rtol=0, atol=1e-2)
    assert half.transform(new.half()).dtype == torch.float16
    assert half.map_.matrix.dtype == torch.float32
    again = quick().fit(new, old)
    assert torch.equal(again.map_.matrix, whole.map_.matrix)


def test_classes_with_one_item_count_for_themselves():
    new, old = pairs(50)
    alone = quick().fit(new, old, np.arange(50))
    unlabelled = quick().fit(new, old)
    torch.testing.assert_close(alone.map_.matrix, unlabelled.map_.matrix)


def test_the_departure_from_a_rotation_is_spanned_and_ordered():
    new, _ = pairs()
    stretch = torch.ones(8)
    stretch[2], stretch[5] = 3.0, 0.3
    model = quick(backward="affine", epochs=800, learning_rate=0.03, **ONLY_BACKWARD).fit(new, new * stretch)
    found = model.departure(0.2)
    torch.testing.assert_close(found.variances, torch.tensor([8.0, 0.91], dtype=torch.float64), rtol=0.05, atol=0.05)
    torch.testing.assert_close(found.basis.abs(), torch.eye(8)[:, [2, 5]].double(), rtol=0, atol=0.05)
    with pytest.raises(ValueError, match="no direction departs"):
        quick(backward="strict").fit(new, new * stretch).departure()


@pytest.mark.parametrize(("backward", "forward"), [("lambda", "affine"), ("strict", "mlp")])
def test_the_maps_survive_a_file(tmp_path, backward, forward):
    new, old = pairs(80)
    model = quick(backward=backward, forward=forward).fit(new, old[:, :6])
    model.save(tmp_path / "adapter.safetensors")
    loaded = LambdaOrthogonalAdapter.load(tmp_path / "adapter.safetensors")
    torch.testing.assert_close(loaded.transform(new), model.transform(new))
    torch.testing.assert_close(loaded.transform_old(old[:, :6]), model.transform_old(old[:, :6]))
    assert loaded.orthogonality_defect_ == pytest.approx(model.orthogonality_defect_)
    assert loaded.get_params()["backward"] == backward
    model.map_.save(tmp_path / "map.safetensors")
    with pytest.raises(ValueError, match="holds affine-map"):
        LambdaOrthogonalAdapter.load(tmp_path / "map.safetensors")


def test_a_map_without_a_limit_survives_a_file(tmp_path):
    new, old = pairs(80)
    for option in ("lam", "lam_rel"):
        model = quick(**{option: math.inf}).fit(new, old)
        model.save(tmp_path / "adapter.safetensors")
        loaded = LambdaOrthogonalAdapter.load(tmp_path / "adapter.safetensors")
        assert loaded.lam_ == loaded.get_params()[option] == math.inf
        torch.testing.assert_close(loaded.transform(new), model.transform(new))


def test_few_pairs_and_a_worse_new_model_are_warned_of():
    new, old = pairs(6)
    with pytest.warns(UserWarning, match="undetermined"):
        quick().fit(new, old)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quick(backward="strict").fit(new, old)
    labels = torch.arange(300) % 5
    good = F.one_hot(labels, 8) + 0.2 * torch.randn(300, 8, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(300, 8, generator=torch.Generator().manual_seed(2))
    with pytest.warns(UserWarning, match="retrieves worse than the old one"):
        quick(backward="strict").fit(noise, good, labels)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: quick().fit(x, y[:-1]), "Y: expected 300 rows"),
        (lambda x, y: quick().fit(x, y * math.nan), "Y: 300 of 300 rows"),
        (lambda x, y: quick().fit(x[:1], y[:1]), "at least 2 pairs"),
        (lambda x, y: quick().fit(x, y, [0, 1]), "labels: expected 300"),
        (lambda x, y: quick().fit(x, torch.ones(300, 8)), "Y: all rows are equal"),
        (lambda x, y: quick(lam=-1.0).fit(x, y), "lam: expected a number >= 0"),
        (lambda x, y: quick(alpha=-1.0).fit(x, y), "alpha: expected a number >= 0"),
        (lambda x, y: quick(weights=(1.0,)).fit(x, y), "weights"),
        (lambda x, y: quick(backward="free").fit(x, y), "backward"),
        (lambda x, y: quick(temperature=0.0).fit(x, y), "temperature"),
        (lambda x, y: quick(epochs=0).fit(x, y), "epochs"),
        (lambda x, y: quick(determinant=2).fit(x, y), "determinant"),
        (lambda x, y: quick().fit(x, y).transform(x[:, :3]), "expected 8 columns"),
        (lambda x, y: quick().fit(x, y).transform_old(y[:, :3]), "Y: expected 8 columns"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*pairs())


def test_the_relative_limit_is_the_default():
    new, old = pairs(100)
    assert quick().fit(new, old).lam_ == pytest.approx(0.375 * math.sqrt(8))
    assert quick(lam=2.0).fit(new, old).lam_ == 2.0
    assert float(orthogonality_defect(quick().fit(new, old).map_.matrix)) < 1.1 * 0.375 * math.sqrt(8)
