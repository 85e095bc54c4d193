import math
import warnings

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from subspan.edit import (
    ENSEMBLE_TEMPLATES,
    ConfidentAverage,
    PrototypeShift,
    marginal_entropy,
    select_confident,
    zero_shot_prototypes,
)
from subspan.edit.confident_views import view_entropies
from subspan.edit.sts import SpectralSteering, STSClassifier
from subspan.geometry import GavishDonoho, Subspace, random_matrix
from subspan.geometry.grassmann import random_basis

SCALE = 20.0


def unit(*shape, seed=0, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


@pytest.fixture
def prototypes():
    """30 classes in 16 dimensions with a dominant mean and a falling spectrum, as text embeddings have."""
    generator = torch.Generator().manual_seed(1)
    scale = torch.linspace(1.0, 0.05, 16, dtype=torch.float64)
    rows = torch.randn(30, 16, generator=generator, dtype=torch.float64) * scale
    return F.normalize(rows + torch.randn(16, generator=generator, dtype=torch.float64), dim=-1)


@pytest.fixture
def views(prototypes):
    """12 images, 20 views each, scattered around a prototype of theirs."""
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(12, 20, 16, generator=generator, dtype=torch.float64)
    return F.normalize(prototypes[:12, None] + 0.3 * noise, dim=-1)


def steer(prototypes, **options):
    return SpectralSteering(prototypes, SCALE, **{"rank": 5, "keep": 0.3, **options})


def reference(
    prototypes,
    views,
    basis,
    *,
    keep,
    steps,
    learning_rate,
    optimizer,
    reg,
    penalty,
    predict,
    per_class=False,
    side="text",
):
    """One image after the other with autograd and torch's own optimisers, as the paper describes it."""
    rows = []
    for image in views:
        logits = SCALE * image @ prototypes.T
        entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
        kept = image[entropy.argsort()[: max(1, int(keep * len(image)))]]
        shape = (len(prototypes), basis.shape[1]) if per_class else (basis.shape[1],)
        gamma = torch.zeros(shape, dtype=image.dtype, requires_grad=True)
        kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
        stepper = kinds[optimizer]([gamma], lr=learning_rate)

        def logits_of(rows, gamma):
            shift = gamma @ basis.T
            if side == "image":
                return SCALE * F.normalize(rows + shift, dim=-1) @ prototypes.T
            return SCALE * rows @ F.normalize(prototypes + shift, dim=-1).T

        for _ in range(steps):
            stepper.zero_grad()
            p = logits_of(kept, gamma).softmax(-1).mean(0)
            size = (gamma @ basis.T).norm() if penalty == "norm" else (gamma @ basis.T).square().sum()
            (-(p * p.log()).sum() + reg * size).backward()
            stepper.step()
        final = logits_of(image[:1] if predict == "original" else kept, gamma.detach())
        rows.append(final.softmax(-1).mean(0))
    return torch.stack(rows)


# ---------------------------------------------------------------- the rank rule on prototypes


@pytest.mark.parametrize(("beta", "omega"), [(1.0, 2.858), (0.5, 2.171), (0.1, 1.609), (0.02, 1.459)])
def test_threshold_has_the_published_values(beta, omega):
    assert random_matrix.gavish_donoho_omega(beta) == pytest.approx(omega, abs=6e-4)
    approximation = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    assert random_matrix.gavish_donoho_omega(beta) == pytest.approx(approximation, abs=0.02)


@pytest.mark.parametrize(("classes", "dim"), [(100, 384), (1000, 512)])
def test_default_rank_finds_a_planted_rank(classes, dim):
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(classes, 20, generator=generator) @ random_basis(dim, 20, generator=generator).float().T
    mean = 3 * F.normalize(torch.randn(dim, generator=generator), dim=-1)
    rows = signal + mean + 0.3 * torch.randn(classes, dim, generator=generator) / math.sqrt(dim)
    assert SpectralSteering(rows, 100.0).subspace.dim in (20, 21)


def test_prototype_subspace_is_uncentred_and_ordered(prototypes):
    steering = steer(prototypes)
    _, s, vh = torch.linalg.svd(prototypes, full_matrices=False)
    assert torch.allclose((steering.basis.T @ vh[:5].T).abs(), torch.eye(5).double(), atol=1e-6)
    assert torch.allclose(steering.subspace.variances, s[:5].square() / 30)
    assert steering.subspace.center is None
    centred = steer(prototypes, center=True)
    assert not torch.allclose(centred.subspace.projector, steering.subspace.projector, atol=1e-2)


@pytest.mark.filterwarnings("ignore:the median singular value")
def test_degenerate_class_sets_fall_back_with_a_warning():
    few = unit(2, 8)
    repeated = torch.cat([few, few, few, few])
    with pytest.warns(UserWarning, match="median singular value is zero"):
        assert SpectralSteering(repeated, SCALE).subspace.dim <= 2
    with pytest.warns(UserWarning, match="using one direction"):
        assert SpectralSteering(torch.eye(6), SCALE).subspace.dim == 1


# ---------------------------------------------------------------- selection and entropy


def test_marginal_entropy_is_the_log_sum_exp_formula():
    logits = 30 * torch.randn(4, 7, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    log_mean = log_p.logsumexp(-2) - math.log(7)
    expected = -(log_mean * log_mean.exp()).sum(-1)
    assert torch.allclose(marginal_entropy(logits), expected)
    mean = logits.softmax(-1).mean(-2)
    assert torch.allclose(marginal_entropy(logits), -torch.special.xlogy(mean, mean).sum(-1))
    # The marginal entropy is at least the mean entropy of the views, and differs from it.
    assert (marginal_entropy(logits) > view_entropies(logits).mean(-1) + 1e-3).all()


def test_marginal_entropy_survives_certainty():
    logits = torch.full((3, 4), -1e4)
    logits[:, 1] = 1e4
    assert float(marginal_entropy(logits)) == 0.0


def test_a_tenth_of_64_views_is_six_and_they_are_the_most_confident():
    logits = 5 * torch.randn(2, 64, 10, generator=torch.Generator().manual_seed(0))
    index, counts = select_confident(logits, 0.1)
    assert index.shape == (2, 6)
    assert bool(counts.all())
    entropy = view_entropies(logits)
    for row in range(2):
        assert set(index[row].tolist()) == set(entropy[row].topk(6, largest=False).indices.tolist())


def test_selection_of_less_than_one_view_warns_and_a_single_view_does_not():
    with pytest.warns(UserWarning, match="keeping one"):
        assert select_confident(torch.randn(5, 3), 0.1)[0].shape == (1,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select_confident(torch.randn(1, 3), 0.1)[0].shape == (1,)


def test_selection_uses_the_prototypes_before_adaptation(prototypes, views):
    steering = steer(prototypes, steps=20, learning_rate=0.05, predict="original")
    before = ConfidentAverage(prototypes, SCALE, keep=0.3)
    index, _ = select_confident(SCALE * views @ prototypes.T, before.keep)
    assert torch.equal(steering.explain(views).kept, index)


# ---------------------------------------------------------------- parity with autograd, image by image


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("predict", ["confident_mean", "original"])
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"steps": 5},
        {"steps": 5, "reg": 0.1},
        {"steps": 4, "reg": 0.3, "penalty": "squared"},
        {"per_class": True, "steps": 3},
        {"per_class": True, "steps": 3, "reg": 0.2},
        {"side": "image", "steps": 3},
    ],
    ids=str,
)
def test_batched_closed_form_equals_the_autograd_loop(prototypes, views, optimizer, predict, variant):
    subspace = Subspace.fit(prototypes, rank=5, center=False)
    options = {"steps": 1, "learning_rate": 0.03, "optimizer": optimizer, "reg": 0.0, "penalty": "norm", "keep": 0.3}
    options |= variant | {"predict": predict}
    found = SpectralSteering(prototypes, SCALE, subspace=subspace, **options)(views)
    expected = reference(prototypes, views, subspace.basis, **options)
    assert torch.allclose(found, expected, atol=1e-10)
    assert not torch.allclose(found, ConfidentAverage(prototypes, SCALE, keep=0.3, predict=predict)(views), atol=1e-4)


@pytest.mark.parametrize("per_class", [False, True])
def test_prototype_shift_equals_the_autograd_loop_in_all_dimensions(prototypes, views, per_class):
    options = {"steps": 2, "learning_rate": 5e-3, "optimizer": "adamw", "reg": 0.0, "penalty": "norm", "keep": 0.1}
    options |= {"per_class": per_class, "predict": "original"}
    eye = torch.eye(16, dtype=torch.float64)
    expected = reference(prototypes, views, eye, **options)
    assert torch.allclose(PrototypeShift(prototypes, SCALE, **options)(views), expected, atol=1e-10)


@pytest.mark.parametrize(("per_class", "side"), [(False, "text"), (True, "text"), (False, "image")])
def test_gradient_equals_autograd_away_from_zero(prototypes, views, per_class, side):
    subspace = Subspace.random(16, 6, generator=torch.Generator().manual_seed(3))
    steering = steer(prototypes, subspace=subspace, per_class=per_class, side=side, reg=0.4)
    shape = (12, 30, 6) if per_class else (12, 6)
    gamma = 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    gamma.requires_grad_()
    kept = views[:, :6]
    shift = gamma @ subspace.basis.T
    if side == "image":
        logits = F.normalize(kept + shift.unsqueeze(1), dim=-1) @ prototypes.T
    else:
        moved = F.normalize(prototypes + (shift if per_class else shift.unsqueeze(1)), dim=-1)
        logits = kept @ moved.mT
    loss = marginal_entropy(SCALE * logits) + 0.4 * torch.linalg.vector_norm(shift.flatten(1), dim=-1)
    loss.sum().backward()
    everything = torch.ones(12, 6, dtype=torch.bool)
    found = steering._gradient(kept, kept @ prototypes.T, everything, gamma.detach())
    assert torch.allclose(found, gamma.grad, atol=1e-10)


def test_a_batch_equals_its_images_one_by_one_in_any_order(prototypes, views):
    steering = steer(prototypes, steps=3)
    together = steering(views)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(together[order], steering(views[order]), atol=1e-12)
    assert torch.allclose(together, torch.cat([steering(image) for image in views]), atol=1e-12)


def test_chunks_do_not_change_the_answer(prototypes, views, monkeypatch):
    steering = steer(prototypes, steps=2)
    whole = steering.explain(views)
    monkeypatch.setattr("subspan.edit.prototypes._CHUNK_NUMBERS", 20 * 30 * 5)
    pieces = steering.explain(views)
    assert torch.allclose(whole.probabilities, pieces.probabilities, atol=1e-12)
    assert torch.equal(whole.kept, pieces.kept)


def test_online_mode_carries_over_and_reset_forgets(prototypes, views):
    episodic, online = steer(prototypes), steer(prototypes, online=True)
    first = online(views)
    assert torch.allclose(first[0], episodic(views)[0])
    assert not torch.allclose(first[1:], episodic(views)[1:], atol=1e-6)
    online.reset()
    halves = torch.cat([online(views[:5]), online(views[5:])])
    assert torch.allclose(first, halves)


# ---------------------------------------------------------------- facts about the step


def test_first_adam_step_is_the_sign_of_the_gradient_times_lr(prototypes, views):
    steering = steer(prototypes, learning_rate=5e-3)
    report = steering.explain(views)
    assert torch.allclose(report.coefficients.abs(), torch.full_like(report.coefficients, 5e-3), rtol=1e-4)
    assert torch.allclose(report.shift.norm(dim=-1), torch.full((12,), 5e-3 * math.sqrt(5)).double(), rtol=1e-4)
    assert torch.allclose(report.shift, report.coefficients @ steering.basis.T)


def test_regulariser_and_decay_matter_only_after_the_first_step(prototypes, views):
    plain = steer(prototypes)(views)
    assert torch.equal(plain, steer(prototypes, reg=10.0, weight_decay=0.5)(views))
    several = steer(prototypes, steps=5)(views)
    assert not torch.allclose(several, steer(prototypes, steps=5, reg=10.0)(views), atol=1e-5)
    assert not torch.allclose(several, steer(prototypes, steps=5, weight_decay=0.5)(views), atol=1e-7)


def with_basis(subspace, matrix):
    return Subspace(subspace.basis @ matrix)


def test_adamw_ignores_signs_of_directions_but_not_rotations_and_sgd_ignores_both(prototypes, views):
    subspace = Subspace.fit(prototypes, rank=5, center=False)
    signs = torch.diag(torch.tensor([1.0, -1, 1, -1, -1], dtype=torch.float64))
    rotation = random_basis(5, 5, generator=torch.Generator().manual_seed(0))
    turned = {"signs": with_basis(subspace, signs), "rotation": with_basis(subspace, rotation)}
    for optimizer, lr in (("adamw", 5e-2), ("sgd", 0.3)):
        answers = {
            name: steer(prototypes, subspace=basis, optimizer=optimizer, learning_rate=lr)(views)
            for name, basis in {"given": subspace, **turned}.items()
        }
        assert torch.allclose(answers["given"], answers["signs"], atol=1e-12)
        assert torch.allclose(answers["given"], answers["rotation"], atol=1e-12) == (optimizer == "sgd")


def test_a_shared_shift_acts_only_through_the_normalisation(prototypes, views):
    steering = steer(prototypes, learning_rate=0.2)
    report = steering.explain(views)
    image, shift = views[0], report.shift[0]
    raw = (SCALE * image @ (prototypes + shift).T).softmax(-1)
    assert torch.allclose(raw, (SCALE * image @ prototypes.T).softmax(-1), atol=1e-12)
    normalised = (SCALE * image @ F.normalize(prototypes + shift, dim=-1).T).softmax(-1)
    assert not torch.allclose(normalised, raw, atol=1e-3)


def test_logits_move_to_first_order_by_the_singular_coordinates(prototypes, views):
    subspace = Subspace.fit(prototypes, rank=5, center=False)
    gamma = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(prototypes, full_matrices=False)
    signs = (vh[:5] * subspace.basis.T).sum(-1).sign()
    view = views[0, 0]
    base = prototypes @ view
    errors = []
    for size in (1e-2, 1e-3):
        shift = subspace.basis @ (size * gamma)
        moved = F.normalize(prototypes + shift, dim=-1) @ view
        first_order = -base * ((u * s)[:, :5] * signs @ (size * gamma))
        shared = view @ shift
        errors.append(float((moved - base - shared - first_order).abs().max()))
    assert errors[0] < 2e-3
    assert errors[1] < errors[0] / 50


def test_small_gradient_steps_lower_the_entropy(prototypes, views):
    report = steer(prototypes, optimizer="sgd", learning_rate=1e-3).explain(views)
    assert bool((report.entropy_after < report.entropy_before).all())
    more = steer(prototypes, optimizer="sgd", learning_rate=1e-3, steps=30).explain(views)
    assert bool((more.entropy_after < report.entropy_after).all())


def test_keeping_every_view_of_one_gives_zero_shot(prototypes, views):
    expected = (SCALE * views[:, 0] @ prototypes.T).softmax(-1)
    assert torch.allclose(ConfidentAverage(prototypes, SCALE)(views[:, :1]), expected)
    assert torch.allclose(ConfidentAverage(prototypes, SCALE, predict="original")(views), expected)
    average = (SCALE * views @ prototypes.T).softmax(-1).mean(1)
    assert torch.allclose(ConfidentAverage(prototypes, SCALE, keep=1.0)(views), average)


# ---------------------------------------------------------------- masks, dtypes, modules


def test_masked_views_do_not_exist(prototypes, views):
    counts = torch.tensor([20, 7, 1, 13, 20, 4, 10, 11, 2, 16, 19, 3])
    mask = torch.arange(20) < counts.unsqueeze(-1)
    spoiled = views.masked_fill(~mask.unsqueeze(-1), torch.nan)
    steering = steer(prototypes, steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = steering.explain(spoiled, mask)
        for i, count in enumerate(counts.tolist()):
            alone = steering.explain(views[i, :count])
            assert torch.allclose(report.probabilities[i], alone.probabilities[0], atol=1e-12)
            assert torch.allclose(report.entropy_after[i], alone.entropy_after[0], atol=1e-12)
            kept = report.kept[i]
            assert kept[kept >= 0].tolist() == alone.kept[0].tolist()


def test_half_precision_views_are_computed_in_single(prototypes, views):
    steering = steer(prototypes.float())
    expected = steering(views.half().float())
    for dtype in (torch.float16, torch.bfloat16):
        assert steering(views.to(dtype)).dtype == torch.float32
    assert torch.equal(steering(views.half()), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(steering(views.half()), expected)
    assert torch.allclose(steering.half()(views.half()), expected, atol=0.02)


def test_numpy_views_and_unnormalised_rows_give_the_same(prototypes, views):
    steering = steer(prototypes)
    scaled = steer(prototypes * torch.linspace(1, 9, 30).double().unsqueeze(-1))
    assert torch.allclose(steering(views), scaled((7 * views).numpy()), atol=1e-10)
    for size in (1e-200, 1e200):
        assert torch.allclose(steering(views), steering(size * views), atol=1e-10)


def test_state_dict_carries_prototypes_and_basis(prototypes, views):
    source, target = steer(prototypes), steer(unit(30, 16, seed=9))
    assert not torch.allclose(source(views), target(views), atol=1e-3)
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(views), target(views))
    assert not list(source.parameters())
    assert "rank=5" in repr(source)


def test_more_classes_than_dimensions_and_fewer_both_work():
    for classes, dim in ((40, 6), (4, 50)):
        steering = SpectralSteering(unit(classes, dim), SCALE, rank=2, keep=0.5)
        probabilities = steering(unit(3, 8, dim, seed=5))
        assert probabilities.shape == (3, classes)
        assert torch.allclose(probabilities.sum(-1), torch.ones(3).double())


# ---------------------------------------------------------------- prototypes from texts


def fake_encoder(texts):
    rows = [torch.randn(12, generator=torch.Generator().manual_seed(sum(map(ord, text)))) for text in texts]
    return 3 * torch.stack(rows)


def test_prototypes_are_means_of_unit_template_embeddings():
    names = ["cat", "dog"]
    found = zero_shot_prototypes(fake_encoder, names, ENSEMBLE_TEMPLATES)
    assert len(ENSEMBLE_TEMPLATES) == 7
    for name, row in zip(names, found):
        mean = F.normalize(fake_encoder([t.format(name) for t in ENSEMBLE_TEMPLATES]), dim=-1).mean(0)
        assert torch.allclose(row, F.normalize(mean, dim=-1), atol=1e-6)


@pytest.mark.parametrize(
    ("names", "templates", "error", "match"),
    [
        (["cat"], ["a {}"], ValueError, "classnames: at least 2"),
        ("cats", ["a {}"], TypeError, "classnames: a list"),
        (["cat", " "], ["a {}"], ValueError, "classnames: texts that are not empty"),
        (["cat", "dog"], ["a photo"], ValueError, "templates: each needs"),
        (["cat", "dog"], [], ValueError, "templates: at least 1"),
    ],
)
def test_bad_texts_are_refused(names, templates, error, match):
    with pytest.raises(error, match=match):
        zero_shot_prototypes(fake_encoder, names, templates)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"logit_scale": 0.0}, "logit_scale: must be positive"),
        ({"logit_scale": float("nan")}, "logit_scale: must be positive"),
        ({"steps": 0}, "steps: an integer >= 1"),
        ({"learning_rate": 0.0}, "learning_rate: must be positive"),
        ({"learning_rate": float("nan")}, "learning_rate: must be positive"),
        ({"keep": 0.0}, "keep: a fraction"),
        ({"keep": 1.5}, "keep: a fraction"),
        ({"reg": -1.0}, "reg: must be >= 0"),
        ({"weight_decay": float("inf")}, "weight_decay: must be >= 0"),
        ({"optimizer": "adam"}, "optimizer: 'adamw' or 'sgd'"),
        ({"penalty": "l1"}, "penalty: 'norm' or 'squared'"),
        ({"predict": "mean"}, "predict: 'confident_mean' or 'original'"),
        ({"side": "audio"}, "side: 'text' or 'image'"),
        ({"side": "image"}, "side: 'image' needs subspace"),
        ({"subspace": Subspace.random(9, 2)}, "subspace: one subspace of R\\^16"),
    ],
    ids=str,
)
def test_bad_options_are_refused(prototypes, options, match):
    with pytest.raises(ValueError, match=match):
        SpectralSteering(prototypes, **{"logit_scale": SCALE, **options})


def test_bad_prototypes_are_refused(prototypes):
    with pytest.raises(ValueError, match="at least 2 classes"):
        SpectralSteering(prototypes[:1], SCALE)
    zero = prototypes.clone()
    zero[3] = 0
    with pytest.raises(ValueError, match="row 3 is zero"):
        SpectralSteering(zero, SCALE)
    zero[3] = torch.nan
    with pytest.raises(ValueError, match="the first is row 3"):
        SpectralSteering(zero, SCALE)
    with pytest.warns(UserWarning, match="nearly flat"):
        SpectralSteering(prototypes, 1.0)


def test_bad_views_are_refused(prototypes, views):
    steering = steer(prototypes)
    with pytest.raises(ValueError, match="expected 16 columns, got 15"):
        steering(views[..., :15])
    with pytest.raises(ValueError, match="expected shape"):
        steering(views[0, 0])
    with pytest.raises(ValueError, match="no empty axis"):
        steering(views[:, :0])
    bad = views.clone()
    bad[2, 3, 4] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinity"):
        steering(bad)
    bad[2, 3] = 0
    with pytest.raises(ValueError, match="zero and has no direction"):
        steering(bad)
    with pytest.raises(ValueError, match="mask: booleans of shape"):
        steering(views, torch.ones(12, 19, dtype=torch.bool))
    with pytest.raises(ValueError, match="at least one view"):
        steering(views, torch.zeros(12, 20, dtype=torch.bool))
    without_first = torch.ones(12, 20, dtype=torch.bool)
    without_first[0, 0] = False
    with pytest.raises(ValueError, match="reads the first view"):
        steer(prototypes, predict="original")(views, without_first)
    with pytest.raises(ValueError, match="views: are on cpu, the prototypes on meta"):
        steering.to("meta")(views)


# ---------------------------------------------------------------- CLIP-like models


class CharacterTokenizer:
    def __call__(self, texts, padding, truncation, max_length, return_tensors):
        rows = [[1, *(2 + ord(c) % 90 for c in text[: max_length - 2]), 99] for text in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [99] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}


class ImageSettings:
    crop_size = {"height": 32, "width": 32}
    image_mean = [0.48, 0.46, 0.41]
    image_std = [0.27, 0.26, 0.28]


class Processor:
    tokenizer = CharacterTokenizer()
    image_processor = ImageSettings()


@pytest.fixture(scope="module")
def clip():
    transformers = pytest.importorskip("transformers", reason="the text extra is not installed")
    text = {"vocab_size": 100, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 77, "eos_token_id": 99, "bos_token_id": 1}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    return transformers.CLIPModel(config).eval()


def test_classifier_on_a_clip_like_model(clip):
    images = [np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8) for i in range(3)]
    classifier = STSClassifier(clip, Processor(), ["cat", "dog", "newt"], views=20, rank=2, keep=0.2)
    probabilities = classifier.predict_proba(images)
    assert probabilities.shape == (3, 3)
    assert torch.equal(probabilities, classifier.predict_proba(images))
    assert classifier.predict(images) == [("cat", "dog", "newt")[i] for i in probabilities.argmax(-1).tolist()]
    assert classifier.steering.logit_scale == pytest.approx(float(clip.logit_scale.detach().exp()))
    views = classifier.encode_views(images)
    assert views.shape == (3, 20, 12)
    pixels = classifier.preprocessing(images[0])[None]
    output = clip.get_image_features(pixel_values=pixels)
    pooled = output if isinstance(output, torch.Tensor) else output.pooler_output
    assert torch.allclose(views[0, 0], pooled[0], atol=1e-5)


def test_class_sets_are_rebuilt_once_each(clip):
    classifier = STSClassifier(clip, Processor(), ["cat", "dog"], views=4, rank=1, keep=0.5)
    first = classifier.steering
    classifier.set_classes(["owl", "dog", "cat"])
    assert classifier.steering.prototypes.shape == (3, 12)
    classifier.set_classes(["cat", "dog"])
    assert classifier.steering is first
    with pytest.raises(ValueError, match="images: at least one"):
        classifier.predict([])


def test_default_rank_rule_is_gavish_donoho(prototypes):
    rule = GavishDonoho(minimum=1)
    expected = rule(torch.linalg.svdvals(prototypes).square().numpy() / 30, 30, 16)
    assert SpectralSteering(prototypes, SCALE).subspace.dim == expected
